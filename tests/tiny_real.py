"""Stand-ins for what the real study fetches: a tiny GGUF model, and corpora of made-up words."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.local.real.corpus import DOMAINS

HIDDEN, LAYERS, HEADS, FEED = 32, 2, 4, 64


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of random float32 weights with a byte-level tokenizer; returns its tensors by GGUF's names."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (FEED, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (HIDDEN, FEED)}
    tensors = {name: 0.1 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_real_corpora(folder: Path, *, documents: int = 20, domains: Sequence[str] = tuple(DOMAINS)) -> Path:
    """Documents of random words in lines, for these domains; different ones in each split."""
    for domain in domains:
        (folder / domain).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rng = random.Random(f"{domain} {split}")
            rows = []
            for i in range(documents):
                words = ["".join(rng.choices("abcdefgh{}", k=rng.randint(2, 9))) for _ in range(60)]
                text = "\n".join(" ".join(words[at : at + 12]) for at in range(0, 60, 12))
                rows.append({"text": text, "source": "made up", "digest": f"{domain}{split}{i}"})
            (folder / domain / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
