"""The second moments beside every checkpoint of transformers' Trainer, and of the trainers that are made of it."""

import shutil
from pathlib import Path
from typing import Any, Literal

from ota_core.capture.live import LiveMoments
from ota_core.capture.save import EXPERT_JSON, STEM, save_second_moments


class SecondMomentsCallback:
    """Writes v beside each checkpoint that the Trainer saves, and beside the model that stands when the training ends.

    ``Trainer(callbacks=[SecondMomentsCallback(method="rank1")])``, likewise in TRL; ``save_only_model``, FSDP, DeepSpeed and 8-bit optimizers
    are no obstacle. Options are those of ``save_second_moments``. An optimizer that keeps no second moments ends the training at its first
    step, not at its first checkpoint.

    The Trainer calls every callback by the event's name and asks nothing of its class; this one derives from nothing, so that it can be
    imported without transformers.
    """

    def __init__(
        self,
        *,
        method: Literal["none", "rank1"] = "none",
        capability: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """As ``save_second_moments``."""
        self._options: dict[str, Any] = {"method": method, "capability": capability, "base_model": base_model}
        self._seen = False

    def __getattr__(self, event: str) -> Any:
        """Events of no concern, whatever transformers may add."""
        if event.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(f"{type(self).__name__} has no {event}")

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        """After the first step: whether there is anything to keep. Raises MomentsError where there is not."""
        if not self._seen and not getattr(optimizer, "step_was_skipped", False):
            LiveMoments(model, optimizer)
            self._seen = True

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        """The Trainer has saved a checkpoint, and calls this in every process."""
        save_second_moments(model, optimizer, _checkpoint(args, state), **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        """Beside the model that ``trainer.save_model()`` writes; with ``load_best_model_at_end`` that of the best checkpoint."""
        if state.is_hyper_param_search:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            if state.is_world_process_zero:
                best, out = Path(state.best_model_checkpoint), Path(args.output_dir)
                for old in out.glob(f"{STEM}*"):
                    old.unlink()
                for file in [*best.glob(f"{STEM}*"), *best.glob(EXPERT_JSON)]:
                    shutil.copyfile(file, out / file.name)
            return
        save_second_moments(model, optimizer, args.output_dir, **self._options)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder that was saved last: of a search over hyperparameters, which has a folder for each trial, the newest."""
    name = f"checkpoint-{state.global_step}"
    trials = list(Path(args.output_dir).glob(f"*/{name}")) if state.is_hyper_param_search else []
    return max(trials, key=lambda folder: folder.stat().st_mtime, default=Path(args.output_dir) / name)
