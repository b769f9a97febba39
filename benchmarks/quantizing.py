"""Quantizing with crossbit in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement, measure
from crossbit.errors import WorkError

# Embedding and head as they are; what is evaluated, the benchmarks evaluate.
FLOAT_ENDS = ("embedding=null", "head=null", "evaluation.windows=0")


def cleaned(text: str) -> str:
    """A message without the folders of this machine: of an absolute path, the last name."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)


def failure(found: Measurement, log: Path) -> str:
    """Exit code and last line of a log, which of a traceback is the message."""
    lines = [line for line in log.read_text("utf8", "replace").splitlines() if line.strip()]
    return f"exit {found.exit_code}: {cleaned(lines[-1] if lines else 'no output')}"


def quantized(
    model: str,
    recipe: str,
    settings: Sequence[str],
    out: Path,
    *,
    budget: tuple[int, int] | None = None,
    seed: int = 0,
    resume: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize into ``out``, with ``FLOAT_ENDS``; what it took, and its crossbit.json.

    Args:
        model, recipe, settings, out: of the command.
        budget: calibration sequences and their tokens; None leaves them to recipe and settings.
        seed: of the calibration windows.
        resume: go on with what a killed run left.

    Raises:
        WorkError: the command failed.
    """
    samples = "" if budget is None else f" --samples {budget[0]} --length {budget[1]}"
    changed = [word for setting in (*settings, *FLOAT_ENDS) for word in ("--set", setting)]
    options = f"--recipe {recipe}{samples} --seed {seed}".split() + changed
    program = str(Path(sys.executable).with_name("crossbit"))
    log = out.with_name(f"{out.name}.log")
    work = out.with_name(f"{out.name}.crossbit-work")
    resumed = work.exists() or out.exists()  # finished, but not evaluated
    where = ["--out", str(out), *(["--resume"] if resume else [])]
    found = measure([program, "quantize", model, *options, *where], log=log)
    described = f"crossbit quantize {Path(model).name} {' '.join(options)}"
    if found.exit_code:
        raise WorkError(f"{described}: {failure(found, log)}")
    made = json.loads((out / "crossbit.json").read_text("utf8"))
    return {
        "command": described,
        "kind": made["kind"],
        # Then neither seconds nor memory are those of a whole run.
        "resumed": resume and resumed,
        "seconds": made["time"]["stages"]["quantize"],
        "process_seconds": found.wall_seconds,
        # Of this process alone, verification too; what other jobs take of the machine is not in it.
        "cpu_seconds": found.user_seconds + found.system_seconds,
        # The process goes on to verify in transformers, which the peers do not do.
        "peak_rss": made["memory"]["stages"]["quantize"],
        "load_before": found.load_before,
    }, made
