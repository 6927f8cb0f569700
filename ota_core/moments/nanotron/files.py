"""How nanotron calls its files."""

import re
from pathlib import Path

RANK = re.compile(
    r"optimizer_pp-(?P<pp>\d+)-of-(?P<pps>\d+)(?:_dp-(?P<dp>\d+)-of-(?P<dps>\d+))?_tp-(?P<tp>\d+)-of-(?P<tps>\d+)"
    r"(?:[_-]exp-(?P<exp>\d+)-of-(?P<exps>\d+))?\.pt"
)
FOLDER, CONFIG, MODEL, MODEL_CONFIG, LATEST = "optimizer", "optimizer_config.json", "model", "model_config.json", "latest.txt"


def rank_files(folder: Path) -> list[Path]:
    """Every rank's file."""
    return sorted(path for path in folder.glob("optimizer_pp-*.pt") if RANK.fullmatch(path.name) and path.is_file())
