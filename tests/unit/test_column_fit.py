"""The fitted column factor: its two error terms, their gradients, and what it is worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import Grid
from crossbit.recipe import CrossFold
from crossbit.transforms.column_fit import (
    fit_factor,
    input_error,
    rounding_error,
    weight_error,
)
from crossbit.transforms.cross_fold import choose
from crossbit.transforms.search import Candidate, FoldProblem, search

COLUMNS = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(tokens: int, seed: int = 0) -> Tensor:
    """Columns of different sizes, spikes at a few tokens in a few of them."""
    x = normal(tokens, COLUMNS, seed=seed) * normal(1, COLUMNS, seed=1).exp()
    spikes = normal(tokens, COLUMNS, seed=seed + 2).abs()
    often = torch.arange(COLUMNS) % 8 == 0
    return torch.where((spikes > 2.3) & often, x * 30, x).float()


def test_rounding_error_is_that_of_real_rounding() -> None:
    """Against the squared error of values spread over a factor of two around u steps."""
    spread = torch.linspace(-0.5, 0.5, 20001, dtype=torch.float64).mul(math.log(2)).exp()
    for u in (0.01, 0.05, 0.15, 0.3, 0.8, 2.0, 7.0, 50.0):
        values = u * spread
        wanted = float((values - values.round()).square().mean())
        found, _ = rounding_error(torch.tensor([math.log(u)], dtype=torch.float64))
        assert float(found) == pytest.approx(wanted, rel=0.7), u
    small, _ = rounding_error(torch.tensor([math.log(1e-3)]))
    assert float(small) == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("term", ["inputs", "weights per row", "weights per group"])
def test_gradients_are_those_of_finite_differences(term: str) -> None:
    log_f = normal(COLUMNS, seed=3) * 0.5
    table = normal(40, COLUMNS, seed=4).abs().log()
    scale = normal(COLUMNS, seed=5).square() + 0.1

    def error(log_f: Tensor) -> tuple[Tensor, Tensor]:
        if term == "inputs":
            return input_error(table, log_f, scale, 7.0)
        groups = 1 if term == "weights per row" else 4
        return weight_error(table.view(40, groups, -1), log_f, scale, 127.0)

    _, gradient = error(log_f)
    for j in range(0, COLUMNS, 5):
        h = torch.zeros_like(log_f)
        h[j] = 1e-6
        slope = (error(log_f + h)[0] - error(log_f - h)[0]) / 2e-6
        assert float(gradient[j]) == pytest.approx(float(slope), rel=1e-5, abs=1e-12)


def test_errors_against_a_slow_loop() -> None:
    f, x, w = normal(6, seed=1).exp(), normal(5, 6, seed=2), normal(3, 6, seed=3)
    power, second = w.square().sum(0), x.square().mean(0)
    a = 0.0
    for i in range(5):
        step = max(abs(float(x[i, j])) / float(f[j]) for j in range(6)) / 127.5
        for j in range(6):
            u = torch.tensor([abs(float(x[i, j])) / float(f[j]) / step], dtype=torch.float64)
            a += float(rounding_error(u.log())[0]) * (step * float(f[j])) ** 2 * float(power[j]) / 5
    b = 0.0
    for k in range(3):
        for group in (range(3), range(3, 6)):
            step = max(abs(float(w[k, j])) * float(f[j]) for j in group) / 7.5
            b += step**2 / 12 * sum(float(second[j]) / float(f[j]) ** 2 for j in group)
    assert float(input_error(x.abs().log(), f.log(), power, 127.5)[0]) == pytest.approx(a)
    found = weight_error(w.abs().log().view(3, 2, 3), f.log(), second, 7.5)[0]
    assert float(found) == pytest.approx(b)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_beats_every_power_of_the_maxima_on_unseen_tokens(bits: int) -> None:
    x, held = heavy(6000), heavy(1500, seed=9)
    weight = normal(48, COLUMNS, seed=7).float()
    grid, activations = Grid(8, strategy="channel"), ActivationGrid(bits)
    problem = FoldProblem([weight], [grid], activations, x.abs().amax(0), x.abs().mean(0), held)
    powers = [Candidate(a, problem.column_maximum ** (1 - a)) for a in (0.0, 0.15, 0.5, 0.7, 1.0)]
    best = search(problem, powers)
    f = fit_factor(x, [weight], [grid], best.factor, divisor=activations.effective_divisor)
    fitted = search(problem, [Candidate(0, f)])
    assert min(fitted.losses.values()) < 0.9 * min(best.losses.values())


def test_the_search_fits_where_there_are_enough_tokens() -> None:
    x, weight, grid = heavy(400), normal(48, COLUMNS, seed=7).float(), Grid(8, strategy="channel")

    def chosen(tokens: int, activations: ActivationGrid | None, **options: bool) -> set[str]:
        problem = FoldProblem(
            [weight], [grid], activations, x.abs().amax(0), x.abs().mean(0), heavy(100, 9),
            fitting=x[:tokens],
        )  # fmt: skip
        choice = choose(problem, CrossFold(**options))
        assert choice.losses[choice.label] == min(choice.losses.values())
        return set(choice.losses)

    with_fit = {"fitted", "0.4 of rms", "0.5 of rms", "0.6 of rms"}
    assert with_fit <= chosen(256, ActivationGrid(8))
    plain = chosen(256, ActivationGrid(8), fit=False)
    assert not with_fit & plain
    assert chosen(255, ActivationGrid(8)) == plain
    assert chosen(256, None) == plain
    assert chosen(256, ActivationGrid(8, "per_tensor_static")) == plain


def test_shared_channels_get_one_factor_and_dead_ones_a_finite_one() -> None:
    x = heavy(500)
    x[:, 5] = 0.0
    shared = torch.arange(COLUMNS) // 4
    weight, grid = normal(16, COLUMNS).float(), Grid(4, strategy="group", group_size=16)
    f = fit_factor(x, [weight], [grid], torch.ones(COLUMNS), divisor=7.5, shared=shared)
    assert torch.isfinite(f).all()
    assert (f > 0).all()
    assert torch.equal(f.view(-1, 4), f.view(-1, 4)[:, :1].expand(-1, 4))
    again = fit_factor(x, [weight], [grid], torch.ones(COLUMNS), divisor=7.5, shared=shared)
    assert torch.equal(f, again)
    nothing = fit_factor(torch.zeros(3, COLUMNS), [weight], [grid], f, divisor=7.5)
    assert torch.equal(nothing, f)
