"""Time of evaluating W8A8 against the bare bf16 forward of the same model.

    python -m benchmarks.fake_quant_cost --work DIR [--rounds 5]

Both run the same windows through all blocks of the whole model in memory, alternating; the figure
is the median of the ratios of neighbouring runs. Head and loss are left out of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import crossbit
from benchmarks.store import once
from crossbit.corpora import evaluation_windows, load_text
from crossbit.models.opening import open_tokenizer
from crossbit.models.source import resolve_model
from crossbit.products import widened_products
from crossbit.runtime.loader import load_model

WINDOWS, LENGTH = 2, 2048


def seconds(model: Any, ids: torch.Tensor) -> float:
    """Wall seconds of the blocks on all windows."""
    started = time.perf_counter()
    with torch.no_grad():
        for window in ids:
            model.model(input_ids=window[None], use_cache=False)
    return time.perf_counter() - started


@widened_products()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    original = resolve_model("demo").path
    out = args.work / "demo-rtn-w8a8"
    if not out.exists():
        crossbit.quantize("demo", "rtn-w8a8", out=out, settings=["evaluation.windows=0"])
    corpus = load_text(None, split="evaluation")
    tokenizer = open_tokenizer(original)
    ids = evaluation_windows(corpus, tokenizer, length=LENGTH, windows=WINDOWS, bos=False)

    def measure() -> dict[str, Any]:
        bare: Any = load_model(original, dtype=torch.bfloat16)
        result: dict[str, Any] = {"windows": WINDOWS, "length": LENGTH}
        for execution in ("integer", "fake"):
            quantized: Any = load_model(out, dtype=torch.bfloat16, execution=execution)
            seconds(bare, ids[:1])
            seconds(quantized, ids[:1])
            pairs = [(seconds(bare, ids), seconds(quantized, ids)) for _ in range(args.rounds)]
            result[execution] = {
                "bare_seconds": statistics.median(b for b, _ in pairs),
                "quantized_seconds": statistics.median(q for _, q in pairs),
                "ratio": statistics.median(q / b for b, q in pairs),
                "ratios": [q / b for b, q in pairs],
            }
        return result

    command = f"python -m benchmarks.fake_quant_cost --rounds {args.rounds}"
    found = once("fake-quant-cost", command, measure)
    for execution in ("integer", "fake"):
        print(execution, found[execution])


if __name__ == "__main__":
    main()
