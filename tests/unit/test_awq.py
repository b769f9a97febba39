"""AWQ's searches against slow loops over candidates, tokens and groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.grid import Grid
from crossbit.solvers.awq import awq_search_clip
from crossbit.solvers.rtn import rtn
from crossbit.transforms.awq_scale import weight_magnitude

GRID = Grid(4, True, "group", 8)


def sample(count: int = 100, columns: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    x[:, ::9] *= 15
    return x


def layer(rows: int, columns: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_weight_magnitude_matches_a_loop() -> None:
    weights = [layer(3), layer(5, seed=2)]
    rows = [row for weight in weights for row in weight]
    wanted = [
        sum(float(row[k].abs() / row[k // 8 * 8 : k // 8 * 8 + 8].abs().max()) for row in rows) / 8
        for k in range(32)
    ]
    assert torch.allclose(weight_magnitude(weights, [GRID, GRID]), torch.tensor(wanted), rtol=1e-4)


@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_clip_equals_a_loop(symmetric: bool, signed: bool, strategy: str) -> None:
    size = 8 if strategy == "group" else None
    grid = Grid(3, symmetric, strategy, size, signed=signed)  # type: ignore[arg-type]
    width = 8 if strategy == "group" else 32
    x, weight = sample(40), layer(5)
    limit = awq_search_clip(x, weight, grid, 10, 0.5)
    assert limit.shape == (5, 32 // width)
    one = Grid(3, symmetric, "channel", signed=signed)
    for row in range(5):
        for group in range(32 // width):
            part = slice(group * width, (group + 1) * width)
            w, inputs = weight[row : row + 1, part], x[:, part]
            top = float(w.abs().max())

            def loss(bound: float, w: Tensor = w, inputs: Tensor = inputs) -> float:
                rounded = rtn(w, one, limit=torch.tensor([[bound]])).dequantize()
                return float(((rounded - w).double() @ inputs.double().T).square().mean())

            losses = [loss(top * (1 - step / 10)) for step in range(5)]
            assert loss(float(limit[row, group])) <= min(losses) * (1 + 1e-4)
            assert 0.59 * top < float(limit[row, group]) <= top * (1 + 1e-6)


def test_clip_from_the_hessian_is_that_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = sample(64), layer(7)
    by_sample = awq_search_clip(x, weight, GRID)
    assert torch.equal(by_sample, awq_search_clip(None, weight, GRID, hessian=x.T @ x / 64))
    monkeypatch.setattr("crossbit.solvers.awq._CHUNK_ELEMENTS", 64)
    assert torch.equal(by_sample, awq_search_clip(x, weight, GRID))


def test_bad_input_is_refused() -> None:
    x, weight = sample(8), layer(2)
    with pytest.raises(InputError):
        awq_search_clip(x, weight, Grid(4, True, "tensor"))
    with pytest.raises(InputError):
        awq_search_clip(None, weight, GRID)
    with pytest.raises(InputError):
        awq_search_clip(None, weight, GRID, hessian=torch.eye(8))
    with pytest.raises(InputError):
        awq_search_clip(x, weight, GRID, max_shrink=0.0)
