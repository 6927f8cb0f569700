"""Fixtures of the tasks' tests."""

from tests.fixtures.retention import either as either
from tests.fixtures.retention import ground as ground
from tests.fixtures.retention import lived as lived
from tests.fixtures.retention import quick as quick
from tests.fixtures.retention import settled as settled
from tests.fixtures.retention import shop as shop
