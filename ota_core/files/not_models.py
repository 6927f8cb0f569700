"""Folders that people take for a model and that are none, by their files: what each is, and the command that makes a model of it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ota_core.errors import CheckpointError
from ota_core.files.safetensors_io import TensorInfo

SHOWN = 3


def what_it_is(folder: Path) -> str | None:
    """What a folder without a model's weights holds instead, to be read after its name; None where nothing is known of it."""
    names = sorted(path.name for path in folder.iterdir())
    return next((said for look in _LOOKS if (said := look(folder, names))), None)


def check_gathered(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError where weights are the empty placeholders that DeepSpeed's ZeRO-3 leaves of parameters it holds in shards."""
    empty = [name for name, info in infos.items() if info.shape == (0,) and info.dtype.is_floating_point]
    if empty:
        more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        raise CheckpointError(
            f"{folder}: {len(empty)} of {len(infos)} tensors have the shape [0] ({', '.join(empty[:SHOWN])}{more}): empty placeholders of "
            "DeepSpeed's ZeRO-3, whose parameters lay in shards when it was saved. Train with stage3_gather_16bit_weights_on_model_save: true, or "
            f"gather a checkpoint's shards: python zero_to_fp32.py CHECKPOINT {folder.name}-whole --safe_serialization"
        )


def _deepspeed(folder: Path, names: list[str]) -> str | None:
    steps = [name for name in names if name.startswith("global_step") and (folder / name).is_dir()]
    if not steps and not any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names):
        return None
    return (
        "holds DeepSpeed's shards of a training run, not a whole model; gather them first: python zero_to_fp32.py "
        f"{folder.name} {folder.name}-whole --safe_serialization, and copy config.json and the tokenizer there"
    )


def _distributed(folder: Path, names: list[str]) -> str | None:
    if not any(folder.glob("*.distcp")) and not any(folder.glob("*/*.distcp")):
        return None
    return (
        "holds shards of PyTorch's distributed checkpoints without a model's weights among them (an optimizer's alone?); take the folder that "
        "has pytorch_model_fsdp_0/, or gather the shards: accelerate merge-weights pytorch_model_fsdp_0 OUT"
    )


def _run(folder: Path, names: list[str]) -> str | None:
    steps = sorted((name for name in names if _is_step(folder / name)), key=lambda name: int(name.rpartition("-")[2]))
    if not steps:
        return None
    return f"is the folder of a training run; name one of its checkpoints, such as {folder / steps[-1]}"


def _is_step(path: Path) -> bool:
    head, _, step = path.name.rpartition("-")
    return head == "checkpoint" and step.isdigit() and path.is_dir()


def _cache(folder: Path, names: list[str]) -> str | None:
    snapshots = sorted((folder / "snapshots").iterdir()) if (folder / "snapshots").is_dir() else []
    if "refs" not in names or not snapshots:
        return None
    return f"is a model's folder in the cache of Hugging Face, which keeps each revision apart; name {snapshots[-1]}"


def _training_only(folder: Path, names: list[str]) -> str | None:
    held = [
        name
        for name in names
        if name in {"optimizer.pt", "optimizer.bin", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    ]
    if not held:
        return None
    return (
        f"holds the state of a training run ({', '.join(held)}) and no weights: save_only_model was set the other way round, or the weights lie in "
        "another folder; name that one, and this one as preconditioner_path"
    )


def _elsewhere(folder: Path, names: list[str]) -> str | None:
    """Formats of other programs, each with the program that converts it."""
    for ending, what, command in _FORMATS:
        if held := [name for name in names if name.endswith(ending)]:
            return f"holds {what} ({', '.join(held[:SHOWN])}), not a model of transformers; {command.format(name=folder.name)}"
    return None


def _pipeline(folder: Path, names: list[str]) -> str | None:
    if "model_index.json" not in names:
        return None
    parts = [name for name in names if (folder / name / "config.json").is_file()]
    return f"is a pipeline of diffusers, not one model; name one of its parts ({', '.join(parts) or 'none is here'})"


def _unfinished(folder: Path, names: list[str]) -> str | None:
    if not any(folder.glob("**/*.incomplete")):
        return None
    return "is a download that did not finish (*.incomplete); fetch the model again"


_FORMATS = (
    (".pth", "weights as their author trains them", "convert them: python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir "
     "{name} --output_dir {name}-hf (for Llama), or take the model's Hugging Face edition"),
    (".h5", "weights of TensorFlow", "save them with transformers 4: AutoModelForCausalLM.from_pretrained({name!r}, from_tf=True).save_pretrained(…)"),
    (".msgpack", "weights of Flax", "save them with transformers 4: AutoModelForCausalLM.from_pretrained({name!r}, from_flax=True).save_pretrained(…)"),
    (".onnx", "a graph for ONNX", "take the model that it was exported from"),
    (".nemo", "an archive of NeMo", "convert it with NeMo's script scripts/checkpoint_converters/convert_<model>_nemo_to_hf.py"),
    (".npz", "arrays of NumPy, as MLX once saved them", "take the model's Hugging Face edition"),
)  # fmt: skip

_LOOKS: tuple[Callable[[Path, list[str]], str | None], ...] = (
    _unfinished, _cache, _deepspeed, _distributed, _run, _pipeline, _elsewhere, _training_only,
)  # fmt: skip
