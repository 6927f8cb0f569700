"""Fixtures of the tasks' tests."""

from tests.retention_fixture import either as either
from tests.retention_fixture import ground as ground
from tests.retention_fixture import lived as lived
from tests.retention_fixture import quick as quick
from tests.retention_fixture import settled as settled
from tests.retention_fixture import shop as shop
