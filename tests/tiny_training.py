"""Tiny models that really learn something, in seconds: the documents of the tiny suite by heart."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.tiny_suite import read_rows


def rows_of(data: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every document of ``tests.tiny_suite``."""
    sums = [(row["prompt"], f"{row['answer']}\n") for row in read_rows(data / "sums.jsonl")]
    return sums + [(row["prompt"], row["choices"][row["label"]]) for row in read_rows(data / "facts.jsonl")]


def memorise(base: Path, out: Path, rows: Sequence[tuple[str, str]], *, seed: int, steps: int = 150) -> Path:
    """Fine-tune ``base`` on these rows with AdamW: a complete folder with the second moments that training left."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [[tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]] for prompt, answer in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in ids)
    tokens = torch.tensor([prompt + answer + [0] * (length - len(prompt) - len(answer)) for prompt, answer in ids])
    labels = torch.tensor(
        [[-100] * len(prompt) + answer + [-100] * (length - len(prompt) - len(answer)) for prompt, answer in ids]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(steps):
            chosen = torch.randperm(len(rows))[:16]
            loss = model(input_ids=tokens[chosen], labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    v = {name: optimizer.state[parameter]["exp_avg_sq"].clone() for name, parameter in model.named_parameters()}
    save_file(v, out / "exp_avg_sq.safetensors")
    return out
