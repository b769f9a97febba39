"""Mixture of experts: fused 3-D expert weights <-> one set of linear layers an expert.

transformers keeps all experts of a block in two parameters, gate_up_proj [E, 2I, D] and down_proj
[E, D, I]; checkpoints on disk name every expert's matrices on their own. Quantization works per
linear layer, so the fused module is replaced by an equivalent one with the same forward signature.
This file also translates between the names of our module's tensors and those of checkpoint files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from crossbit.errors import InputError
from crossbit.models.families import Family


class TensorSource(Protocol):
    """What is needed of a checkpoint: lazily read tensors by name."""

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        ...

    def __contains__(self, name: object) -> bool: ...


class Weights(TensorSource, Protocol):
    """A tensor source over files."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        ...

    def close(self) -> None:
        """Close the files; they are opened again when a tensor is asked for."""
        ...


class Expert(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)) for the tokens routed to one expert."""

    def __init__(self, width: int, inner: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class ExpertList(nn.ModuleList):
    """Experts 0..E-1 with the forward of transformers' fused experts modules."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [T, D].
            top_k_index: int64 [T, k], experts chosen for each token.
            top_k_weights: [T, k], their weights.

        Returns:
            [T, D]. An expert that no token chose is not called.
        """
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= len(self):  # transformers' marker for "no expert"
                continue
            token, slot = torch.where(top_k_index == index)
            y = self[index](hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def unfuse_experts(model: nn.Module, family: Family) -> int:
    """Replace every fused experts module of the model by an `ExpertList`, in place.

    Parameters stay on their device (meta included) and keep their dtype; real values are copied.

    Returns:
        Number of modules replaced (0 for families without experts).

    Raises:
        InputError: an experts module with a layout other than concatenated, untransposed [gate;
        up].
    """
    if family.experts is None:
        return 0
    replaced = 0
    for name, module in list(model.named_modules()):
        if not name.endswith(f".{family.experts}") or isinstance(module, ExpertList):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _unfused(name, module))
        replaced += 1
    return replaced


def _unfused(name: str, fused: nn.Module) -> ExpertList:
    gate_up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
    plain = (
        isinstance(gate_up, nn.Parameter)
        and isinstance(down, nn.Parameter)
        and gate_up.ndim == 3
        and down.ndim == 3
        and not getattr(fused, "has_bias", False)
        and not getattr(fused, "is_transposed", False)
        and getattr(fused, "is_concatenated", True)
        and gate_up.shape[1] == 2 * down.shape[2]
    )
    if not plain:
        raise InputError(
            f"experts module {name} ({type(fused).__name__}) has an unknown weight layout; "
            "expected gate_up_proj [experts, 2 inner, width] and down_proj [experts, width, inner]"
        )
    assert isinstance(gate_up, nn.Parameter)
    assert isinstance(down, nn.Parameter)
    experts, width, inner = down.shape
    act_fn = cast(Callable[[Tensor], Tensor], fused.act_fn)
    result = ExpertList()
    for e in range(experts):
        with torch.device("meta"):
            expert = Expert(width, inner, act_fn)
        for linear, weight in (
            (expert.gate_proj, gate_up[e, :inner]),
            (expert.up_proj, gate_up[e, inner:]),
            (expert.down_proj, down[e]),
        ):
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        result.append(expert)
    return result.train(fused.training)


def is_expert(name: str) -> bool:
    """True for a matrix of one expert, such as "model.layers.0.mlp.experts.3.up_proj"."""
    return ".experts." in name


def checkpoint_name(family: Family, name: str) -> str:
    """The name in checkpoint files (what transformers writes and reads) of our module's tensor."""
    for pattern, replacement in family.checkpoint_names:
        name = re.sub(pattern, replacement, name)
    return name


def _fused_name(family: Family, name: str) -> tuple[str, int, str] | None:
    """(name of the fused tensor, expert, gate|up|down) of an expert's weight; None for others."""
    if family.experts is None:
        return None
    match = re.fullmatch(
        rf"(.*\.{re.escape(family.experts)})\.(\d+)\.(gate|up|down)_proj\.weight", name
    )
    if match is None:
        return None
    part = match.group(3)
    fused = "down_proj" if part == "down" else "gate_up_proj"
    return f"{match.group(1)}.{fused}", int(match.group(2)), part


class TensorReader:
    """Reads our module's tensors from a checkpoint, whichever way that one names or fuses them.

    The last fused tensor read is kept, so that the experts of a block are read from disk once.
    Names used are collected in `used`.
    """

    def __init__(self, family: Family, checkpoint: TensorSource, base: str = "model") -> None:
        self._family = family
        self._checkpoint = checkpoint
        self._base = base
        self._cached: tuple[str, Tensor] | None = None
        self.used: set[str] = set()

    def _find(self, name: str) -> str | None:
        # A checkpoint saved from the model without its head has no base prefix ("layers.0...").
        stripped = name.removeprefix(f"{self._base}.")
        for candidate in (
            checkpoint_name(self._family, name),
            name,
            checkpoint_name(self._family, stripped),
            stripped,
        ):
            if candidate in self._checkpoint:
                self.used.add(candidate)
                return candidate
        return None

    def _locate(self, name: str) -> tuple[str, tuple[int, str] | None] | None:
        """(checkpoint name, None | (expert, part) of a fused tensor); None if not there."""
        plain = self._find(name)
        if plain is not None:
            return plain, None
        fused = _fused_name(self._family, name)
        if fused is not None:
            found = self._find(fused[0])
            if found is not None:
                return found, (fused[1], fused[2])
        return None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._locate(name) is not None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of our tensor `name` as the checkpoint has it; None if it is not there."""
        found = self._locate(name)
        if found is None:
            return None
        shape = tuple(self._checkpoint.shape(found[0]))
        if found[1] is None:
            return shape
        expert, part = found[1]
        if len(shape) != 3 or expert >= shape[0]:
            return None
        return shape[1:] if part == "down" else (shape[1] // 2, shape[2])

    def tensor(self, name: str) -> Tensor | None:
        """Our tensor `name`; None if the checkpoint does not have it."""
        found = self._locate(name)
        if found is None:
            return None
        stored, piece = found
        if piece is None:
            return self._checkpoint.tensor(stored)
        if self._cached is None or self._cached[0] != stored:
            self._cached = (stored, self._checkpoint.tensor(stored))
        expert, part = piece
        matrix = self._cached[1][expert]
        if part == "down":
            return matrix
        gate, up = matrix.chunk(2, dim=0)
        return gate if part == "gate" else up
