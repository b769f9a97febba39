"""Folders rewritten as dense safetensors: the shared parts of unpickling and dequantizing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crossbit.models.validate import INDEX_FILE, SINGLE_FILE

# What is worth carrying along beside config.json and the weights.
_CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.jinja",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "*TERMS*",
)


def copy_companions(source: Path, target: Path, config: Mapping[str, object]) -> None:
    """Write ``config`` and copy tokenizer, chat template and licence files to ``target``."""
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for pattern in _CARRIED:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


class ShardWriter:
    """Writes a checkpoint shard by shard; with one shard it becomes ``model.safetensors``."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder = folder
        self.shards = shards
        self._where: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard; tensors are made contiguous and stored in name order."""
        self._written += 1
        if not tensors:
            return
        name = (
            SINGLE_FILE
            if self.shards == 1
            else f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        )
        ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
        save_file(ordered, str(self.folder / name), metadata={"format": "pt"})
        (self.folder / name).chmod(0o644)
        self._where.update(dict.fromkeys(ordered, name))
        self._bytes += sum(t.numel() * t.itemsize for t in ordered.values())

    def finish(self) -> None:
        """Write the index of a checkpoint of several shards."""
        if self.shards > 1:
            index = {
                "metadata": {"total_size": self._bytes},
                "weight_map": dict(sorted(self._where.items())),
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def total_bytes(folder: Path, files: Iterable[str | Path]) -> int:
    """Size of ``files`` of ``folder`` together, in bytes."""
    return sum((folder / file).stat().st_size for file in files)
