"""A flow that the stack's workers run in a test: says where it runs, then waits."""

import json
import os
import time

from prefect import flow
from prefect.settings import get_current_settings

from tasks.storage import s3

TOLD = ("OTA_HOME", "OTA_ARTIFACTS", "OTA_WORK_POOL", "OTA_GPU_DEPLOYMENT", "PREFECT_HOME", "MLFLOW_TRACKING_URI")


@flow(name="probe", persist_result=False)
def probe(uri: str, seconds: float = 0) -> None:
    """Put what this process was told into S3, as JSON, then stay for so long."""
    told: dict[str, object] = {name: os.environ.get(name) for name in TOLD}
    told |= {"pid": os.getpid(), "heartbeat": get_current_settings().flows.heartbeat_frequency}
    s3.write_bytes(uri, json.dumps(told).encode())
    time.sleep(seconds)
