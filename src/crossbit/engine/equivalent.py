"""Learnable equivalent transformation (LET of OmniQuant, arXiv 2308.13137): factors and shifts.

A group of layers reads X. With a factor s [K] and a shift d [K] of its channels they read

    X~ = (X - d) / s    and have the weights    W~ = W diag(s)    and biases    b~ = b + W d

and what makes X is changed to make X~: the gain and bias of a norm, or the rows and bias of a
linear layer. Rows of values may be shifted because the shares that attention gives them add up to
one. Rows of queries are divided by a factor with which those of the keys are multiplied.

The block's function stays what it is, its rounding does not: what is rounded are W~ and X~. W is
the weight from which its rounding starts, before anything moves it (after GPTQ that is
``continuous_start``, not the original), so that W d is what this weight loses with d; it is no part
of what is rounded. Trained are log s, from where a fold
has begun, and d. A norm's gain and bias are rounded to the dtype in which they are stored before s
and d are taken from them, so that both sides stay each other's inverse.

Which inputs have factors and shifts says ``engine.let``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from crossbit.models.structure import NormSource
from crossbit.solvers.rounding_state import Rounding
from crossbit.transforms.fold import norm_quotients

LIMIT = 4.6  # |log s|: factors stay within a hundred of where they began

# id of a layer -> what ``solvers.rounding.pull_back`` found for its rows and columns
Found = Mapping[int, Mapping[str, Tensor]]


class Layer(Protocol):
    """A linear layer in training."""

    state: Rounding
    bias: nn.Parameter | None


@dataclass
class Bias:
    """The bias of a layer: (own + entered - left) times the factors of its rows.

    Attributes:
        layer: whose; it has one.
        own: float32 [N], before any factor and shift.
        entered: float32 [N], W d for the shift d of its input, None without one.
        left: float32 [N], the shift of its output, None without one.
    """

    layer: Layer
    own: Tensor
    entered: Tensor | None = None
    left: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The bias in use [N], in the dtype in which it is stored."""
        assert self.layer.bias is not None
        return self.layer.bias

    @torch.no_grad()
    def write(self) -> None:
        """Make the bias in use what factors and shifts make of its own."""
        value = self.own
        if self.entered is not None:
            value = value + self.entered
        if self.left is not None:
            value = value - self.left
        if self.layer.state.rows is not None:
            value = value * self.layer.state.rows
        self.parameter.copy_(value)

    def gradient(self) -> Tensor | None:
        """Gradient at what the factors of the rows multiply, float32 [N]; None if there is none."""
        if self.parameter.grad is None:
            return None
        gradient = self.parameter.grad.float()
        return gradient if self.layer.state.rows is None else gradient * self.layer.state.rows


@dataclass(frozen=True)
class Norm:
    """A norm that makes an input.

    Attributes:
        module: the norm.
        source: how its gain is stored.
        gain: float32 [K], its own weight before the factor (without an offset that it adds).
        bias: float32 [K], its own bias before factor and shift, None if it has none.
    """

    module: nn.Module
    source: NormSource
    gain: Tensor
    bias: Tensor | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias if it has one, in use."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        found = [getattr(self.module, name) for name in names]
        return [p for p in found if isinstance(p, nn.Parameter)]

    def divide(self, factor: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Make it give (X - shift) / factor: the factor and the shift that it really has."""
        wide = nn.Module()
        wide.weight = nn.Parameter(self.gain, requires_grad=False)
        if self.bias is not None:
            moved = self.bias if shift is None else self.bias - shift
            wide.bias = nn.Parameter(moved, requires_grad=False)
        own = self.parameters
        gain, bias, realised = norm_quotients(wide, self.source, factor.double(), own[0].dtype)
        own[0].copy_(gain)
        if bias is None or self.bias is None:
            return realised.float(), None
        own[1].copy_(bias)
        if shift is None:
            return realised.float(), None
        # What the rounding of the bias took is a shift, too.
        return realised.float(), (self.bias.double() - realised * bias.double()).float()


@dataclass(frozen=True)
class Rows:
    """Rows of a layer that a factor changes.

    Attributes:
        name: of the layer, relative to the block.
        layer: it.
        index: int64 [R].
        entry: int64 [R], the factor's entry for each.
        power: -1 divides them by the factor, 1 multiplies.
        shifted: the shift is taken from what they make.
    """

    name: str
    layer: Layer
    index: Tensor
    entry: Tensor
    power: int = -1
    shifted: bool = False


@dataclass
class Equivalent:
    """A factor, and the shift that goes with it.

    Attributes:
        name: of the group whose input it is of, or what else tells it from others of the block.
        log: float32 [E], trained: an entry a channel, or one for rows that share a factor.
        shift: float32 [E], trained; None if there is none.
        consumers: layers that read the input, by relative name.
        channel: int64 [K], the entry of each channel of the input; None is each its own.
        norm: what makes the input, if it is a norm.
        rows: what makes it, if it is a linear layer; rows of queries and keys.
        biases: those that change with it, by the layer's relative name.
    """

    name: str
    log: Tensor
    shift: Tensor | None = None
    consumers: dict[str, Layer] = field(default_factory=dict)
    channel: Tensor | None = None
    norm: Norm | None = None
    rows: Sequence[Rows] = ()
    biases: dict[str, Bias] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is trained; the tensors are those in use."""
        return {"log": self.log} if self.shift is None else {"log": self.log, "shift": self.shift}

    @torch.no_grad()
    def apply(self) -> None:
        """Make factors and shift, on both sides of the input, those of ``parameters`` as it is."""
        factor, shift = self.log.exp(), self.shift
        for rows in self.rows:
            self._change(rows, factor)
        if self.norm is not None:
            factor, shift = self.norm.divide(factor, shift)
        if self.channel is not None:
            factor = factor[self.channel]
            shift = None if shift is None else shift[self.channel]
        for name, layer in self.consumers.items():
            if layer.state.columns is None:
                layer.state.columns = factor.clone()
            else:  # in place: its version tells that the moved weight is an old one
                layer.state.columns.copy_(factor)
            if shift is not None:
                self.biases[name].entered = layer.state.weight @ shift
                self.biases[name].write()

    def _change(self, rows: Rows, factor: Tensor) -> None:
        state = rows.layer.state
        if state.rows is None:
            state.rows = torch.ones(state.weight.shape[0])
        values = factor[rows.entry]
        state.rows[rows.index] = values if rows.power > 0 else 1 / values
        bias = self.biases.get(rows.name)
        if bias is None:
            return
        if rows.shifted and self.shift is not None:
            if bias.left is None:
                bias.left = torch.zeros_like(bias.own)
            bias.left[rows.index] = self.shift[rows.entry]
        bias.write()

    def leaves(self, wanted: bool) -> None:
        """Let gradients reach what makes the input, and biases; or free them."""
        for tensor in self._made():
            tensor.requires_grad_(wanted)
            if not wanted:
                tensor.grad = None

    def _made(self) -> list[nn.Parameter]:
        own = [] if self.norm is None else self.norm.parameters
        return [*own, *(bias.parameter for bias in self.biases.values())]

    @torch.no_grad()
    def gradients(self, found: Found) -> dict[str, Tensor]:
        """Gradients of ``parameters``; those of the leaves are where autograd put them.

        Args:
            found: gradients of the rows and columns of layers.
        """
        wanted = {"log": self._at_log(found)}
        if self.shift is not None:
            wanted["shift"] = self._at_shift(self.shift)
        return wanted

    def _at_log(self, found: Found) -> Tensor:
        pulled = torch.zeros_like(self.log)
        for layer in self.consumers.values():
            gradients = found.get(id(layer), {})
            if "columns" in gradients:
                pulled += self._by_entry(gradients["columns"])
        pulled *= self.log.exp()
        if self.norm is not None:
            # d (g / s) / d log s = -g / s, and g / s is what the norm has now; so with its bias.
            offsets = (self.norm.source.gain_offset, 0)
            for own, offset in zip(self.norm.parameters, offsets, strict=False):
                if own.grad is not None:
                    pulled -= own.grad.float() * (own.float() + offset)
        for rows in self.rows:
            gradients, bias = found.get(id(rows.layer), {}), self.biases.get(rows.name)
            state = rows.layer.state
            changed = torch.zeros(state.weight.shape[0])
            if "rows" in gradients and state.rows is not None:
                changed += gradients["rows"] * state.rows
            if bias is not None and bias.parameter.grad is not None:
                changed += bias.parameter.grad.float() * bias.parameter.float()
            pulled.index_add_(0, rows.entry, rows.power * changed[rows.index])
        return pulled

    def _at_shift(self, shift: Tensor) -> Tensor:
        pulled = torch.zeros_like(shift)
        for name, layer in self.consumers.items():
            at_bias = self.biases[name].gradient()
            if at_bias is not None:
                pulled += self._by_entry(at_bias @ layer.state.weight)
        if self.norm is not None:
            at_norm = self.norm.parameters[1].grad
            if at_norm is not None:
                pulled -= at_norm.float() / self.log.exp()
        for rows in self.rows:
            at_bias = self.biases[rows.name].gradient()
            if at_bias is not None:
                pulled.index_add_(0, rows.entry, -at_bias[rows.index])
        return pulled

    def _by_entry(self, channels: Tensor) -> Tensor:
        """The sum over the channels [K] of each entry [E]."""
        if self.channel is None:
            return channels
        return torch.zeros_like(self.log).index_add_(0, self.channel, channels)

    def hold(self) -> None:
        """Keep the factors within their limit, in place."""
        self.log.clamp_(-LIMIT, LIMIT)

    def tensors(self) -> dict[str, Tensor]:
        """What a state needs beside ``parameters`` and the layers' own biases."""
        kept = {} if self.norm is None else {"gain": self.norm.gain, "bias": self.norm.bias}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}
