"""Several variants of one model run side by side, each on its own hidden states.

A block is loaded once and every variant goes through it: first those with the original weights,
then those with INT8 weights. Memory: one block, and the hidden states of every variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.kernel import remove_smallest
from crossbit.activations.quantize import fake_quantize_activation
from crossbit.analysis.inputs import LayerInput, Replace, replacing
from crossbit.analysis.observe import Calibrated
from crossbit.errors import WorkError
from crossbit.evaluation import perplexity
from crossbit.grid import Grid
from crossbit.models.shell import Shell
from crossbit.models.structure import BlockStructure
from crossbit.runtime.loader import BlockSource
from crossbit.solvers.rtn import rtn

INT8 = Grid(bits=8, symmetric=True, strategy="channel")
INT8_NAME = "INT8 per output channel, round to nearest"


class Change(Protocol):
    """What a variant does to the inputs of linear layers."""

    def on(self, known: Calibrated) -> Replace:
        """The change of an input with these calibrated figures: x float32 -> float32."""
        ...


@dataclass(frozen=True)
class Quantize:
    """Quantize and dequantize; a static mode falls back to per token where nothing was seen."""

    grid: ActivationGrid

    def on(self, known: Calibrated) -> Replace:
        """See ``Change``."""
        grid, columns = self.grid, known.columns
        if grid.kind in ("cross_static", "cross_static_clip") and columns is None:
            grid = replace(grid, kind="per_token", alpha=1.0)

        def quantize(x: Tensor) -> Tensor:
            own = None if columns is None else columns.to(x.device)
            return fake_quantize_activation(x, grid, columns=own)

        return quantize


@dataclass(frozen=True)
class Remove:
    """Set the smallest elements to zero, a proportion of them on the calibration text."""

    proportion: float

    def on(self, known: Calibrated) -> Replace:
        """See ``Change``."""
        theta = 0.0 if known.ratios is None else known.ratios.theta(self.proportion)
        return lambda x: remove_smallest(x, theta)


@dataclass
class Tally:
    """Elements of all changed inputs, and how many were zero before and after."""

    elements: int = 0
    before: int = 0
    after: int = 0

    @property
    def kernel(self) -> float | None:
        """Share of elements that are zero after the change, exact zeros included."""
        return self.after / self.elements if self.elements else None

    @property
    def removed(self) -> float | None:
        """Share of elements that the change set to zero."""
        return (self.after - self.before) / self.elements if self.elements else None


@dataclass
class Stream:
    """One variant of the model on its way through the blocks.

    Attributes:
        title: for error messages.
        int8: weights of the blocks rounded to INT8 rather than left as they are.
        change: what is done to the inputs of linear layers, None for nothing.
        hidden: its hidden states [W, L, D].
        tally: zeros counted while it ran.
    """

    title: str
    int8: bool
    change: Change | None
    hidden: Tensor
    tally: Tally = field(default_factory=Tally)


@torch.no_grad()
def advance(
    shell: Shell,
    index: int,
    streams: Sequence[Stream],
    inputs: Sequence[LayerInput],
    known: dict[str, Calibrated],
) -> None:
    """All variants through the loaded block ``index``, window by window; rounds its weights.

    One window at a time: dynamic column maxima are those of one sequence, and the routed tokens
    of an expert would mix several.
    """
    block = shell.block(index)
    for int8 in (False, True):
        chosen = [s for s in streams if s.int8 == int8]
        if int8 and chosen:
            _round_weights(block, shell.structure.blocks[index])
        for stream in chosen:
            kwargs = shell.block_kwargs(stream.hidden.shape[1], stream.hidden.dtype)[index]
            with replacing(block, inputs, _replacements(stream, inputs, known)):
                for i in range(len(stream.hidden)):
                    window = stream.hidden[i : i + 1]
                    window.copy_(shell.run_block(index, window, kwargs))


def losses(source: BlockSource, stream: Stream, ids: Tensor) -> list[float]:
    """Mean negative log-likelihood in nats of each window int64 [W, L], after the last block.

    Raises:
        WorkError: a loss is not finite.
    """
    values = [
        perplexity._window_loss(source, hidden, row)
        for hidden, row in zip(stream.hidden, ids, strict=True)
    ]
    if not bool(torch.tensor(values).isfinite().all()):
        raise WorkError(f"{stream.title}: the loss is not finite; try --dtype float32")
    return values


def _replacements(
    stream: Stream, inputs: Sequence[LayerInput], known: dict[str, Calibrated]
) -> dict[str, Replace]:
    change = stream.change
    if change is None:
        return {}
    return {p.name: _counted(change.on(known[p.name]), stream.tally) for p in inputs}


def _counted(function: Replace, tally: Tally) -> Replace:
    """The change in float32, counting zeros before the result is cast back."""

    def run(x: Tensor) -> Tensor:
        changed = function(x.float())
        tally.elements += x.numel()
        tally.before += x.numel() - int(torch.count_nonzero(x))
        tally.after += x.numel() - int(torch.count_nonzero(changed))
        return changed.to(x.dtype)

    return run


def _round_weights(block: nn.Module, structure: BlockStructure) -> None:
    """Replace the linear weights [N, K] by the nearest point of the INT8 grid, in place."""
    for name in structure.linears:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(rtn(weight.float(), INT8).dequantize())
