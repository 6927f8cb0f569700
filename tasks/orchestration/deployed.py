"""Runs of deployments, taken by workers on other machines: start them, wait for them, cancel them with their parent."""

from typing import Any, cast

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from ota_core.errors import OtaError

POLL_SECONDS = 2


def run_deployed(deployment: str, *, name: str, parameters: dict[str, Any], key: str, **options: Any) -> FlowRun:
    """One run of a deployment; the same key gives the same run. ``options``: of Prefect's ``run_deployment``. Raises OtaError."""
    try:
        found = run_deployment(deployment, parameters=parameters, flow_run_name=name, idempotency_key=key, **options)
    except ObjectNotFound:
        raise OtaError(
            f"the Prefect server has no deployment '{deployment}'; create it: prefect --no-prompt deploy --all, in the repository's root, "
            "with deployments/prefect.yaml"
        ) from None
    return cast(FlowRun, found)  # the coroutine that its type also names is for callers that are one


def pool_of(deployment: str) -> str | None:
    """The work pool whose workers run a deployment. None where none does, or the server has no such deployment."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_deployment_by_name(deployment).work_pool_name
    except ObjectNotFound:
        return None


def complaint(name: str, state: Any) -> str:
    """What to say of a run that did not complete."""
    if state.is_failed():
        return f"{name}: {state.message}"
    return f"{name}: its run ended as {state.name} ({state.message or 'no message'}); run again, what is finished is kept"


def cancel_children(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of a flow: cancel the runs below it that other machines have taken or will take, also those below its subflows."""
    with get_client(sync_client=True) as client:
        above = [flow_run.id]
        while above:
            below = _runs_below(client, above)
            for run in below:
                if run.deployment_id and not (run.state and run.state.is_final()):
                    client.set_flow_run_state(run.id, Cancelling(message="the run that it belongs to was cancelled"))
            above = [run.id for run in below]


def _runs_below(client: Any, above: list[Any]) -> list[Any]:
    """The subflow runs of these flow runs; the server gives at most 200 an answer."""
    wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=above))
    found: list[Any] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=200, offset=len(found)):
        found += page
    return found
