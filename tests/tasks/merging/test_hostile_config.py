"""A configuration that asks for more than a machine has."""

import json
from pathlib import Path

import pytest

from ota_core.errors import CheckpointError
from tasks.merging.architecture import check_layers


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**7}, {"text_config": {"n_layers": 10**400}}])
def test_ten_million_layers(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="at most 10000 layers"):
        check_layers(tmp_path)
