"""All benchmarks, resumable: what is in results/ is not measured again.

WIKITEXT2_TEST=wikitext2-test.txt python -m benchmarks.run [--work DIR] [--peer PYTHON]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import ablation, cqe


def steps(text: str, work: str, peer: str | None) -> list[list[str]]:
    """Every benchmark with its options, the tables last.

    Args:
        text: the evaluation text.
        work: folder for models.
        peer: python of the peers' environment; their rows are left out without.
    """
    at = ["--work", work]
    common = ["--text", text, *at]
    theirs = ["--peer", peer] if peer else []
    found = [["quality", *common], ["findings", *common], ["fake_quant_cost", *at]]
    if peer:
        found.append(["gptq_peer", *common, *theirs])
    found += [["verify_schemes", *at], ["plan_accuracy", *at], ["scaling", *at]]
    # The first two and the last windows of cbq-w4a16, and its disk where training helps.
    trained = ["--recipes", "cbq-w4a16"]
    found.append(["plan_accuracy", *at, "--only", "1b", "--blocks", "6", *trained])
    found.append(["plan_accuracy", *at, "--only", "1b-from-rtn", "--blocks", "4", *trained])
    found += [["products"], ["train_step"], ["cqe_cost"], ["ablation", *common], ["cqe", *common]]
    found += [["probe", *at], ["second", *common, "--seeds", "0"]]
    for table, rows in (("ablation", ablation.LONG), ("cqe", (*cqe.FEW, *cqe.LONG))):
        found.append([table, *common, "--seeds", "0", "--only", ";".join(rows)])
    found.append(["low_bits", *common, *theirs, "--samples", "64", "--length", "512"])
    found.append(["low_bits", *common, *theirs, "--only", "w4a16"])
    return [*found, ["tables"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=os.environ.get("WIKITEXT2_TEST", "wikitext2"))
    parser.add_argument("--work", default="bench-work")
    parser.add_argument("--peer", help="python of llm-compressor's environment; skipped without")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    for name, *options in steps(args.text, args.work, args.peer):
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True, cwd=root)


if __name__ == "__main__":
    main()
