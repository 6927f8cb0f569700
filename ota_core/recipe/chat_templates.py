"""Chat templates that a recipe may name (``chat_template``): how a conversation becomes text, in Jinja, as tokenizers keep it."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token if bos_token is defined and bos_token else '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
MISTRAL = (
    "{% set told = namespace(first='') %}{{ bos_token if bos_token is defined and bos_token else '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set told.first = message['content'] + '\n\n' %}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + (eos_token if eos_token is defined and eos_token else '</s>') }}"
    "{% else %}{{ '[INST] ' + told.first + message['content'] | trim + ' [/INST]' }}{% set told.first = '' %}{% endif %}{% endfor %}"
)
"""A system message stands before the first question: the models know no other place for it."""
EXAONE = (
    "{% if messages and messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}{% for message in messages %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] + ('\n' if message['role'] == 'user' else '[|endofturn|]\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "alpaca": ALPACA, "mistral": MISTRAL, "exaone": EXAONE}
AUTO_TEMPLATE = "auto"


def is_template(given: str) -> bool:
    """Whether this is a template itself, not the name of one."""
    return "{{" in given or "{%" in given
