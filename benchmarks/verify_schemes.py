"""Every exported scheme on the real models: quantize with a little text, reload, verify.

    python -m benchmarks.verify_schemes --work DIR [--models demo,demo-gemma]

What is shown is that the file is the model, not how good it is: calibration is 4 x 128 tokens.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.quality import FLOAT_HEAD
from benchmarks.store import once

# One preset for each way in which layers are stored; folds, GPTQ and plain rounding among them.
PRESETS = (
    "crossquant-w8a8",
    "rtn-w8a8-static",
    "rtn-w8a16",
    "gptq-w4a16",
    "gptq-w4a16-g64",
    "rtn-w3a16-g64",
    "crossquant-w4a8-g64",
    "crossquant-w4a4",
    "crossquant-w4a4-channel",
)
ASYMMETRIC = (
    "weights.symmetric=false",
    *FLOAT_HEAD,
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ()) for name in PRESETS},
    "crossquant-w8a8, float head": ("crossquant-w8a8", FLOAT_HEAD),
    "rtn-w4a16-g64, asymmetric": ("rtn-w4a16-g64", ASYMMETRIC),
    "w4a16 with down_proj at 8 bits": (
        "rtn-w4a16-g64",
        ("overrides=[{match: down_proj, weights: {bits: 8, group: 64}}]", "ignore=[layers.0]"),
    ),
}


def verify(model: str, recipe: str, settings: tuple[str, ...], work: Path) -> dict[str, Any]:
    """The verification's measurements; quantize itself fails where one does not hold."""
    out = work / "verify"
    made = crossbit.quantize(
        model,
        recipe,
        out=out,
        samples=4,
        length=128,
        settings=[*settings, "evaluation.windows=0"],
        overwrite=True,
    )
    shutil.rmtree(out)
    return {"verify": {k: v for k, v in made["verify"].items() if k in ("passed", "checks")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default="demo,demo-gemma")
    args = parser.parse_args()
    for model in args.models.split(","):
        for name, (recipe, settings) in CASES.items():
            found = once(
                f"{model}-verify-{name.replace(', ', '-').replace(' ', '-')}",
                f"python -m benchmarks.verify_schemes  ({recipe} {' '.join(settings)})",
                partial(verify, model, recipe, settings, args.work),
            )
            state = "passed" if found["verify"]["passed"] else "FAILED"
            print(f"{model} {name}: {state}", flush=True)


if __name__ == "__main__":
    main()
