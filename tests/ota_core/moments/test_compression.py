"""What holds for every compression: files, cuts, threads, bad values, and merges that see exactly what the files hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ota_core.compute.blocks import matrix_shape
from ota_core.compute.stream import Stream
from ota_core.engine import engine
from ota_core.errors import MomentsError, OtaError
from ota_core.moments import Moments, compression, open_moments
from ota_core.moments.compression import compress, compressed_bytes, open_compressed, passes, save_compressed, write_compressed
from ota_core.moments.compression import cuts as cuts_module
from ota_core.plan.inputs import resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests import reference
from tests.checkpoints import SHAPES, assert_merged, ota_recipe, random_base, random_experts

CHOICES: list[dict[str, Any]] = [{"method": "rank1"}, {"method": "log8"}, {"method": "rank_k", "rank": 1}, {"method": "rank_k", "rank": 3}]  # fmt: skip
# Wide enough for factors to be smaller, no size divisible by a block of 256, a stack, vectors, a single element, an empty row of zeros.
FORMS = {"wide": (37, 61), "stack": (3, 21, 30), "tall": (300, 7), "vector": (517,), "one": (1,), "row": (1, 40)}


def realistic(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Row and column scales lognormal, times squares of normal noise; 5 % zeros, and a row and a column of zeros."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=shape) ** 2 * 1e-12
    if len(shape) > 1:
        v = v * np.exp(rng.normal(size=(*shape[:-1], 1))) * np.exp(rng.normal(size=(*shape[:-2], 1, shape[-1])))
        v[..., -1, :] = 0 if shape[-2] > 1 else v[..., -1, :]
        v[..., 2] = 0
    return (v * (rng.random(shape) >= 0.05)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    v = {name: torch.from_numpy(realistic(shape, i)) for i, (name, shape) in enumerate(FORMS.items())}
    path = tmp_path / "exp_avg_sq.safetensors"
    save_file(v, path, metadata={"step": "9", "beta2": "0.95"})
    return path


def everything(moments: Moments) -> dict[str, np.ndarray]:
    return {name: moments.read(name, 0, matrix_shape(shape)[0]).copy() for name, shape in moments.shapes().items()}


def bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_file_gives_back_what_was_compressed(tmp_path: Path, source: Path, choice: dict[str, Any]) -> None:
    out = tmp_path / "c.safetensors"
    report = engine.compress_moments(source, out, **choice)
    held, again = compress(open_moments(source), **choice, stream=Stream(), scratch=tmp_path)
    assert report == again and (held.beta2, held.step("wide")) == (0.95, 9)
    opened = open_moments(out)
    assert (opened.beta2, opened.step("wide"), opened.shapes()) == (0.95, 9, held.shapes())
    first, second = everything(held), everything(opened)
    assert all(bits_equal(first[name], second[name]) for name in FORMS)
    assert all((x >= 0).all() and (x < np.inf).all() and x.dtype == np.float32 for x in first.values())
    stored = sum(tensor.nbytes for tensor in load_file(out).values())
    elements = sum(int(np.prod(shape)) for shape in FORMS.values())
    assert report.bytes_per_param == stored / elements
    assert stored == sum(compressed_bytes(shape, **choice) for shape in FORMS.values())
    if choice["method"] != "log8":
        save_compressed(held, tmp_path / "d.safetensors")  # type: ignore[arg-type]
        assert (tmp_path / "d.safetensors").read_bytes() == out.read_bytes()
    # The temporary file of log8 has no name any more.
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "d.safetensors") == ["c.safetensors", source.name]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_error_is_that_of_the_values_read_back(source: Path, choice: dict[str, Any]) -> None:
    full = open_moments(source)
    held, report = compress(full, **choice, stream=Stream())
    lost = total = 0.0
    for name, v in everything(full).items():
        x, y = (np.sqrt(np.asarray(t, np.float64)) for t in (v, everything(held)[name]))
        norm = float((x * x).sum())
        assert report.sqrt_error_per_tensor[name] == pytest.approx(np.sqrt(((x - y) ** 2).sum() / norm), rel=1e-4, abs=3e-7)
        lost, total = lost + float(((x - y) ** 2).sum()), total + norm
    assert report.sqrt_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert (report.method, report.rank) == (choice["method"], choice.get("rank"))


@pytest.mark.parametrize("choice", [{"method": "none"}, *CHOICES], ids=str)
def test_any_rows_read_are_the_same_values(tmp_path: Path, source: Path, choice: dict[str, Any]) -> None:
    out = tmp_path / "c.safetensors"
    engine.compress_moments(source, out, **choice)
    moments = open_compressed(out)
    rng = np.random.default_rng(0)
    for name, whole in everything(moments).items():
        for _ in range(20):
            a, b = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
            assert bits_equal(moments.read(name, a, b), whole[a:b])
            assert bits_equal(moments.read(name, a, b, check=False), whole[a:b])


@pytest.mark.parametrize("choice", [{"method": "none"}, *CHOICES], ids=str)
def test_bytes_depend_on_neither_threads_nor_blocks_nor_memory(tmp_path: Path, source: Path, choice: dict[str, Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With a chunk that cuts every matrix: parts come in any order, sums are added in one."""
    for module in (cuts_module, compression.rank1, compression.rank_k, compression.log8):
        monkeypatch.setattr(module, "CHUNK", 512)
    files = set()
    for threads, block, memory in ((1, 1 << 16, 2**31), (2, 100, 2**26), (7, 1, 2**40)):
        for attempt in range(2):
            out = tmp_path / f"{threads}.{attempt}"
            stream = Stream(threads=threads, block_elements=block, memory=memory)
            report = write_compressed(open_moments(source), out, **choice, stream=stream)
            files.add((out.read_bytes(), report.model_dump_json()))
    assert len(files) == 1


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("bad", [-1e-30, -1.0, float("nan"), float("inf"), -float("inf")])
def test_bad_values_are_named(
    tmp_path: Path, choice: dict[str, Any], chunk: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (compression.rank1, compression.rank_k, compression.log8):
        monkeypatch.setattr(module, "CHUNK", chunk)
    for name, shape, index in (("m", (40, 30), [33, 7]), ("s", (3, 9, 30), [1, 8, 29]), ("v", (300,), [299])):
        v = torch.zeros(shape)  # beside zeros, so that nothing hides behind a product with a sum
        v[tuple(index)] = bad
        path = tmp_path / f"{name}.safetensors"
        save_file({"w": v}, path)
        with pytest.raises(
            MomentsError, match=rf"{name}\.safetensors: the second moment of 'w' is .* at index \[{str(index)[1:-1]}\]"
        ):
            write_compressed(open_moments(path), tmp_path / "out", **choice, stream=Stream())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_storage_types_and_negative_zeros(tmp_path: Path, choice: dict[str, Any], dtype: torch.dtype) -> None:
    v = torch.from_numpy(realistic((40, 50), 3)).to(dtype)
    v[0, 0] = -0.0
    save_file({"w": v}, tmp_path / "v.safetensors")
    save_file({"w": v.float().abs()}, tmp_path / "f.safetensors")
    read = [
        everything(compress(open_moments(tmp_path / f), **choice, stream=Stream())[0])["w"]
        for f in ("v.safetensors", "f.safetensors")
    ]
    assert np.array_equal(*read) and not np.signbit(read[0][0, 0])


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t, m: m.update(method="log9"),
            r"method 'log9'; this version reads moments/1 with method none, rank1, log8 or rank_k",
        ),
        (lambda t, m: m.update(ota_format="moments/2"), "format 'moments/2'"),
        (lambda t, m: m.update(header="{"), "its header is damaged"),
        (lambda t, m: t.pop("wide#col"), r"its tensors do not match its header \(\['wide#col'\]\)"),
        (lambda t, m: t.update({"wide#col": t["wide#col"][:, :-1].contiguous()}), r"do not match its header \(\['wide#col'\]\)"),
        (lambda t, m: t.update({"wide#row": t["wide#row"].double()}), r"do not match its header \(\['wide#row'\]\)"),
        (lambda t, m: t["wide#row"].view(-1).__setitem__(3, float("nan")), "tensor 'wide#row' holds a negative, NaN or infinite"),
        (lambda t, m: t["vector"].__setitem__(3, -1.0), "tensor 'vector' holds a negative, NaN or infinite"),
        (lambda t, m: m.update(header=json.dumps(json.loads(m["header"]) | {"rank": 0})), "do not match its header"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, source: Path, edit: Any, message: str) -> None:
    out = tmp_path / "c.safetensors"
    engine.compress_moments(source, out, method="rank_k", rank=2)
    tensors, metadata = load_file(out), dict(open_file_metadata(out))
    edit(tensors, metadata)
    save_file(tensors, out, metadata=metadata)
    with pytest.raises(MomentsError, match=message):
        open_moments(out)


def open_file_metadata(path: Path) -> dict[str, str]:
    from ota_core.files.safetensors_io import SafetensorsFile

    with SafetensorsFile(path) as file:
        return file.metadata


def test_a_damaged_range_of_log8_is_refused_when_it_is_read(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "c.safetensors"
    engine.compress_moments(source, out, method="log8")
    tensors, metadata = load_file(out), open_file_metadata(out)
    for bad in (float("nan"), float("inf"), -1.0):
        tensors["wide#range"][2, 1] = bad
        save_file(tensors, out, metadata=metadata)
        moments = open_compressed(out)
        assert moments.read("wide", 0, 5).shape == (5, 61)
        with pytest.raises(MomentsError, match="'wide' holds a block whose range is no range of second moments"):
            moments.read("wide", 0, 37, check=False)


def test_methods_and_ranks_that_are_none(source: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"method": "log9"}, "'log9' is not known; expected one of none, rank1, log8, rank_k"),
        ({"method": "log8", "rank": 3}, "rank: 3 has no effect with the method log8; remove it, or choose rank_k"),
        ({"method": "rank_k", "rank": 0}, "rank: got 0, expected a whole number of at least 1"),
    ]:
        with pytest.raises(OtaError, match=message):
            engine.compress_moments(source, tmp_path / "c", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "c").exists()
    assert [passes((40, 40), m, 2) for m in ("none", "rank1", "log8", "rank_k")] == [0, 1, 1, 3]


WIDE = SHAPES | {"model.layers.0.mlp.experts.down_proj": (3, 20, 16), "model.layers.1.mlp.up_proj.weight": (24, 40)}


@pytest.mark.parametrize("choice", [*CHOICES[:2], {"method": "rank_k", "rank": 2}], ids=str)
@pytest.mark.parametrize(
    "method, rest",
    [
        ("ota", {"density": 0.4}),
        ("ota", {"density": 0.3, "scope": "per_tensor", "normalise": "global"}),
        ("ota", {}),
        ("fisher", {}),
    ],
    ids=str,
)
def test_a_merge_equals_the_reference_on_decoded_moments(
    tmp_path: Path, choice: dict[str, Any], rest: dict[str, Any], method: str
) -> None:
    """The reference knows no compression: it gets the v that the files give back. So does a merge without compression, byte for byte."""
    base = random_base(shapes=WIDE)
    experts = random_experts(base, density=None)
    asked = {"compression": choice["method"]} | ({"rank": choice["rank"]} if "rank" in choice else {})
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path / "a", base, experts, asked | rest, method=method))
    engine.merge(recipe, tmp_path / "a" / "out")
    assert not [p for p in (tmp_path / "a" / "out").iterdir() if p.name.startswith(".")]
    decoded = []
    for expert, item in zip(experts, resolve_local(recipe).experts, strict=True):
        assert item.moments is not None
        engine.compress_moments(item.moments, tmp_path / "c", **choice)
        v = everything(open_compressed(tmp_path / "c"))
        decoded.append(replace(expert, v={name: v[name].reshape(x.shape) for name, x in expert.v.items()}))
    plain = MergeRecipe.model_validate(ota_recipe(tmp_path / "b", base, decoded, rest, method=method))
    engine.merge(plain, tmp_path / "b" / "out")
    got, same = ((tmp_path / f / "out" / "model.safetensors") for f in "ab")
    assert got.read_bytes() == same.read_bytes()
    if method == "ota":
        wanted = reference.ota(
            base, [replace(e, density=rest.get("density")) for e in decoded], **{k: x for k, x in rest.items() if k != "density"}
        )
        assert_merged({name: tensor.numpy() for name, tensor in load_file(got).items()}, wanted, base)
