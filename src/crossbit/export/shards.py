"""Streaming tensors into safetensors shards with an index, one shard in memory at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from crossbit.cache import atomic_write
from crossbit.errors import WorkError
from crossbit.export.fingerprint import tensor_sha256
from crossbit.models.validate import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 2_000_000_000
_PART = ".writing-{:05d}.safetensors"


class ShardWriter:
    """Writes ``model.safetensors``, or ``model-XXXXX-of-YYYYY.safetensors`` and their index.

    A shard is written when the next tensor would not fit; names are final only after ``close``,
    so an interrupted write leaves no file that a reader takes for a model. The same tensors in
    the same order give the same bytes. A tensor larger than the limit gets a shard of its own.

    Args:
        folder: an existing folder.
        max_shard_bytes: upper limit of tensor bytes a shard.

    Attributes:
        digests: ``tensor_sha256`` of every tensor as it was handed over.
        total_bytes: bytes of all tensors so far.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        if max_shard_bytes < 1:
            raise ValueError("max_shard_bytes must be positive")
        self._folder = folder
        self._limit = max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._closed = False
        self.digests: dict[str, str] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take over a tensor (its values must not change any more before ``close``).

        Raises:
            WorkError: the name was added before, or a full shard cannot be written.
        """
        if self._closed:
            raise WorkError(f"{self._folder}: {name} comes after the checkpoint was closed")
        if name in self.digests:
            raise WorkError(f"{self._folder}: tensor {name} is written twice")
        held = tensor.detach().cpu().contiguous()
        size = held.numel() * held.element_size()
        shared = any(held.data_ptr() == other.data_ptr() for other in self._held.values())
        if size and (shared or held.untyped_storage().nbytes() != size):
            # A view would keep its whole storage alive; a shared one cannot be stored twice.
            held = held.clone()
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        self._held[name] = held
        self._held_bytes += size
        self.total_bytes += size
        self.digests[name] = tensor_sha256(name, held)

    def close(self) -> list[Path]:
        """Write what is left, give the shards their names, write the index; the files written.

        Raises:
            WorkError: nothing was added, or the disk refuses.
        """
        if self._held:
            self._flush()
        if not self._shards:
            raise WorkError(f"{self._folder}: no tensors to write")
        self._closed = True
        count = len(self._shards)
        files: list[Path] = []
        where: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = (
                SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            )
            os.replace(self._folder / _PART.format(index), self._folder / final)
            files.append(self._folder / final)
            where.update(dict.fromkeys(names, final))
        if count > 1:
            files.append(self._write_index(where))
        return files

    def _flush(self) -> None:
        path = self._folder / _PART.format(len(self._shards))
        try:
            path.touch()  # save_file alone makes files that only their owner can read
            mode = path.stat().st_mode
            save_file(self._held, str(path), metadata={"format": "pt"})
            path.chmod(mode)
        except (OSError, SafetensorError) as error:
            raise WorkError(f"{path}: cannot be written ({error})") from error
        self._shards.append(list(self._held))
        self._held = {}
        self._held_bytes = 0

    def _write_index(self, where: dict[str, str]) -> Path:
        path = self._folder / INDEX_FILE
        content = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: where[name] for name in sorted(where)},
        }
        atomic_write(path, json.dumps(content, indent=2) + "\n")
        return path
