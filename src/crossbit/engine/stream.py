"""The activations between two blocks, in a file rather than in memory.

One calibration set of a large model is gigabytes of activations (128 x 2048 tokens x 4096 channels:
2 GB), and only a batch of it is needed at a time. A stream is written batch by batch, and is there
under its name only once it is whole.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from crossbit.errors import WorkError
from crossbit.safetensors_format import DTYPES, file_head, raw_bytes

_KEY = "hidden"


class Stream:
    """Activations [S, L, D] in a safetensors file, read a few sequences at a time.

    Raises:
        WorkError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(size))[_KEY]
            self.shape: tuple[int, ...] = tuple(entry["shape"])
            self.dtype = DTYPES[entry["dtype"]]
            self._start = 8 + size
            self._sequence = math.prod(self.shape[1:]) * self.dtype.itemsize
            whole = path.stat().st_size == self._start + self.shape[0] * self._sequence
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
            whole = False
        if not whole:
            raise damaged(path)

    def read(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Sequences [start, stop) as a tensor [stop - start, L, D] of the caller's own."""
        stop = min(stop, self.shape[0])
        data = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        view = raw_bytes(data)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + start * self._sequence)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise damaged(self.path)
                    view = view[count:]
        except OSError:
            raise damaged(self.path) from None
        return data.to(device)


class StreamWriter:
    """Writes a stream in order; leaving the context without ``commit`` leaves nothing behind.

    Args:
        path: where the stream will be.
        shape: [S, L, D].
        dtype: of the activations.

    Raises:
        WorkError: the file cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._left = math.prod(shape) * dtype.itemsize
        try:
            self._file = self._temporary.open("wb", buffering=0)
            self._put(memoryview(file_head({_KEY: (dtype, shape)})))
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, part: Tensor) -> None:
        """The next sequences [n, L, D]."""
        data = raw_bytes(part)
        self._left -= len(data)
        assert self._left >= 0
        try:
            self._put(data)
        except OSError as error:
            raise self._unwritable(error) from None

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def commit(self) -> Stream:
        """Close the file and give it its name."""
        assert self._left == 0
        try:
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._unwritable(error) from None
        return Stream(self.path)

    def _unwritable(self, error: OSError) -> WorkError:
        if hasattr(self, "_file"):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        return unwritable(self.path, error)


def damaged(path: Path) -> WorkError:
    """For a file of the work folder that cannot be read."""
    return WorkError(f"{path}: damaged; delete the work folder and start afresh")


def unwritable(path: Path, error: Exception) -> WorkError:
    """For a file of the work folder that the disk refuses."""
    return WorkError(
        f"{path}: cannot be written ({error}); free some disk space and run again with --resume"
    )
