"""Checkpoint: reading tensors by name, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossbit.errors import InputError, WorkError
from crossbit.models.checkpoint import Checkpoint, check_finite, count_nonfinite, scan_finite


def _write(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, str(folder / file))
    if list(shards) != ["model.safetensors"]:
        where = {name: file for file, tensors in shards.items() for name in tensors}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "b.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(4, generator=generator),
        "c.codes": torch.arange(-3, 3, dtype=torch.int8).reshape(2, 3),
    }


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor_as_written(tmp_path: Path, sharded: bool) -> None:
    tensors = _tensors()
    if sharded:
        first = {"b.weight": tensors["b.weight"]}
        rest = {k: v for k, v in tensors.items() if k not in first}
        _write(tmp_path, {"model-00001-of-00002.safetensors": rest, "z.safetensors": first})
    else:
        _write(tmp_path, {"model.safetensors": tensors})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ("a.weight", "b.weight", "c.codes")
        assert len(checkpoint) == 3
        assert "b.weight" in checkpoint
        assert "b" not in checkpoint
        for name, expected in tensors.items():
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.dtype(name) == expected.dtype
            assert torch.equal(checkpoint.tensor(name), expected)
        assert checkpoint.nbytes == 5 * 3 * 2 + 4 * 4 + 6
        assert set(checkpoint.by_file()) == set(checkpoint.files)
        assert sum(len(names) for names in checkpoint.by_file().values()) == 3


def test_tensor_outlives_the_checkpoint_and_files_reopen(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path, {"model.safetensors": tensors})
    checkpoint = Checkpoint(tmp_path)
    kept = checkpoint.tensor("b.weight")
    checkpoint.close()
    assert torch.equal(kept, tensors["b.weight"])
    assert torch.equal(checkpoint.tensor("a.weight"), tensors["a.weight"])
    checkpoint.close()


def test_close_leaves_no_open_file(tmp_path: Path) -> None:
    _write(tmp_path, {"model.safetensors": _tensors()})

    def opened() -> int:
        fds = Path("/proc/self/fd")
        links = [os.readlink(p) for p in fds.iterdir() if p.is_symlink()]
        return sum(str(tmp_path) in link for link in links)

    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.shape("a.weight")
    assert opened() == 0


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path, {"model.safetensors": tensors})
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.tensor("a.weight").mul_(0)
    assert torch.equal(
        load_file(str(tmp_path / "model.safetensors"))["a.weight"], _tensors()["a.weight"]
    )


def test_unknown_tensor(tmp_path: Path) -> None:
    _write(tmp_path, {"model.safetensors": _tensors()})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(WorkError, match=r"no tensor x\.weight"):
        checkpoint.tensor("x.weight")


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights") as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    _write(tmp_path, {"one.safetensors": _tensors(), "two.safetensors": {"d": torch.ones(2)}})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards missing, e\.g\. two\.safetensors"):
        Checkpoint(tmp_path)


def test_index_naming_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    _write(tmp_path, {"one.safetensors": _tensors(), "two.safetensors": {"d": torch.ones(2)}})
    save_file({"other": torch.ones(2)}, str(tmp_path / "two.safetensors"))
    with pytest.raises(InputError, match=r"two\.safetensors: lacks 1 tensors .* e\.g\. d;"):
        Checkpoint(tmp_path)


def test_index_pointing_outside_the_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not a file name in the same folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1, -7])
def test_truncation_anywhere_is_found(tmp_path: Path, keep: int) -> None:
    _write(tmp_path, {"model.safetensors": _tensors()})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(InputError, match="truncated or corrupt safetensors") as caught:
        Checkpoint(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["header", "offsets", "longer"])
def test_corruption_of_the_header_is_found(tmp_path: Path, damage: str) -> None:
    _write(tmp_path, {"model.safetensors": _tensors()})
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    if damage == "header":
        data[10:14] = b"\xff\xff\xff\xff"
    elif damage == "offsets":
        header = json.loads(data[8 : 8 + size])
        header["a.weight"]["data_offsets"][1] -= 4
        text = json.dumps(header).encode().ljust(size)
        data[: 8 + size] = len(text).to_bytes(8, "little") + text
    else:
        data += b"\0" * 16
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="truncated or corrupt safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nonfinite_counted_like_isfinite(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(50, 31, generator=generator).to(dtype)
    assert count_nonfinite(tensor) == 0
    tensor[3, 4] = torch.nan
    tensor[7, 30] = torch.inf
    tensor[49, 30] = -torch.inf
    assert count_nonfinite(tensor) == 3 == int((~torch.isfinite(tensor)).sum())


def test_largest_finite_values_pass() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_finite("w", torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    check_finite("codes", torch.zeros(3, dtype=torch.int8))


def test_check_finite_names_tensor_and_count() -> None:
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    with pytest.raises(WorkError, match=r"layers\.0\.up: 2 of 4 values") as caught:
        check_finite("layers.0.up", bad)
    assert caught.value.exit_code == 1


def test_scan_finite_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path, {"model.safetensors": tensors})
    with Checkpoint(tmp_path) as checkpoint:
        scan_finite(checkpoint)
    tensors["b.weight"][2, 1] = float("nan")
    _write(tmp_path, {"model.safetensors": tensors})
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(
            InputError, match=r"b\.weight holds 1 NaN or infinite values of 15"
        ) as caught,
    ):
        scan_finite(checkpoint)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 2
