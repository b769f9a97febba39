"""What this machine has left: memory for this process, space for its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def held_memory() -> int:
    """Anonymous and shared memory of this process in bytes; all resident memory off Linux."""
    try:
        text = Path("/proc/self/status").read_text("utf8")
    except OSError:
        return int(psutil.Process().memory_info().rss)
    kib = {line.partition(":")[0]: line.split()[1] for line in text.splitlines() if " kB" in line}
    return 1024 * (int(kib.get("RssAnon", 0)) + int(kib.get("RssShmem", 0)))


def available_memory() -> int:
    """Bytes that this process can have in all: what it holds, and what is free to be taken.

    The limit of the control group counts, where there is one.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text("utf8").strip()
        if limit != "max":
            stat = (_CGROUP / "memory.stat").read_text("utf8").split()
            values = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            used = int((_CGROUP / "memory.current").read_text("utf8"))
            # Pages of files can be dropped.
            free = min(free, int(limit) - used + values.get("file", 0))
    except (OSError, ValueError):
        pass
    return held_memory() + max(0, free)


def existing(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def available_disk(folder: Path) -> int:
    """Bytes that can be written into a folder, which need not exist yet.

    What it holds counts as free: a new run deletes it, a resumed one has written it already.
    """
    held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return int(shutil.disk_usage(existing(folder)).free) + held


def same_disk(one: Path, other: Path) -> bool:
    """True if both folders will be on one file system."""
    return existing(one).stat().st_dev == existing(other).stat().st_dev
