"""What an estimate looks at: the numbers of a run, without a model or a tensor.

``describe`` takes them from the empty model and the plan; everything else in the package is a pure
function of a ``Description``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from crossbit.engine.job import needs_calibration
from crossbit.engine.plan import BlockPlan, LayerPlan, ModelPlan, choice_of
from crossbit.export.artifact import layer_scheme, outside_schemes
from crossbit.export.scheme import INT, QuantScheme
from crossbit.models.experts import is_expert
from crossbit.models.shell import Shell
from crossbit.packing import words_per_row
from crossbit.recipe import (
    Activations,
    EndToEnd,
    Gptq,
    Recipe,
    Rtn,
    TrainedRounding,
    first_solver,
)
from crossbit.run import VERIFY_TOKENS, evaluation_length
from crossbit.solvers.expansion import stored_shapes
from crossbit.windows import Window, schedule

SHAPE_ENTRY = 16  # bytes of weight_shape, two int64, beside packed words


@dataclass(frozen=True)
class LayerShape:
    """A linear layer [rows, columns] of a block and what is done with it.

    Attributes:
        rows, columns: N, K.
        groups: scales a row; 0 is one for the whole matrix.
        stored: bytes of its tensors in the export, file headers left out.
        tensors: how many they are.
        packed: codes are packed into words.
        input_bits: of its input's grid, None for float.
        integer: it runs as int8 x int8.
        solver, rounding: as in the plan; None and None for a layer that is left alone.
        share: of the tokens that reach it (an expert's is below 1).
        residual: what it gives is added to the residual stream, and is not kept for a gradient.
    """

    rows: int
    columns: int
    groups: int
    stored: int
    tensors: int
    packed: bool
    input_bits: int | None
    integer: bool
    solver: Rtn | Gptq | None
    rounding: TrainedRounding | None
    share: float
    residual: bool

    @property
    def weights(self) -> int:
        """N K."""
        return self.rows * self.columns

    @property
    def scales(self) -> int:
        """Number of scales."""
        return self.rows * self.groups if self.groups else 1

    @property
    def quantized(self) -> bool:
        """True if it gets integers."""
        return self.solver is not None

    @property
    def parameters(self) -> int:
        """Numbers that training changes, those of the steps left out."""
        if self.rounding is None:
            return 0
        rank = min(self.rounding.rank, self.rows, self.columns)
        offsets = {
            "full": self.weights,
            "low_rank": rank * (self.rows + self.columns),
            "none": 0,
        }
        return offsets[self.rounding.parameter] + sum(map(math.prod, self._inner.values()))

    @property
    def limits(self) -> int:
        """Numbers that the steps are trained by: one each, or the two ends of each range."""
        ranges = self.rounding is not None and self.rounding.limits == "range"
        return self.scales * (2 if ranges else 1)

    @property
    def directions(self) -> int:
        """Singular directions that the weight moves along, 0 if it stays where it is."""
        choice = choice_of(self.rounding).expansion
        return 0 if choice is None else choice.check_shape(self.rows, self.columns)

    @property
    def basis(self) -> int:
        """Numbers of U, V^T and S."""
        return self.directions * (self.rows + self.columns + 1)

    @property
    def inner_width(self) -> float:
        """Mean numbers in a row of B."""
        return sum(map(math.prod, self._inner.values())) / max(1, self.directions)

    @property
    def _inner(self) -> dict[str, tuple[int, ...]]:
        choice = choice_of(self.rounding).expansion
        return {} if choice is None else stored_shapes(choice, self.directions)


@dataclass(frozen=True)
class GroupShape:
    """Layers that read one input [tokens, columns]; an expert's own input is a group of its own."""

    columns: int
    share: float
    layers: tuple[LayerShape, ...]
    foldable: bool
    norm: bool

    @property
    def hessian(self) -> bool:
        """True if X^T X of the input is accumulated."""
        return any(isinstance(layer.solver, Gptq) for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all its layers."""
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True)
class BlockShape:
    """One block: its groups, and ``other`` parameters (norms, biases, routers)."""

    groups: tuple[GroupShape, ...]
    other: int
    other_tensors: int

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Layers of all groups."""
        return tuple(layer for group in self.groups for layer in group.layers)

    @property
    def planned(self) -> tuple[LayerShape, ...]:
        """Layers that get integers."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def weights(self) -> int:
        """Weights of all linear layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.weights + self.other

    @property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max((layer.weights for layer in self.layers), default=0)

    @property
    def active(self) -> float:
        """Weights that a token meets: of experts, those that it is routed to."""
        return sum(layer.weights * layer.share for layer in self.layers)


@dataclass(frozen=True)
class OutsideShape:
    """An embedding or a head [rows, columns]; ``stored`` None: it stays in floating point."""

    rows: int
    columns: int
    stored: int | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Description:
    """The numbers of a run.

    Attributes:
        recipe: its settings (calibration and training are read from here, so that another setting
            is another recipe).
        blocks: in order.
        embedding, head: head None is tied.
        outside: parameters that are neither (norms, positions).
        itemsize: bytes of the dtype of computation.
        source_itemsize: of a stored parameter of the original.
        heads: attention heads, for attention that makes its matrix.
        head_width: channels of a head.
        eager: attention makes its matrix [heads, L, L] in the run itself (it always does in
            verification).
        calibrated: the recipe needs calibration.
        windows: evaluation windows.
        window_length: tokens of each.
        verify_length: tokens that verification runs on.
        companions: bytes of tokenizer and other files that are copied along.
    """

    recipe: Recipe
    blocks: tuple[BlockShape, ...]
    embedding: OutsideShape
    head: OutsideShape | None
    outside: int
    itemsize: int
    source_itemsize: float
    heads: int
    head_width: int
    eager: bool
    calibrated: bool
    windows: int
    window_length: int
    verify_length: int
    companions: int

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return max(g.columns for g in self.blocks[0].groups if g.norm)

    @property
    def samples(self) -> int:
        """Calibration sequences; 0 if none are needed."""
        return self.recipe.calibration.samples if self.calibrated else 0

    @property
    def length(self) -> int:
        """Tokens of each."""
        return self.recipe.calibration.length

    @property
    def held(self) -> int:
        """Sequences that are kept out of training (``Job.held_out``)."""
        wanted = max(1, round(self.samples * self.recipe.calibration.holdout))
        return min(self.samples - 1, wanted) if self.samples else 0

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.embedding.rows

    @property
    def outside_weights(self) -> int:
        """Parameters outside the blocks, a tied matrix once."""
        return self.embedding.weights + (self.head.weights if self.head else 0) + self.outside

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return sum(block.parameters for block in self.blocks) + self.outside_weights

    @property
    def end_to_end(self) -> EndToEnd | None:
        """Settings of the stage that tunes all blocks together, None if there is none."""
        return self.recipe.end_to_end if self.recipe.trains else None

    @property
    def schedule(self) -> list[Window]:
        """The windows of a recipe that trains, else a window a block."""
        if not self.recipe.trains:
            return schedule(len(self.blocks), 1)
        objective = self.recipe.objective
        return schedule(
            len(self.blocks),
            objective.window,
            objective.overlap,
            expand=objective.expand,
            largest=objective.largest,
        )


def describe(
    shell: Shell,
    plan: ModelPlan,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    windows: int | None = None,
    source_bytes: int = 0,
    companions: int = 0,
) -> Description:
    """The numbers of a run.

    Args:
        shell: the empty model.
        plan: grids and solvers of its layers.
        recipe: the recipe.
        dtype: of computation.
        windows: evaluation windows that there are; None is as many as the recipe asks for.
        source_bytes: of the original's weights, 0 if that is not known.
        companions: bytes of the files that are copied along.
    """
    structure, config = shell.structure, shell.config
    schemes = outside_schemes(structure, plan)
    named = dict(shell.model.named_parameters())
    prefix = f"{structure.family.blocks}."
    ends = {f"{structure.embedding}.weight", f"{structure.head}.weight"}
    outside = sum(p.numel() for n, p in named.items() if not n.startswith(prefix) and n not in ends)

    def end(name: str, *, tied: bool = False) -> OutsideShape:
        weight = shell.model.get_submodule(name).weight
        rows, columns = (int(n) for n in weight.shape)
        scheme = schemes.get(name)
        stored = None if scheme is None else _stored(rows, columns, scheme)[0]
        return OutsideShape(rows, columns, stored)

    embedding = end(structure.embedding)
    heads = int(getattr(config, "num_attention_heads", 1))
    wanted = recipe.evaluation.windows
    described = Description(
        recipe=recipe,
        blocks=tuple(_block(shell, i, b, config, dtype) for i, b in enumerate(plan.blocks)),
        embedding=embedding,
        head=None if structure.tied else end(structure.head),
        outside=outside,
        itemsize=dtype.itemsize,
        source_itemsize=2.0,
        heads=heads,
        head_width=int(getattr(config, "head_dim", None) or embedding.columns // heads),
        eager=shell.attn == "eager",
        calibrated=needs_calibration(recipe),
        windows=wanted if windows is None else min(wanted, windows),
        window_length=evaluation_length(config, recipe.evaluation.length),
        verify_length=evaluation_length(config, VERIFY_TOKENS),
        companions=companions,
    )
    if source_bytes:
        described = replace(described, source_itemsize=source_bytes / described.parameters)
    return described


def with_recipe(description: Description, recipe: Recipe) -> Description:
    """The same run with another calibration, training or parametrisation of trained rounding."""

    def layer(known: LayerShape) -> LayerShape:
        solver = recipe.solver
        if known.rounding is None or not isinstance(solver, TrainedRounding):
            return known
        same = {key: getattr(solver, key) for key in ("parameter", "limits", "expansion")}
        rounding = known.rounding.model_copy(update=same)
        return replace(known, rounding=rounding)

    changed = {
        block: replace(
            block,
            groups=tuple(
                replace(group, layers=tuple(map(layer, group.layers))) for group in block.groups
            ),
        )
        for block in set(description.blocks)
    }
    return replace(
        description,
        recipe=recipe,
        blocks=tuple(changed[block] for block in description.blocks),
        windows=min(description.windows, recipe.evaluation.windows),
        window_length=min(description.window_length, recipe.evaluation.length),
    )


def _block(
    shell: Shell, index: int, plan: BlockPlan, config: Any, dtype: torch.dtype
) -> BlockShape:
    structure = plan.structure
    experts = len({n.rpartition(".")[0] for n in structure.linears if is_expert(f".{n}")})
    chosen = float(getattr(config, "num_experts_per_tok", None) or 1)
    groups = []
    known: set[str] = set()
    for group in structure.groups:
        # One point an expert, as in ``engine.observe``: each sees the tokens routed to it.
        by_parent: dict[str, list[str]] = {}
        for name in group.consumers:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
        known.update(group.consumers)
        norm = group.name in ("qkv", "gate_up", "fc1") or group.name.endswith("gate_up")
        for names in by_parent.values():
            share = chosen / experts if is_expert(f".{names[0]}") and experts else 1.0
            layers = tuple(
                _layer(structure.linears[n], plan.layers.get(n), n, share, not norm, dtype)
                for n in names
            )
            groups.append(GroupShape(group.width, share, layers, group.source is not None, norm))
    for name, info in structure.linears.items():
        if name not in known:
            alone = (_layer(info, plan.layers.get(name), name, 1.0, False, dtype),)
            groups.append(GroupShape(info.in_features, 1.0, alone, False, False))
    block = shell.block(index)
    linear = sum(i.in_features * i.out_features for i in structure.linears.values())
    sizes = [p.numel() for p in block.parameters()]
    return BlockShape(tuple(groups), sum(sizes) - linear, len(sizes) - len(structure.linears))


def _layer(
    info: Any, plan: LayerPlan | None, name: str, share: float, residual: bool, dtype: torch.dtype
) -> LayerShape:
    rows, columns = info.out_features, info.in_features
    if plan is None:
        stored = rows * columns * dtype.itemsize
        return LayerShape(
            rows, columns, 0, stored, 1, False, None, False, None, None, share, residual
        )
    stored, tensors = _stored(rows, columns, layer_scheme(f".{name}", plan))
    activations = plan.activations
    if activations is not None and activations.kind in ("cross_static", "cross_static_clip"):
        stored, tensors = stored + 4 * columns, tensors + 1
    if activations is not None and activations.kind == "per_token_clip":
        stored, tensors = stored + 4, tensors + 1
    grid = plan.weights
    integer = (
        activations is not None
        and activations.kind == "per_token"
        and grid.symmetric
        and grid.strategy != "group"
        and dtype != torch.float32
    )
    return LayerShape(
        rows=rows,
        columns=columns,
        groups=0 if grid.strategy == "tensor" else grid.groups(columns),
        stored=stored,
        tensors=tensors,
        packed=layer_scheme(f".{name}", plan).format != INT,
        input_bits=None if activations is None else activations.bits,
        integer=integer,
        solver=plan.solver,
        rounding=plan.rounding,
        share=share,
        residual=residual,
    )


def _stored(rows: int, columns: int, scheme: QuantScheme) -> tuple[int, int]:
    """Bytes and number of the tensors of a module (``compressed_tensors.module_tensors``)."""
    grid = scheme.weights
    per_tensor = grid.strategy == "tensor"
    scales = 1 if per_tensor else rows * grid.groups(columns)
    packed = scheme.format != INT
    tensors = 3 if packed else 2
    size = scales * grid.scale_dtype.itemsize
    if packed:
        size += rows * words_per_row(columns, grid.bits) * 4 + SHAPE_ENTRY
    else:
        size += rows * columns
    if not grid.symmetric:
        tensors += 1
        if packed and not per_tensor:
            size += words_per_row(rows, grid.bits) * grid.groups(columns) * 4
        else:
            size += scales
    if scheme.activations is not None and scheme.activations.kind == "per_tensor_static":
        size, tensors = size + 4, tensors + 1
    return size, tensors


def wants_ranges(recipe: Recipe) -> bool:
    """Column maxima and means are kept (``engine.opening``)."""
    activations = [recipe.activations, *(o.activations for o in recipe.overrides)]
    static = ("per_tensor_static", "cross_static", "cross_static_clip")
    return bool(recipe.folds) or any(
        isinstance(a, Activations) and a.kind in static for a in activations
    )


def wants_sample(recipe: Recipe) -> bool:
    """Held-out inputs are kept for searches (``engine.opening``)."""
    return bool(recipe.folds) or any(
        isinstance(s, Rtn) and s.clip == "awq" for s in recipe.first_solvers
    )


def head_solver(recipe: Recipe) -> Gptq | None:
    """GPTQ's settings if it solves the head, too."""
    solver = first_solver(recipe.solver)
    return solver if isinstance(solver, Gptq) and recipe.head is not None else None
