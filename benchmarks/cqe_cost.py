"""What CQE+ costs: a training step with it against one without, and its decompositions.

    python -m benchmarks.cqe_cost [--rounds 7]

SmolLM2, 4 x 1024 tokens, bf16, the ranges of the weights' groups trained (LWC). Steps with and
without alternate; the figure is the median of the ratios of neighbouring runs. The look-ahead goes
two blocks beyond a window of one block, with an error after the first and after the last: with all
sequences, and with the share of them (``objective.ahead_share``) that the add-on sends ahead, three
or four of a batch, over five steps. Hadamard transforms of 1024 tokens are timed against products
with the matrix.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from benchmarks.store import once
from benchmarks.train_step import Window, alternating, seconds
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.source import resolve_model
from crossbit.products import widened_products
from crossbit.recipe import Recipe
from crossbit.rotations.hadamard import apply_hadamard
from crossbit.solvers.expansion import singular_basis

LWC = ("solver.parameter=none", "solver.limits=range", "solver.start={kind: rtn}")
EXPANSIONS = {
    **{f"band {k}": f"{{kind: band, width: {k}}}" for k in (0, 2, 4, 8, 16, 32, 128)},
    "all of B": "{kind: full}",
}
HADAMARD = (576, 1536, 2048, 11008)


def ratio(plain: Window, other: Window, rounds: int, steps: int = 1) -> dict[str, Any]:
    """Seconds of a step without, and of one with it, as means of ``steps``."""

    def several(window: Window) -> None:
        for _ in range(steps):
            window.trained()

    without, with_it, ratio = alternating(partial(several, plain), partial(several, other), rounds)
    return {"plain_seconds": without / steps, "seconds": with_it / steps, "ratio": ratio}


def decompositions() -> dict[str, Any]:
    """Seconds of the singular directions of every linear layer in the blocks."""
    folder = resolve_model("demo").path
    checkpoint, shell = Checkpoint(folder), Shell(open_config(folder))
    total, count = 0.0, 0
    for index, structure in enumerate(shell.structure.blocks):
        block = shell.load_block(index, checkpoint, torch.float32)
        for name in structure.linears:
            weight = block.get_submodule(name).get_parameter("weight").detach()
            total += seconds(lambda weight=weight: singular_basis(weight))
            count += 1
        shell.free_block(index)
    return {"seconds": total, "layers": count}


def transform(width: int, rounds: int) -> dict[str, Any]:
    """The fast transform of ``width`` channels against the dense product."""
    x = torch.randn(1024, width).bfloat16()
    matrix = apply_hadamard(torch.eye(width)).bfloat16()
    dense, fast, ratio = alternating(lambda: x @ matrix, lambda: apply_hadamard(x), rounds)
    return {"dense_seconds": dense, "seconds": fast, "ratio": ratio}


def measure(rounds: int) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {}
    plain = Window(LWC)
    for name, expansion in EXPANSIONS.items():
        found[name] = ratio(plain, Window((*LWC, f"solver.expansion={expansion}")), rounds)
    one = Window(LWC, (3,))
    found["look-ahead 2"] = ratio(one, Window(LWC, (3,), ahead=2), rounds)
    share = Recipe.load("omniquant-w4a16+cl").objective.ahead_share
    some = Window(LWC, (3,), ahead=2, share=share)
    found[f"look-ahead 2, {share:g} of the sequences"] = ratio(one, some, rounds, steps=5)
    found["decompositions"] = decompositions()
    for width in HADAMARD:
        found[f"hadamard {width}"] = transform(width, rounds)
    return found


@widened_products()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    found = once("cqe-cost", "python -m benchmarks.cqe_cost", lambda: measure(args.rounds))
    for name, row in found.items():
        if name == "conditions":
            continue
        other = "the dense product" if "dense_seconds" in row else "a step without"
        about = f"{row['ratio']:.2f}x of {other}" if "ratio" in row else ""
        print(f"{name}: {row['seconds']:.3f} s {about}")


if __name__ == "__main__":
    main()
