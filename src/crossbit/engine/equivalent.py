"""Learnable equivalent transformation (LET of OmniQuant, arXiv 2308.13137): trained factors.

A group of layers reads X. With a factor s [K] of its channels they read X / s and have the weights
W diag(s), and what makes X is divided by s: the gain of a norm, or the rows of a linear layer. The
block's function stays what it is, its rounding does not. What is trained is log s, from where
a fold has begun; the norm's gain is rounded to the dtype in which it is stored before s is used,
so that the two stay each other's inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from crossbit.engine.plan import BlockPlan
from crossbit.models.structure import InputGroup, NormSource, RowSource
from crossbit.solvers.rounding_state import Rounding
from crossbit.transforms.fold import norm_quotients

LIMIT = 4.6  # |log s|: factors stay within a hundred of where they began


class Layer(Protocol):
    """A linear layer in training."""

    state: Rounding
    bias: nn.Parameter | None


@dataclass
class Equivalent:
    """The factor of one group.

    Attributes:
        group: whose input it is of.
        log: float32 [K], or one a row of the source; what is trained.
        consumers: layers that read the input, by relative name.
        norm: what makes the input, if it is a norm; ``gain`` and ``bias`` are its own before the
            factor (the stored weight, without an offset that the norm adds).
        producer: what makes it, if it is a linear layer; ``bias`` is its own before the factor.
        channel: int64 [K], the entry of ``log`` that is a channel's (row sources).
        rows: int64, the source's row of each entry.
    """

    group: InputGroup
    log: Tensor
    consumers: dict[str, Layer]
    norm: nn.Module | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    producer: Layer | None = None
    channel: Tensor | None = None
    rows: Tensor | None = None

    @torch.no_grad()
    def apply(self) -> None:
        """Make the factors, and what makes the input, those of ``log`` as it is."""
        factor = self.log.exp()
        if self.norm is not None:
            source = self.group.source
            assert isinstance(source, NormSource)
            assert self.gain is not None
            kept = _parameter(self.norm, "weight")
            wide = nn.Module()
            wide.weight = nn.Parameter(self.gain, requires_grad=False)
            if self.bias is not None:
                wide.bias = nn.Parameter(self.bias, requires_grad=False)
            gain, bias, realised = norm_quotients(wide, source, factor.double(), kept.dtype)
            kept.copy_(gain)
            if bias is not None:
                _parameter(self.norm, "bias").copy_(bias)
            columns = realised.float()
        else:
            assert self.producer is not None
            assert self.channel is not None
            assert self.rows is not None
            self.producer.state.rows = _filled(
                self.producer.state.rows, self.producer.state.weight.shape[0], self.rows, 1 / factor
            )
            if self.producer.bias is not None:
                assert self.bias is not None
                divisor = torch.ones_like(self.bias)
                divisor[self.rows] = factor
                self.producer.bias.copy_(self.bias / divisor)
            columns = factor[self.channel]
        for layer in self.consumers.values():
            if layer.state.columns is None:
                layer.state.columns = columns.clone()
            else:  # in place: its version tells that the moved weight is an old one
                layer.state.columns.copy_(columns)

    def leaves(self, wanted: bool) -> None:
        """Let gradients reach what makes the input, or free them."""
        for tensor in self._made():
            tensor.requires_grad_(wanted)
            if not wanted:
                tensor.grad = None

    def _made(self) -> list[nn.Parameter]:
        if self.norm is not None:
            names = ("weight", "bias") if self.bias is not None else ("weight",)
            return [_parameter(self.norm, name) for name in names]
        assert self.producer is not None
        return [] if self.producer.bias is None else [self.producer.bias]

    @torch.no_grad()
    def gradient(self, found: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """Gradient of ``log``.

        Args:
            found: id of a layer -> what ``solvers.rounding.pull_back`` found for it.
        """
        factor = self.log.exp()
        columns: list[Tensor] = []
        for layer in self.consumers.values():
            gradients = found.get(id(layer), {})
            if "columns" in gradients:
                columns.append(gradients["columns"])
        total = torch.zeros(self.group.width)
        for part in columns:
            total += part
        if self.norm is not None:
            source = self.group.source
            assert isinstance(source, NormSource)
            assert self.gain is not None
            total *= factor
            # d (g / s) / d log s = -g / s, and g / s is what the norm has now.
            for own, offset in zip(self._made(), (source.gain_offset, 0), strict=False):
                if own.grad is not None:
                    total -= own.grad.float() * (own.float() + offset)
            return total
        assert self.channel is not None
        assert self.rows is not None
        pulled = torch.zeros_like(self.log).index_add_(0, self.channel, total) * factor
        gradients = found.get(id(self.producer), {})
        if "rows" in gradients:
            pulled -= gradients["rows"][self.rows] / factor
        for own in self._made():
            if own.grad is not None:
                pulled -= (own.grad.float() * own.float())[self.rows]
        return pulled

    def tensors(self) -> dict[str, Tensor]:
        """What a state needs beside ``log``."""
        kept = {"gain": self.gain, "bias": self.bias}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}


def equivalents(
    module: nn.Module,
    plan: BlockPlan,
    layers: Mapping[str, Layer],
    *,
    down: bool = False,
    known: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[Equivalent]:
    """The factors of a block that can be trained: inputs behind a norm, and that of o_proj.

    Args:
        module: the block; its norms are as the fold of the start left them.
        plan: of the block.
        layers: its layers in training.
        down: that of down_proj too.
        known: group -> "log", "gain", "bias" of factors that have begun already.
    """
    found: list[Equivalent] = []
    for group in plan.structure.groups:
        if not trainable(plan, group, down):
            continue
        consumers = {name: layers[name] for name in group.consumers}
        own = (known or {}).get(group.name, {})
        source = group.source
        if isinstance(source, NormSource):
            norm = module.get_submodule(source.module)
            gain = own.get("gain", _parameter(norm, "weight").detach().float().clone())
            bias = None
            if source.has_bias:
                bias = own.get("bias", _parameter(norm, "bias").detach().float().clone())
            log = own.get("log", torch.zeros(group.width))
            found.append(Equivalent(group, log, consumers, norm, gain, bias))
        elif isinstance(source, RowSource):
            producer = layers[source.linear]
            rows, channel = torch.unique(source.rows, return_inverse=True)
            bias = None
            if producer.bias is not None:
                bias = own.get("bias", producer.bias.detach().float().clone())
            log = own.get("log", torch.zeros(rows.numel()))
            found.append(
                Equivalent(
                    group,
                    log,
                    consumers,
                    bias=bias,
                    producer=producer,
                    channel=channel,
                    rows=rows,
                )
            )
    return found


def trainable(plan: BlockPlan, group: InputGroup, down: bool) -> bool:
    """Whether a factor of the group's input is trained.

    None where a weight that is not trained reads it, or makes it: the gradient of the factor would
    lack a part. Of the input of down_proj only with ``down``: OmniQuant has none there.
    """
    source = group.source
    if source is None or group.readers:
        return False
    weights = list(group.consumers)
    if isinstance(source, RowSource):
        others = any(plan.structure.linears[name].role != "o_proj" for name in group.consumers)
        if others and not down:
            return False
        weights.append(source.linear)
    planned = [plan.layers.get(name) for name in weights]
    return all(layer is not None and layer.rounding is not None for layer in planned)


def _filled(old: Tensor | None, count: int, rows: Tensor, values: Tensor) -> Tensor:
    """Ones [count] but for ``values`` at ``rows``; written into ``old`` if there is one."""
    filled = torch.ones(count) if old is None else old
    filled[rows] = values
    return filled


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter
