"""How one module is stored: grids, role, and the storage format that readers accept for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from crossbit.activations.grid import ActivationGrid
from crossbit.errors import InputError
from crossbit.grid import Grid, as_read

Role = Literal["linear", "expert", "embedding"]
Format = Literal["pack-quantized", "int-quantized"]
INT: Format = "int-quantized"
PACKED: Format = "pack-quantized"


@dataclass(frozen=True)
class QuantScheme:
    """The storage scheme of one module.

    Args:
        weights: grid of the weight.
        activations: grid of the input, None for weight-only.
        role: ``linear``; ``expert``, a matrix of a mixture of experts; ``embedding``, an embedding
            or a head that is tied to one.

    Raises:
        InputError: no reader executes the combination (the message says which does).
    """

    weights: Grid
    activations: ActivationGrid | None = None
    role: Role = "linear"

    def __post_init__(self) -> None:
        _check_activations(self.activations)
        if self.role != "linear" and self.activations is not None:
            where = "fused experts" if self.role == "expert" else "an embedding"
            raise InputError(
                f"activations of {where} cannot be exported: readers would leave them "
                "unquantized; quantize only the weights there"
            )
        if self.role == "expert" and not self.weights.symmetric:
            raise InputError("experts are exported with symmetric weights only; set symmetric")
        if self.role == "expert" and self.weights.scale_dtype != torch.float32:
            raise InputError(
                "experts need scale_dtype float32: transformers rounds their values to the dtype "
                "of the stored scale"
            )
        if self.weights != _as_read(self.weights, self.activations, self.role):
            what = "does not round" if self.weights.rounded else "rounds"
            raise InputError(
                f"{self.weights.describe()} ({self.role}): transformers {what} its values to the "
                "dtype of the stored scale, unlike the grid; take the grid from as_read"
            )

    @property
    def format(self) -> Format:
        """The compressed-tensors format.

        int8 codes for 8-bit weights with quantized inputs (what INT8 kernels read), and where
        transformers cannot load packed words: embeddings, and zero points beside quantized inputs.
        Packed words for everything else.
        """
        whole_bytes = self.weights.bits == 8 or not self.weights.symmetric
        if self.role == "embedding" or (self.activations is not None and whole_bytes):
            return INT
        return PACKED

    @property
    def key(self) -> tuple[object, ...]:
        """What decides the config group: equal keys are stored and executed alike."""
        weights, inputs = self.weights, self.activations
        return (
            self.format,
            weights.bits,
            weights.symmetric,
            weights.strategy,
            weights.group_size,
            None if inputs is None else (inputs.bits, inputs.kind),
        )

    def config(self) -> dict[str, Any]:
        """The config group of this scheme, without its targets."""
        weights, inputs = self.weights, self.activations
        described = None
        if inputs is not None:
            dynamic = inputs.kind == "per_token"
            described = {
                "num_bits": inputs.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "token" if dynamic else "tensor",
                "dynamic": dynamic,
            }
        return {
            "format": self.format,
            "weights": {
                "num_bits": weights.bits,
                "type": "int",
                "symmetric": weights.symmetric,
                "strategy": weights.strategy,
                "group_size": weights.group_size,
                "dynamic": False,
            },
            "input_activations": described,
            "output_activations": None,
        }


def scheme_from_config(
    group: dict[str, Any], default_format: str, scale_dtype: torch.dtype, role: Role
) -> tuple[QuantScheme, str]:
    """The scheme and storage format that a config group states.

    Args:
        group: one entry of ``config_groups``.
        default_format: the config's own format, for groups without one.
        scale_dtype: dtype of the stored scales (the config does not state it).
        role: see ``QuantScheme``.

    Raises:
        InputError: a group that crossbit does not write (float types, other strategies, ...).
    """
    weights, inputs = group.get("weights"), group.get("input_activations")
    storage = str(group.get("format") or default_format)
    if not isinstance(weights, dict) or weights.get("type") != "int" or weights.get("dynamic"):
        raise InputError("a config group without static integer weights; crossbit reads its own")
    if storage not in (INT, PACKED):
        raise InputError(f"format {storage!r}; crossbit reads {INT} and {PACKED}")
    grid = Grid(
        bits=int(weights["num_bits"]),
        symmetric=bool(weights.get("symmetric", True)),
        strategy=weights["strategy"],
        group_size=weights.get("group_size") if weights["strategy"] == "group" else None,
        scale_dtype=scale_dtype,
    )
    activations = None
    if inputs is not None:
        kinds = {("token", True): "per_token", ("tensor", False): "per_tensor_static"}
        kind = kinds.get((str(inputs.get("strategy")), bool(inputs.get("dynamic"))))
        if kind is None or inputs.get("type") != "int" or not inputs.get("symmetric", True):
            raise InputError(
                "input activations other than symmetric integers per token (dynamic) or per "
                "tensor (static); crossbit reads its own"
            )
        activations = ActivationGrid(bits=int(inputs["num_bits"]), kind=kind)  # type: ignore[arg-type]
    return QuantScheme(_as_read(grid, activations, role), activations, role), storage


def _as_read(grid: Grid, activations: ActivationGrid | None, role: Role) -> Grid:
    float_inputs = activations is None and role != "embedding"
    return as_read(grid, float_inputs=float_inputs)


def _check_activations(grid: ActivationGrid | None) -> None:
    if grid is None:
        return
    if grid.research:
        raise InputError(
            f"activations of kind {grid.kind} run in no plain runtime and are not exported; "
            "use the folded mode"
        )
    readers = ((1 << grid.bits) - 1) / 2
    if grid.effective_divisor != readers:
        raise InputError(
            f"activation divisor {grid.effective_divisor:g} cannot be exported: compressed-tensors "
            f"readers divide by {readers:g}; set divisor {readers:g} or leave it out"
        )
