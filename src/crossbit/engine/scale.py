"""Apply the recipe's transforms to one block: choose each group's factor, fold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.observe import GroupState
from crossbit.engine.plan import BlockPlan
from crossbit.models.structure import NormSource, RowSource
from crossbit.recipe import AwqScale, CrossFold, Smooth
from crossbit.transforms import awq_scale, cross_fold, smooth
from crossbit.transforms.fold import fold
from crossbit.transforms.search import FoldChoice, FoldProblem

SAMPLE_ROWS = 2048
_CHOOSE: dict[type, Callable[[FoldProblem, Any], FoldChoice]] = {
    CrossFold: cross_fold.choose,
    Smooth: smooth.choose,
    AwqScale: awq_scale.choose,
}


def apply_transforms(
    block: nn.Module,
    plan: BlockPlan,
    states: Sequence[GroupState],
    transforms: Sequence[CrossFold | Smooth | AwqScale],
    stored: torch.dtype,
) -> list[dict[str, Any]]:
    """Fold every transform into the block, in order.

    Args:
        block: float32 linear weights; other parameters in the dtype they will be stored in.
        plan: grids of its layers.
        states: statistics of its groups; they are rescaled along with the fold.
        transforms: from the recipe.
        stored: dtype of norm gains and biases in the export.

    Returns:
        One record a fold: group, transform, chosen parameter, losses of all candidates.
    """
    records: list[dict[str, Any]] = []
    for config in transforms:
        for state in states:
            group = state.group
            if not any(name in plan.layers for name in group.consumers):
                continue
            if group.source is None:
                records.append({"group": group.name, "kind": config.kind, "skipped": group.reason})
                continue
            norms_only = isinstance(config, Smooth) and config.targets == "norms"
            if norms_only and not isinstance(group.source, NormSource):
                continue
            choice = _CHOOSE[type(config)](_problem(block, plan, state, config), config)
            realised = fold(block, group, choice.factor, stored=stored).float()
            state.rescale(realised)
            records.append(
                {
                    "group": group.name,
                    "kind": config.kind,
                    "chosen": choice.parameter,
                    "label": choice.label,
                    "losses": choice.losses,
                }
            )
    return records


def _problem(block: nn.Module, plan: BlockPlan, state: GroupState, config: Any) -> FoldProblem:
    group = state.group
    weights, grids = [], []
    for name in group.consumers:
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear)
        weights.append(module.weight.detach().float())
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
