"""Fixtures of the flows' tests."""

from tests.flows.merge_fixture import counts as counts
from tests.flows.merge_fixture import empty_mlflow as empty_mlflow
from tests.flows.merge_fixture import world as world
from tests.flows.prefect_fixture import prefect_server as prefect_server
