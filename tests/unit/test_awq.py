"""AWQ's searches against slow loops over candidates, tokens and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.grid import Grid
from crossbit.solvers.awq import (
    awq_scale_candidates,
    awq_search_clip,
    awq_search_scale,
    weight_magnitude,
)
from crossbit.solvers.rtn import rtn

GRID = Grid(4, True, "group", 8)


def sample(count: int = 100, columns: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    x[:, ::9] *= 15
    return x


def layer(rows: int, columns: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def round_activations(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 7.5
    return (x / scale).round().clamp(-8, 7) * scale


def slow_loss(x: Tensor, weights: list[Tensor], s: Tensor, quantize_inputs: bool) -> float:
    total, count = 0.0, 0
    for weight in weights:
        folded = rtn(weight * s, GRID).dequantize()
        for token in x:
            scaled = token / s
            read = round_activations(scaled[None])[0] if quantize_inputs else scaled
            for exact, rounded in zip(weight, folded, strict=True):
                total += (
                    float(exact.double() @ token.double() - rounded.double() @ read.double()) ** 2
                )
                count += 1
    return total / count


def test_candidates_follow_the_formula() -> None:
    mean = torch.tensor([1.0, 4.0, 0.25])
    scales, ratios = awq_scale_candidates(mean, None, 4)
    assert ratios == [0.0, 0.25, 0.5, 0.75]
    assert torch.equal(scales[0], torch.ones(3))
    assert torch.allclose(scales[2], mean.sqrt() / math.sqrt(2.0 * 0.5))
    share = torch.tensor([0.5, 0.25, 1.0])
    scales, ratios = awq_scale_candidates(mean, share, 2)
    assert ratios == [0.0, 0.0, 0.5]
    raw = mean.sqrt() / (share.sqrt() + 1e-4)
    assert torch.allclose(scales[2], raw / (raw.max() * raw.min()).sqrt())
    assert torch.allclose(scales.amax(1) * scales.amin(1), torch.ones(3), rtol=1e-5)


def test_weight_magnitude_matches_a_loop() -> None:
    weights = [layer(3), layer(5, seed=2)]
    rows = [row for weight in weights for row in weight]
    wanted = [
        sum(float(row[k].abs() / row[k // 8 * 8 : k // 8 * 8 + 8].abs().max()) for row in rows) / 8
        for k in range(32)
    ]
    assert torch.allclose(weight_magnitude(weights, GRID), torch.tensor(wanted), rtol=1e-4)


@pytest.mark.parametrize("quantize_inputs", [False, True])
@pytest.mark.parametrize("duo", [False, True])
def test_losses_equal_a_loop_and_the_best_is_chosen(quantize_inputs: bool, duo: bool) -> None:
    x, weights = sample(12), [layer(3), layer(2, seed=2)]
    found = awq_search_scale(
        x, weights, GRID, round_activations if quantize_inputs else None, 5, duo=duo
    )
    magnitude = weight_magnitude(weights, GRID) if duo else None
    scales, ratios = awq_scale_candidates(x.abs().mean(0), magnitude, 5)
    wanted = [slow_loss(x, weights, s, quantize_inputs) for s in scales]
    assert found.losses.tolist() == pytest.approx(wanted, rel=1e-3)
    best = min(range(len(wanted)), key=lambda i: wanted[i])
    assert torch.equal(found.scale, scales[best])
    assert found.ratio == ratios[best]
    assert found.gain == pytest.approx(wanted[best] / wanted[0], rel=1e-3)


def test_hessian_forward_and_sample_agree() -> None:
    x, weights = sample(200), [layer(6), layer(4, seed=2)]
    by_sample = awq_search_scale(x, weights, GRID)
    moments = x.T @ x / 200
    mean = x.abs().mean(0)
    by_hessian = awq_search_scale(None, weights, GRID, act_mean=mean, hessian=moments)
    by_forward = awq_search_scale(
        None, weights, GRID, act_mean=mean, forward=lambda ws: torch.cat([x @ w.T for w in ws], 1)
    )
    for other in (by_hessian, by_forward):
        assert torch.allclose(other.losses, by_sample.losses, rtol=1e-3)
        assert torch.equal(other.scale, by_sample.scale)


def test_scales_help_with_outlier_channels_and_never_hurt() -> None:
    for seed in range(4):
        x = sample(300, seed=seed)
        found = awq_search_scale(x, [layer(16, seed=seed + 9)], GRID)
        assert found.gain < 0.9
    # Inputs on which nothing can be gained: every channel alike, one column per group.
    grid = Grid(8, True, "group", 1)
    alike = awq_search_scale(torch.eye(32), [torch.ones(4, 32)], grid)
    assert alike.gain <= 1.0


def test_searched_clip_in_the_scale_search_weights_channels_by_their_energy() -> None:
    x, weight = sample(300), layer(16)
    plain = awq_search_scale(x, [weight], GRID)
    searched = awq_search_scale(x, [weight], GRID, clip="mse")
    assert float(searched.losses.min()) < float(plain.losses.min())
    scales, _ = awq_scale_candidates(x.abs().mean(0), weight_magnitude([weight], GRID))
    wanted = []
    for s in scales:
        folded = rtn(weight * s, GRID, "mse", (x / s).square().mean(0)).dequantize()
        wanted.append(float(((folded / s - weight) @ x.T).square().mean()))
    assert searched.losses.tolist() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_clip_equals_a_loop(symmetric: bool, strategy: str) -> None:
    grid = Grid(3, symmetric, "group", 8) if strategy == "group" else Grid(3, symmetric, "channel")
    width = 8 if strategy == "group" else 32
    x, weight = sample(40), layer(5)
    limit = awq_search_clip(x, weight, grid, 10, 0.5)
    assert limit.shape == (5, 32 // width)
    one = Grid(3, symmetric, "channel")
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
    with pytest.raises(InputError, match="no weights"):
        awq_search_scale(x, [], GRID)
    with pytest.raises(InputError, match="act_mean or x"):
        awq_search_scale(None, [weight], GRID, hessian=torch.eye(32))
    with pytest.raises(InputError, match="sample"):
        awq_search_scale(
            None, [weight], GRID, round_activations, act_mean=torch.ones(32), hessian=torch.eye(32)
        )
    with pytest.raises(WorkError, match="not finite"):
        awq_search_scale(x * math.nan, [weight], GRID)
    with pytest.raises(WorkError, match="NaN"):
        awq_search_scale(x, [weight], GRID, forward=lambda ws: ws[0] * math.nan)
    with pytest.raises(InputError):
        awq_scale_candidates(torch.ones(3), torch.ones(2))
    with pytest.raises(InputError):
        awq_scale_candidates(torch.ones(3), None, 0)
    with pytest.raises(InputError):
        awq_search_clip(x, weight, Grid(4, True, "tensor"))
    with pytest.raises(InputError):
        awq_search_clip(None, weight, GRID)
    with pytest.raises(InputError):
        awq_search_clip(None, weight, GRID, hessian=torch.eye(8))
    with pytest.raises(InputError):
        awq_search_clip(x, weight, GRID, max_shrink=0.0)
