"""Folders that are built once and kept in the cache: converted, unpickled or dequantized models."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from crossbit.cache import crossbit_cache_dir
from crossbit.errors import InputError, WorkError

_PARTIAL_PREFIX = ".partial-"
_STALE_SECONDS = 24 * 3600.0


def models_cache() -> Path:
    """The folder of the cache that holds built model folders (created if missing).

    Raises:
        InputError: it cannot be created.
    """
    path = crossbit_cache_dir() / "models"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: the cache folder cannot be created ({error.strerror}); "
            "set CROSSBIT_CACHE to a folder that can be written"
        ) from error
    return path


def build_once(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cached folder ``key``, building it first if it is not there yet.

    ``build`` fills an empty folder beside the final one; only when it returns is that folder
    renamed to its final name, so a folder under its final name is always whole. Two processes
    building the same key at once both succeed: the later one drops its copy.

    Args:
        key: folder name; has to determine the contents.
        build: fills the folder it is given; its exceptions pass through.

    Returns:
        The folder, ``models_cache() / key``.

    Raises:
        WorkError: the cache cannot be written (full, or read-only).
    """
    parent = models_cache()
    target = parent / key
    if target.is_dir():
        return target
    _sweep_stale(parent)
    partial: Path | None = None
    try:
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL_PREFIX}{key}-", dir=parent))
        build(partial)
        partial.chmod(0o755)  # mkdtemp makes it private; the cache may be shared by a group
        try:
            os.rename(partial, target)
        except OSError:
            # Another process was faster: its folder is whole and equal, so it stays.
            if not target.is_dir():
                raise
        return target
    except OSError as error:
        raise WorkError(
            f"{parent}: cannot write the converted model ({error.strerror or error}); "
            "make room, or set CROSSBIT_CACHE to another folder"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sweep_stale(parent: Path) -> None:
    """Remove what killed builds left behind, old enough that no build can still be using it."""
    for left in parent.glob(f"{_PARTIAL_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
