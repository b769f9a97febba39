"""Run commands one after another and measure each: time, CPU and memory (Linux).

    python benchmarks/measure.py --json FILE [--repeat N] \
        --run crossbit "crossbit quantize ..." --run peer ".venv-peer/bin/python ..."

With --repeat the commands alternate (A B A B), so that a slow drift of the machine falls on
both. Keep this process small: it imports the standard library only, because on Linux a child's
ru_maxrss starts at the size of the process that spawned it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """What one command cost. Memory in bytes, time in seconds.

    peak_rss_bytes: VmHWM of the command's own process, the kernel's record of its highest
        resident size (mapped files included); peak_anonymous_bytes: highest sampled
        RssAnon + RssShmem of the process with all its descendants, which leaves out file
        pages that the kernel can drop; peak_tree_rss_bytes: the same with file pages.
        ru_maxrss_bytes: what wait4 reported, the largest single process of the tree.
    load_before: 1-minute load average when the command began. Above about 0.3 the times are
        indicative only.
    """

    command: tuple[str, ...]
    exit_code: int
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_tree_rss_bytes: int
    ru_maxrss_bytes: int
    samples: int
    load_before: float


def read_status(pid: int) -> dict[str, int]:
    """The kB lines of /proc/PID/status in bytes; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    figures: dict[str, int] = {}
    for line in text.splitlines():
        if line.endswith(" kB"):
            name, _, value = line.partition(":")
            figures[name] = int(value.split()[0]) * 1024
    return figures


def descendants(pid: int) -> list[int]:
    """pid and every living process below it."""
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for task in tasks:
            try:
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.extend(int(child) for child in children.split())
    return found


class Sampler(threading.Thread):
    """Polls the memory of a process tree until stopped."""

    def __init__(self, pid: int, interval: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.interval = pid, interval
        self.highest, self.anonymous, self.tree, self.samples = 0, 0, 0, 0
        self.finished = threading.Event()

    def run(self) -> None:
        """Sample at once, then every interval, keeping the highest figures."""
        while not self.finished.wait(self.interval if self.samples else 0.0):
            own = read_status(self.pid)
            states = [own, *(read_status(child) for child in descendants(self.pid)[1:])]
            anonymous = sum(s.get("RssAnon", 0) + s.get("RssShmem", 0) for s in states)
            # Popen returns after the exec, so this is the command's own high-water mark.
            self.highest = max(self.highest, own.get("VmHWM", 0))
            self.anonymous = max(self.anonymous, anonymous)
            self.tree = max(self.tree, sum(s.get("VmRSS", 0) for s in states))
            self.samples += 1


def measure(
    command: Sequence[str],
    *,
    interval: float = 0.05,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Measurement:
    """Run command to its end and measure it.

    interval: seconds between two memory samples (a sample costs well under a millisecond).
    environment: added to the inherited one. log: file for its output, which goes where this
    process's goes otherwise. Raises OSError when it cannot be started.
    """
    load = os.getloadavg()[0]
    began = time.perf_counter()
    with contextlib.ExitStack() as opened:
        output = opened.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=output, stderr=output
        )
    sampler = Sampler(process.pid, interval)
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        sampler.finished.set()
    wall = time.perf_counter() - began
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    maxrss = usage.ru_maxrss * 1024
    return Measurement(
        command=tuple(command),
        exit_code=process.returncode,
        wall_seconds=wall,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_rss_bytes=sampler.highest or maxrss,
        peak_anonymous_bytes=sampler.anonymous,
        peak_tree_rss_bytes=sampler.tree,
        ru_maxrss_bytes=maxrss,
        samples=sampler.samples,
        load_before=load,
    )


def machine() -> dict[str, str | int]:
    """What the figures were taken on: CPU model, usable cores, memory, kernel."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure commands: time, CPU and memory.")
    parser.add_argument(
        "--run", nargs=2, action="append", required=True, metavar=("NAME", "COMMAND")
    )
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all commands")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between samples")
    arguments = parser.parse_args()

    runs: list[dict[str, object]] = []
    failed = False
    for turn in range(arguments.repeat):
        for name, text in arguments.run:
            try:
                result = measure(shlex.split(text), interval=arguments.interval)
            except OSError as error:
                print(f"{name}: cannot start {text!r}: {error}", file=sys.stderr)
                return 2
            runs.append({"name": name, "round": turn, **asdict(result)})
            failed = failed or result.exit_code != 0
            print(
                f"{name}: exit {result.exit_code}, {result.wall_seconds:.1f} s wall, "
                f"{result.user_seconds + result.system_seconds:.1f} s CPU, "
                f"{result.peak_rss_bytes / 1e9:.3f} GB resident, "
                f"{result.peak_anonymous_bytes / 1e9:.3f} GB anonymous",
                file=sys.stderr,
            )
    text = json.dumps({"machine": machine(), "runs": runs}, indent=2)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    else:
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
