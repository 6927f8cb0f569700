"""Events that this tool tells a Prefect server, for automations to react to."""

import asyncio

from ota_core.errors import OtaError

EXPERT_ARRIVED = "ota.expert.arrived"
_ATTEMPTS = 2


def expert_arrived(uri: str, capability: str, name: str) -> bool:
    """Tell the server of ``PREFECT_API_URL`` that an expert lies at ``uri``, complete. Returns False where no server is configured.

    The event ``ota.expert.arrived`` has the resource ``ota.expert.<capability>.<name>`` and the payload uri, capability. It has reached the
    server when this returns: ``prefect.events.emit_event`` would queue it and only log that it was lost, so that the client below it is used,
    which waits for the server's answer. Call it outside of an event loop. Raises OtaError when the server does not take the event.
    """
    from prefect.events import Event, get_events_client
    from prefect.settings import PREFECT_API_URL
    from prefect.types import DateTime

    api = PREFECT_API_URL.value()
    if not api:
        return False
    event = Event(
        occurred=DateTime.now("UTC"),
        event=EXPERT_ARRIVED,
        resource={"prefect.resource.id": f"ota.expert.{capability}.{name}", "prefect.resource.name": f"{capability}/{name}"},
        payload={"uri": uri, "capability": capability},
    )

    async def send() -> None:
        async with get_events_client(reconnection_attempts=_ATTEMPTS, checkpoint_every=1) as client:
            await client.emit(event)

    try:
        asyncio.run(send())
    except Exception as error:  # of the network, of the websocket, or what the server says about the login
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OtaError(f"the Prefect server at {api} did not take the event ({reason}); check PREFECT_API_URL") from error
    return True
