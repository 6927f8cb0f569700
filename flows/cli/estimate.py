"""The command ``ota estimate``."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.common import Artifacts, AsJson, DataDir, Device, Home, Overwrite, load_numba, progress_bars, user_errors
from ota_core.errors import OtaError


def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, s3://…, or org/name.", show_default=False)],
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
    ] = "none",
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
    with user_errors():
        from ota_core.compute.stream import pick_device
        from ota_core.engine import engine
        from ota_core.engine.output import check_free
        from ota_core.recipe.parameters import EstimateSettings
        from tasks.artifacts.store import store_of
        from tasks.evaluation.gradients.job import EstimateJob, Texts
        from tasks.evaluation.subject import fetched_subject
        from tasks.merging.recipes import parse_config
        from tasks.settings import places
        from tasks.storage import models as storage

        if out is None and method != "none":
            raise OtaError(f"--method {method} says how --out is written; give --out, or leave it away")
        if out is not None:
            check_free(out, overwrite=overwrite)
            if out.is_dir():
                raise OtaError(f"{out} is a folder; name a file such as {out / 'exp_avg_sq.safetensors'}")
        given: dict[str, Any] = {
            "data": data, "data_dir": data_dir, "samples": samples, "batch": batch, "max_length": max_length, "clip": _clip(clip),
            "random_tokens": random_tokens, "seed": seed, "dtype": dtype,
        }  # fmt: skip
        settings = parse_config(EstimateSettings, given, "ota estimate", OtaError)
        where, device = places(home, artifacts), pick_device(device)
        with progress_bars() as progress:
            fetched = storage.fetch(model, cache=where.cache, progress=partial(progress, "fetch"))
            start = storage.fetch(base, cache=where.cache, progress=partial(progress, "fetch base")) if base else None
            own = capability or (fetched.expert or {}).get("capability")
            texts = Texts.of(settings, where, name=fetched.path.name, capability=own)
            job = EstimateJob.of(
                fetched_subject(fetched.path.name, "expert", fetched, own),
                start and fetched_subject("base", "base", start),
                settings,
                texts,
            )
            ref = job.run(where, device, progress)
            made = store_of(where).read_record(ref).results
            file = job.located(ref, where).path
            if out is not None:
                from flows.cli.engine import new_file

                load_numba()
                with new_file(out) as temporary:
                    engine.compress_moments(file, temporary, method=method, progress=progress)
        if as_json:
            typer.echo(json.dumps({"path": str(out or file), "fingerprint": ref.fingerprint, **made}))
            return
        clipped = f", {made['clipped_batches']} of them clipped" if settings.clip is not None else ""
        typer.echo(
            f"{made['parameters']:,} parameters in {made['tensors']} tensors; {made['batches']} batches{clipped}; loss {made['loss']:.4f} over "
            f"{made['tokens']:,} tokens, mean norm of the gradient {made['gradient_norm']:.4g}"
        )
        typer.echo(f"{out or file}: second moments, estimated{'' if out is None or method == 'none' else f', {method}'}")


def _clip(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise OtaError(f"--clip: got '{text}', expected a number above 0, or none") from None
