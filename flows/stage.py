"""The door through which a worker of the GPU pool takes jobs. Deployed by deployments/prefect.yaml, sent by tasks/orchestration/executors.py."""

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.benchmark import one_model
from tasks.job import Job
from tasks.orchestration.executors import do_jobs
from tasks.orchestration.run_log import for_users
from tasks.settings import Places


@for_users
@flow(name="stage", persist_result=False)
def stage(jobs: list[Job], where: Places, device: str = "auto") -> State:
    """Merge or benchmark on the machine that takes this run. Outputs go to the artifacts' root, errors' messages to who sent the jobs.

    Trials among them share one loaded model.
    """
    with one_model():
        return do_jobs(jobs, where, device)
