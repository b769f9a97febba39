"""What a change is worth in the first blocks, before hours go into a row of a table.

    python -m benchmarks.probe --work DIR ["prefixquant-w4a4+cl objective.ahead_share=1" ...]

SmolLM2, the budget of ``benchmarks.cqe``, the first 8 of 30 blocks quantized and the others in
floating point; loss over 12 windows of 2048 tokens of the embedded evaluation text, which no table
is about, so that settings may be chosen on it. Exported integers. A row is a recipe and settings;
those that were tried are listed here, others can be named. One result a row.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.cqe import BUDGET
from benchmarks.quantizing import quantized
from benchmarks.rows import result_name
from benchmarks.store import once, once_among
from crossbit.evaluation.statistics import paired_loss

BLOCKS, LAYERS, WINDOWS = 8, 30, 12
SAMPLES, LENGTH = 64, 512
ORIGINAL = f"demo-original-embedded-{WINDOWS}"
_REST = ", ".join(f"layers.{index}" for index in range(BLOCKS, LAYERS))
ROWS = (
    "duquant-w4a4",
    "duquant-w4a4+sde+cl",
    "prefixquant-w4a4",
    "prefixquant-w4a4+cl001",
    "prefixquant-w4a4 solver.parameter=none",
    "prefixquant-w4a4+sde+cl solver.parameter=none",
)


def split(row: str) -> tuple[str, tuple[str, ...]]:
    """Recipe and settings of a row."""
    recipe, *changes = row.split()
    return recipe, tuple(changes)


def measure(work: Path, row: str) -> dict[str, Any]:
    """Quantize the first blocks, evaluate the folder, remove it."""
    recipe, changes = split(row)
    out = work / result_name("probe", row, 0)
    settings = (*BUDGET, f"ignore=[{_REST}]", *changes)
    took, made = quantized("demo", recipe, settings, out, budget=(SAMPLES, LENGTH), resume=True)
    found = crossbit.evaluate(str(out), windows=WINDOWS)["perplexity"]
    shutil.rmtree(out)
    return {
        "recipe": recipe,
        "settings": list(changes),
        "losses": found["losses"],
        "perplexity": found["value"],
        "held_out": [[window["before"], window["after"]] for window in made["training"]],
        **took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for quantized models")
    parser.add_argument("rows", nargs="*", default=ROWS, help="each a recipe and settings")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    original = once(
        ORIGINAL,
        f"crossbit evaluate demo --windows {WINDOWS}",
        lambda: crossbit.evaluate("demo", windows=WINDOWS)["perplexity"],
    )["losses"]
    for row in args.rows:
        command = f'python -m benchmarks.probe "{row}"'
        name = result_name("probe", row, 0)
        found = once_among(args.work, name, command, partial(measure, args.work, row))
        if found is not None:
            paired = paired_loss(found["losses"], original)
            loss = f"{100 * paired.value:+.2f} % +- {100 * paired.stderr:.2f}"
            print(f"{row}: {loss}, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
