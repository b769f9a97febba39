"""The numbers of a run, taken from the empty model and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from crossbit.engine.job import needs_calibration
from crossbit.engine.let import factored_layers
from crossbit.engine.plan import BlockPlan, LayerPlan, ModelPlan
from crossbit.engine.turn import turned
from crossbit.estimate.shapes import (
    BlockShape,
    Description,
    GroupShape,
    LayerShape,
    OutsideShape,
)
from crossbit.export.artifact import layer_scheme, outside_schemes
from crossbit.export.scheme import INT, QuantScheme
from crossbit.models.experts import is_expert
from crossbit.models.shell import Shell
from crossbit.packing import words_per_row
from crossbit.recipe import DuQuant, Let, Recipe, TrainedRounding
from crossbit.rotations.duquant import PARTS, block_size_for
from crossbit.run import VERIFY_TOKENS, evaluation_length
from crossbit.runtime.attention import IMPLEMENTATION
from crossbit.transforms.rotation import Change, RotationPlan

SHAPE_ENTRY = 16  # bytes of weight_shape, two int64, beside packed words


def describe(
    shell: Shell,
    plan: ModelPlan,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    windows: int | None = None,
    source_bytes: int = 0,
    companions: int = 0,
    rotation: RotationPlan | None = None,
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
        rotation: what is rotated as it is read.
    """
    structure, config = shell.structure, shell.config
    schemes = outside_schemes(structure, plan)
    changes = {} if rotation is None else rotation.changes
    named = dict(shell.model.named_parameters())
    prefix = f"{structure.family.blocks}."
    ends = {f"{structure.embedding}.weight", f"{structure.head}.weight"}
    outside = sum(p.numel() for n, p in named.items() if not n.startswith(prefix) and n not in ends)

    def end(name: str, *, tied: bool = False) -> OutsideShape:
        weight = shell.model.get_submodule(name).weight
        rows, columns = (int(n) for n in weight.shape)
        scheme = schemes.get(name)
        stored = None if scheme is None else _stored(rows, columns, scheme)[0]
        return OutsideShape(rows, columns, stored, name in changes)

    embedding = end(structure.embedding)
    heads = int(getattr(config, "num_attention_heads", 1))
    wanted = recipe.evaluation.windows
    described = Description(
        recipe=recipe,
        blocks=tuple(
            _block(shell, i, b, recipe.duquant, recipe.let, dtype, changes)
            for i, b in enumerate(plan.blocks)
        ),
        embedding=embedding,
        head=None if structure.tied else end(structure.head),
        outside=outside,
        itemsize=dtype.itemsize,
        source_itemsize=2.0,
        heads=heads,
        head_width=int(getattr(config, "head_dim", None) or embedding.columns // heads),
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        eager=_eager(shell),
        calibrated=needs_calibration(recipe),
        windows=wanted if windows is None else min(wanted, windows),
        window_length=evaluation_length(config, recipe.evaluation.length),
        verify_length=evaluation_length(config, VERIFY_TOKENS),
        companions=companions,
    )
    if source_bytes:
        described = replace(described, source_itemsize=source_bytes / described.parameters)
    return described


def _eager(shell: Shell) -> bool:
    """Whether attention makes its matrix: crossbit's own does for soft-capped scores."""
    capped = bool(getattr(shell.config, "attn_logit_softcapping", None))
    return shell.attn == "eager" or (shell.attn == IMPLEMENTATION and capped)


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
    shell: Shell,
    index: int,
    plan: BlockPlan,
    duquant: DuQuant | None,
    let: Let | None,
    dtype: torch.dtype,
    changes: Mapping[str, Change],
) -> BlockShape:
    structure, config = plan.structure, shell.config
    experts = len({n.rpartition(".")[0] for n in structure.linears if is_expert(f".{n}")})
    chosen = float(getattr(config, "num_experts_per_tok", None) or 1)
    groups = []
    known: set[str] = set()
    factored = set() if let is None else factored_layers(plan, let)

    def layer(name: str, share: float, *, residual: bool, turn: int, keeps: bool) -> LayerShape:
        found = _layer(structure.linears[name], plan.layers.get(name), name, share, residual, dtype)
        change = changes.get(f"{structure.name}.{name}", Change())
        heads = (change.column_heads, change.row_heads)
        return replace(
            found,
            stored=found.stored + (turn if keeps else 0),
            tensors=found.tensors + (len(PARTS) if turn and keeps else 0),
            turn=turn,
            factored=name in factored,
            turns=sum(t is not None for t in (change.columns, change.rows, *heads)),
            by_head=any(heads),
        )

    for group in structure.groups:
        # One point an expert, as in ``engine.observe``: each sees the tokens routed to it.
        by_parent: dict[str, list[str]] = {}
        for name in group.consumers:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
        known.update(group.consumers)
        norm = group.name in ("qkv", "gate_up", "fc1") or group.name.endswith("gate_up")
        turn = 0
        if duquant is not None and turned(plan, group, duquant):
            turn = _rotation_bytes(group.width, duquant)
        for names in by_parent.values():
            share = chosen / experts if is_expert(f".{names[0]}") and experts else 1.0
            layers = tuple(
                layer(n, share, residual=not norm, turn=turn, keeps=n == group.consumers[0])
                for n in names
            )
            groups.append(GroupShape(group.width, share, layers, group.source is not None, norm))
    for name, info in structure.linears.items():
        if name not in known:
            alone = (layer(name, 1.0, residual=False, turn=0, keeps=False),)
            groups.append(GroupShape(info.in_features, 1.0, alone, False, False))
    block = shell.block(index)
    linear = sum(i.in_features * i.out_features for i in structure.linears.values())
    sizes = [p.numel() for p in block.parameters()]
    return BlockShape(tuple(groups), sum(sizes) - linear, len(sizes) - len(structure.linears))


def _rotation_bytes(width: int, config: DuQuant) -> int:
    """DuQuant's two rotations float32 and its permutation int64, for an input."""
    n = block_size_for(width, config.block)
    return 2 * 4 * n * (n if config.shared else width) + 8 * width


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
