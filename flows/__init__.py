"""Prefect flows and the command line."""

from tasks.orchestration.prepare import exempt_loopback

exempt_loopback()
