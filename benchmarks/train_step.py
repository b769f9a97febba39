"""Time of an optimiser step of a window against the bare forward and backward of its blocks.

    python -m benchmarks.train_step [--rounds 7]

Two blocks of SmolLM2, 4 x 1024 tokens, bf16. The bare pass, with the attention of torch, makes the
gradients of all weights; the step makes the trained weights, their gradients, Adam's update and
everything else that training does. They alternate; the figure is the median of the ratios of
neighbouring runs. ``trained_bytes`` are what is trained and what Adam keeps of it: the memory in
which a low rank differs from one offset a weight, as AdaRound has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.store import once
from crossbit.engine.fit import Optimiser, Progress, Task, _step
from crossbit.engine.job import Job
from crossbit.engine.opening import open_block
from crossbit.engine.plan import make_plan
from crossbit.engine.trained import layers_of, make_trainable
from crossbit.engine.window import _frozen
from crossbit.engine.workdir import WorkDir
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.source import resolve_model
from crossbit.objective import reconstruction_loss
from crossbit.products import widened_products
from crossbit.recipe import Recipe
from crossbit.runtime.attention import IMPLEMENTATION, register

BLOCKS, SEQUENCES, LENGTH = (3, 4), 4, 1024
TOTAL = 100  # steps that a training is said to have


class Window:
    """Some blocks twice: as they are, and in training.

    Args:
        settings: changes to the recipe.
        blocks: which.
        ahead: how many original blocks after them the output goes through.
        share: of the sequences that do.
        tokens: sequences, and tokens of each.
    """

    def __init__(
        self,
        settings: tuple[str, ...],
        blocks: tuple[int, ...] = BLOCKS,
        ahead: int = 0,
        share: float = 1.0,
        tokens: tuple[int, int] = (SEQUENCES, LENGTH),
    ) -> None:
        self.blocks = blocks
        sequences, length = tokens
        folder = resolve_model("demo").path
        self.dtype = torch.bfloat16
        checkpoint = Checkpoint(folder)
        register()
        self.shell = Shell(open_config(folder), attn=IMPLEMENTATION)
        self.shell.load_outside(checkpoint, self.dtype)
        batch = f"training.batch={sequences}"
        recipe = Recipe.load("cbq-w4a16", (*settings, batch))
        plan = make_plan(self.shell.structure, recipe, self.shell.config.hidden_size)
        ids = torch.randint(
            0, 1000, (sequences, length), generator=torch.Generator().manual_seed(0)
        )
        job = Job(self.shell, checkpoint, plan, recipe, ids, self.dtype, _nothing, lambda: None)
        self.x = self.shell.embed(ids)
        self.kwargs = self.shell.block_kwargs(length, self.dtype)
        trained = []
        with TemporaryDirectory() as place:
            work = WorkDir(Path(place))
            with work.writer("x", tuple(self.x.shape), self.x.dtype) as writer:
                writer.append(self.x)
                stream = writer.commit()
            for index in blocks:
                opened = open_block(job, index, stream, None)
                trained.append(
                    make_trainable(
                        index, opened, plan.blocks[index], self.kwargs[index], self.dtype, 0
                    )
                )
        bare = Shell(open_config(folder))
        self.bare = [bare.load_block(i, checkpoint, self.dtype) for i in blocks]
        for block in self.bare:
            for parameter in block.parameters():
                parameter.requires_grad_(parameter.ndim == 2)
        target = self.x.clone()

        def read(numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self.x[numbers], [target[numbers]]

        self.task = Task(
            blocks=trained,
            read=read,
            loss=lambda outputs, targets, _: sum(
                (reconstruction_loss(o, targets[0][: o.shape[0]]) for o in outputs[::2]),
                torch.zeros(()),
            ),
            fitting=torch.arange(sequences),
            held=torch.arange(1),
            length=length,
            settings=recipe.training,
            steps={name: True for name, _ in layers_of(trained)},
            dtype=self.dtype,
            seed=0,
            ahead=[_frozen(job, blocks[-1] + 1 + n, length) for n in range(ahead)],
            ahead_share=share,
        )
        self.optimiser = Optimiser(self.task)
        self.done = 0

    def plain(self) -> None:
        """Forward and backward."""
        hidden = self.x.detach().requires_grad_()
        for block, index in zip(self.bare, self.blocks, strict=True):
            out = block(hidden, **self.kwargs[index])
            hidden = out[0] if isinstance(out, tuple) else out
        reconstruction_loss(hidden, self.x).backward()  # type: ignore[no-untyped-call]
        for block in self.bare:
            block.zero_grad()

    def trained(self) -> None:
        """A step of training."""
        _step(self.task, self.optimiser, Progress(done=self.done % TOTAL), TOTAL)
        self.done += 1


def _nothing(*_: Any) -> dict[str, Tensor]:
    return {}


def seconds(run: Any) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternating(first: Any, second: Any, rounds: int) -> tuple[float, float, float]:
    """Median seconds of two calls that alternate, and median of the neighbours' ratios."""
    first()
    second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def measure(settings: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """A bare pass and a step of training."""
    window = Window(settings)
    bare, step, ratio = alternating(window.plain, window.trained, rounds)
    parameters = [p for _, x in layers_of(window.task.blocks) for p in x.state.parameters.values()]
    kept = [*parameters, *(tensor for _, tensor in window.optimiser.state())]
    return {
        "bare_seconds": bare,
        "step_seconds": step,
        "ratio": ratio,
        "trained_bytes": sum(tensor.numel() * tensor.element_size() for tensor in kept),
    }


@widened_products()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    variants: dict[str, tuple[str, ...]] = {
        "full": (),
        "low_rank": ("solver.parameter=low_rank",),
        "w4a4": ("activations={bits: 4}",),
    }
    found = once(
        "train-step",
        "python -m benchmarks.train_step",
        lambda: {name: measure(changes, args.rounds) for name, changes in variants.items()},
    )
    for name in variants:
        row = found[name]
        print(
            f"{name}: {row['step_seconds']:.3f} s a step, {row['bare_seconds']:.3f} s bare, "
            f"{row['ratio']:.2f}x, {row['trained_bytes'] / 1e6:.1f} MB trained"
        )


if __name__ == "__main__":
    main()
