"""Magnitudes and weights with outliers in known places."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 64


def spread_out(count: int, seed: int = 0) -> Tensor:
    """Magnitudes of a uniform bulk in [1, 2), none of which is a candidate."""
    return 1 + torch.rand(count, generator=torch.Generator().manual_seed(seed))


def planted(count: int = COLUMNS) -> Tensor:
    """A bulk, two moderate candidates close together, and two outliers far from them."""
    c = spread_out(count)
    c[3], c[17] = 4.0, 4.1
    c[5], c[40] = 60.0, 100.0
    return c
