"""The paper's findings on real models: kernels, modes, the remove-kernel curve.

python -m benchmarks.findings --text wikitext2-test.txt --work DIR [--windows 4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import crossbit
from benchmarks.store import once


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
            lambda model=model: crossbit.analyze(  # type: ignore[misc]
                model,
                text=args.text,
                windows=args.windows,
                samples=args.samples,
                out=args.work / f"{model}-analysis",
                quiet=False,
            ),
        )


if __name__ == "__main__":
    main()
