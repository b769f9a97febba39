"""Content digests of files and model folders, remembered so that big files are hashed once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from crossbit.cache import atomic_write, crossbit_cache_dir


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents as hex.

    The digest is remembered in the cache under (real path, size, mtime in ns), so a file that did
    not change is read once. A cache that cannot be written costs time, never correctness.
    """
    real = path.resolve()
    stat = real.stat()
    key = hashlib.sha256(f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    entry = crossbit_cache_dir() / "digests" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = str(json.loads(entry.read_text())["sha256"])
        if len(known) == 64:
            return known
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):
        atomic_write(entry, json.dumps({"path": str(real), "size": stat.st_size, "sha256": digest}))
    return digest


def combined_sha256(named_files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over (name, content digest) pairs, in the order given."""
    total = hashlib.sha256()
    for name, path in named_files:
        total.update(f"{name}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def folder_fingerprint(folder: Path, weight_files: Iterable[str]) -> str:
    """Identity of a model: SHA-256 over ``config.json`` and its weight files, by sorted name."""
    names = ["config.json", *sorted(set(weight_files))]
    return combined_sha256((name, folder / name) for name in names)
