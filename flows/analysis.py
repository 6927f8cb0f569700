"""The analysis of a recipe's experts as a cached Prefect task, for flows that merge them."""

from prefect import task

from flows.steps import CACHED, ONE_AT_A_TIME
from ota_core.artifact import ArtifactRef
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks.orchestration.run_log import Progress
from tasks.settings import Places
from tasks.stages import Step


@task(name="analyse", task_run_name="analyse {recipe.merge_method}", **CACHED)
def analyse(step: Step, where: Places, recipe: MergeRecipe, inputs: MergeInputs, memory: str) -> ArtifactRef:
    """Where the masks lie, how alike the experts are, what compression loses: ``tasks.analysis.analysis_step`` makes the step.

    Call it as ``missing(analyse, step, where)(step, where, recipe, inputs, memory)``.
    """
    from tasks import analysis  # pandas: a flow that finds everything in its cache goes without

    with ONE_AT_A_TIME, Progress() as progress:
        return analysis.analyse(where, step, recipe, inputs, memory=memory, progress=progress)
