"""The work folder: finished blocks and the live activations, so that a killed run can go on.

    manifest.json            what is being done: fingerprints of model, text, recipe, version
    outside.safetensors      embedding, norms and head in their exported form (+ .json record)
    block-00007.safetensors  one finished block in its exported form (+ .json record)
    stream-00008.safetensors activations that enter block 8
    target.safetensors       outputs of the float block in work on the held-out sequences

and, where rounding is trained (``engine.loop`` says what follows what)

    teacher-00009.safetensors activations that enter block 9, the first that is not open yet, in the
                             original model
    metric-00008.safetensors the metric of what leaves block 8
    sensitivity-*            activations and gradients while metrics are measured
    window-00003.safetensors the open blocks when window 3 begins
    start.safetensors        where it began, if some layer has no sensible rounding yet
    training.safetensors     window, optimiser and progress of a training in work
    best-0.safetensors       its best parameters so far, or those before them (and best-1)
    trained-00002.json       how the training of window 2 went
    open-00001.safetensors   block 1 as it left training, for the end-to-end stage
    refined.safetensors      all blocks after that stage

Every file is written under a temporary name and renamed, so a file that exists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossbit.engine.stream import Stream, StreamWriter, damaged, unwritable
from crossbit.errors import InputError, WorkError
from crossbit.safetensors_format import raw_bytes

MANIFEST = "manifest.json"
PREFIX = "prefix"
TARGET = "target"


class WorkDir:
    """A work folder; see the module's text for its files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, manifest: dict[str, Any], *, resume: bool) -> None:
        """Start afresh, or go on if ``resume`` and the folder belongs to the same work.

        Raises:
            InputError: the folder belongs to other work (the difference is named), or cannot be
                written.
        """
        known = self._manifest()
        if resume and known is not None:
            for key in sorted({*known, *manifest}):
                if known.get(key) != manifest.get(key):
                    raise InputError(
                        f"{self.path}: holds work of another {key} ({_short(known.get(key))}, now "
                        f"{_short(manifest.get(key))}); repeat the original command, or leave out "
                        "--resume to start afresh"
                    )
            return
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            self._put_json(MANIFEST, manifest)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --out or --work"
            ) from None

    def _manifest(self) -> dict[str, Any] | None:
        try:
            data = json.loads((self.path / MANIFEST).read_text("utf8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise InputError(
                f"{self.path / MANIFEST}: damaged; delete the folder or leave out --resume"
            ) from None
        return data if isinstance(data, dict) else None

    # -- finished parts -----------------------------------------------------------------------

    def save_part(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a finished part ("outside" or "block-00007") and its record."""
        self._write_json(f"{name}.json", record)
        self._write_tensors(f"{name}.safetensors", tensors)

    def has(self, name: str) -> bool:
        """True if there are a finished part, activations or a state of that name."""
        return (self.path / f"{name}.safetensors").exists()

    def record(self, name: str) -> dict[str, Any]:
        """The record of a finished part."""
        try:
            data = json.loads((self.path / f"{name}.json").read_text("utf8"))
        except (OSError, ValueError):
            raise damaged(self.path / f"{name}.json") from None
        assert isinstance(data, dict)
        return data

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a finished part, one at a time, in a fixed order."""
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in sorted(file.keys()):
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError):
            raise damaged(path) from None

    # -- activations --------------------------------------------------------------------------

    def new_stream(self, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> StreamWriter:
        """Write the activations [S, L, D] that enter ``block``."""
        return self.writer(stream_name(block), shape, dtype)

    def new_target(self, shape: tuple[int, ...], dtype: torch.dtype) -> StreamWriter:
        """Write what a block's output should be on the held-out sequences [S, L, D].

        It is of use to the run that wrote it only, and the next block's takes its place.
        """
        return self.writer(TARGET, shape, dtype)

    def writer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StreamWriter:
        """Write activations [S, L, D] under a name."""
        return StreamWriter(self.path / f"{name}.safetensors", shape, dtype)

    def named(self, name: str) -> Stream | None:
        """Activations under a name, None if there are none.

        Raises:
            WorkError: the file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        return Stream(path) if path.exists() else None

    def drop(self, name: str) -> None:
        """Forget activations or a state, if they are there."""
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def stream(self, block: int) -> Stream | None:
        """Activations that enter ``block``, None if they were not kept.

        Raises:
            WorkError: the file is damaged.
        """
        return self.named(stream_name(block))

    def drop_stream(self, block: int) -> None:
        """Forget the activations that enter ``block``, if they are there."""
        self.drop(stream_name(block))

    def next_block(self, *, streams: bool) -> int:
        """The first block that is not finished (and whose input is known, if ``streams``)."""
        block = 0
        while self.has(part_name(block)):
            block += 1
        while streams and block > 0 and not self.has(stream_name(block)):
            block -= 1
        return block

    # -- training -----------------------------------------------------------------------------

    def save_state(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write tensors and a record as one file, whole or not at all."""
        text = json.dumps(record)
        metadata = {"record": text, "checksum": _checksum(text, tensors)}
        self._write_tensors(f"{name}.safetensors", tensors, metadata)

    def load_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save_state`` wrote.

        Raises:
            WorkError: the file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata()
                # Copies: the file may be replaced while its tensors are in use.
                tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
            record = json.loads(metadata["record"])
            whole = _checksum(metadata["record"], tensors) == metadata["checksum"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise WorkError(
                f"{path}: damaged; delete this file, and --resume goes on from what was saved "
                "before it"
            )
        return tensors, record

    def names(self, prefix: str) -> list[str]:
        """Files of the folder that begin with ``prefix``, without their endings, in order."""
        return sorted({p.name.partition(".")[0] for p in self.path.glob(f"{prefix}*")})

    def save_record(self, name: str, record: dict[str, Any]) -> None:
        """Write a record that has no tensors."""
        self._write_json(f"{name}.json", record)

    # -- files --------------------------------------------------------------------------------

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        try:
            self._put_json(name, data)
        except OSError as error:
            raise unwritable(self.path / name, error) from None

    def _put_json(self, name: str, data: dict[str, Any]) -> None:
        """Whole or not at all.

        Raises:
            OSError: the disk refuses.
        """
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", "utf8")
            os.replace(temporary, self.path / name)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _write_tensors(
        self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        temporary = self.path / f".{name}.tmp"
        whole: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            whole[key] = tensor.detach().cpu().contiguous()
            if any(whole[key].data_ptr() == t.data_ptr() for k, t in whole.items() if k != key):
                whole[key] = whole[key].clone()  # a tied matrix: files hold no shared memory
        try:
            save_file(whole, str(temporary), metadata)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise unwritable(self.path / name, error) from None
        os.replace(temporary, self.path / name)


def teacher_name(block: int) -> str:
    """Name of the activations that enter ``block`` in the original model."""
    return f"teacher-{block:05d}"


def window_name(window: int) -> str:
    """Name of the state at the beginning of a window."""
    return f"window-{window:05d}"


def part_name(block: int) -> str:
    """Name of the part that holds a block."""
    return f"block-{block:05d}"


def _checksum(record: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a state is: training would go on from a flipped bit without a word."""
    found = zlib.crc32(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(raw_bytes(tensor), found)
    return f"{found:08x}"


def stream_name(block: int) -> str:
    """Name of the activations that enter ``block``."""
    return f"stream-{block:05d}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
