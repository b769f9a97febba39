"""Gains and biases of norms that are trained with the rounding (Norm Tweaking, arXiv 2309.02784).

A norm stays in floating point, so what its K numbers take up costs the export nothing. Unlike a
factor of LET, which the weights behind it take back, a trained gain changes what the block
computes: each channel of the input of quantized layers gets a factor that their grids lack.

Trained are shares: a gain is its own times 1 + g, a bias its own plus b times the mean size of the
gains, so that one learning rate fits every norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossbit.engine.equivalent import Found

# "own_weight" and "own_bias", "gain" and "bias" as far as they have been trained
Known = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainedNorm:
    """A norm in training.

    Attributes:
        name: of it, relative to the block.
        module: it.
        offset: what it adds to its weight to make the gain.
        own: float32 [K], weight and bias before training, by name.
        parameters: float32 [K], the trained shares "gain" and "bias"; the tensors are those in use.
    """

    name: str
    module: nn.Module
    offset: int
    own: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @torch.no_grad()
    def apply(self) -> None:
        """Make the norm what ``parameters`` say; rounded to the dtype that it has."""
        gain = self.own["weight"] + self.offset
        self._leaf("weight").copy_(self.own["weight"] + gain * self.parameters["gain"])
        if "bias" in self.parameters:
            moved = self.parameters["bias"] * gain.abs().mean()
            self._leaf("bias").copy_(self.own["bias"] + moved)

    def leaves(self, wanted: bool) -> None:
        """Let gradients reach weight and bias, or free them."""
        for name in self.own:
            leaf = self._leaf(name).requires_grad_(wanted)
            if not wanted:
                leaf.grad = None

    @torch.no_grad()
    def gradients(self, found: Found) -> dict[str, Tensor]:
        """Gradients of ``parameters`` from those that autograd put at the leaves.

        Args:
            found: gradients of layers, which have no part in it.
        """
        gain = self.own["weight"] + self.offset
        sizes = {"weight": gain, "bias": gain.abs().mean()}
        pulled = {}
        for (name, own), key in zip(self.own.items(), self.parameters, strict=True):
            grad = self._leaf(name).grad
            pulled[key] = torch.zeros_like(own) if grad is None else grad.float() * sizes[name]
        return pulled

    def hold(self) -> None:
        """Nothing bounds the shares."""

    def tensors(self) -> dict[str, Tensor]:
        """What a state needs beside ``parameters``."""
        return {f"own_{name}": tensor for name, tensor in self.own.items()}

    def _leaf(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)


def trained_norms(
    module: nn.Module, offset: int, *, known: Mapping[str, Known] | None = None
) -> list[TrainedNorm]:
    """The norms of a block: its modules whose weight is a vector.

    Args:
        module: the block; its norms are as the folds left them.
        offset: what the family's norms add to their weight to make the gain.
        known: relative name -> what a norm was, of those that have begun already.
    """
    found = []
    for name, norm in module.named_modules():
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            continue
        kept = (known or {}).get(name, {})
        names = [n for n in ("weight", "bias") if isinstance(getattr(norm, n, None), nn.Parameter)]
        own = {
            n: kept.get(f"own_{n}", norm.get_parameter(n).detach().float().clone()) for n in names
        }
        keys = {"weight": "gain", "bias": "bias"}
        shares = {keys[n]: kept.get(keys[n], torch.zeros_like(own[n])) for n in names}
        found.append(TrainedNorm(name, norm, offset, own, shares))
    return found
