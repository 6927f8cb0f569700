"""DeepSpeed's universal format (``ds_to_universal.py``): a folder per parameter with ``exp_avg_sq.pt``, the whole tensor."""

from collections.abc import Sequence
from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.deepspeed.saved import V, beta2_of, mapping, open_saved, step_of
from ota_core.moments.pieces import PiecedMoments, Run

COMMON = "optimizer_state.pt"  # what is not of one parameter: the groups' β₂


class UniversalMoments(PiecedMoments):
    """v by parameter name, each from a file of its own."""

    def __init__(self, folder: Path, paths: Sequence[Path], source_of: SourceOf | None) -> None:
        """``paths``: the parameters' files below ``folder/zero``. Raises MomentsError for what is damaged, or no tensor."""
        files: list[TorchFile] = []
        runs, shapes, steps = {}, {}, {}
        try:
            _check_complete(folder / "zero")
            for path in paths:
                file = open_saved(path, source_of)
                files.append(file)
                name, tensor = path.parent.relative_to(folder / "zero").as_posix(), _tensor(file)
                runs[name], shapes[name] = [Run(file, tensor, 0, tensor.numel)], tensor.shape
                steps[name] = _step(path.with_name("step.pt"))
            super().__init__(folder, files, runs, shapes, steps, _beta2(folder / "zero" / COMMON))
        except BaseException:
            for file in files:
                file.close()
            raise


def _check_complete(zero: Path) -> None:
    """Every parameter has its v beside its weights."""
    lost = sorted(path.parent.name for path in zero.glob("*/fp32.pt") if not path.with_name(f"{V}.pt").is_file())
    if lost:
        raise MomentsError(f"{zero} lacks {V}.pt of {len(lost)} parameters, such as {lost[0]}: fetch the checkpoint again")


def _tensor(file: TorchFile) -> SavedTensor:
    saved = file.saved.get("param") if isinstance(file.saved, dict) else file.saved
    if not (isinstance(saved, SavedTensor) and saved.is_floating_point and saved.contiguous):
        raise MomentsError(f"{file.path} holds no dense float tensor under 'param'; convert the checkpoint again")
    return saved


def _step(path: Path) -> int | None:
    if not path.is_file():
        return None
    file = open_saved(path, None)
    try:
        return step_of(file, file.saved)
    finally:
        file.close()


def _beta2(path: Path) -> float | None:
    if not path.is_file():
        return None
    file = open_saved(path, None)
    try:
        return beta2_of(mapping(file.saved, str(path)).get("param_groups"), str(path))
    finally:
        file.close()
