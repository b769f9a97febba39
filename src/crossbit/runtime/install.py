"""Put quantized layers in the place of a block's linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import QTensor
from crossbit.models.structure import BlockStructure
from crossbit.runtime.linear import Execution, QuantLinear, SharedInput
from crossbit.runtime.online import carry


@dataclass(frozen=True)
class QuantizedLayer:
    """Everything that executing one quantized linear layer needs (its bias stays in the block).

    Attributes:
        qtensor: the integer weight.
        activations: grid of the input, None for floating point.
        static_scale: step of the input (scalar), for ``per_tensor_static``.
        columns: calibrated column maxima [K], for the static CrossQuant kinds.
        clip: factor of the input's row maxima (scalar float32), for ``per_token_clip``; layers that
            read the same input have the same.
    """

    qtensor: QTensor
    activations: ActivationGrid | None
    static_scale: Tensor | None = None
    columns: Tensor | None = None
    clip: Tensor | None = None


def install(
    block: nn.Module,
    structure: BlockStructure,
    layers: Mapping[str, QuantizedLayer],
    dtype: torch.dtype,
    execution: Execution = "auto",
) -> None:
    """Replace linear layers of ``block`` (relative names) by ``QuantLinear``, in place.

    Layers of one input group share the memory of their quantized input.
    """
    shared = {name: SharedInput() for name in layers}
    for group in structure.groups:
        memory = SharedInput()
        shared.update({name: memory for name in group.consumers if name in layers})
    device = next(block.parameters()).device
    for name, layer in layers.items():
        linear = block.get_submodule(name)
        bias = getattr(linear, "bias", None)
        replacement = QuantLinear(
            layer.qtensor,
            bias,
            layer.activations,
            dtype=dtype,
            execution=execution,
            shared=shared[name],
            static_scale=layer.static_scale,
            columns=layer.columns,
            clip=None if layer.clip is None else float(layer.clip),
        )
        parent, _, child = name.rpartition(".")
        carry(linear, replacement)
        setattr(block.get_submodule(parent), child, replacement.to(device))
