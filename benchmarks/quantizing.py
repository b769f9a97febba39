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
    model: str, recipe: str, settings: Sequence[str], samples: int, length: int, out: Path
) -> dict[str, Any]:
    """Quantize into ``out``, with ``FLOAT_ENDS``; what it took.

    Raises:
        WorkError: the command failed.
    """
    budget = f"--samples {samples} --length {length} --seed 0"
    changed = [word for setting in (*settings, *FLOAT_ENDS) for word in ("--set", setting)]
    options = f"--recipe {recipe} {budget}".split() + changed
    program = str(Path(sys.executable).with_name("crossbit"))
    log = out.with_name(f"{out.name}.log")
    found = measure([program, "quantize", model, *options, "--out", str(out)], log=log)
    described = f"crossbit quantize {Path(model).name} {' '.join(options)}"
    if found.exit_code:
        raise WorkError(f"{described}: {failure(found, log)}")
    made = json.loads((out / "crossbit.json").read_text("utf8"))
    return {
        "command": described,
        "kind": made["kind"],
        "seconds": made["time"]["stages"]["quantize"],
        "process_seconds": found.wall_seconds,
        # The process goes on to verify in transformers, which the peers do not do.
        "peak_rss": made["memory"]["stages"]["quantize"],
        "load_before": found.load_before,
    }
