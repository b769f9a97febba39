"""Rotate the inputs of a block at run time: choose each group's rotation, fold its inverse.

The rotated weights are W G, since (X G)(W G)^T = X W^T for an orthogonal G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from crossbit.engine.observe import GroupState
from crossbit.engine.plan import BlockPlan
from crossbit.errors import InputError
from crossbit.models.structure import InputGroup
from crossbit.recipe import DuQuant
from crossbit.rotations.duquant import DuRotation, block_size_for, choose_rotation, outlier_gain

SAMPLE_ROWS = 4096


@torch.no_grad()
def turn_inputs(
    block: nn.Module, plan: BlockPlan, states: Sequence[GroupState], config: DuQuant
) -> tuple[list[dict[str, Any]], dict[str, DuRotation]]:
    """Rotate the inputs of a block (see ``wanted``).

    Args:
        block: float32 linear weights, all folds applied; the weights are rotated in place.
        plan: grids of its layers.
        states: statistics of its groups, with samples; they are rotated along.
        config: of the rotation.

    Returns:
        One record a group, and the rotation of each layer's input.
    """
    records: list[dict[str, Any]] = []
    rotations: dict[str, DuRotation] = {}
    for state in states:
        group = state.group
        if not wanted(plan, group):
            continue
        record: dict[str, Any] = {"group": group.name, "kind": config.kind}
        records.append(record)
        if reason := left_out(plan, group, config):
            record["skipped"] = reason
            continue
        sample = state.sample(SAMPLE_ROWS)
        if not sample.shape[0]:
            record["skipped"] = "no calibration token reached it"
            continue
        size = block_size_for(group.width, config.block)
        rotation = choose_rotation(
            sample,
            block=size,
            steps=config.steps,
            permute=config.permute,
            seed=config.seed,
            shared=config.shared,
        ).to(sample.device, torch.float32)  # as it is stored and applied
        for name in group.consumers:
            weight = block.get_submodule(name).get_parameter("weight")
            weight.copy_(rotation.fold(weight))
            rotations[name] = rotation
        record.update(block=size, **outlier_gain(sample, rotation))
        for point in state.points:
            point.statistics.rotate(rotation)
    return records, rotations


def wanted(plan: BlockPlan, group: InputGroup) -> bool:
    """Whether a rotation of the group's input is asked for.

    Where it is quantized; in a block that quantizes no input, where a weight that reads it is: a
    rotation spreads the outliers of weights as well.
    """
    if any(layer.activations is not None for layer in plan.layers.values()):
        return plan.group_activations(group) is not None
    return any(name in plan.layers for name in group.consumers)


def left_out(plan: BlockPlan, group: InputGroup, config: DuQuant) -> str:
    """Why an input that is to be rotated is not; empty if it is."""
    for name in group.consumers:
        if name not in plan.layers:
            role = plan.structure.linears[name].role
            return f"{role}, which is not quantized, reads it too"
    try:
        block_size_for(group.width, config.block)
    except InputError as error:
        return str(error)
    return ""


def turned(plan: BlockPlan, group: InputGroup, config: DuQuant) -> bool:
    """Whether the group's input is rotated, if any calibration token reaches it."""
    return wanted(plan, group) and not left_out(plan, group, config)
