"""What the files of the command ``ota`` share: options, how a user's mistake ends, progress bars."""

import errno
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from ota_core.addresses import holds_secret, without_secrets
from ota_core.errors import MomentsError, OtaError
from ota_core.reading import printable, quoted
from tasks.orchestration.prepare import end_in_order

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="What to write; it must not exist yet.", show_default=False)]
Memory = Annotated[str, typer.Option(help="Memory budget, for example 2GiB.")]
MergeMemory = Annotated[str, typer.Option(help="Memory budget of each merge, for example 2GiB.")]
Fetch = Annotated[
    bool, typer.Option("--fetch", help="Download models in S3 into the cache first, instead of reading them there by ranges.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Merge infinite numbers and NaN as they are, instead of refusing them.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Home = Annotated[
    Path | None, typer.Option(help="Folder for caches, artifacts and the embedded MLflow.", show_default="$OTA_HOME or ~/.ota")
]
Artifacts = Annotated[
    str | None,
    typer.Option(help="Root of the artifacts: a folder or s3://….", show_default="$OTA_ARTIFACTS or inside the home folder"),
]


class Commands(TyperGroup):
    """Commands whose help is plain text: rich would take as long to import as everything else together."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without arguments the help is what was asked for: on stdout, with the exit code of a command that did nothing."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit(2)
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Every command, whatever it imports and however it ends."""
        with user_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Name and purpose of every command, whole rather than cut to a line."""
        named = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (one.help or "").split("\n\n")[0]) for name, one in named.items() if one and not one.hidden]
            )


def _without_password(address: str | None) -> str | None:
    if address and holds_secret(address):
        raise typer.BadParameter(
            "it holds a user name, a password or a token, which Prefect would keep; give them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return address


TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow server.", show_default="$MLFLOW_TRACKING_URI or an embedded database", callback=_without_password),
]
IgnoreDifferences = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-differences", metavar="KEY", show_default=False,
        help="A setting of config.json that may differ between the models, such as rope_theta; repeat it for several.",
    ),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as one line of JSON.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file of the merged model, for example 2GB.")]
DataDir = Annotated[str | None, typer.Option(help="Data of a local suite: a folder or s3://….")]
Overlap = Annotated[
    Literal["refuse", "warn"] | None,
    typer.Option(help="Where the two suites share documents, or much of their text.", show_default="refuse"),
]
Limit = Annotated[int | None, typer.Option(help="Documents per task, for a quick look.")]

# What the machine refuses: no space, no permission, a read-only disk. The user can mend it; a traceback would not help.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


# typer brings its own click from one version on; this is the one that its commands raise.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_NO_PATHS = {errno.ENAMETOOLONG, errno.ELOOP}


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake ends with its message and exit code 2, without a traceback. So does what nobody foresaw: its traceback is in a file. SIGTERM ends the
    command in order."""
    end_in_order()
    logging.raiseExceptions = False  # a line that a library fails to write into a log concerns nobody
    try:
        yield
    except (typer.Exit, typer.Abort, _UsageError, BrokenPipeError):
        raise  # who reads the output has gone: click ends the command
    except OtaError as error:
        _end_with(str(error))
    except OSError as error:
        if error.errno in _NO_PATHS:
            _end_with(f"{str(error.filename)[:200]}: {error.strerror}; give another path")
        if error.errno in _REFUSALS:
            _end_with(f"{error.filename or 'the disk'}: {error.strerror}; make room or choose another place")
        raise_unforeseen(error)
    except (RuntimeError, ValueError) as error:
        # What pathlib says of ~nobody, of links in a circle, of NUL and of surrogates.
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            _end_with(f"{quoted(error.object)} holds bytes that are no text in UTF-8; rename that file or folder")
        if str(error).startswith(("Could not determine home", "Symlink loop", "embedded null")):
            _end_with(f"{str(error)[:200]}; give another path")
        raise_unforeseen(error)
    except Exception as error:
        raise_unforeseen(error)


def raise_unforeseen(error: Exception) -> NoReturn:
    """End the command with what is known of an error that is no user's mistake."""
    from tasks.orchestration.prepare import lost_server

    _end_with(lost_server(error) or _unforeseen(error))


def _end_with(message: str) -> NoReturn:
    typer.echo(f"Error: {printable(message)}", err=True)
    raise typer.Exit(2) from None


def _unforeseen(error: Exception) -> str:
    """What is said of an error that no part of the program has foreseen. Its traceback goes to a file in the home folder, or a temporary one."""
    import tempfile
    import traceback

    from tasks.settings import home_folder

    text = without_secrets(f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    first = without_secrets(next(iter(str(error).strip().splitlines()), ""))
    said = f"{type(error).__name__}{f': {first[:200]}' if first else ''}"
    folders: list[Callable[[], Path]] = [lambda: home_folder() / "logs", lambda: Path(tempfile.gettempdir())]
    for find in folders:
        with suppress(OSError, RuntimeError):
            folder = find()
            folder.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(prefix=time.strftime("ota-%Y%m%d-%H%M%S-"), suffix=".log", dir=folder, text=True)
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return f"{said} (this is a fault of the program; the details are in {name}, please report it with that file)"
    return f"{said} (this is a fault of the program, and no file could be written: please report what follows)\n{text}"


def load_numba() -> None:
    """Load what runs the compiled loops, without SciPy and cffi, which take as long to import as all the rest.

    numba can do without either and imports them only to know whether they are there; no loop of this project uses them. A command has no
    other thread yet that might import them at this moment.
    """
    optional = [name for name in ("scipy.linalg.cython_blas", "cffi") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(optional))  # type: ignore[arg-type]  # None says that there is no such module
    try:
        import numba.core.typing.cffi_utils
        import numba.np.arraymath  # noqa: F401
    finally:
        for name in optional:
            del sys.modules[name]


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A function that draws (stage, done, total) as progress bars on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bars:
        known: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            elif done == 0:  # a further pass over the same blocks
                bars.reset(known[what], total=total)
            bars.update(known[what], completed=done, total=total)

        yield report


def show(item: Any) -> None:
    """Text, or anything rich can draw."""
    from rich.console import Console

    Console(soft_wrap=True, width=table_width()).print(item)


def table_width() -> int | None:
    """Characters: the terminal's own width, None; in a log or a file, where nothing limits a line, as wide as tables need."""
    from rich.console import Console

    return None if Console().is_terminal else 200


@contextmanager
def recipe_inputs(
    recipe: Any,
    recipe_file: Path,
    *,
    home: Path | None,
    memory: str,
    fetch: bool,
    optional_moments: bool = False,
    device: str = "cpu",
) -> Iterator[Any]:
    """(every model of a recipe with second moments and digests, notes, what draws progress bars). What lies in S3 is read by ranges, or
    ``fetch``ed first. Second moments are estimated where the recipe asks for it, on the ``device``.

    ``optional_moments``: second moments that lie beside the experts of a merge that needs none are made ready, too.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from ota_core.moments import find_moments, moments_files
    from tasks.merging.inputs import assemble, fetch_all
    from tasks.settings import places
    from tasks.storage.streaming.streams import Streams

    where = places(home)
    options: dict[str, Any] = {"cache": where.cache, "recipe_dir": recipe_file.resolve().parent}
    with progress_bars() as progress, ExitStack() as stack:
        # Gradients are of whole models.
        whole = fetch or recipe.estimates is not None
        streams = None if whole else stack.enter_context(Streams(cache=options["cache"], memory=parse_memory(memory)))
        fetched = fetch_all(recipe, **options, progress=progress, streams=streams)
        estimated = {}
        if recipe.estimates is not None:
            from tasks.evaluation.gradients.job import estimate_jobs

            for i, job in estimate_jobs(recipe, fetched, where, options["recipe_dir"]).items():
                estimated[i] = job.located(job.run(where, pick_device(device), progress), where)
        inputs = assemble(recipe, fetched, **options, streams=streams, estimated=estimated)
        if optional_moments and streams is not None:
            for expert in inputs.experts:
                with suppress(MomentsError):  # the analysis says what is wrong with them
                    if expert.moments is None and (found := find_moments(expert.path)) is not None:
                        streams.settle(moments_files(found))
        yield inputs, streams.notes if streams else [], progress
