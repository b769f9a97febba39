"""Evaluate the folders that the peers' scripts write, and say how many bits they spend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.quantize import fake_quantize_activation
from crossbit.engine.progress import Reporter
from crossbit.evaluation.perplexity import window_losses
from crossbit.export.reader import QuantizedCheckpoint, is_quantized
from crossbit.export.research import is_research, model_config
from crossbit.models.validate import read_config
from crossbit.products import widened_products
from crossbit.runtime.linear import QuantLinear
from crossbit.runtime.loader import BlockSource, open_blocks

ACTIVATIONS = "activations.json"
# AutoRound's int_sym keeps the steps of inputs at or above this.
SMALLEST_STEP = 1e-5


def signed_full_range(x: Tensor, bits: int) -> Tensor:
    """AutoRound's symmetric input grid (``int_sym``, a scale a token): x [..., K], same dtype.

    The row's largest element takes the code -2^(b-1): the step is signed, and stored in float16.
    """
    half = 1 << (bits - 1)
    low = -x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    largest = torch.where(high < low, low, -high)
    step = (largest / half).half()
    small = torch.where(step < 0, step.clamp(max=-SMALLEST_STEP), step.clamp(min=SMALLEST_STEP))
    codes = torch.round(x / small).clamp(-half, half - 1)
    return (small * codes).to(x.dtype)


def input_quantizer(bits: int, kind: str) -> Callable[[Tensor], Tensor]:
    """``signed_full_range``, or ``per_token``: the grid of compressed-tensors."""
    if kind == "signed_full_range":
        return lambda x: signed_full_range(x, bits)
    grid = ActivationGrid(bits=bits)
    return lambda x: fake_quantize_activation(x, grid)


class InputQuantized(BlockSource):
    """A weight-only folder whose quantized layers also quantize their inputs."""

    def __init__(self, source: BlockSource, quantize: Callable[[Tensor], Tensor]) -> None:
        self.__dict__.update(source.__dict__)
        self._quantize = quantize

    def load(self, index: int) -> nn.Module:
        """The block, with its inputs quantized."""
        block = super().load(index)
        for module in block.modules():
            if isinstance(module, QuantLinear):
                module.register_forward_pre_hook(lambda _, args: (self._quantize(args[0]),))
        return block


def activations(folder: Path) -> dict[str, Any] | None:
    """The activations that a peer quantized in a weight-only folder; None: config.json says all."""
    path = folder / ACTIVATIONS
    return json.loads(path.read_text("utf8")) if path.exists() else None


@widened_products()
def folder_losses(folder: Path, ids: Tensor, *, kind: str | None = None) -> list[float]:
    """Mean negative log-likelihood of every window int64 [W, L].

    Args:
        folder: a compressed-tensors folder, with or without ``activations.json``, or a plain one.
        ids: the windows.
        kind: another activation grid than the one of ``activations.json``.

    Raises:
        WorkError: a loss that is not finite.
    """
    source, described = open_blocks(folder), activations(folder)
    if described is not None:
        quantize = input_quantizer(int(described["bits"]), kind or str(described["kind"]))
        source = InputQuantized(source, quantize)
    return window_losses(source, ids, Reporter(quiet=True), folder.name)


def bits_per_weight(folder: Path, scale_bits: int | None = None) -> float:
    """Bits a weight of the blocks' linear layers: codes, scales and zero points.

    Args:
        folder: a quantized folder.
        scale_bits: bits of a scale where the file holds it wider than it is.
    """
    described = model_config(folder) if is_research(read_config(folder)) else None
    assert described is not None or is_quantized(folder)
    checkpoint = QuantizedCheckpoint(folder)
    weights, bits = 0, 0.0
    for name, scheme in checkpoint.schemes.items():
        if ".layers." not in name:
            continue  # embedding and head
        grid = scheme.weights
        rows, columns = checkpoint.shape(f"{name}.weight")
        count = math.prod(checkpoint.stored.shape(f"{name}.weight_scale"))
        scale = scale_bits or grid.scale_dtype.itemsize * 8
        zero = 0 if grid.symmetric else grid.bits
        weights += rows * columns
        bits += grid.bits * rows * columns + count * (scale + zero)
    return bits / weights
