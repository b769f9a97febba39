"""Tensors of a safetensors checkpoint, read by name when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.models.validate import WeightLayout, weight_layout
from crossbit.safetensors_format import DTYPES

# Elements of a tensor looked at in one go, so that the check needs little memory.
_CHUNK = 1 << 22

# Bytes read through a memory map before it is closed.
_TOUCHED = 1 << 26


class Checkpoint:
    """The weights of a model folder: one safetensors file, or shards with an index.

    Nothing but headers is read until a tensor is asked for; a tensor comes as a view of the
    memory-mapped file and costs memory only where it is touched. Treat it as read-only. Use as a
    context manager, or call ``close``; tensors handed out stay valid after it.

    Args:
        path: the folder.

    Raises:
        InputError: no weights, missing shards, truncated or corrupt files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layout: WeightLayout = weight_layout(path)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._layout.where)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        return self._layout.files

    def by_file(self) -> dict[str, tuple[str, ...]]:
        """File name -> names of the tensors in it, both sorted."""
        return {
            file: tuple(n for n, where in self._layout.where.items() if where == file)
            for file in self._layout.files
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, file headers left out."""
        return sum(
            math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self._layout.where
        )

    def __contains__(self, name: object) -> bool:
        return name in self._layout.where

    def __len__(self) -> int:
        return len(self._layout.where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``, from the header."""
        return tuple(int(n) for n in self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of tensor ``name``, from the header."""
        stored = str(self._slice(name).get_dtype())
        try:
            return DTYPES[stored]
        except KeyError:
            raise InputError(
                f"{self._file_of(name)}: {name} has dtype {stored}, which is not supported"
            ) from None

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name`` in its stored shape and dtype, on the CPU.

        Raises:
            WorkError: no such tensor, or the file changed or vanished since it was checked.
        """
        handle = self._handle(name)
        try:
            value: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WorkError(
                f"{self._file_of(name)}: cannot read {name} ({' '.join(str(error).split())[:120]})"
            ) from error
        return value

    def close(self) -> None:
        """Close the files; they are opened again when a tensor is asked for."""
        while self._open:
            _, handle = self._open.popitem()
            handle.__exit__(None, None, None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _file_of(self, name: str) -> Path:
        try:
            return self.path / self._layout.where[name]
        except KeyError:
            raise WorkError(f"{self.path}: the checkpoint has no tensor {name}") from None

    def _handle(self, name: str) -> Any:
        path = self._file_of(name)
        handle: Any = self._open.get(path.name)
        if handle is None:
            try:
                handle = safe_open(str(path), framework="pt")
                handle.__enter__()
            except (SafetensorError, OSError) as error:
                raise WorkError(
                    f"{path}: cannot be opened any more ({' '.join(str(error).split())[:120]})"
                ) from error
            self._open[path.name] = handle
        return handle

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)


def count_nonfinite(tensor: Tensor) -> int:
    """Number of NaN and infinite elements; 0 for integer tensors."""
    if not tensor.is_floating_point():
        return 0
    if tensor.itemsize == 1:
        tensor = tensor.float()
    flat = tensor.detach().reshape(-1)
    bad = 0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        # A finite sum of absolute values proves every element finite, several times faster than
        # isfinite on bfloat16, which copies; the exact count is taken only where it is not.
        if not math.isfinite(part.abs().sum(dtype=torch.float64).item()):
            bad += int((~torch.isfinite(part)).sum())
    return bad


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise when ``tensor`` holds NaN or infinity.

    Args:
        name: what the message calls the tensor.
        tensor: any shape; integer tensors always pass.

    Raises:
        WorkError: with the name, the count and the number of elements.
    """
    bad = count_nonfinite(tensor)
    if bad:
        raise WorkError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; "
            "the weights are damaged, get the model again"
        )


def scan_finite(checkpoint: Checkpoint) -> None:
    """Check every tensor of a checkpoint for NaN and infinity, one at a time.

    Files are closed on the way, because the pages of an open map count as this process's memory.

    Raises:
        InputError: naming the first damaged tensor, its file and the count.
    """
    touched = 0
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        bad = count_nonfinite(tensor)
        if bad:
            raise InputError(
                f"{checkpoint.path}: {name} holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; the weights are damaged, get the model again"
            )
        touched += tensor.nbytes
        if touched > _TOUCHED:
            touched = 0
            del tensor
            checkpoint.close()
