"""Where second moments are looked for, and how the reader is chosen: by content."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ota_core.errors import MomentsError
from ota_core.moments import ParameterLayout, find_moments, moments_files, open_moments

V = {"w": torch.ones(2, 2)}
LAYOUT = ParameterLayout(shapes={"w": (2, 2)}, decayed=frozenset({"w"}))


def write(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(V, path)
    else:
        torch.save({"state": {0: {"exp_avg_sq": V["w"]}}, "param_groups": [{"params": [0]}]}, path)
    return path


KNOWN = ["exp_avg_sq.safetensors", "exp_avg_sq_rank1.safetensors", "optimizer.pt", "optimizer.bin", "checkpoint-20/optimizer.pt"]


@pytest.mark.parametrize("name", KNOWN)
def test_each_known_file_is_found_and_opened(tmp_path, name):
    write(tmp_path / "model.safetensors")
    path = write(tmp_path / name)
    assert find_moments(tmp_path) == path
    assert moments_files(tmp_path) == [path]
    assert torch.equal(torch.from_numpy(open_moments(tmp_path, layout=LAYOUT).read("w", 0, 2)), V["w"])


@pytest.mark.parametrize(
    "names",
    [
        ("exp_avg_sq.safetensors", "optimizer.pt"),
        ("exp_avg_sq.safetensors", "exp_avg_sq-00001-of-00001.safetensors"),
        ("checkpoint-10/optimizer.pt", "checkpoint-20/optimizer.pt"),
    ],
)
def test_two_different_hits_are_listed(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    # Shards without an index go by their folder.
    listed = ", ".join("." if "-of-" in name else name for name in names)
    message = f"{tmp_path} holds several second moments: {listed}; one was expected: set preconditioner_path"
    with pytest.raises(MomentsError, match=re.escape(message)):
        find_moments(tmp_path)


def test_a_link_to_the_same_file_is_one_hit(tmp_path):
    (tmp_path / "optimizer.pt").symlink_to(write(tmp_path / "checkpoint-20/optimizer.pt"))
    assert find_moments(tmp_path) == tmp_path / "optimizer.pt"


def test_nothing_found(tmp_path):
    write(tmp_path / "model.safetensors")
    assert find_moments(tmp_path) is None
    with pytest.raises(MomentsError, match=r"holds no second moments; expected exp_avg_sq\.safetensors, .*optimizer\.pt"):
        open_moments(tmp_path)
    with pytest.raises(MomentsError, match=r"no_such\.pt does not exist"):
        open_moments(tmp_path / "no_such.pt")


def test_content_decides_not_the_extension(tmp_path):
    as_pt = write(tmp_path / "v.safetensors").rename(tmp_path / "v.pt")
    without = write(tmp_path / "o.pt").rename(tmp_path / "moments")
    other = write(tmp_path / "p.pt").rename(tmp_path / "o.safetensors")
    for path in (as_pt, without, other):
        assert torch.equal(torch.from_numpy(open_moments(path, layout=LAYOUT).read("w", 0, 2)), V["w"])


def test_a_header_that_starts_like_a_pickle_is_still_safetensors(tmp_path):
    for size in range(2000):
        save_file(V, tmp_path / "v.safetensors", metadata={"fill": "x" * size})
        if (tmp_path / "v.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header length with the byte 0x80 was reached")
    assert torch.equal(torch.from_numpy(open_moments(tmp_path / "v.safetensors").read("w", 0, 2)), V["w"])


def test_the_layout_is_built_only_where_numbers_need_it(tmp_path):
    def never() -> ParameterLayout:
        raise AssertionError("not needed")

    open_moments(write(tmp_path / "v.safetensors"), layout=never)
    with pytest.raises(AssertionError, match="not needed"):
        open_moments(write(tmp_path / "o.pt"), layout=never)
