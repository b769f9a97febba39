"""What each part of CBQ is worth: one table, two seeds, a part changed at a time.

    python -m benchmarks.ablation --text wikitext2-test.txt --work DIR [--only "A;B"] [--seeds 0,1]

SmolLM2, W4A16 in groups of 64, 32 x 512 calibration tokens, 3 epochs; perplexity of the exported
integers over 40 windows of 2048 tokens of the text, embedding and head in floating point. One
result a row and seed, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.store import once
from crossbit.evaluation.statistics import paired_loss, perplexity

SAMPLES, LENGTH, WINDOWS = 32, 512, 40
BLOCKWISE = ("objective.window=1", "objective.overlap=0")
ADAROUND = ("solver.mode=sigmoid", "solver.start={kind: rtn, clip: mse}")
LORA = ("solver.parameter=low_rank", "solver.start={kind: rtn, clip: mse}")
LITERAL = ("solver.mode=sigmoid", "solver.base=zero", *LORA)

# Name -> preset, changes. The first rows build up from round to nearest, the others change one
# thing of the default.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn": ("rtn-w4a16-g64", ("solver.clip=mse",)),
    "gptq": ("gptq-w4a16-g64", ()),
    "block-wise, from rtn": ("cbq-w4a16", (*BLOCKWISE, "solver.start={kind: rtn, clip: mse}")),
    "block-wise": ("cbq-w4a16", BLOCKWISE),
    "windows of 2, no overlap": ("cbq-w4a16", ("objective.overlap=0",)),
    "default": ("cbq-w4a16", ()),
    "AdaRound": ("cbq-w4a16", ADAROUND),
    "LoRA-Rounding, straight-through": ("cbq-w4a16", LORA),
    "LoRA-Rounding, literal": ("cbq-w4a16", LITERAL),
    "homologous": ("cbq-w4a16", ("objective.homologous=1.0",)),
    "KL": ("cbq-w4a16", ("objective.kl=1.0",)),
    "CFP": ("cbq-w4a16", ("transforms=[{kind: cfp, activations: false}]",)),
    "steps fixed": ("cbq-w4a16", ("solver.steps=false",)),
    "windows of 3, overlap 2": ("cbq-w4a16", ("objective.window=3", "objective.overlap=2")),
    "windows of 4, overlap 2": ("cbq-w4a16", ("objective.window=4", "objective.overlap=2")),
    "expanding ends": ("cbq-w4a16", ("objective.expand=ends",)),
    "mean norm": ("cbq-w4a16", ("objective.norm=mean",)),
    "end to end": ("cbq-w4a16", ("end_to_end.epochs=1",)),
}


def measure(args: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """Quantize, evaluate the folder, remove it."""
    preset, changes = ROWS[row]
    out: Path = args.work / "ablation"
    shutil.rmtree(out, ignore_errors=True)
    made = crossbit.quantize(
        "demo",
        preset,
        out=out,
        samples=SAMPLES,
        length=LENGTH,
        seed=seed,
        settings=[*changes, "embedding=null", "head=null", "evaluation.windows=0"],
        overwrite=True,
    )
    found = crossbit.evaluate(str(out), text=args.text, windows=WINDOWS)["perplexity"]
    shutil.rmtree(out)
    return {
        "row": row,
        "seed": seed,
        "recipe": preset,
        "settings": list(changes),
        "losses": found["losses"],
        "perplexity": found["value"],
        "stderr": found["stderr"],
        "seconds": made["time"]["stages"]["quantize"],
        "peak_rss": made["memory"]["stages"]["quantize"],
        "windows": [
            {key: window[key] for key in ("blocks", "before", "after", "events", "seconds")}
            for window in made["training"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, help="WikiText-2 raw test, as a file or wikitext2")
    parser.add_argument("--work", type=Path, required=True, help="folder for quantized models")
    parser.add_argument("--only", help="rows, separated by semicolons; default: all")
    parser.add_argument("--seeds", default="0,1")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    original = once(
        f"demo-original-{WINDOWS}",
        f"crossbit evaluate demo --windows {WINDOWS}",
        lambda: crossbit.evaluate("demo", text=args.text, windows=WINDOWS)["perplexity"],
    )["losses"]
    for seed in map(int, args.seeds.split(",")):
        for row in args.only.split(";") if args.only else ROWS:
            name = row.lower().replace(",", "").replace(" ", "-")
            found = once(
                f"ablation-{name}-seed{seed}",
                "python -m benchmarks.ablation",
                partial(measure, args, row, seed),
            )
            paired = paired_loss(found["losses"], original)
            value = perplexity(found["losses"]).value
            print(
                f"{row} (seed {seed}): {value:.3f}, {100 * paired.value:+.2f} % "
                f"+- {100 * paired.stderr:.2f}, {found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
