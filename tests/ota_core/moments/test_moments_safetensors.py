"""v from safetensors files: names and suffixes, shards, metadata, storage types, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ota_core.errors import MomentsError
from ota_core.files.layouts.relayout import Relayout, Source
from ota_core.files.layouts.stored import Stored, View
from ota_core.moments import moments_files, open_moments
from ota_core.moments.check import checked
from ota_core.moments.relaid import relaid

A = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) * 1e-15
B = torch.rand(5, generator=torch.Generator().manual_seed(1)) * 1e-15


def save(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata or None)
    return path


def shards(folder: Path, *, index: dict[str, str] | None = None) -> None:
    save(folder / "exp_avg_sq-00001-of-00002.safetensors", {"a": A})
    save(folder / "exp_avg_sq-00002-of-00002.safetensors", {"b": B})
    if index is not None:
        (folder / "exp_avg_sq.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


GOOD_INDEX = {"a": "exp_avg_sq-00001-of-00002.safetensors", "b": "exp_avg_sq-00002-of-00002.safetensors"}


def assert_reads(moments) -> None:
    assert moments.shapes() == {"a": (4, 3), "b": (5,)}
    assert torch.equal(torch.from_numpy(moments.read("a", 0, 4)), A)
    assert torch.equal(torch.from_numpy(moments.read("a", 1, 3)), A[1:3])
    assert torch.equal(torch.from_numpy(moments.read("b", 2, 5)), B[2:5, None])


def test_names_with_and_without_suffix_and_metadata(tmp_path):
    plain = open_moments(save(tmp_path / "v.safetensors", {"a": A, "b": B}, beta2="0.95", step="12"))
    assert_reads(plain)
    assert (plain.beta2, plain.step("a"), plain.step("b")) == (0.95, 12, 12)
    state = {"a.exp_avg_sq": A, "b.exp_avg_sq": B, "a.exp_avg": -A, "b.step": torch.tensor(3.0)}
    dump = open_moments(save(tmp_path / "dump.safetensors", state))
    assert_reads(dump)
    assert (dump.beta2, dump.step("a"), dump.step("b")) == (None, None, 3)


def test_expert_json_gives_step_and_beta2_and_must_agree(tmp_path):
    path = save(tmp_path / "exp_avg_sq.safetensors", {"a": A, "b": B}, step="12")
    (tmp_path / "expert.json").write_text(json.dumps({"capability": "math", "beta2": 0.999, "step": 12}))
    moments = open_moments(path)
    assert (moments.beta2, moments.step("a")) == (0.999, 12)
    (tmp_path / "expert.json").write_text(json.dumps({"step": 13}))
    with pytest.raises(MomentsError, match=r"step is 12 in .*exp_avg_sq\.safetensors and 13 in .*expert\.json"):
        open_moments(path)
    (tmp_path / "expert.json").write_text("{")
    with pytest.raises(MomentsError, match=r"expert\.json cannot be read as JSON"):
        open_moments(path)


@pytest.mark.parametrize(("key", "value"), [("beta2", "1.0"), ("beta2", "x"), ("step", "0"), ("step", "1.5"), ("step", "nan")])
def test_metadata_out_of_range_is_refused(tmp_path, key, value):
    with pytest.raises(MomentsError, match=rf"v\.safetensors: {key} is '{value}'"):
        open_moments(save(tmp_path / "v.safetensors", {"a": A}, **{key: value}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float_type_comes_out_as_float32(tmp_path, dtype):
    stored = (A * 1e15).to(dtype)
    read = open_moments(save(tmp_path / "v.safetensors", {"a": stored})).read("a", 0, 4)
    assert read.dtype == np.float32
    assert np.array_equal(read, stored.float())


def test_shards_by_index_and_by_folder(tmp_path):
    shards(tmp_path)
    assert_reads(open_moments(tmp_path))
    assert [file.name for file in moments_files(tmp_path)] == sorted(GOOD_INDEX.values())
    shards(tmp_path, index=GOOD_INDEX)
    assert_reads(open_moments(tmp_path))
    index = tmp_path / "exp_avg_sq.safetensors.index.json"
    assert_reads(open_moments(index))
    assert moments_files(tmp_path) == [index, *(tmp_path / name for name in sorted(GOOD_INDEX.values()))]


def test_incomplete_or_contradicting_shards_are_refused(tmp_path):
    shards(tmp_path, index=GOOD_INDEX | {"c": GOOD_INDEX["a"]})
    with pytest.raises(MomentsError, match="disagree on 1 tensors, such as 'c'"):
        open_moments(tmp_path)
    shards(tmp_path, index=GOOD_INDEX | {"c": "../c.safetensors"})
    with pytest.raises(MomentsError, match=r"lists '\.\./c\.safetensors'; names of files beside the index"):
        open_moments(tmp_path)
    (tmp_path / "exp_avg_sq.safetensors.index.json").unlink()
    with pytest.raises(MomentsError, match="is one shard of 2; name their index or folder"):
        open_moments(tmp_path / GOOD_INDEX["a"])
    save(tmp_path / GOOD_INDEX["b"], {"a": A})
    with pytest.raises(MomentsError, match=r"'a' is in .*00001-of-00002\.safetensors and in .*00002-of-00002"):
        open_moments(tmp_path)
    (tmp_path / GOOD_INDEX["b"]).unlink()
    with pytest.raises(MomentsError, match=r"lacks shards .*exp_avg_sq-00002-of-00002\.safetensors"):
        open_moments(tmp_path)
    shards(tmp_path, index=GOOD_INDEX)
    (tmp_path / GOOD_INDEX["b"]).unlink()
    with pytest.raises(MomentsError, match=r"index\.json lists shards that are not beside it: .*00002"):
        open_moments(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({"a": A.to(torch.int8)}, "'a' has the dtype int8, a float type was expected"),
        ({"a.exp_avg_sq": A, "b": B}, "'b' lacks the suffix .exp_avg_sq"),
    ],
)
def test_files_of_unclear_meaning_are_refused(tmp_path, tensors, message):
    with pytest.raises(MomentsError, match=message):
        open_moments(save(tmp_path / "v.safetensors", tensors))


def test_a_truncated_file_is_a_moments_error_with_both_sizes(tmp_path):
    path = save(tmp_path / "v.safetensors", {"a": A})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MomentsError, match=rf"v\.safetensors is truncated: its tensors need {size} bytes, {size - 5} are there"):
        open_moments(path)


@settings(deadline=None)
@given(st.data())
def test_the_first_bad_entry_is_found_wherever_it_is(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple))
    matrix = np.random.default_rng(0).random(shape, np.float32).reshape(-1, shape[-1] if len(shape) > 1 else 1)
    start = data.draw(st.integers(0, len(matrix) - 1))
    block = matrix[start:]
    assert checked(block, path=Path("f"), name="w", shape=shape, start=start) is block
    places = sorted(data.draw(st.sets(st.integers(0, block.size - 1), min_size=1, max_size=3)))
    for place in places:
        block.reshape(-1)[place] = data.draw(st.sampled_from([-1.0, -(2.0**-20), float("nan"), float("inf"), -float("inf")]))
    with pytest.raises(MomentsError) as caught:
        checked(block, path=Path("f"), name="w", shape=shape, start=start)
    flat = start * matrix.shape[1] + places[0]
    index = [] if not shape else [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)]
    assert f"f: the second moment of 'w' is {float(block.reshape(-1)[places[0]])} at index {index}," in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_the_check_bad_entries_come_out_as_float32(tmp_path, dtype):
    bad = A.to(dtype)
    bad[3, 1] = -1.0
    moments = open_moments(save(tmp_path / "v.safetensors", {"a": bad}))
    assert torch.equal(torch.from_numpy(moments.read("a", 2, 4, check=False)), bad[2:].float())
    with pytest.raises(MomentsError, match=r"-1.0 at index \[3, 1\]"):
        moments.read("a", 2, 4)


def test_bad_entries_of_a_shard_name_the_shard(tmp_path):
    shards(tmp_path)
    bad = A.clone()
    bad[3, 1] = float("nan")
    save(tmp_path / GOOD_INDEX["a"], {"a": bad})
    with pytest.raises(MomentsError, match=r"00001-of-00002\.safetensors: the second moment of 'a' is nan at index \[3, 1\]"):
        open_moments(tmp_path).read("a", 0, 4)


def test_a_view_in_another_layout_counts_the_bytes_behind_it(tmp_path: Path) -> None:
    """v in bfloat16, two bytes an element: of a stack of which each expert takes its own, and of q and k that one tensor takes."""
    tensors = {"stack": torch.rand(2, 3, 4), "q": torch.rand(4, 4), "k": torch.rand(2, 4), "rest": torch.rand(5)}
    held = open_moments(save(tmp_path / "v.safetensors", {name: one.bfloat16() for name, one in tensors.items()}))
    whole = {name: View(name, 0, tuple(one.shape), tuple(one.stride())) for name, one in tensors.items()}
    made = {f"expert{i}": Stored((3, 4), (View("stack", 12 * i, (3, 4), (4, 1)),)) for i in range(2)}
    made["qk"] = Stored((6, 4), (whole["q"], whole["k"]))
    sources = {name: (Source(name, one.shape[-1], 0, whole[name]),) for name, one in tensors.items()}
    seen = relaid(held, Relayout(made, sources, {name: tuple(one.shape) for name, one in tensors.items()}))
    assert {name: seen.stored_bytes(name) for name in seen.shapes()} == {"expert0": 24, "expert1": 24, "qk": 48, "rest": 10}
    assert sum(map(seen.stored_bytes, seen.shapes())) == sum(map(held.stored_bytes, held.shapes()))
    np.testing.assert_array_equal(
        seen.read("qk", 3, 5), torch.cat([tensors["q"][3:], tensors["k"][:1]]).bfloat16().float().numpy()
    )
