"""Every optimizer whose state holds a v, by the name of its parameters and exactly; every other is refused with the true reason.

States that the real libraries wrote lie in tests/fixtures/optimizers. Where a library is installed, it makes its state again.
"""

import fractions
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments import Moments, ParameterLayout, open_moments
from ota_core.moments.base import Stored, View
from ota_core.moments.compression import RankOneMoments, kept_as_trained
from ota_core.moments.trainer.kinds import NoSecondMoment, second_moment
from ota_core.moments.trainer.stored import Coded
from tests.fixtures.optimizers.make import HERE, READ, REFUSED, STEPS
from tests.ota_core.files.test_byte_source import elsewhere

BETA2 = {"kept/rmsprop": 0.95, "kept/stable_adamw": 0.99} | {
    name: 1 - STEPS**-0.8 for name in READ if name.startswith("kept/adafactor")
}
REASONS = {
    "refused/lion": "is Lion's, which keeps a momentum",
    "refused/bnb_lion8bit": "state1 and no state2: .*the file does not tell which",
    "refused/sgd": "has an empty state: SGD without momentum keeps none",
    "refused/sgd_momentum": "is SGD's, which keeps a momentum",
    "refused/schedulefree_sgd": "is that of schedule-free SGD",
    "refused/adagrad": "is Adagrad's, which adds squared gradients up",
    "refused/muon": "is Muon's, which keeps a momentum",
    "refused/galore": "has a projector: GaLore and APOLLO",
    "refused/apollo": "has a projector: GaLore and APOLLO",
    "refused/layerwise": "is the stand-in that the Trainer saves of layer-wise optimizers",
    "refused/lomo": "has an empty state: LOMO keeps none, and AdaLomo keeps its own outside",
}


def layout_of(v: dict[str, torch.Tensor]) -> ParameterLayout:
    return ParameterLayout(shapes={name: tuple(tensor.shape) for name, tensor in v.items()}, decayed=frozenset(v))


def in_order(name: str, v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors sorts names; the optimizer had the order of the model."""
    return {key: v[key] for key in ("embed", "q", "o", "norm", "experts") if key in v}


def assert_equal(moments: Moments, name: str, v: dict[str, torch.Tensor]) -> None:
    assert {key: tuple(tensor.shape) for key, tensor in v.items()} == moments.shapes()
    for key, tensor in v.items():
        rows, cols = matrix_shape(tensor.shape)
        want = tensor.reshape(rows, cols).numpy()
        assert want.max() > 0
        for a, b in ((0, rows), (1, rows - 1), (rows // 2, rows // 2 + 1), (rows - 1, rows), (2, 2)):
            moments.prefetch(key, a, b)
            got = moments.read(key, a, b)
            assert got.dtype == np.float32 and got.shape == (b - a, cols)
            if isinstance(moments, RankOneMoments) and len(tensor.shape) > 1:
                np.testing.assert_allclose(got, want[a:b], rtol=5e-7)
            else:
                assert np.array_equal(got, want[a:b]), (key, a, b)
    assert moments.beta2 == pytest.approx(BETA2.get(name, 0.999), rel=1e-12)
    assert moments.unbiased == name.startswith(("kept/adafactor", "kept/stable"))
    steps = {key: moments.step(key) for key in v}
    if name == "kept/unequal_steps":
        assert steps == {"embed": STEPS + 1, "q": STEPS, "norm": STEPS, "experts": STEPS + 1}
    else:
        assert set(steps.values()) == {STEPS}


@pytest.mark.parametrize("name", READ)
def test_a_state_that_a_real_optimizer_wrote_gives_its_v(name: str) -> None:
    v = in_order(name, load_file(HERE / f"{name}.safetensors"))
    moments = open_moments(HERE / f"{name}.pt", layout=layout_of(v))
    assert_equal(moments, name, v)
    moments.close()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", READ)
def test_v_is_that_of_the_live_optimizer(name: str, legacy: bool, tmp_path: Path) -> None:
    library, make = READ[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (extra 'trainers')")
    if legacy and name == "torchao/adamw_fp8":
        pytest.skip("torch cannot load float8 from its old format")
    state, v = make()
    torch.save(state, tmp_path / "optimizer.bin", _use_new_zipfile_serialization=not legacy)
    assert_equal(open_moments(tmp_path / "optimizer.bin", layout=layout_of(v)), name, v)


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_v_is_refused_with_the_true_reason(name: str) -> None:
    with pytest.raises(MomentsError, match=rf"{name}\.pt:? .*{REASONS[name]}.*ota estimate MODEL --data FILE --samples 256"):
        open_moments(HERE / f"{name}.pt")


@pytest.mark.parametrize("name", REFUSED)
def test_the_refused_state_is_that_of_the_live_optimizer(name: str, tmp_path: Path) -> None:
    library, make = REFUSED[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (extra 'trainers')")
    torch.save(make()[0], tmp_path / "optimizer.pt")
    with pytest.raises(MomentsError, match=REASONS[name]):
        open_moments(tmp_path / "optimizer.pt")


def entry_of(name: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A bitsandbytes state and the quantised part of one parameter, to be damaged."""
    state = torch.load(HERE / f"{name}.pt", weights_only=True)
    entry = state["state"][number]
    return state, entry.get("__bnb_optimizer_quant_state__", entry)


def refusal(state: Any, folder: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    torch.save(state, folder / "optimizer.pt")
    layout = ParameterLayout(shapes=shapes, decayed=frozenset()) if shapes else None
    with pytest.raises(MomentsError) as error:
        open_moments(folder / "optimizer.pt", layout=layout)
    return str(error.value)


def test_codes_that_do_not_fit_their_scales_are_refused(tmp_path: Path) -> None:
    state, entry = entry_of("bitsandbytes/adamw8bit", 0)
    entry["absmax2"] = entry["absmax2"][:17].clone()
    assert "17 scales absmax2 for 5120 codes; no block size gives that" in refusal(state, tmp_path)
    entry["absmax2"], entry["qmap2"] = torch.ones(20), torch.ones(255)
    assert "not the 256 values qmap2" in refusal(state, tmp_path)
    state, entry = entry_of("bitsandbytes/adamw8bit", 0)
    entry["max2"] = entry.pop("absmax2")[:1]
    assert "one scale for the whole tensor (block_wise=False" in refusal(state, tmp_path)
    state, entry = entry_of("bitsandbytes/adamw8bit", 0)
    entry["state2"] = entry["state2"].T
    assert "transposed state2" in refusal(state, tmp_path)


@pytest.mark.parametrize("block", [256, 2048])
def test_the_block_size_comes_from_the_number_of_scales(tmp_path: Path, block: int) -> None:
    state, entry = entry_of("bitsandbytes/adamw8bit_flat", 1)
    blocks = -(-67 * 64 // block)
    entry["absmax2"] = torch.arange(1, blocks + 1) / 7
    kept = {"state": {1: state["state"][1]}, "param_groups": [{"params": [1], "param_names": ["q"]}]}
    torch.save(kept, tmp_path / "optimizer.pt")
    codes = entry["state2"].reshape(-1).long()
    want = entry["qmap2"][codes] * entry["absmax2"][torch.arange(codes.numel()) // block]
    assert np.array_equal(open_moments(tmp_path / "optimizer.pt").read("q", 0, 67), want.reshape(67, 64))


@pytest.mark.parametrize(
    "change",
    [
        {"scale": SavedTensor("float32", "0", 7, 0, (7,), (1,))},
        {"scale": SavedTensor("float32", "0", 0, 0, (0,), (1,))},
        {"scale": 3},
        {"codes": SavedTensor("uint8", "0", 9, 0, (9,), (1,))},
        {"codes": SavedTensor("float32", "0", 80 * 64, 0, (80, 64), (64, 1))},
        {"qmap": SavedTensor("float32", "0", 17, 0, (17,), (1,))},
        {"qmap": SavedTensor("float32", "0", 16, 0, (16,), (1,))},
        {"qmap": None},
    ],
)
def test_a_tensor_subclass_with_parts_that_do_not_fit_is_refused(change: dict[str, Any]) -> None:
    tensor = TorchFile(HERE / "torchao/adamw8bit.pt").saved["state"][0]["exp_avg_sq"]
    assert isinstance(second_moment({"exp_avg_sq": tensor}, {}), Coded)
    tensor.parts.update(change)
    with pytest.raises(
        NoSecondMoment, match=r"shape \[80, 64\] as a OptimState8bit whose codes, scales and table of values do not fit"
    ):
        second_moment({"exp_avg_sq": tensor}, {})


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_beside_the_known_ones_stay_refused_and_are_named(tmp_path: Path, zipped: bool) -> None:
    state = torch.load(HERE / "kept/amsgrad.pt", weights_only=True) | {"when": fractions.Fraction(1, 3)}
    torch.save(state, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(MomentsError, match=r"fractions\.Fraction.* refused because loading it could run code"):
        open_moments(tmp_path / "optimizer.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_tensor_that_exceeds_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"state": {"w": {"exp_avg_sq": torch.rand(4, 7)}}, "param_groups": [{"params": ["w"]}]}, tmp_path / "optimizer.pt")
    whole = (tmp_path / "optimizer.pt").read_bytes()
    assert whole.count(b"K\x04K\x07\x86") == 1  # the shape in the pickle
    (tmp_path / "optimizer.pt").write_bytes(whole.replace(b"K\x04K\x07\x86", b"K\x40K\x07\x86"))
    with pytest.raises(MomentsError, match=r"shape \[64, 7\] reaches to byte 1792 of its storage, which has 112 bytes.*damaged"):
        open_moments(tmp_path / "optimizer.pt")


@pytest.mark.parametrize("value", [float("nan"), -1e-9, float("inf"), 3e38])
def test_bad_means_of_an_adafactor_are_refused(tmp_path: Path, value: float) -> None:
    state = torch.load(HERE / "kept/adafactor_transformers.pt", weights_only=True)
    state["state"][0]["exp_avg_sq_row"][3] = value
    v = in_order("", load_file(HERE / "kept/adafactor_transformers.safetensors"))
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(MomentsError, match=r"the second moment of 'embed#row' is .* at index \[3\], a finite value"):
        open_moments(tmp_path / "optimizer.pt", layout=layout_of(v))


def test_means_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    state = torch.load(HERE / "kept/adafactor_transformers.pt", weights_only=True)
    state["state"][3]["exp_avg_sq_col"] = torch.ones(3, 4)
    assert "of the shapes [2, 3] and [3, 4], which do not fit together" in refusal(state, tmp_path)
    state = torch.load(HERE / "kept/adafactor_torch.pt", weights_only=True)
    state["state"][3]["row_var"] = torch.ones(2, 3)
    assert "of the shapes [2, 3] and [2, 1, 4], which do not fit together" in refusal(state, tmp_path)
    state = torch.load(HERE / "kept/adafactor_transformers.pt", weights_only=True)
    state["state"][0] = {"step": 4, "exp_avg_sq": torch.ones(6, 5)}
    shapes = {"embed": (6, 5), "q": (5, 5), "norm": (5,), "experts": (2, 3, 4)}
    assert "'embed' of the shape [6, 5] has a full second moment while others have row and column means" in refusal(
        state, tmp_path, shapes
    )


def test_different_decays_are_refused(tmp_path: Path) -> None:
    state = torch.load(HERE / "kept/adafactor_transformers.pt", weights_only=True)
    group = state["param_groups"][0]
    state["param_groups"] = [{**group, "params": [0, 1]}, {**group, "params": [2, 3], "decay_rate": -0.9}]
    for part, names in zip(state["param_groups"], (["embed", "q"], ["norm", "experts"]), strict=True):
        part["param_names"] = names
    assert "different decays of β₂ (-0.9, -0.8)" in refusal(state, tmp_path)


@pytest.mark.parametrize("name", ["bitsandbytes/adamw8bit", "torchao/adamw4bit", "torchao/adamw_fp8", "kept/adafactor_torch"])
def test_v_comes_from_the_source_in_the_ranges_that_are_asked(tmp_path: Path, name: str) -> None:
    v = in_order(name, load_file(HERE / f"{name}.safetensors"))
    path = tmp_path / "optimizer.pt"
    path.write_bytes((HERE / f"{name}.pt").read_bytes())
    sources = elsewhere(path)
    moments = open_moments(path, layout=layout_of(v), source_of=sources.get)
    if name != "kept/adafactor_torch":
        sources[path].reads.clear()
        moments.prefetch("embed", 8, 12)  # 256 elements from element 512 on: one block of 256, or two of 128
        hinted = set(sources[path].hints)
        moments.read("embed", 8, 12)
        codes = 128 if "4bit" in name else 256
        sizes = sorted(stop - start for start, stop in hinted)
        assert hinted <= set(sources[path].reads) and sizes == sorted([codes, 8 if "4bit" in name else 4])
        assert sum(stop - start for start, stop in sources[path].reads) <= sum(sizes) + 1024, (
            "the table of values, and nothing else"
        )
    moments.prefetch("embed", 79, 90)  # the next block may not exist
    assert_equal(moments, name, v)


@pytest.mark.parametrize(
    ("name", "share"),
    [("bitsandbytes/adamw8bit", 0.5), ("torchao/adamw8bit", 0.5), ("torchao/adamw4bit", 0.3), ("kept/amsgrad", 1)],
)
def test_the_bytes_that_are_counted_are_those_that_are_read(tmp_path: Path, name: str, share: float) -> None:
    v = in_order(name, load_file(HERE / f"{name}.safetensors"))
    path = tmp_path / "optimizer.pt"
    path.write_bytes((HERE / f"{name}.pt").read_bytes())
    sources = elsewhere(path)
    moments = open_moments(path, layout=layout_of(v), source_of=sources.get)
    for key, tensor in v.items():
        sources[path].reads.clear()
        moments.read(key, 0, matrix_shape(tensor.shape)[0])
        assert sum(stop - start for start, stop in sources[path].reads) == moments.stored_bytes(key) <= 4 * tensor.numel()
    assert moments.stored_bytes("embed") <= share * 4 * v["embed"].numel()


def adafactor_with(stored: dict[str, Stored]) -> tuple[Moments, Moments]:
    """An Adafactor's moments by the names of its parameters, and by those of a checkpoint that is laid out in another way."""
    v = in_order("kept/adafactor_transformers", load_file(HERE / "kept/adafactor_transformers.safetensors"))
    path, plain = HERE / "kept/adafactor_transformers.pt", layout_of(v)
    names = {*v, *stored}
    return open_moments(path, layout=plain), open_moments(path, layout=replace(plain, stored=stored), tensors=names)


def test_means_of_an_adafactor_are_split_as_its_parameters_are() -> None:
    whole = open_moments(
        HERE / "kept/adafactor_transformers.pt",
        layout=layout_of(in_order("", load_file(HERE / "kept/adafactor_transformers.safetensors"))),
    )
    count, height, width = whole.shapes()["experts"]
    rows, cols = whole.shapes()["embed"]
    size = height * width
    stored = {
        "e0.all": Stored((height, width), (View("experts", 0, (height, width), (width, 1)),)),
        "e1.flat": Stored((height, width), (View("experts", size, (size,), (1,)),)),
        "e1.turned": Stored((width, height), (View("experts", size, (width, height), (1, width)),)),
        "e1.second_rows": Stored((height // 2, width), (View("experts", size + width, (height // 2, width), (2 * width, 1)),)),
        "both.odd_columns": Stored(
            (count, height, width // 2), (View("experts", 1, (count, height, width // 2), (size, width, 2)),)
        ),
        "top": Stored((rows // 2, cols), (View("embed", 0, (rows // 2 * cols,), (1,)),)),
        "bottom": Stored((rows - rows // 2, cols), (View("embed", rows // 2 * cols, (rows - rows // 2, cols), (cols, 1)),)),
        "norm.new": Stored((whole.shapes()["norm"]), (View("norm", 0, whole.shapes()["norm"], (1,)),)),
    }
    before, after = adafactor_with(stored)
    assert after.shapes().keys() == {*stored, *(before.shapes().keys() - {"experts", "embed", "norm"})}
    assert kept_as_trained(after) and after.unbiased and after.beta2 == before.beta2
    for name, one in stored.items():
        view = one.views[0]
        held = np.ascontiguousarray(before.read(view.parameter, 0, matrix_shape(before.shapes()[view.parameter])[0])).reshape(-1)
        want = np.lib.stride_tricks.as_strided(held[view.offset :], view.shape, [4 * s for s in view.strides]).reshape(
            matrix_shape(one.shape)
        )
        np.testing.assert_allclose(after.read(name, 0, want.shape[0]), want, rtol=1e-6)
        assert after.step(name) == STEPS


def test_what_is_put_together_of_factored_parameters_is_refused() -> None:
    fused = Stored((11, 5), (View("q", 0, (5, 5), (5, 1)), View("embed", 0, (6, 5), (5, 1))))
    with pytest.raises(
        MomentsError, match=r"'qe' of the checkpoint is put together from 2 parts of embed, q; Adafactor keeps the means"
    ):
        adafactor_with({"qe": fused})
    diagonal = {"d": Stored((2, 2), (View("q", 0, (2, 2), (6, 12)),))}
    with pytest.raises(MomentsError, match=r"'d' of the checkpoint runs over 'q' in neither its rows nor its columns"):
        adafactor_with(diagonal)
