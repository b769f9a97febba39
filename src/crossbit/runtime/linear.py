"""A linear layer over a quantized weight, and the input that several of them share.

Two executions of the same integers:

    fake      dequantized weight, quantize-dequantize input, float matmul (the oracle)
    integer   int8 codes on both sides, exact int32 accumulation, then row scale x column scale:
              what INT8 kernels do

The integer path needs per-token activations and one symmetric scale an output channel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.quantize import fake_quantize_activation, per_token_codes
from crossbit.grid import QTensor
from crossbit.products import integer_product

Execution = Literal["auto", "fake", "integer"]


class SharedInput:
    """Remembers the last quantized input, so that q, k and v quantize theirs once.

    The key is the identity of the tensor object and its version counter, never its content;
    inputs that take part in autograd are remembered only if ``differentiable``: layers of one
    forward pass may share a graph.
    """

    def __init__(self, *, differentiable: bool = False) -> None:
        self._differentiable = differentiable
        self._key: weakref.ref[Tensor] | None = None
        self._version = -1
        self._tag: Any = None
        self._value: Any = None

    def get(self, x: Tensor, tag: Any, compute: Callable[[], Any]) -> Any:
        """The value computed for ``x`` under ``tag``, from memory if it was the last one."""
        # Tensors of inference mode have no version counter.
        if (x.requires_grad and not self._differentiable) or x.is_inference():
            return compute()
        known = self._key() if self._key is not None else None
        if known is not x or self._version != x._version or self._tag != tag:
            self._value = compute()
            self._key, self._version, self._tag = weakref.ref(x, self._forget), x._version, tag
        return self._value

    def _forget(self, _: Any) -> None:
        self._key = self._value = self._tag = None


def integer_path(qtensor: QTensor, activations: ActivationGrid | None) -> bool:
    """True if the layer can run as int8 x int8 -> int32."""
    return (
        activations is not None
        and activations.kind == "per_token"
        and qtensor.grid.symmetric
        and qtensor.grid.strategy in ("channel", "tensor")
        and qtensor.codes.shape[1] > 1  # torch._int_mm reads past a single column (torch 2.13)
    )


class QuantLinear(nn.Module):
    """y = Q_x(x) Q(W)^T + bias, x [..., K], W codes [N, K].

    Args:
        qtensor: the integer weight.
        bias: [N] or None.
        activations: grid of the input, or None for weight-only.
        dtype: dtype of the dequantized weight in the fake path.
        execution: "fake", "integer", or "auto": integer where it is possible and ``dtype`` is
            not float32, else fake.
        shared: the memory shared by the layers that read the same input.
        static_scale: scalar step for ``per_tensor_static``, kept in float32 whatever the module is
            cast to.
        columns: calibrated column maxima [K] for the static CrossQuant kinds.
        clip: factor of the row maximum for ``per_token_clip``; a number, so that no cast of the
            module changes it.
    """

    def __init__(
        self,
        qtensor: QTensor,
        bias: Tensor | None,
        activations: ActivationGrid | None,
        *,
        dtype: torch.dtype,
        execution: Execution = "auto",
        shared: SharedInput | None = None,
        static_scale: Tensor | None = None,
        columns: Tensor | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        possible = integer_path(qtensor, activations)
        if execution == "auto":
            execution = "integer" if possible and dtype != torch.float32 else "fake"
        if execution == "integer" and not possible:
            raise ValueError("no integer path: needs per-token inputs and channel scales")
        self.activations = activations
        self.execution = execution
        self.clip = clip
        self.static_scale = static_scale
        self._step = None if static_scale is None else float(static_scale)
        self.out_features, self.in_features = qtensor.codes.shape
        self.grid = qtensor.grid
        self._shared = shared or SharedInput()
        weight = qtensor.codes if execution == "integer" else qtensor.dequantize().to(dtype)
        self.register_buffer("weight", weight, persistent=False)
        scale = qtensor.scale.float().reshape(-1) if execution == "integer" else None
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(dtype), persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    columns: Tensor | None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        acts = "none" if self.activations is None else f"{self.activations.bits}-bit"
        return (
            f"{self.in_features} -> {self.out_features}, {self.grid.describe()}, "
            f"activations {acts}, {self.execution}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the dtype of x."""
        if self.execution == "integer":
            return self._integer(x)
        if self.activations is None:
            return F.linear(x, self.weight, self.bias)
        tag = (self.activations, "fake", self._step, id(self.columns), self.clip)
        quantized = self._shared.get(x, tag, lambda: self._fake_input(x))
        return F.linear(quantized, self.weight, self.bias)

    def _fake_input(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        if self.activations.kind == "per_token" and not x.requires_grad:
            codes, scale = per_token_codes(
                x.reshape(-1, self.in_features), self.activations, torch.float32
            )
            return codes.mul_(scale).to(x.dtype).view(x.shape)
        return fake_quantize_activation(
            x,
            self.activations,
            static_scale=None if self.static_scale is None else self.static_scale.to(x.device),
            columns=self.columns,
            clip=self.clip,
        )

    def _integer(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        assert self.scale is not None
        grid = self.activations
        codes, rows = self._shared.get(
            x, (grid, "int8"), lambda: per_token_codes(x.reshape(-1, x.shape[-1]), grid, torch.int8)
        )
        # int_mm on some devices refuses fewer than 17 rows: pad, then drop.
        count = codes.shape[0]
        if x.is_cuda and count < 32:
            codes = F.pad(codes, (0, 0, 0, 32 - count))
        product = integer_product(codes, self.weight)[:count]
        out = product.float().mul_(rows).mul_(self.scale)
        if self.bias is not None:
            out += self.bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)
