"""Checks of a local model folder before anything is loaded from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from crossbit.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.bin")


@dataclass(frozen=True)
class WeightLayout:
    """Which safetensors file holds each tensor.

    Attributes:
        files: names of the safetensors files, sorted, relative to the folder.
        where: tensor name -> file name, sorted by tensor name.
    """

    files: tuple[str, ...]
    where: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of ``folder``.

    Raises:
        InputError: missing, not JSON, or without a model type and architectures.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json, so not a Hugging Face model folder")
    config = _read_json(path)
    if not config.get("model_type"):
        raise InputError(f"{path}: no model_type; add the one of the original model")
    if not config.get("architectures"):
        raise InputError(
            f"{path}: no architectures; add the class of the model, e.g. [LlamaForCausalLM]"
        )
    return config


def weight_layout(folder: Path) -> WeightLayout:
    """Find the safetensors files of ``folder`` and check that each is whole.

    Raises:
        InputError: no safetensors, an index that is not JSON, names missing shards or tensors
            that are not in their shard, or a truncated or corrupt file.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        names = tensor_names(folder / SINGLE_FILE)
        return WeightLayout((SINGLE_FILE,), dict.fromkeys(names, SINGLE_FILE))
    if not index.is_file():
        return _unindexed_layout(folder)
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index}: no weight_map in the index; download the model again")
    files = sorted({str(file) for file in where.values()})
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{index}: shard {file!r} is not a file name in the same folder")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of {len(files)} shards missing, e.g. {missing[0]}; "
            "download the model again"
        )
    for file in files:
        held = set(tensor_names(folder / file))
        lost = sorted(
            name for name, in_file in where.items() if in_file == file and name not in held
        )
        if lost:
            raise InputError(
                f"{folder / file}: lacks {len(lost)} tensors that the index places in it, "
                f"e.g. {lost[0]}; download the model again"
            )
    return WeightLayout(tuple(files), {name: str(where[name]) for name in sorted(where)})


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors in one safetensors file, sorted.

    Opening checks the header's length, that the offsets are contiguous and fit each tensor's
    shape and dtype, and that the file is exactly as long as they say.

    Raises:
        InputError: truncated or corrupt file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = tuple(sorted(file.keys()))
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path}: truncated or corrupt safetensors ({reason}); download it again"
        ) from error
    if not names:
        raise InputError(f"{path}: holds no tensors; download it again")
    return names


def check_tokenizer_present(folder: Path) -> None:
    """Raise InputError when ``folder`` holds no tokenizer file that transformers reads."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "copy it from the original model"
        )


def pickle_files(folder: Path) -> tuple[Path, ...]:
    """Pickled weight files of ``folder``, sorted; optimizer and argument pickles left out."""
    found = {path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)}
    other = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
    return tuple(sorted(p for p in found if p.is_file() and not p.name.startswith(other)))


def has_safetensors(folder: Path) -> bool:
    """Whether ``folder`` has safetensors weights, or an index that promises them."""
    return (folder / INDEX_FILE).is_file() or any(folder.glob("*.safetensors"))


def check_pickle_shards(folder: Path, files: tuple[Path, ...]) -> None:
    """Raise InputError when the index of pickled shards names one that is missing."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        named = {str(file) for file in (_read_json(index).get("weight_map") or {}).values()}
        missing = sorted(named - {path.name for path in files})
        if missing:
            raise InputError(
                f"{index}: {len(missing)} of {len(named)} shards missing, e.g. {missing[0]}; "
                "download the model again"
            )


def _unindexed_layout(folder: Path) -> WeightLayout:
    """The only safetensors file under another name, or the error that fits what is there."""
    files = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if len(files) == 1:
        return WeightLayout((files[0],), dict.fromkeys(tensor_names(folder / files[0]), files[0]))
    if files:
        raise InputError(
            f"{folder}: {len(files)} safetensors files without {INDEX_FILE}; "
            "download the index with the model"
        )
    raise InputError(f"{folder}: no weights (no {SINGLE_FILE}, no {INDEX_FILE})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable as JSON ({' '.join(str(error).split())[:120]})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content
