"""What a trained rounding is: its parametrisation, its state, the weight and the grid in force.

``solvers.rounding`` makes integers of it and gradients for it. Here is what stands behind them: a
weight that may move, along its singular directions (``solvers.expansion``) or by factors of its
rows and columns, and steps that are trained as factors or as shares of each group's range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid, fit_range, grouped
from crossbit.solvers.expansion import (
    Basis,
    ExpansionChoice,
    expand,
    learning_rate_scale,
    pull_back_expansion,
)

Base = Literal["frac", "zero"]
Parameter = Literal["full", "low_rank", "none"]
Mode = Literal["straight_through", "sigmoid", "held"]
Limits = Literal["step", "range"]

EXPANSION = ("expansion", "square")  # names of B's parameters
WHOLE = 4.0  # where g of limits "range" starts: sigmoid(4) = 0.982 of the range (OmniQuant)


@dataclass(frozen=True)
class RoundingChoice:
    """How a weight's rounding is parametrised.

    Attributes:
        base, parameter, mode: see the module's text.
        rank: r of ``low_rank``.
        reach: largest |offset| in steps (straight-through only).
        limits: how the steps are trained; "range" is straight-through only.
        expansion: how the weight moves along its singular directions, None if it does not.
    """

    base: Base = "frac"
    parameter: Parameter = "full"
    mode: Mode = "straight_through"
    rank: int = 5
    reach: float = 1.0
    limits: Limits = "step"
    expansion: ExpansionChoice | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank: {self.rank} is below 1; use 1 or more, such as 5")
        if not self.reach > 0:
            raise InputError(f"reach: {self.reach} is not positive; 0.5 reaches the next code")
        plain = self.mode == "straight_through" and self.base == "frac"
        if self.mode == "held":
            return
        moves = self.limits == "range" or self.expansion is not None or self.parameter == "none"
        if moves and not plain:
            # Their integers are those of a weight that stays.
            raise InputError(
                f"mode {self.mode}, base {self.base}: does not go with limits range, an expansion "
                "or parameter none; use mode straight_through with base frac"
            )


@dataclass
class _Moved:
    """A moved weight, and what it was made of: tensors, and the versions they had."""

    weight: Tensor
    sources: list[Tensor]
    versions: list[int]

    def fits(self, sources: list[Tensor]) -> bool:
        """True if nothing that is known of them says that it would be another one now."""
        return len(sources) == len(self.sources) and all(
            one is other and one._version == version
            for one, other, version in zip(sources, self.sources, self.versions, strict=True)
        )


@dataclass
class Rounding:
    """A weight whose rounding is being trained.

    Attributes:
        weight: float32 [N, K], what is rounded.
        scale: float32 [N', G], the steps to begin with.
        zero: float32 [N', G] zero points, or None.
        grid: the grid.
        choice: the parametrisation.
        parameters: what is trained, float32: "offset" [N, K], or "a1" [N, r] and "a2" [r, K]; and
            "step" [N', G], the logarithm of the factor on ``scale``, or "low" and "high" [N', G],
            the g of limits "range"; and those of the expansion.
        basis: the weight's singular directions, with an expansion.
        rows, columns: float32 [N] and [K], factors of the moved weight that something else trains.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    choice: RoundingChoice
    parameters: dict[str, Tensor] = field(default_factory=dict)
    basis: Basis | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    _moved: _Moved | None = field(default=None, repr=False)

    @property
    def moves(self) -> bool:
        """True if what is rounded is not ``weight`` itself."""
        return self.basis is not None or self.rows is not None or self.columns is not None

    @property
    def expansion_rate(self) -> float:
        """Factor of the expansion's learning rate: the weight moves alike for any mask."""
        if self.basis is None or self.choice.expansion is None:
            return 1.0
        return learning_rate_scale(self.choice.expansion, self.basis.s.numel())


def moved_weight(state: Rounding) -> Tensor:
    """What is rounded, float32 [N, K]: W, moved by its expansion and factors. Not to be written to.

    It is made once for all that is asked between two steps of the optimiser. Operations in place
    show in a tensor's version; torch's fused optimisers write without one: ``forget_moved`` goes
    after their steps.
    """
    if not state.moves:
        return state.weight
    moving = [p for name, p in state.parameters.items() if name in EXPANSION]
    sources = [state.weight, *moving, *_factors(state)]
    if state._moved is None or not state._moved.fits(sources):
        moved = _expanded(state)
        for factor, axis in ((state.rows, 1), (state.columns, 0)):
            if factor is not None:
                moved = moved * factor.unsqueeze(axis)
        state._moved = _Moved(moved, sources, [tensor._version for tensor in sources])
    return state._moved.weight


def forget_moved(state: Rounding) -> None:
    """Free what ``moved_weight`` keeps; what is asked next is made anew."""
    state._moved = None


def _expanded(state: Rounding) -> Tensor:
    if state.basis is None or state.choice.expansion is None:
        return state.weight
    inner = {name: p for name, p in state.parameters.items() if name in EXPANSION}
    return state.weight + expand(state.basis, state.choice.expansion, inner)


def _factors(state: Rounding) -> list[Tensor]:
    return [factor for factor in (state.rows, state.columns) if factor is not None]


def effective_grid(state: Rounding) -> tuple[Tensor, Tensor | None]:
    """Steps [N', G] float32 as they will be stored, and zero points (float32) or None."""
    if state.choice.limits == "step":
        return effective_scale(state), state.zero
    view = grouped(moved_weight(state), state.grid)
    low = view.amin(-1).clamp_(max=0.0) * state.parameters["low"].sigmoid()
    high = view.amax(-1).clamp_(min=0.0) * state.parameters["high"].sigmoid()
    scale, zero = fit_range(low, high, state.grid)
    return scale.float(), None if zero is None else zero.float()


def effective_scale(state: Rounding) -> Tensor:
    """Steps [N', G] float32 as they will be stored."""
    if state.choice.limits == "range":
        return effective_grid(state)[0]
    dtype = state.grid.scale_dtype
    trained = state.scale * state.parameters["step"].exp()
    if state.rows is not None and _follows(state):
        trained = trained * state.rows.unsqueeze(1)
    info = torch.finfo(dtype)
    size = trained.abs().clamp(min=info.tiny, max=info.max)
    return torch.copysign(size, trained).to(dtype).float()


def _follows(state: Rounding) -> bool:
    """Whether the steps change with the factors of rows, as those of limits "range" do anyway.

    Then a row rounds alike whatever its factor; a step of several rows belongs to none of them.
    """
    return state.choice.limits == "step" and state.scale.shape[0] == state.weight.shape[0]


def pull_back_limits(state: Rounding, slopes: Tensor, found: dict[str, Tensor]) -> None:
    """Gradients of what the steps come from, given those at the steps themselves [N', G].

    A range's gradient ends at its shares: that a moved weight's extremes make the range, and zero
    points, are constants to it.
    """
    if state.choice.limits == "step":
        found["step"] = slopes * effective_scale(state)
        if state.rows is not None and _follows(state):
            found["rows"] = found["step"].sum(1) / state.rows
        return
    view = grouped(moved_weight(state), state.grid)
    low, high = view.amin(-1).clamp_(max=0.0), view.amax(-1).clamp_(min=0.0)
    g_low, g_high = state.parameters["low"].sigmoid(), state.parameters["high"].sigmoid()
    if state.grid.symmetric:
        # The larger side alone makes the step; a negative step turns its sign over.
        upper = high * g_high > -low * g_low
        unit = slopes / state.grid.effective_divisor
        if state.grid.signed:
            unit = torch.where(upper, -unit, unit)
        at_low, at_high = -unit * ~upper, unit * upper
    else:
        unit = slopes / state.grid.steps
        at_low, at_high = -unit, unit
    found["low"] = at_low * low * g_low * (1 - g_low)
    found["high"] = at_high * high * g_high * (1 - g_high)


def pull_back_move(state: Rounding, at_weight: Tensor, found: dict[str, Tensor]) -> None:
    """Gradients of what moves the weight, given that at the moved weight [N, K] (used up)."""
    factors = _factors(state)
    if factors:
        weight = _expanded(state)
        rows = None if state.rows is None else state.rows.unsqueeze(1)
        if state.columns is not None:
            pulled = at_weight * weight
            found["columns"] = (pulled if rows is None else pulled.mul_(rows)).sum(0)
        if rows is not None:
            pulled = at_weight * weight
            if state.columns is not None:
                pulled.mul_(state.columns)
            found["rows"] = found.get("rows", 0) + pulled.sum(1)
            at_weight.mul_(rows)
        if state.columns is not None:
            at_weight.mul_(state.columns)
    if state.basis is not None and state.choice.expansion is not None:
        found.update(pull_back_expansion(state.basis, state.choice.expansion, at_weight))
