"""Put quantized layers in the place of a block's linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import QTensor
from crossbit.models.structure import BlockStructure
from crossbit.rotations.duquant import DuRotation
from crossbit.runtime.linear import Execution, QuantLinear, SharedInput
from crossbit.runtime.online import carry, turn_input


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
        rotation: of the input at run time; layers that read the same input have the same.
    """

    qtensor: QTensor
    activations: ActivationGrid | None
    static_scale: Tensor | None = None
    columns: Tensor | None = None
    clip: Tensor | None = None
    rotation: DuRotation | None = None


class TurnedInput:
    """A rotation of an input that several layers read: made once for all of them."""

    def __init__(self, rotation: DuRotation) -> None:
        self._rotation = rotation.to("cpu", torch.float32)
        self._memory = SharedInput(differentiable=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> x G."""
        if self._rotation.first.device != x.device:
            self._rotation = self._rotation.to(x.device, torch.float32)
        found: Tensor = self._memory.get(
            x, torch.is_grad_enabled(), lambda: self._rotation.apply(x)
        )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> TurnedInput:
        return TurnedInput(self._rotation)


def shared_turns(
    structure: BlockStructure, layers: Mapping[str, QuantizedLayer]
) -> dict[str, TurnedInput]:
    """What turns the input of each layer that has a rotation: one for the layers of a group."""
    turns: dict[str, TurnedInput] = {}
    for group in structure.groups:
        for name in group.consumers:
            layer = layers.get(name)
            if layer is None or layer.rotation is None:
                continue
            known = [turns[n] for n in group.consumers if n in turns]
            turns[name] = known[0] if known else TurnedInput(layer.rotation)
    return turns


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
    turns = shared_turns(structure, layers)
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
        if name in turns:
            turn_input(replacement, turns[name], own=True)
        setattr(block.get_submodule(parent), child, replacement.to(device))
