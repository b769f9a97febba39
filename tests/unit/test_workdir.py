"""The work folder: what a killed run left is found, named, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crossbit.engine.workdir import WorkDir, part_name
from crossbit.errors import InputError, WorkError


def test_work_is_found_again(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    work.begin({"model": "a"}, resume=False)
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    work.save_part("outside", {"tied": tensors["a"], "same": tensors["a"]}, {})
    work.save_part(part_name(0), tensors, {"block": 0})
    again = WorkDir(tmp_path / "work")
    again.begin({"model": "a"}, resume=True)
    assert again.record(part_name(0)) == {"block": 0}
    found = list(again.tensors(part_name(0)))
    assert [name for name, _ in found] == ["a", "b"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    assert [n for n, _ in again.tensors("outside")] == ["same", "tied"]
    with pytest.raises(InputError, match="another model"):
        again.begin({"model": "b"}, resume=True)
    assert again.has_part(part_name(0))
    again.begin({"model": "b"}, resume=False)
    assert not again.has_part(part_name(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streams_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    work.begin({}, resume=False)
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    work.save_stream(0, hidden.transpose(0, 1))
    kept = work.load_stream(0)
    assert kept is not None
    assert kept.dtype == dtype
    assert torch.equal(kept, hidden.transpose(0, 1))
    assert work.load_stream(1) is None


def test_the_next_block_is_one_whose_input_is_known(tmp_path: Path) -> None:
    work, hidden = WorkDir(tmp_path / "work"), torch.zeros(1, 2, 3)
    work.begin({}, resume=False)
    assert work.next_block(streams=True) == 0
    work.save_stream(0, hidden)
    for block in range(3):
        work.save_stream(block + 1, hidden)
        assert work.next_block(streams=True) == block  # killed between the two files
        work.save_part(part_name(block), {"x": hidden}, {})
        assert work.next_block(streams=True) == block + 1
        assert work.next_block(streams=False) == block + 1
    streams = sorted(p.name for p in work.path.glob("stream-*"))
    assert streams == ["stream-00002.safetensors", "stream-00003.safetensors"]


def test_damage_is_named(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    work.begin({"a": 1}, resume=False)
    work.save_part(part_name(0), {"x": torch.zeros(9)}, {})
    work.save_stream(0, torch.zeros(1, 2, 3))
    for name in ("block-00000.safetensors", "stream-00000.safetensors", "block-00000.json"):
        path = work.path / name
        path.write_bytes(path.read_bytes()[:-9] if name.endswith("s") else b"{")
    for action in (
        lambda: list(work.tensors(part_name(0))),
        lambda: work.record(part_name(0)),
        lambda: work.load_stream(0),
    ):
        with pytest.raises(WorkError, match="damaged"):
            action()
    (work.path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        WorkDir(work.path).begin({"a": 1}, resume=True)
    assert json.loads((work.path / "block-00000.json").read_text() + "}") == {}
