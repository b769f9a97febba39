"""Results on disk: one JSON a measurement, so that a stopped benchmark goes on where it was."""

from __future__ import annotations

import datetime
import fcntl
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit that is measured, with a + where its files were changed; "" outside git."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True)
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "../src", "../benchmarks/*.py"]
        )
    except OSError:
        return ""
    if head.returncode:
        return ""
    return head.stdout.decode().strip() + ("+" if changed.returncode else "")


def once(name: str, command: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored result of that name, or what ``measure`` returns, stored with its conditions."""
    path = RESULTS / f"{name}.json"
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text("utf8"))
        return stored
    print(f"measuring {name}", flush=True)
    # Before: a run of hours may outlive a checkout.
    measured = commit()
    instructions = torch.backends.cpu.get_cpu_capability()
    result = {
        **measure(),
        "conditions": {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()} ({instructions}), {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "commit": measured,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    temporary.replace(path)
    return result


def once_among(
    work: Path, name: str, command: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """``once``, or None, and a line that says so, while another process is at that result."""
    with claimed(work, name) as mine:
        if mine:
            return once(name, command, measure)
    print(f"{name}: another process is at it", flush=True)
    return None


@contextmanager
def claimed(work: Path, name: str) -> Iterator[bool]:
    """Whether no other process with this work folder is measuring that result.

    Several can share the rows of a table so; the claim of one that is killed ends with it.
    """
    with (work / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
