"""Fixtures that several rooms share."""

import os

# Before numpy and torch load: two cores are shared by everything that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

pytest_plugins = ["tests.servers", "tests.s3_requests", "tests.s3_proxy"]
