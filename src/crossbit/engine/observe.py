"""Run calibration text through one block and remember what its linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.statistics import InputStatistics
from crossbit.models.structure import BlockStructure, InputGroup


@dataclass
class Point:
    """One place where an input is read: layers of one parent module that share a tensor.

    A group of dense layers has one point; a group of experts has one an expert, since each sees
    only the tokens that were routed to it.
    """

    consumers: tuple[str, ...]
    statistics: InputStatistics


@dataclass
class GroupState:
    """A fold group and its points."""

    group: InputGroup
    points: list[Point] = field(default_factory=list)

    def column_maximum(self, *, skip_massive: bool) -> Tensor:
        """c_j [K] over all points."""
        maxima = [p.statistics.column_maximum(skip_massive=skip_massive) for p in self.points]
        return torch.stack(maxima).amax(0)

    def column_mean(self) -> Tensor:
        """mean |X_j| [K] over all points, weighted by tokens."""
        tokens = sum(p.statistics.tokens for p in self.points)
        total = sum(p.statistics.column_mean() * p.statistics.tokens for p in self.points)
        assert isinstance(total, Tensor)
        return total / max(1, tokens)

    def sample(self, limit: int) -> Tensor:
        """At most ``limit`` held-out rows [S, K], evenly spread over the points."""
        rows = torch.cat([p.statistics.sample for p in self.points])
        if rows.shape[0] <= limit:
            return rows
        return rows[torch.linspace(0, rows.shape[0] - 1, limit).long()]

    def fitting(self) -> Tensor | None:
        """Kept rows [T, K] of the fitting sequences, None if there are none."""
        rows = torch.cat([p.statistics.fitting for p in self.points])
        return rows if rows.shape[0] else None

    def rescale(self, factor: Tensor) -> None:
        """Account for a fold of ``factor`` [K]."""
        for point in self.points:
            point.statistics.rescale(factor)

    def shift(self, shift: Tensor) -> None:
        """Account for X -> X - shift [K]."""
        for point in self.points:
            point.statistics.shift(shift)


def make_states(
    block: BlockStructure,
    *,
    percentile: float,
    tokens: int,
    ranges: bool,
    hessian: Callable[[str], bool],
    centres: Callable[[InputGroup], bool] = lambda _: False,
) -> list[GroupState]:
    """Empty statistics for every group of a block.

    Args:
        block: the block.
        percentile: of the column maxima.
        tokens: tokens of the fitting sequences.
        ranges: whether anything looks at maxima and means.
        hessian: whether the solver of a layer (relative name) wants X^T X.
        centres: whether the input of a group will be shifted.
    """
    states = []
    for group in block.groups:
        by_parent: dict[str, list[str]] = {}
        for name in group.consumers:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
        points = [
            Point(
                tuple(names),
                InputStatistics(
                    group.width,
                    percentile=percentile,
                    tokens=tokens,
                    ranges=ranges,
                    hessian=any(hessian(n) for n in names),
                    centres=centres(group),
                ),
            )
            for names in by_parent.values()
        ]
        states.append(GroupState(group, points))
    return states


def attach(
    block: nn.Module, states: Iterable[GroupState], take: Callable[[InputStatistics, Tensor], None]
) -> list[Any]:
    """Hook every point so that ``take(statistics, input)`` is called; returns the handles."""
    handles = []
    for state in states:
        for point in state.points:

            def hook(
                _module: nn.Module, args: tuple[Any, ...], stats: InputStatistics = point.statistics
            ) -> None:
                take(stats, args[0].detach())

            module = block.get_submodule(point.consumers[0])
            handles.append(module.register_forward_pre_hook(hook))
    return handles
