"""16-bit products by way of float32 against torch's own, where the processor has no instructions.

    python -m benchmarks.products [--rounds 3]

A layer of SmolLM2 and the head over 512 tokens in bf16, and a training step of one of its blocks
with 2 x 512 tokens: ranges of the weights' groups (LWC). With and without ``widened_products``
alternate; the figure is the median of the ratios of neighbouring runs. On a processor with bf16
instructions both are the same way, and the ratios are 1 within noise. A result a kind of processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cqe_cost import LWC
from benchmarks.store import once
from benchmarks.train_step import Window, alternating
from crossbit.device import computing_on
from crossbit.products import slow_dtypes, widened_products

LAYERS = {"gate_proj": (1536, 576), "head": (49152, 576)}


def compared(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of torch's own way and of the other one."""
    own, widened, ratio = alternating(run, widened_products()(run), rounds)
    return {"own_seconds": own, "seconds": widened, "ratio": ratio}


def measure(rounds: int) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {
        "processor": computing_on("cpu"),
        "slow": [str(dtype).removeprefix("torch.") for dtype in slow_dtypes()],
    }
    for name, (rows, columns) in LAYERS.items():
        x, weight = (torch.randn(n, columns).bfloat16() for n in (512, rows))
        found[name] = compared(partial(F.linear, x, weight), rounds)
    found["training step"] = compared(Window(LWC, (3,), tokens=(2, 512)).trained, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    name = f"products-{instructions}{'' if slow_dtypes() else '-bf16'}"
    found = once(name, "python -m benchmarks.products", lambda: measure(args.rounds))
    print(f"{found['processor']}; slow: {', '.join(found['slow']) or 'nothing'}")
    for name in (*LAYERS, "training step"):
        row = found[name]
        print(
            f"{name}: {row['seconds']:.3f} s, {row['own_seconds']:.3f} s in torch's own way, "
            f"{row['ratio']:.2f}x"
        )


if __name__ == "__main__":
    main()
