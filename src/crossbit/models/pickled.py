"""A folder with pickled weights as a safetensors folder, read without running pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.models.built import build_once
from crossbit.models.dense import ShardWriter, copy_companions
from crossbit.models.fingerprint import combined_sha256


def unpickle_folder(folder: Path, config: dict[str, Any], files: tuple[Path, ...]) -> Path:
    """Return a safetensors copy of ``folder``, made on the first call.

    ``torch.load(weights_only=True)`` refuses everything but tensors and plain containers.

    Args:
        folder: the model folder.
        config: its parsed config.json.
        files: its pickled weight files.

    Raises:
        InputError: damaged file, one that holds more than tensors, or a whole training state.
    """
    named = [("config.json", folder / "config.json"), *((p.name, p) for p in files)]
    key = f"pickle-{folder.resolve().name[:60]}-{combined_sha256(named)[:16]}"

    def build(target: Path) -> None:
        writer = ShardWriter(target, len(files))
        for file in files:
            tensors = _load(file)
            if config.get("tie_word_embeddings") and any("embed" in name for name in tensors):
                _drop_shared_head(tensors)
            writer.write(_unshared({n: t for n, t in tensors.items() if n not in writer}))
        writer.finish()
        copy_companions(folder, target, config)

    return build_once(key, build)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
        raise InputError(
            f"{file}: cannot be read with weights_only ({reason}); "
            "get the model as safetensors, or convert it with its own tools"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(
            f"{file}: not a plain table of tensors (a training state?); "
            "save the model's state_dict, best as safetensors"
        )
    return {str(name): value for name, value in content.items()}


def _drop_shared_head(tensors: dict[str, Tensor]) -> None:
    """Leave out the head of a tied model where it is the embedding once more."""
    head = tensors.get("lm_head.weight")
    if head is None:
        return
    for name, value in tensors.items():
        if name != "lm_head.weight" and "embed" in name and value.data_ptr() == head.data_ptr():
            del tensors["lm_head.weight"]
            return


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors that share memory copies of their own: safetensors has no sharing."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name in sorted(tensors):
        value = tensors[name]
        start = value.untyped_storage().data_ptr()
        out[name] = value.clone() if start in seen else value
        seen.add(start)
    return out
