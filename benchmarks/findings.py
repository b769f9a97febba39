"""The paper's findings on real models: kernels, modes, the remove-kernel curve.

python -m benchmarks.findings --text wikitext2-test.txt --work DIR [--windows 4]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.store import once


def findings(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The analysis of a model, without its thousands of rows for single layers."""
    found = crossbit.analyze(
        model,
        text=args.text,
        windows=args.windows,
        samples=args.samples,
        out=args.work / f"{model}-analysis",
        quiet=False,
    )
    return summary(found)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What is stored of an analysis: everything that speaks of the whole model."""
    kernel = {k: v for k, v in found["kernel"].items() if k not in ("layers", "types")}
    return {k: v for k, v in found.items() if k != "outliers"} | {"kernel": kernel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--models", default="demo,demo-gemma")
    args = parser.parse_args()
    for model in args.models.split(","):
        once(
            f"{model}-findings",
            f"python -m benchmarks.findings --windows {args.windows} --samples {args.samples}",
            partial(findings, args, model),
        )


if __name__ == "__main__":
    main()
