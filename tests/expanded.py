"""Weights and what moves them along their singular directions."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from crossbit.solvers.expansion import ExpansionChoice, Kind

KINDS: tuple[Kind, ...] = ("diagonal", "band", "blocks", "square", "full")
SHAPES = [(40, 64), (64, 40), (48, 48), (1, 5), (5, 1), (300, 33)]
SEEDS = st.integers(0, 999)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight with an outlier, zeros of both signs, and singular values of one size."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[0, 0] *= 8
    weight[-1, -1] = 0.0
    weight[0, -1] = -0.0
    return weight


@st.composite
def problems(draw: st.DrawFn, largest: int = 9) -> tuple[Tensor, ExpansionChoice]:
    """A weight, and a choice that fits it."""
    rows, columns = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    r = min(rows, columns)
    rank = draw(st.none() | st.integers(1, r))
    kind = draw(st.sampled_from(KINDS))
    lowest, highest = (0, (rank or r) - 1) if kind == "band" else (1, rank or r)
    choice = ExpansionChoice(kind, draw(st.integers(lowest, highest)), rank)
    return matrix(rows, columns, draw(SEEDS)), choice
