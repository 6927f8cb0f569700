"""The command ``ota estimate``."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.common import Artifacts, AsJson, DataDir, Device, Home, Overwrite, load_numba, progress_bars
from flows.cli.engine import agreement, said_of
from ota_core.errors import MomentsError, OtaError


def estimate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint folder, s3://…, org/name, or base+adapter.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Texts: JSON lines with text, messages, or prompt and completion; plain text; or a suite.", show_default=False
        ),
    ] = None,
    data_dir: DataDir = None,
    capability: Annotated[
        str | None, typer.Option(help="Of a suite, whose documents.", show_default="that of expert.json")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents.")] = 256,
    batch: Annotated[int, typer.Option(help="Documents of a batch, as in training.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a document at most.")] = 512,
    clip: Annotated[
        str,
        typer.Option(
            help="Largest norm of a batch's gradient, as in training (Trainer: 1.0), or none. A number takes 5/3 of the time."
        ),
    ] = "1.0",
    points: Annotated[
        int, typer.Option(help="Points on the way from --base to MODEL, MODEL the last of them, that share the batches.")
    ] = 1,
    random_tokens: Annotated[bool, typer.Option("--random-tokens", help="Random tokens, where there are no texts.")] = False,
    seed: Annotated[int, typer.Option(help="Decides which documents are taken.")] = 0,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the model in memory.", show_default="as it is stored"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base model: what training left as it is there has no second moments.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, such as MODEL/exp_avg_sq.safetensors.", show_default="among the artifacts alone"),
    ] = None,
    method: Annotated[Literal["none", "rank1", "log8"], typer.Option(help="Compression of --out.")] = "none",
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Compare with the second moments that MODEL holds, by saliency and FFG mask; needs --base."
        ),
    ] = False,
    density: Annotated[float, typer.Option(help="Density of the compared masks.")] = 0.4,
    device: Device = "auto",
    overwrite: Overwrite = False,
    home: Home = None,
    artifacts: Artifacts = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the second moments of MODEL where training kept none: the mean squared gradient of its loss over documents, in one pass.

    Takes the memory of the model, of one layer's gradients, of a batch's activations, and 4 bytes a parameter. What was estimated alike before
    is found; a run that was killed is gone on with. Estimate all experts of a merge with the same settings.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from ota_core.engine import engine
    from ota_core.files.place import new_file
    from ota_core.moments import find_moments, none_found
    from ota_core.plan.inputs import expert_name
    from ota_core.plan.vocabulary.match import names_in
    from ota_core.recipe.estimate import EstimateSettings
    from tasks.artifacts.store import store_of
    from tasks.evaluation.gradients.job import EstimateJob, Texts
    from tasks.merging.architecture import parameter_layout
    from tasks.merging.composed import one_model
    from tasks.merging.recipes import parse_config
    from tasks.settings import places
    from tasks.storage import models as storage

    with progress_bars() as progress:
        _check(out, method, overwrite=overwrite, compare=compare, base=base, density=density)
        given: dict[str, Any] = {
            "data": data, "data_dir": data_dir, "samples": samples, "batch": batch, "max_length": max_length, "clip": _clip(clip),
            "points": points, "random_tokens": random_tokens, "seed": seed, "dtype": dtype,
        }  # fmt: skip
        settings = parse_config(EstimateSettings, given, "ota estimate", OtaError)
        where, device = places(home, artifacts), pick_device(device)
        bring = partial(storage.fetch, cache=where.cache, progress=partial(progress, "fetch"))
        start = one_model(base, bring) if base else None
        fetched = one_model(model, bring, start)
        kept = find_moments(fetched.path) if compare else None
        if compare and kept is None:
            raise MomentsError(f"--compare: {none_found(model)}")
        own = capability or (fetched.expert or {}).get("capability")
        name = expert_name(model, own, None)
        texts = Texts.of(settings, where, name=name, capability=own)
        job = EstimateJob.of(fetched, start, settings, texts, name=name, capability=own)
        ref = job.run(where, device, progress)
        made, file = store_of(where).read_record(ref).results, job.located(ref, where).path
        names: dict[str, Any] = {"layout": partial(parameter_layout, fetched.path), "tensors": names_in(fetched.path)}
        if out is not None:
            load_numba()
            with new_file(out, overwrite=overwrite) as temporary:
                engine.compress_moments(file, temporary, method=method, progress=progress, **names)
        agreed = None
        if kept is not None and start is not None:
            names["layout"] = partial(parameter_layout, fetched.path, start.path)
            budget = parse_memory("2GiB")
            agreed = agreement(kept, file, fetched.path, start.path, density=density, memory=budget, progress=progress, **names)
    if as_json:
        compared = None if agreed is None else {"spearman": agreed.spearman, "jaccard": agreed.jaccard}
        typer.echo(json.dumps({"path": str(out or file), "fingerprint": ref.fingerprint, **made, "agreement": compared}))
        return
    clipped = f", {made['clipped_batches']} of them clipped" if settings.clip is not None else ""
    typer.echo(
        f"{made['parameters']:,} parameters in {made['tensors']} tensors; {made['batches']} batches{clipped}; loss {made['loss']:.4f} over "
        f"{made['tokens']:,} tokens, mean norm of the gradient {made['gradient_norm']:.4g}"
    )
    typer.echo(f"{out or file}: second moments, estimated{'' if out is None or method == 'none' else f', {method}'}")
    if agreed is not None:
        typer.echo(said_of(agreed, "the second moments from training"))


def _check(out: Path | None, method: str, *, overwrite: bool, compare: bool, base: str | None, density: float) -> None:
    """Raises OtaError for options that do not go together, and for an output that is there."""
    from ota_core.files.place import check_file

    if out is None and method != "none":
        raise OtaError(f"--method {method} says how --out is written; give --out, or leave it away")
    if compare and base is None:
        raise OtaError("--compare is by what training changed; name the base model with --base")
    if not 0 < density <= 1:
        raise OtaError(f"density: got {density}, expected a number in (0, 1]")
    if out is not None:
        check_file(out, overwrite=overwrite)


def _clip(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise OtaError(f"--clip: got '{text}', expected a number above 0, or none") from None
