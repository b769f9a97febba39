"""Learned clipping of per-token activations: values, gradients, training, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.test_fit import KilledError, Memory, restore, snapshot
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.quantize import (
    MIN_CLIP,
    fake_quantize_activation,
    per_token_clip_ste,
    per_token_ste,
    row_scale,
)
from crossbit.engine.fit import Optimiser, Task, fit, held_out
from crossbit.engine.live import parameters_of
from crossbit.engine.trained import TrainedBlock, TrainedLinear, clips_of, layers_of, materialised
from crossbit.grid import Grid, round_ste
from crossbit.objective import reconstruction_loss
from crossbit.recipe import Training
from crossbit.runtime.install import QuantizedLayer
from crossbit.runtime.linear import QuantLinear, SharedInput
from crossbit.solvers.rounding import start_rounding
from crossbit.solvers.rounding_state import RoundingChoice
from crossbit.solvers.rtn import rtn

CLIPPED, PLAIN = ActivationGrid(4, "per_token_clip"), ActivationGrid(4, "per_token")
SHAPE = (3, 5, 16)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_factor_of_1_is_per_token_exactly(bits: int, dtype: torch.dtype) -> None:
    """Values, and the gradient for x, as nothing lies more than half a step beyond the grid."""
    clipped, plain = ActivationGrid(bits, "per_token_clip"), ActivationGrid(bits)
    x = draw(*SHAPE, seed=1).to(dtype)
    x[0, 0] = 0.0
    wanted = fake_quantize_activation(x, plain)
    one = torch.ones(())
    assert torch.equal(fake_quantize_activation(x, clipped), wanted)
    assert torch.equal(fake_quantize_activation(x, clipped, clip=one), wanted)
    entered = x.clone().requires_grad_()
    g = draw(*SHAPE, seed=2).to(dtype)
    for found in (per_token_clip_ste(entered, one, clipped), per_token_ste(entered, plain)):
        assert torch.equal(found, wanted)
        (gradient,) = torch.autograd.grad(found, entered, g)
        assert torch.equal(gradient, g)


def test_what_is_larger_saturates() -> None:
    x = torch.tensor([[10.0, -10.0, 4.0, -1.0, 0.0]])
    found = fake_quantize_activation(x, CLIPPED, clip=torch.tensor(0.45))
    step = 10.0 * 0.45 / 7.5  # 0.6
    wanted = torch.tensor([[7 * step, -8 * step, 7 * step, -2 * step, 0.0]])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(per_token_clip_ste(x, torch.tensor(0.45), CLIPPED), found)


def slow(x: Tensor, clip: Tensor, grid: ActivationGrid) -> Tensor:
    """The definition for autograd in float64: row maxima are given, rounding is transparent."""
    step = clip * (x.detach().abs().amax(-1, keepdim=True) / grid.effective_divisor)
    return round_ste(x / step).clamp(grid.qmin, grid.qmax) * step


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.93, 0.5, 0.08])
def test_gradients_are_those_of_autograd(value: float, bits: int) -> None:
    grid = ActivationGrid(bits, "per_token_clip")
    x = draw(*SHAPE, seed=3)
    x[..., 2] *= 6
    g = draw(*SHAPE, seed=4)
    one, two = x.clone().requires_grad_(), x.double().requires_grad_()
    clip = torch.tensor(value, requires_grad=True)
    reference = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    out = per_token_clip_ste(one, clip, grid)
    wanted = slow(two, reference, grid)
    torch.testing.assert_close(out, wanted.float())
    found = torch.autograd.grad(out, (one, clip), g)
    expected = torch.autograd.grad(wanted, (two, reference), g.double())
    assert torch.equal(found[0] == 0, expected[0] == 0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float())
    assert 0 < int((found[0] == 0).sum()) < x.numel()


def test_the_factors_gradient_at_1_is_that_of_clipping() -> None:
    """Half a step beyond the last code: a smaller factor moves the maximum with all of its code."""
    x = draw(64, 8, seed=5).abs()
    x[:, 0] = 9 + draw(64, seed=6)  # x / step is 7.5 to within the last bit, on either side
    clip = torch.ones((), requires_grad=True)
    g = torch.zeros_like(x)
    g[:, 0] = 1.0
    (found,) = torch.autograd.grad(per_token_clip_ste(x, clip, CLIPPED), clip, g)
    torch.testing.assert_close(found, 7 * row_scale(x, CLIPPED).sum())


@pytest.mark.parametrize(("for_x", "for_clip"), [(True, False), (False, True)])
def test_only_what_is_wanted_gets_a_gradient(for_x: bool, for_clip: bool) -> None:
    x, clip = draw(4, 8, seed=7).requires_grad_(for_x), torch.tensor(0.7, requires_grad=for_clip)
    torch.autograd.backward(per_token_clip_ste(x, clip, CLIPPED).square().sum())
    assert (x.grad is not None) == for_x
    assert (clip.grad is not None) == for_clip


def test_the_runtime_layer_does_what_was_trained() -> None:
    """Whatever dtype the module is cast to: the factor is not rounded."""
    weight, clip = draw(8, 16, seed=8), torch.tensor(0.777)
    first = rtn(weight, Grid(4, True, "channel", None, torch.float32))
    layer = QuantLinear(first, None, CLIPPED, dtype=torch.float32, clip=float(clip))
    x = draw(3, 16, seed=9)
    wanted = per_token_clip_ste(x, clip, CLIPPED) @ first.dequantize().t()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
    assert layer.to(torch.bfloat16).clip == float(clip)


# -- training -------------------------------------------------------------------------------------

WIDTH, LENGTH, COUNT, HELD = 16, 6, 16, 4
WEIGHTS = Grid(8, True, "channel", None, torch.float32)
SETTINGS = Training(epochs=8, batch=4, clip=0.02, rounding=1e-4, step=0.0)


class Parallel(nn.Module):
    """Two layers that read the same input."""

    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


def weights() -> list[Tensor]:
    """Channel 0 carries outliers, and hardly counts."""
    made = [draw(WIDTH // 2, WIDTH, seed=20 + i) for i in range(2)]
    for weight in made:
        weight[:, 0] *= 1e-3
    return made


def make_block(frozen: Sequence[bool] = (False, False), base: Any = "frac") -> TrainedBlock:
    shared, clip = SharedInput(differentiable=True), torch.ones(())
    layers = {}
    for name, weight, still in zip(("one", "two"), weights(), frozen, strict=True):
        first = rtn(weight, WEIGHTS)
        layers[name] = TrainedLinear(
            start_rounding(weight, first, RoundingChoice(base)),
            first,
            None,
            QuantizedLayer(first, CLIPPED, clip=clip),
            shared,
            frozen=still,
        )
    return TrainedBlock(0, Parallel(**layers), layers, {}, {})


def make_task(
    block: TrainedBlock, settings: Training = SETTINGS, *, checkpointed: bool = False
) -> Task:
    x = draw(COUNT, LENGTH, WIDTH, seed=30)
    x[..., 0] *= 8
    y = x @ torch.cat(weights()).t()
    return Task(
        blocks=[block],
        read=lambda numbers: (x[numbers], [y[numbers]]),
        loss=lambda outputs, targets, _: reconstruction_loss(outputs[0], targets[0]),
        fitting=torch.arange(COUNT - HELD),
        held=torch.arange(COUNT - HELD, COUNT),
        length=LENGTH,
        settings=settings,
        steps={"0/one": False, "0/two": False},
        dtype=torch.float32,
        seed=1,
        # A step's gradient comes in parts, or of a block that has seen the very input without one.
        tokens=4096 if checkpointed else 2 * LENGTH,
        checkpointed=checkpointed,
    )


def clip_of(block: TrainedBlock) -> float:
    (clip,) = clips_of([block]).values()
    return float(clip)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_planted_outlier_is_clipped(checkpointed: bool) -> None:
    block, still = make_block(), make_block()
    task = make_task(block, checkpointed=checkpointed)
    progress = fit(task, Memory([block]), None, {})
    assert clip_of(block) < 0.9
    assert progress.best < 0.8 * progress.before
    assert held_out(task) == progress.best
    left = fit(
        make_task(still, SETTINGS.model_copy(update={"clip": 0.0})), Memory([still]), None, {}
    )
    assert clip_of(still) == 1.0
    assert progress.best < 0.8 * left.best
    # What is written is what was judged, and both layers have the same factor.
    hardened = block.hardened().layers
    assert {float(layer.clip) for layer in hardened.values() if layer.clip is not None} == {
        clip_of(block)
    }
    x, (y,) = task.read(task.held)
    outputs = [
        QuantLinear(
            layer.qtensor,
            None,
            CLIPPED,
            dtype=torch.float32,
            clip=float(layer.clip),  # type: ignore[arg-type]
        )(x)
        for layer in hardened.values()
    ]
    found = reconstruction_loss(torch.cat(outputs, -1), y)
    assert float(found) == pytest.approx(progress.best, rel=1e-5)


def test_it_pays_for_the_gradient_of_both_readers_once() -> None:
    """One factor, one entry of the optimiser; its gradient is the sum over its layers."""
    block = make_block()
    assert list(clips_of([block])) == ["clips/0/one"]
    task = make_task(block)
    assert [n for n in Optimiser(task).each if n.startswith("clips/")] == ["clips/0/one"]
    x, (y,) = task.read(torch.arange(2))
    clip = clips_of([block])["clips/0/one"]
    with materialised([block], torch.float32, grad=True, clips=True), torch.enable_grad():
        task.loss([block.run(x)], [y], 1.0).backward()  # type: ignore[no-untyped-call]
        assert clip.grad is not None
        found = float(clip.grad)
    assert clip.grad is None
    assert not clip.requires_grad
    own = torch.ones((), requires_grad=True)
    quantized = per_token_clip_ste(x, own, CLIPPED)
    made = torch.cat([layer.first.dequantize() for _, layer in layers_of([block])])
    task.loss([quantized @ made.t()], [y], 1.0).backward()
    assert own.grad is not None
    assert found == pytest.approx(float(own.grad), rel=1e-4)


def test_an_input_that_only_frozen_layers_read_keeps_its_factor() -> None:
    block = make_block((True, True))
    progress = fit(make_task(block), Memory([block]), None, {})
    assert (clip_of(block), progress.done) == (1.0, 0)
    half = make_block((True, False))
    fit(make_task(half), Memory([half]), None, {})
    assert clip_of(half) < 1.0


def test_the_factor_stays_in_its_range() -> None:
    block = make_block()
    seen: list[float] = []

    class Watching(Memory):
        def tick(self, *args: Any) -> None:
            seen.append(clip_of(block))

    task = make_task(block, SETTINGS.model_copy(update={"clip": 3.0, "warmup": 0.0}))
    fit(task, Watching([block]), None, {})
    assert min(seen) == pytest.approx(MIN_CLIP)
    assert max(seen) <= 1.0


def test_a_window_that_did_not_get_better_has_its_factor_back() -> None:
    """Also one that starts undecided, and returns to its first integers."""
    for base in ("frac", "zero"):
        block = make_block(base=base)
        task = make_task(block)

        def loss(
            outputs: list[Tensor], targets: list[Tensor], ahead: float, task: Task = task
        ) -> Tensor:
            value = task.loss(outputs, targets, ahead)
            # Held-out losses that rise with every step away from the start.
            return value if outputs[0].requires_grad else value * 0 + 2.0 - clip_of(block)  # noqa: B023

        progress = fit(replace(task, loss=loss), Memory([block]), None, {})
        assert progress.best == progress.before
        assert clip_of(block) == 1.0


def test_what_returns_to_its_first_integers_is_not_clipped() -> None:
    """Training helped what started undecided, but not as much as not to have begun."""
    block = make_block(base="zero")
    task = make_task(block)
    judged = 0

    def loss(outputs: list[Tensor], targets: list[Tensor], ahead: float) -> Tensor:
        nonlocal judged
        if outputs[0].requires_grad:
            return task.loss(outputs, targets, ahead)
        judged += 1  # twice a held-out loss: undecided, first integers, then after each epoch
        return torch.tensor((3.0, 1.0, 2.0)[min((judged - 1) // 2, 2)])

    progress = fit(replace(task, loss=loss), Memory([block]), None, {})
    assert progress.best_at > 0
    assert progress.events == ["training did not help: the window stays as it was"]
    assert clip_of(block) == 1.0


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_it_goes_on_where_it_was_killed(stop: int) -> None:
    whole = make_block()
    fit(make_task(whole), Memory([whole]), None, {})
    block = make_block()
    keeper = Memory([block], stop)
    with pytest.raises(KilledError):
        fit(make_task(block), keeper, None, {})
    assert keeper.saved is not None
    progress, optimiser, parameters = keeper.saved
    assert "clips/0/one" in parameters
    assert any(n.startswith("clips/0/one/clip/") for n in optimiser)
    resumed = make_block()
    restore([resumed], parameters)
    again = Memory([resumed], best=keeper.best)
    fit(make_task(resumed), again, progress, optimiser)
    found, wanted = snapshot([resumed]), snapshot([whole])
    assert found.keys() == wanted.keys() == parameters_of([whole]).keys()
    assert all(torch.equal(found[n], wanted[n]) for n in found)
    assert clip_of(resumed) < 1.0
