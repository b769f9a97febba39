"""All benchmarks, resumable: what is in results/ is not measured again.

WIKITEXT2_TEST=wikitext2-test.txt python benchmarks/run.py [--work DIR] [--peer PYTHON]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=os.environ.get("WIKITEXT2_TEST", "wikitext2"))
    parser.add_argument("--work", default="bench-work")
    parser.add_argument("--peer", help="python of llm-compressor's environment; skipped without")
    args = parser.parse_args()
    common = ["--text", args.text, "--work", args.work]
    steps = [["quality", *common], ["findings", *common], ["fake_quant_cost", "--work", args.work]]
    if args.peer:
        steps.append(["gptq_peer", *common, "--peer", args.peer])
    steps += [["plan_accuracy", "--work", args.work], ["scaling", "--work", args.work]]
    steps += [["train_step"], ["cqe_cost"], ["ablation", *common], ["cqe", *common]]
    steps.append(["second", *common, "--seeds", "0"])
    if args.peer:
        steps.append(["low_bits", *common, "--peer", args.peer])
    steps.append(["tables"])
    root = Path(__file__).resolve().parent.parent
    for name, *options in steps:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True, cwd=root)


if __name__ == "__main__":
    main()
