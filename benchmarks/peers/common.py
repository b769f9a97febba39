"""What the scripts that drive the peers share; standard library and torch only.

Imported as a sibling (the scripts run as files inside a peer's environment), hence without the
name of a package in front.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "llmcompressor",
    "auto-round",
    "compressed-tensors",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "numpy",
)


def add_files(parser: argparse.ArgumentParser) -> None:
    """The arguments that name files, the same for every peer."""
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face folder")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors with input_ids")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--json", type=Path, required=True, help="file for the measurements")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")


def check_files(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Leave with a usage error if the files of ``add_files`` cannot be used."""
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model}: no config.json; pass a Hugging Face folder")
    if not arguments.ids.is_file():
        parser.error(f"{arguments.ids}: no such file")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out}: not empty; pass a new folder")


def load_ids(path: Path) -> Any:
    """The calibration token ids, int64 [samples, length]; leaves with a message for others."""
    from safetensors.torch import load_file

    ids = load_file(path)["input_ids"]
    if str(ids.dtype) != "torch.int64" or ids.ndim != 2:
        sys.exit(f"{path}: input_ids must be int64 [samples, length], is {ids.dtype}")
    return ids


def digest(ids: Any) -> str:
    """SHA-256 of the token ids, which shows that two peers saw the same."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def process_status(key: str) -> int:
    """A kB figure of /proc/self/status in bytes (VmHWM: highest resident size so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def plain(value: Any) -> Any:
    """JSON form of settings: enums, dtypes and objects become their text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if hasattr(value, "value"):
        return plain(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
