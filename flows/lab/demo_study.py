"""The study of the demo's experts, with all that it needs: S3 server, data, base and experts of every seed that the study names."""

from pathlib import Path
from typing import Any

from flows.lab.demo import experts_flow
from flows.study import StudyOutcome, study_flow
from ota_core.errors import RecipeError
from tasks.experiments.study.study import StudyConfig
from tasks.local.demo.steps import BUCKET, base_uri
from tasks.local.s3_server import running_server
from tasks.settings import places

SEED = "seed"


def demo_study(file: str, config: StudyConfig, *, home: Path | None = None, **options: Any) -> StudyOutcome:
    """Run a study of the demo's experts. What was trained before is not trained again. ``options``: those of ``study_flow``.

    Raises RecipeError for a study that names other models, and what the flow raises.
    """
    seeds = [int(seed) for seed in config.replicates.get(SEED, ()) if str(seed).isdigit()]
    if not seeds or [one.base_model for one in config.all_replicates()] != [base_uri(seed) for seed in seeds]:
        raise RecipeError(
            f"study '{config.name}' is not of the demo's experts: expected base_model {base_uri(1).replace('1', '{seed}')} and "
            f"replicates: {{seed: [1, 2, 3]}}, got {config.base_model} and {dict(config.replicates)}; leave --demo out"
        )
    where = places(home)
    with running_server(where.home / "demo" / "s3", buckets=(BUCKET,)):
        for seed in seeds:
            experts_flow(where, seed)
        outcome: StudyOutcome = study_flow(file, home=home, **options)
        return outcome
