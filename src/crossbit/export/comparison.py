"""Quantized layers of a model that another library loaded, compared with our own, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.export.reader import QuantizedCheckpoint
from crossbit.grid import QTensor
from crossbit.models.experts import checkpoint_name, is_expert
from crossbit.models.families import family_of
from crossbit.runtime.install import QuantizedLayer
from crossbit.runtime.linear import QuantLinear, SharedInput

LAYER_BOUND = 1e-5  # relative, Frobenius norm
_NAMES_SHOWN = 3
_AT_ONCE = 1 << 24  # of our own weights are made at once (64 MiB)


@dataclass(frozen=True)
class Check:
    """One row of the report: ``passed`` is value <= bound where both are given."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    detail: str


class LayerComparison:
    """Compares every quantized module with our own as the forward pass of a model reaches it.

    Use as a context manager around the forward pass.

    Attributes:
        unequal: modules whose weights are not bit-equal to codes x scale.
        outputs: module -> relative difference of its output from ours, for the same input.
        widened: modules whose input was a matrix of tokens (see ``_widen``).
        seen: modules compared so far.
    """

    def __init__(self, model: nn.Module, checkpoint: QuantizedCheckpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._handles: list[Any] = []
        self.unequal: list[str] = []
        self.outputs: dict[str, float] = {}
        self.widened: set[str] = set()
        self.seen: set[str] = set()

    def __enter__(self) -> LayerComparison:
        modules = dict(self._model.named_modules())
        for name in self._checkpoint.quantized:
            module = modules.get(name)
            if module is None:
                continue
            self._handles.append(module.register_forward_pre_hook(self._widen(name)))
            self._handles.append(module.register_forward_hook(self._compare(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def compare_weight(self, name: str, theirs: Tensor, layer: QuantizedLayer) -> None:
        """Count a module as seen; bit-equal or noted."""
        self.seen.add(name)
        if not (
            theirs.shape == layer.qtensor.codes.shape
            and all(_equal(theirs[rows], part.dequantize()) for rows, part in _parts(layer.qtensor))
        ):
            self.unequal.append(name)

    def rows(self) -> list[Check]:
        """The rows "weights" and "layers"."""
        unseen = sorted(set(self._checkpoint.quantized) - self.seen)
        wrong = sorted(self.unequal) + unseen
        detail = f"{len(self.seen)} modules bit-equal to codes x scale"
        if wrong:
            detail = f"differ: {some(sorted(self.unequal))}" if self.unequal else ""
            detail += f" not reached: {some(unseen)}" if unseen else ""
        rows = [Check("weights", not wrong, len(wrong), 0, detail.strip())]
        worst = max(self.outputs, key=self._difference, default=None)
        value = 0.0 if worst is None else self.outputs[worst]
        detail = f"{len(self.outputs)} linear layers with the same inputs, worst: {worst}"
        if self.widened:
            detail += (
                f"; {len(self.widened)} get a matrix of tokens, to which a batch axis was added "
                "(transformers alone would give all tokens one scale)"
            )
        # "not (>)" would let NaN pass.
        rows.append(Check("layers", value <= LAYER_BOUND, value, LAYER_BOUND, detail))
        return rows

    def _difference(self, name: str) -> float:
        value = self.outputs[name]
        return float("inf") if value != value else value

    def _widen(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        """Give per-token layers [1, T, K] where the model hands them [T, K] (OPT does).

        compressed-tensors takes the first two axes for batch and token: of a matrix it would take
        one scale for all tokens.
        """
        scheme = self._checkpoint.schemes[name]
        per_token = scheme.activations is not None and scheme.activations.kind == "per_token"

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not (per_token and args[0].ndim == 2):
                return None
            self.widened.add(name)
            return (args[0].unsqueeze(0), *args[1:])

        return hook

    def _compare(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            layer = self._checkpoint.layer(name)
            assert layer is not None
            assert isinstance(module.weight, Tensor)
            self.compare_weight(name, module.weight, layer)
            if isinstance(module, nn.Linear):
                self.outputs[name] = _compare_output(output, args[0], layer, module.bias)
            return output.squeeze(0) if name in self.widened else None

        return hook


def compare_experts(
    model: nn.Module, checkpoint: QuantizedCheckpoint, comparison: LayerComparison
) -> None:
    """Compare the fused expert weights of a loaded model with the stored experts, one by one."""
    if not any(is_expert(name) for name in checkpoint.quantized):
        return
    family = family_of(model.config)
    for fused, parameter in model.named_parameters():
        block, _, part = fused.rpartition(".")
        if parameter.ndim != 3 or part not in ("gate_up_proj", "down_proj"):
            continue
        for expert, matrix in enumerate(parameter.detach()):
            pieces = {"down_proj": matrix}
            if part == "gate_up_proj":
                gate, up = matrix.chunk(2, dim=0)
                pieces = {"gate_proj": gate, "up_proj": up}
            for piece, theirs in pieces.items():
                stored = checkpoint_name(family, f"{block}.{expert}.{piece}.weight")
                name = stored.removesuffix(".weight")
                layer = checkpoint.layer(name)
                if layer is not None:
                    comparison.compare_weight(name, theirs, layer)


def _parts(qtensor: QTensor) -> Iterator[tuple[slice, QTensor]]:
    """Rows and what they hold, few enough of them to be dense at once."""
    count, columns = qtensor.codes.shape
    step = max(1, _AT_ONCE // columns)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, qtensor.rows(rows.start, rows.stop)


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    return torch.equal(theirs.detach().cpu().float(), ours)


def _compare_output(theirs: Tensor, x: Tensor, layer: QuantizedLayer, bias: Tensor | None) -> float:
    """Relative difference of an output [..., N] from what our own layer makes of the input."""
    shared = SharedInput()  # the input is quantized once
    differences, sizes = [0.0], [0.0]
    for rows, part in _parts(layer.qtensor):
        own = QuantLinear(
            part,
            None if bias is None else bias[rows],
            layer.activations,
            dtype=torch.float32,
            execution="fake",
            shared=shared,
            static_scale=layer.static_scale,
        ).to(theirs.device)
        made = own(x)
        differences.append(_norm(theirs[..., rows] - made))
        sizes.append(_norm(made))
    return relative(math.hypot(*differences), math.hypot(*sizes))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def relative(difference: float, size: float) -> float:
    """A difference over the size of what it is a difference from; 0 if both are zero."""
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
