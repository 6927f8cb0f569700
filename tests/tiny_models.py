"""Small real Llama checkpoints with a tokenizer, made on the spot: complete Hugging Face folders of a few hundred kilobytes.

Import as ``from tests.tiny_models import write_tiny_llama, perturb``.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = ("\n", *(chr(code) for code in range(32, 127)))


def vocabulary(size: int) -> list[str]:
    """The first ``size`` of: special tokens, newline and printable ASCII (100 tokens together), then fillers."""
    tokens = [*SPECIAL, *CHARACTERS]
    return (tokens + [f"<extra_{i}>" for i in range(size - len(tokens))])[:size]


def write_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    """A character-level fast tokenizer: ids are places in ``tokens``; characters outside the vocabulary become <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if tuple(tokens[: len(SPECIAL)]) != SPECIAL or len(set(tokens)) != len(tokens):
        raise ValueError(f"a tiny vocabulary starts with {SPECIAL} and names no token twice, got {list(tokens)}")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    ).save_pretrained(folder)


def write_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    vocab: int | Sequence[str] = 128,
    hidden: int = 16,
    layers: int = 2,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a complete folder (config, generation config, safetensors, tokenizer) and return it.

    ``vocab`` is a size or the tokens themselves (``SPECIAL`` first). ``hidden`` % 4 == 0: two heads, one key-value head.
    ``max_shard_size="20KB"`` gives several shards with an index. Equal arguments give equal weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = vocabulary(vocab) if isinstance(vocab, int) else list(vocab)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.2,  # wide enough that greedy answers vary from prompt to prompt
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder, tokens)
    return folder


def perturb(folder: Path, out: Path, *, seed: int, scale: float = 0.02) -> Path:
    """An "expert" of a base: every weight plus normal noise of standard deviation ``scale``; same dtype and files."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(folder, out)
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            metadata = source.metadata()
            tensors = {name: source.get_tensor(name) for name in sorted(source.keys())}
        noisy = {
            name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        save_file(noisy, path, metadata=metadata)
    return out


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json in place, for tests of contradictory checkpoints."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))
