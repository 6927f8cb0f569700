"""What the tests of several commands begin with."""

from pathlib import Path

import pytest
import yaml

from tests.ota_core.engine.test_output import llama_experts


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file beside two small experts, whose models are named relative to it."""
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    raw = llama_experts(tmp_path) | {"base_model": "base", "models": [{"model": "expert0"}, {"model": "./expert1"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "recipe.yaml"
