"""A merge to log with made-up scores; shared by the tests of what MLflow is told."""

from typing import Any

from tasks.tracking.merge import ChildRun, InputRef, MergeRun

CAPABILITIES = ("math", "code")


def a_merge(name: str = "ota", **changes: Any) -> MergeRun:
    """A merge of two experts with made-up scores."""
    scores = {"base": (0.2, 0.1), "math-expert": (0.9, 0.1), "code-expert": (0.2, 0.8), name: (0.6, 0.5)}
    roles = {"base": "base", "math-expert": "expert", "code-expert": "expert", name: "merge"}
    own = {"math-expert": "math", "code-expert": "code"}
    children = [
        ChildRun(
            name=model,
            role=roles[model],
            capability=own.get(model),
            digest=f"digest-{model}",
            metrics={f"score/{c}": s for c, s in zip(CAPABILITIES, values, strict=True)} | {"score/avg": sum(values) / 2},
        )
        for model, values in scores.items()
    ]
    table = [
        {"model": m, "role": roles[m], "capability": own.get(m), "math": v[0], "code": v[1], "average": sum(v) / 2}
        for m, v in scores.items()
    ]
    values: dict[str, Any] = {
        "name": name,
        "method": "ota",
        "params": {
            "density": 0.4,
            "power": 0.5,
            "compression": "rank1",
            "base_model": "s3://models/base",
            "experts": "math, code",
        },
        "tags": {"recipe_fingerprint": f"fp-{name}", "prefect_flow_run_id": "flow-1", "git_commit": "abc123"},
        "metrics": {"score/math": 0.6, "score/code": 0.5, "score/avg": 0.55, "retention/math": 0.6 / 0.9, "negative_transfer": 0},
        "recipe_yaml": "merge_method: ota\n",
        "record": {"kind": "merged", "files": {"model.safetensors": 12}},
        "model_uri": f"s3://models/merged/{name}",
        "model_digest": f"digest-{name}",
        "model_card": "---\nlibrary_name: transformers\n---\n\n# A merge\n",
        "inputs": [
            InputRef(name="base", source="s3://models/base", digest="b" * 64, role="base"),
            InputRef(name="math-expert", source="/data/experts/math", digest="m" * 64, role="expert"),
            InputRef(name="code-expert", source="org/code@main", digest="c" * 64, role="expert"),
        ],
        "children": children,
        "table": table,
        "pictures": {"plots/scores.png": b"\x89PNG of the scores"},
    }
    return MergeRun(**(values | changes))
