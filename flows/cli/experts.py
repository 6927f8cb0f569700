"""The commands about experts: ``ota init`` writes a recipe for some, ``ota push`` publishes one, ``ota harvest`` its second moments alone,
``ota experts`` lists what lies below a prefix."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import AsJson, Home, Memory, load_numba, progress_bars, show
from ota_core.errors import OtaError

Prefix = Annotated[
    str,
    typer.Argument(
        metavar="PREFIX", help="Where experts lie: s3://bucket/prefix, or a folder; experts are <capability>/<name> below it.", show_default=False
    ),
]  # fmt: skip
BaseModel = Annotated[
    str, typer.Option(help="The base that experts are trained from: s3://…, a folder or org/name.", show_default=False)
]


def init(
    experts: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERTS...",
            help="The experts: folders, s3://… or org/name; or a place with <capability>/<name> below it, of which the newest are taken.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="The base that they were trained from, likewise.", show_default="what the experts say")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the recipe goes (YAML).")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
    home: Home = None,
) -> None:
    """Write a commented recipe for EXPERTS that needs no further choice: by their second moments where all have them, else without."""
    from ota_core.artifact import write_text_atomic
    from tasks.experts.draft import draft
    from tasks.settings import places

    if out.is_dir():
        raise OtaError(f"{out} is a folder; name a file such as recipe.yaml with --out")
    if out.exists() and not overwrite:
        raise OtaError(f"{out} exists already; choose another file with --out, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OtaError(f"{out.absolute().parent} does not exist; make it, or choose another file with --out")
    found = draft(experts, base, cache=places(home).cache, recipe_dir=out.resolve().parent)
    write_text_atomic(out, found.text(str(out)))
    for one in found.experts:
        typer.echo(f"{one.name}: {one.source}; second moments: {one.moments if one.compression else 'none'}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{out}: {found.method} of {len(found.experts)} experts from the base {found.base}. What to do next:")
    typer.echo(f"  ota plan {out}    # what it would read and write, and every problem; reads no weights")
    typer.echo(f"  ota run {out}     # merge, benchmark, report")


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The checkpoint's folder; it is only read.", show_default=False)
    ],
    prefix: Prefix,
    capability: Annotated[str, typer.Option(help="What the expert was trained for, such as math.", show_default=False)],
    base_model: BaseModel,
    name: Annotated[str | None, typer.Option(help="The expert's name.", show_default="its time, as 2026-11-24T18-30-05")] = None,
    trained_at: Annotated[
        str | None, typer.Option(help="Date or time of the training, UTC.", show_default="when the model's files were written")
    ] = None,
    without_moments: Annotated[
        bool, typer.Option("--without-moments", help="Push a checkpoint without second moments; OTA and Fisher cannot merge it.")
    ] = False,
) -> None:
    """Publish a trained checkpoint as an expert, expert.json last, and tell the Prefect server that it is there."""
    from tasks.experts.push import push_expert

    with progress_bars() as progress:
        pushed = push_expert(
            folder, prefix, capability=capability, base_model=base_model, name=name, trained_at=trained_at,
            needs_moments=not without_moments, progress=lambda done, total: progress("upload", done, total),
        )  # fmt: skip
    typer.echo(f"{pushed.uri}: {'was there already, with the same content' if pushed.was_there else 'pushed'}")
    typer.echo(f"trained at {pushed.trained_at.isoformat()}")
    typer.echo(_announce(pushed.uri, pushed.capability, pushed.name))


def harvest(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="What training left: a folder, s3://…, org/name, or a file of second moments.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A new folder, s3://…, or org/name on the Hugging Face hub (where no folder org is here).",
            show_default=False,
        ),
    ],
    method: Annotated[str, typer.Option(help="rank1, log8, rank_k or none.")] = "rank1",
    rank: Annotated[int | None, typer.Option(help="Rank of rank_k.", show_default="4")] = None,
    weights: Annotated[
        str | None, typer.Option(help="The weights that they belong to: a folder, s3://… or org/name.", show_default="CHECKPOINT")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that training began with; for the card, and where parameters were frozen.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="What it was trained on, for the card; may be repeated.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence, for the card.", show_default="that of the weights")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of the hub a private one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies there.")] = False,
    memory: Memory = "2GiB",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a small folder of the second moments in CHECKPOINT that can be published: one file, and a card that says of which weights."""
    from tasks.experts.harvest import harvest as run
    from tasks.settings import places

    load_numba()
    with progress_bars() as progress:
        made = run(
            checkpoint, out, cache=places(home).cache, method=method, rank=rank, weights=weights, base=base, data=data or (),
            licence=licence, private=private, overwrite=overwrite, memory=memory, progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(made.model_dump_json())
        return
    for note in made.notes:
        typer.echo(f"note: {note}")
    lost = "" if made.sqrt_error is None else f", relative error of the square root of v {made.sqrt_error:.4f}"
    typer.echo(f"{made.uri}: {made.label}, {made.parameters:,} parameters in {made.bytes:,} bytes{lost}")
    for key, value in made.facts.items():
        typer.echo(f"{key}: {value}")
    typer.echo(f"belongs to the weights {made.weights}")


def _announce(uri: str, capability: str, name: str) -> str:
    """Send the event; say whether it was sent. The expert is there either way, which a failure must not hide."""
    from tasks.orchestration.events import EXPERT_ARRIVED, expert_arrived

    try:
        sent = expert_arrived(uri, capability, name)
    except OtaError as error:
        return f"event {EXPERT_ARRIVED} not sent: {error}. The next nightly run finds the expert all the same"
    if not sent:
        return f"event {EXPERT_ARRIVED} not sent: PREFECT_API_URL names no server. The next nightly run finds the expert all the same"
    return f"event {EXPERT_ARRIVED} sent"


def experts(prefix: Prefix, base_model: BaseModel) -> None:
    """List the experts below PREFIX that were trained from a base, the newest of each capability marked, and what is wrong with others."""
    from tasks.experts.find import find_experts, lineup
    from tasks.pages.tables import Cells
    from tasks.pages.terminal import draw
    from tasks.storage.models import EXPERT_JSON

    found, problems = find_experts(prefix, base_model=base_model)
    if found:
        rows = [
            [capability, one.name, one.trained_at.strftime("%Y-%m-%d %H:%M:%S"), "newest" if i == 0 else ""]
            for capability, several in lineup(found).items()
            for i, one in enumerate(several)
        ]
        show(draw(Cells(["capability", "name", "trained at (UTC)", ""], rows)))
    else:
        typer.echo(f"no complete expert of {base_model}; expected {prefix.rstrip('/')}/<capability>/<name>/{EXPERT_JSON}")
    for one in problems:
        typer.echo(f"problem: {one.capability}/{one.name}: {one.problem}")
