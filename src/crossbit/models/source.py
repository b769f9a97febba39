"""The MODEL argument: a hub name, a local folder, a GGUF file or an embedded model."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from crossbit.errors import InputError
from crossbit.models.demo import EMBEDDED, assemble, find_embedded
from crossbit.models.dense import total_bytes
from crossbit.models.dequantize import dequantize_folder
from crossbit.models.fingerprint import combined_sha256, file_sha256, folder_fingerprint
from crossbit.models.gguf import LICENCE_NAME, convert_gguf
from crossbit.models.hub import HUB_NAME, download
from crossbit.models.pickled import unpickle_folder
from crossbit.models.validate import (
    check_pickle_shards,
    check_tokenizer_present,
    has_safetensors,
    pickle_files,
    read_config,
    weight_layout,
)

_ACCEPTED = "a hub name (org/name), a local folder, a .gguf file, " + " or ".join(EMBEDDED)
# What only a path looks like: a leading ./ ../ / ~, a known ending, more than one slash.
_PATH_LIKE = re.compile(r"^[./~]|\.(gguf|safetensors|bin|pt)$|/.*/|\\", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFolder:
    """A model ready to be opened.

    Attributes:
        path: local Hugging Face folder: config.json, safetensors (one file or shards with an
            index), tokenizer.
        name: the model as the user typed it.
        origin: where it came from.
        source_bytes: size of the weights as the user has them (the GGUF or safetensors files).
        fingerprint: SHA-256 over config.json and the contents of the safetensors files.
        note: one line worth telling about the weights, e.g. that they were dequantized.
    """

    path: Path
    name: str
    origin: Literal["hub", "local", "gguf", "demo"]
    source_bytes: int
    fingerprint: str
    note: str | None = None


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    allow_pickle: bool = False,
) -> ModelFolder:
    """Turn the MODEL argument into a checked local folder.

    Args:
        name: ``demo``, ``demo-gemma``, a local folder, a .gguf file or a hub name; looked up in
            this order (write ``./demo`` for a folder of that name).
        revision: branch, tag or commit on the hub; only for hub names.
        dtype: dtype of weights converted from GGUF (default bfloat16); safetensors stay as they
            are.
        dequantize: accept a model that is already quantized and make it dense first.
        allow_pickle: accept a folder with pickled weights only; read with ``weights_only``.

    Returns:
        The folder, checked: config, whole weight files, tokenizer.

    Raises:
        InputError: one line saying what is wrong, where, and what to do.
    """
    if not name.strip():
        raise InputError(f"MODEL is empty; give {_ACCEPTED}")
    if revision is not None and (name in EMBEDDED or Path(name).expanduser().exists()):
        raise InputError(f"{name}: only hub models have a revision; leave it out")
    if name in EMBEDDED:
        return _embedded(name, dtype or torch.bfloat16)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path, "local", dtype, dequantize, allow_pickle)
    if path.is_file():
        return _gguf_file(name, path, dtype or torch.bfloat16)
    if _PATH_LIKE.search(name):
        raise InputError(f"{name}: no such file or folder; MODEL is {_ACCEPTED}")
    if not HUB_NAME.match(name):
        raise _unknown(name)
    downloaded = download(name, revision=revision, allow_pickle=allow_pickle)
    return _folder(name, downloaded, "hub", dtype, dequantize, allow_pickle)


def _folder(
    name: str,
    path: Path,
    origin: Literal["hub", "local"],
    dtype: torch.dtype | None,
    dequantize: bool,
    allow_pickle: bool,
) -> ModelFolder:
    """Check a local folder; convert it where the user allowed that."""
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not (path / "config.json").is_file():
        raise InputError(f"{path}: a folder of GGUF files; pass one of them, e.g. {ggufs[0]}")
    config = read_config(path)
    if config["model_type"] == "crossbit":
        kind = "an online" if config.get("crossbit_kind") == "online" else "a research"
        raise InputError(
            f"{path}: already quantized ({kind} result of crossbit); pass the original model"
        )
    check_tokenizer_present(path)
    note: str | None = None
    pickles = pickle_files(path)
    if pickles and not has_safetensors(path):
        if not allow_pickle:
            raise InputError(
                f"{path}: only pickled weights ({pickles[0].name}), which can run code when read; "
                "get the model as safetensors, or give quantize --allow-pickle if you trust it"
            )
        check_pickle_shards(path, pickles)
        source_bytes = total_bytes(path, pickles)
        path = unpickle_folder(path, config, pickles)
        note = "converted from pickled weights"
    else:
        source_bytes = total_bytes(path, weight_layout(path).files)
    if config.get("quantization_config"):
        if not dequantize:
            method = config["quantization_config"].get("quant_method", "unknown method")
            raise InputError(
                f"{path}: already quantized ({method}); pass the original model, or give quantize "
                "--dequantize to make it dense first"
            )
        path, note = dequantize_folder(path, config, dtype)
    return ModelFolder(path, name, origin, source_bytes, _fingerprint(path), note)


def _embedded(name: str, dtype: torch.dtype) -> ModelFolder:
    files = find_embedded(name)

    def whole(scratch: Path) -> Path:
        if len(files.parts) == 1:
            return files.parts[0]
        target = scratch / files.gguf_name
        assemble(files, target)
        return target

    if files.stated_sha256 is not None:
        sha256 = files.stated_sha256
    elif len(files.parts) == 1:
        sha256 = file_sha256(files.parts[0])
    else:
        sha256 = combined_sha256((part.name, part) for part in files.parts)
    folder, note = convert_gguf(
        files.gguf_name,
        sha256,
        whole,
        dtype=dtype,
        licences=files.licences,
        source_bytes=files.nbytes,
    )
    return ModelFolder(folder, name, "demo", files.nbytes, _fingerprint(folder), note)


def _gguf_file(name: str, path: Path, dtype: torch.dtype) -> ModelFolder:
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path}: a file that is not a .gguf; MODEL is {_ACCEPTED}")
    size = path.stat().st_size
    licences = sorted(
        p for p in path.parent.iterdir() if LICENCE_NAME.match(p.name) and p.is_file()
    )
    folder, note = convert_gguf(
        path.name,
        file_sha256(path),
        lambda _: path,
        dtype=dtype,
        licences=licences,
        source_bytes=size,
    )
    return ModelFolder(folder, name, "gguf", size, _fingerprint(folder), note)


def _fingerprint(folder: Path) -> str:
    return folder_fingerprint(folder, weight_layout(folder).files)


def _unknown(name: str) -> InputError:
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return InputError(f"{name}: no such model{guess}; MODEL is {_ACCEPTED}")
