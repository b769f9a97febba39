"""Trained roundings of weights that may move, in any state."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from crossbit.grid import Grid, grouped
from crossbit.solvers.expansion import ExpansionChoice
from crossbit.solvers.rounding import start_rounding
from crossbit.solvers.rounding_state import Rounding, RoundingChoice
from crossbit.solvers.rtn import rtn

LIMITS = ("step", "range")
PARAMETERS = ("full", "low_rank", "none")
EXPANSIONS: tuple[ExpansionChoice | None, ...] = (
    None,
    ExpansionChoice("diagonal"),
    ExpansionChoice("band", 2),
    ExpansionChoice("blocks", 4),
    ExpansionChoice("square", 3),
    ExpansionChoice("full", rank=5),
)
FACTORS = ((), ("rows",), ("columns",), ("rows", "columns"))
STRATEGIES = ("tensor", "channel", "group")
SIGNS = ("signed", "unsigned", "asymmetric")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 999)


def make_grid(bits: int, sign: str, strategy: Any, dtype: torch.dtype = torch.float32) -> Grid:
    size = 4 if strategy == "group" else None
    return Grid(bits, sign != "asymmetric", strategy, size, dtype, signed=sign == "signed")


GRIDS = [
    make_grid(3, sign, strategy, dtype)
    for (sign, strategy), dtype in zip(
        itertools.product(SIGNS, STRATEGIES), itertools.cycle(DTYPES), strict=False
    )
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight with an outlier and a dead group."""
    weight = draw(rows, columns, seed=seed) * 0.1
    weight[0, 0] *= 8
    weight[-1, -4:] = 0.0
    return weight


def start(weight: Tensor, grid: Grid, choice: RoundingChoice, seed: int = 0) -> Rounding:
    """From a scale that lets some codes saturate."""
    limit = 0.7 * grouped(weight, grid).abs().amax(-1).clamp(min=1e-3)
    return start_rounding(weight, rtn(weight, grid, limit=limit), choice, seed=seed)


def trained(
    state: Rounding, seed: int = 0, factors: tuple[str, ...] = (), size: float = 1.0
) -> Rounding:
    """The state after some training: every parameter is anywhere near, padding of B included."""
    spread = {"step": 0.05, "low": 2.0, "high": 2.0, "expansion": 0.03, "square": 0.03}
    for number, (name, parameter) in enumerate(sorted(state.parameters.items())):
        noise = draw(*parameter.shape, seed=seed * 31 + number)
        parameter.add_(noise * spread.get(name, 0.7) * size)
    rows, columns = state.weight.shape
    if "rows" in factors:
        state.rows = (draw(rows, seed=seed + 1) * 0.3).exp()
    if "columns" in factors:
        state.columns = (draw(columns, seed=seed + 2) * 0.3).exp()
    return state


def slow_inner(choice: ExpansionChoice, leaves: dict[str, Tensor], r: int) -> Tensor:
    """B [r, r], entry by entry."""
    p, b = leaves["expansion"], choice.width
    found = torch.zeros(r, r, dtype=p.dtype)
    for i, j in itertools.product(range(r), range(r)):
        if choice.kind == "full":
            found[i, j] = p[i, j]
        elif choice.kind == "blocks" and i // b == j // b:
            found[i, j] = p[i // b, i % b, j % b]
        elif choice.kind == "band" and abs(i - j) <= b:
            found[i, j] = p[j - i + b, i]
        elif choice.kind in ("diagonal", "square") and i == j:
            found[i, j] = p[0, i]
        elif choice.kind == "square" and i < b and j < b:
            found[i, j] = leaves["square"][i, j]
    return found


def slow_moved(state: Rounding, leaves: dict[str, Tensor]) -> Tensor:
    moved = state.weight.double()
    if state.choice.expansion is not None:
        assert state.basis is not None
        inner = slow_inner(state.choice.expansion, leaves, state.basis.s.numel())
        moved = moved + state.basis.u.double() @ inner.double() @ state.basis.vt.double()
    if "rows" in leaves:
        moved = leaves["rows"].double().unsqueeze(1) * moved
    if "columns" in leaves:
        moved = moved * leaves["columns"].double()
    return moved


@st.composite
def states(draw_: st.DrawFn) -> Rounding:
    """A state in training, of any size, bits, dtype of scales and combination."""
    bits, dtype = draw_(st.integers(2, 8)), draw_(st.sampled_from(DTYPES))
    grid = make_grid(bits, draw_(st.sampled_from(SIGNS)), draw_(st.sampled_from(STRATEGIES)), dtype)
    rows, columns, seed = draw_(st.integers(4, 9)), 4 * draw_(st.integers(1, 3)), draw_(SEEDS)
    expansion = draw_(st.sampled_from(EXPANSIONS))
    if expansion is not None and expansion.rank is not None:
        expansion = replace(expansion, rank=draw_(st.integers(1, min(rows, columns))))
    choice = RoundingChoice(
        parameter=draw_(st.sampled_from(PARAMETERS)),
        limits=draw_(st.sampled_from(LIMITS)),
        expansion=expansion,
    )
    state = start(matrix(rows, columns, seed), grid, choice, seed)
    return trained(state, seed, draw_(st.sampled_from(FACTORS)))
