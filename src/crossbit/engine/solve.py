"""Turn the float weights of one block into integers with each layer's solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossbit.engine.observe import GroupState, Point
from crossbit.engine.plan import BlockPlan, LayerPlan
from crossbit.engine.progress import release_memory
from crossbit.grid import QTensor
from crossbit.recipe import Gptq, Rtn
from crossbit.solvers.awq import awq_search_clip
from crossbit.solvers.gptq import gptq_many
from crossbit.solvers.rtn import rtn

CLIP_ROWS = 512  # held-out tokens for AWQ's clip search


@dataclass(frozen=True)
class Solved:
    """An integer weight and how it came about.

    ``weight_error`` is ||W - W^||^2 / ||W||^2; ``output_error`` is the same on calibration
    outputs, ||X (W - W^)^T||^2 / ||X W^T||^2, None where no activations were seen.
    """

    qtensor: QTensor
    solver: str
    weight_error: float
    output_error: float | None
    note: str = ""


def solve_block(
    block: nn.Module, plan: BlockPlan, states: Sequence[GroupState]
) -> dict[str, Solved]:
    """Integer weights of every planned layer of a block, by relative name.

    Args:
        block: float32 linear weights, all folds applied.
        plan: grids and solvers.
        states: statistics of the block's groups (may be empty for round-to-nearest).
    """
    points = {name: p for state in states for p in state.points for name in p.consumers}
    solved: dict[str, Solved] = {}
    for name, layer in plan.layers.items():
        if name in solved:
            continue
        release_memory()  # what the last layer's matrices left behind
        point = points.get(name)
        if isinstance(layer.solver, Gptq):
            solved.update(_solve_gptq(block, plan, name, layer, layer.solver, point))
        else:
            weight = _weight(block, name)
            qtensor = _solve_rtn(weight, layer, layer.solver, point)
            solved[name] = _measure(weight, qtensor, _describe(layer.solver), point)
    return solved


def _weight(block: nn.Module, name: str) -> Tensor:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.weight.detach().float()


def _describe(solver: Rtn | Gptq) -> str:
    if isinstance(solver, Gptq):
        return "gptq"
    return "rtn" if solver.clip == "none" else f"rtn, {solver.clip} clip"


def _solve_rtn(weight: Tensor, layer: LayerPlan, solver: Rtn, point: Point | None) -> QTensor:
    if solver.clip != "awq":
        return rtn(weight, layer.weights, clip=solver.clip)
    sample = point.statistics.sample if point is not None else torch.zeros(0, weight.shape[1])
    if sample.shape[0] == 0:  # an expert that no held-out token reached
        return rtn(weight, layer.weights, clip="mse")
    rows = torch.linspace(0, sample.shape[0] - 1, min(CLIP_ROWS, sample.shape[0])).long()
    limit = awq_search_clip(sample[rows], weight, layer.weights)
    return rtn(weight, layer.weights, limit=limit)


def _solve_gptq(
    block: nn.Module,
    plan: BlockPlan,
    name: str,
    layer: LayerPlan,
    solver: Gptq,
    point: Point | None,
) -> dict[str, Solved]:
    """Solve every layer that shares this one's input, grid and solver, in one call."""
    if point is None or point.statistics.tokens == 0:
        weight = _weight(block, name)
        note = "no calibration token reached this layer: rounded to nearest"
        qtensor = rtn(weight, layer.weights, clip="mse")
        return {name: _measure(weight, qtensor, "rtn, mse clip", None, note)}
    alike = [
        n
        for n in point.consumers
        if n in plan.layers
        and plan.layers[n].weights == layer.weights
        and plan.layers[n].solver == solver
    ]
    weights = [_weight(block, n) for n in alike]
    hessian = point.statistics.hessian_matrix()
    results = gptq_many(weights, hessian, layer.weights, **solver.options)
    solved = {}
    for n, weight, result in zip(alike, weights, results, strict=True):
        note = f"damping {result.damp_used:g}" if result.damp_used != solver.damp else ""
        solved[n] = _measure(weight, result.qtensor, _describe(solver), point, note)
    return solved


def _measure(
    weight: Tensor, qtensor: QTensor, solver: str, point: Point | None, note: str = ""
) -> Solved:
    difference = weight - qtensor.dequantize()
    weight_error = _ratio(difference.square().sum(), weight.square().sum())
    output_error = None
    if point is not None and point.statistics.hessian is not None and point.statistics.tokens:
        hessian = point.statistics.hessian_matrix()
        output_error = _ratio(
            ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
        )
    elif point is not None and point.statistics.sample.shape[0]:
        sample = point.statistics.sample
        output_error = _ratio(
            (sample @ difference.t()).square().sum(), (sample @ weight.t()).square().sum()
        )
    return Solved(qtensor, solver, weight_error, output_error, note)


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(error.double() / power.double().clamp(min=1e-30))
