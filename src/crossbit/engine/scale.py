"""Apply the recipe's transforms to one block: choose each group's factor, fold it.

CFP also truncates weights, which changes the block's function. What the block is compared with
came from its float weights before any of this (``engine/loop.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.let import (
    NO_FOLD,
    QUERY_KEY,
    left_out,
    query_key_left_out,
    shifted,
    wanted,
)
from crossbit.engine.observe import GroupState
from crossbit.engine.plan import BlockPlan
from crossbit.models.structure import InputGroup, NormSource, RowSource
from crossbit.recipe import AwqScale, Cfp, CrossFold, Fold, Let, Smooth
from crossbit.transforms import awq_scale, cfp, cross_fold, smooth
from crossbit.transforms.fold import fold, shift
from crossbit.transforms.search import FoldChoice, FoldProblem

SAMPLE_ROWS = 2048
_CHOOSE: dict[type, Callable[[FoldProblem, Any], FoldChoice]] = {
    CrossFold: cross_fold.choose,
    Smooth: smooth.choose,
    AwqScale: awq_scale.choose,
    Cfp: cfp.choose,
    Let: lambda problem, config: smooth.choose(problem, Smooth(strength=config.start)),
}


def apply_transforms(
    block: nn.Module,
    plan: BlockPlan,
    states: Sequence[GroupState],
    transforms: Sequence[Fold],
    stored: torch.dtype,
) -> list[dict[str, Any]]:
    """Fold every transform into the block, in order.

    Args:
        block: float32 linear weights; other parameters in the dtype they will be stored in.
        plan: grids of its layers.
        states: statistics of its groups; they are rescaled along with the fold.
        transforms: the recipe's folds.
        stored: dtype of norm gains and biases in the export.

    Returns:
        One record a fold: group, transform, chosen parameter, losses of all candidates. One a
        truncated layer: group, transform, layer, the truncated fraction, and what it changed.
    """
    records: list[dict[str, Any]] = []
    for config in transforms:
        if isinstance(config, Cfp):
            # Before its fold, which enlarges the columns of outlier channels: those large weights
            # are wanted, and must not be taken for outliers.
            if config.weights:
                records += _truncate(block, plan, states, config)
            if not config.activations:
                continue
        for state in states:
            group = state.group
            if not any(name in plan.layers for name in group.consumers):
                continue
            if isinstance(config, Let) and not wanted(plan, group, config.down):
                continue
            reason = _left_out(plan, group, config)
            if reason:
                records.append({"group": group.name, "kind": config.kind, "skipped": reason})
                continue
            if isinstance(config, Let) and plan.group_activations(group) is None:
                continue  # its factors begin at 1
            norms_only = isinstance(config, Smooth) and config.targets == "norms"
            if norms_only and not isinstance(group.source, NormSource):
                continue
            choice = _CHOOSE[type(config)](_problem(block, plan, state, config), config)
            realised = fold(block, group, choice.factor, stored=stored).float()
            state.rescale(realised)
            detail = dict(choice.detail)
            if isinstance(config, Let) and shifted(plan, group, config):
                detail["shift"] = _shift(block, state, stored)
            records.append(
                {
                    "group": group.name,
                    "kind": config.kind,
                    "chosen": choice.parameter,
                    "label": choice.label,
                    "losses": choice.losses,
                    **detail,
                }
            )
        reason = query_key_left_out(plan, config) if isinstance(config, Let) else ""
        if reason:
            records.append({"group": QUERY_KEY, "kind": config.kind, "skipped": reason})
    return records


def _left_out(plan: BlockPlan, group: InputGroup, config: Fold) -> str:
    """Why the fold has no factor of the group's input; empty if it has one."""
    if isinstance(config, Let):
        return left_out(plan, group)
    if group.source is None:
        return group.reason or NO_FOLD
    if isinstance(config, Cfp) and plan.group_activations(group) is None:
        # Nothing to gain for a float input (experts have them), and weights to lose.
        return "its input is not quantized"
    return ""


def _shift(block: nn.Module, state: GroupState, stored: torch.dtype) -> float:
    """Shift a group's input by the middle of each channel's range over the sample.

    OmniQuant's start; massive tokens are not in the sample. The statistics follow.

    Returns:
        The largest shift.
    """
    sample, source = state.sample(SAMPLE_ROWS), state.group.source
    if not sample.shape[0]:
        return 0.0
    low, high = sample.amin(0), sample.amax(0)
    if isinstance(source, RowSource):  # channels of one row have one shift
        rows = torch.unique(source.rows, return_inverse=True)[1]
        empty = torch.zeros(int(rows.max()) + 1)
        low = empty.scatter_reduce(0, rows, low, "amin", include_self=False)[rows]
        high = empty.scatter_reduce(0, rows, high, "amax", include_self=False)[rows]
    realised = shift(block, state.group, (low + high) / 2, stored=stored).float()
    state.shift(realised)
    return float(realised.abs().max())


def _truncate(
    block: nn.Module, plan: BlockPlan, states: Sequence[GroupState], config: Cfp
) -> list[dict[str, Any]]:
    """Truncate the weights of every planned layer in place, foldable input or not."""
    by_layer = {name: state for state in states for name in state.group.consumers}
    records = []
    for name, layer in plan.layers.items():
        weight = _weight(block, name)
        result = cfp.truncate(
            weight,
            fence=config.fence,
            spread=config.spread,
            gap=config.gap,
            per_channel=config.per_channel,
        )
        record: dict[str, Any] = {
            "group": plan.structure.group_of(name).name,
            "kind": config.kind,
            "layer": f"{plan.structure.name}.{name}",
            "truncated": result.fraction,
            "weight_change": result.change,
            "limit": result.limit,
        }
        records.append(record)
        state = by_layer.get(name)
        if result.limit is None:
            continue
        problem = None
        if state is not None:
            own = _problem(block, plan, state, config)
            problem = replace(own, weights=[weight], grids=[layer.weights])
        if config.judge:
            refused = True  # without calibration nothing speaks for it
            if problem is not None:
                kept, truncated = cfp.truncation_errors(problem, [weight, result.weight])
                record["losses"] = {"kept": kept, "truncated": truncated}
                refused = kept <= truncated
            if refused:
                record.update(truncated=0.0, weight_change=0.0, limit=None, output_change=0.0)
                continue
        if problem is not None:
            exact = replace(problem, grids=[None], activations=None)
            (record["output_change"],) = cfp.truncation_errors(exact, [result.weight])
        block.get_submodule(name).get_parameter("weight").copy_(result.weight)
    return records


def _weight(block: nn.Module, name: str) -> Tensor:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.weight.detach().float()


def _problem(block: nn.Module, plan: BlockPlan, state: GroupState, config: Any) -> FoldProblem:
    group = state.group
    weights, grids = [], []
    for name in group.consumers:
        weights.append(_weight(block, name))
        grids.append(plan.layers[name].weights if name in plan.layers else None)
    skip = bool(getattr(config, "skip_massive", False))
    return FoldProblem(
        weights,
        grids,
        plan.group_activations(group),
        state.column_maximum(skip_massive=skip),
        state.column_mean(),
        state.sample(SAMPLE_ROWS),
        _shared_index(group.source),
        state.fitting() if getattr(config, "fit", False) else None,
    )


def _shared_index(source: NormSource | RowSource | None) -> Tensor | None:
    if not isinstance(source, RowSource):
        return None
    rows = torch.unique(source.rows, return_inverse=True)[1]
    return None if int(rows.max()) + 1 == rows.numel() else rows
