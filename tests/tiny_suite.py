"""A small benchmark suite with local lm-eval task files and local data, written on the spot; needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.evaluation.suites import Suite, load_suite

SUITE = """
name: tiny
include_path: tiny
capabilities:
  math: {tasks: [{task: tiny_sums, metric: exact_match}]}
  knowledge: {tasks: [{task: tiny_facts, metric: acc}]}
"""

SUMS = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: "{data}/sums.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

FACTS = """
task: tiny_facts
dataset_path: json
dataset_kwargs: {data_files: {test: "{data}/facts.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """A JSONL file with one document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def edited(path: Path, *replacements: tuple[str, str]) -> Suite:
    """The suite after text replacements in its file; every text must occur."""
    text = path.read_text()
    for old, new in replacements:
        assert old in text, f"{path} does not hold {old!r}"
        text = text.replace(old, new)
    path.write_text(text)
    return load_suite(str(path))


def write_tiny_suite(folder: Path, *, n: int = 12) -> tuple[Path, Path]:
    """(suite file, data folder). Capabilities math (generation) and knowledge (four choices), ``n`` documents each."""
    tasks, data = folder / "tiny", folder / "data"
    tasks.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(SUITE)
    (tasks / "sums.yaml").write_text(SUMS)
    (tasks / "facts.yaml").write_text(FACTS)
    write_rows(data / "sums.jsonl", [{"prompt": f"Q: {i}+{2 * i}=\nA:", "answer": f"{3 * i}"} for i in range(n)])
    write_rows(
        data / "facts.jsonl",
        [{"prompt": f"The code of {i:02d} is ", "choices": ["ab", "cd", "ef", "gh"], "label": i % 4} for i in range(n)],
    )
    return folder / "tiny.yaml", data
