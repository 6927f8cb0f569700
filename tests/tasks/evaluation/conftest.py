"""A tiny model, and a suite of a test's own for it."""

from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_llama
from tests.tiny_suite import write_tiny_suite


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """(suite file, data folder)"""
    return write_tiny_suite(tmp_path / "one")
