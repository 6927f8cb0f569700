"""What must be set before Prefect is imported."""

import os


def prepare_prefect() -> None:
    """Settings of the temporary server that Prefect starts where PREFECT_API_URL is not set.

    It may take long to start on a busy machine, and it has nobody to report to.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
