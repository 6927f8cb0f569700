"""Fixtures of the tests of infra/."""

from tests.flows.prefect_fixture import prefect_server as prefect_server
