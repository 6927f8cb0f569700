"""One part of a merge as a flow of its own, for Prefect workers on other machines. Deployed by deployments/prefect.yaml."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from ota_core.errors import OtaError
from tasks.orchestration.run_log import Progress, for_users
from tasks.parts import Part, run_part


@for_users
@flow(name="part", flow_run_name="{part.name}", persist_result=False)
def part(part: Part) -> State:
    """Compress, survey or merge what the part says; its output goes to the artifacts' root, the message of an error to the parent."""
    try:
        with Progress() as progress:
            ref = run_part(part, progress)
    except OtaError as error:
        return Failed(message=str(error))
    return Completed(message=ref.uri)
