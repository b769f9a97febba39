"""Training a window: it helps or it changes nothing, whatever goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossbit.engine.fit import (
    Loss,
    Optimiser,
    Progress,
    Task,
    diverges,
    fit,
    held_out,
    outcome,
    rate_factor,
)
from crossbit.engine.live import parameters_of
from crossbit.engine.trained import TrainedBlock, TrainedLinear, layers_of, materialised
from crossbit.grid import Grid
from crossbit.objective import reconstruction_loss
from crossbit.recipe import Training
from crossbit.runtime.install import QuantizedLayer
from crossbit.runtime.linear import SharedInput
from crossbit.solvers.rounding import start_rounding
from crossbit.solvers.rounding_state import RoundingChoice
from crossbit.solvers.rtn import rtn

WIDTH, LENGTH, COUNT, HELD = 12, 5, 9, 3
GRID = Grid(3, True, "channel", None, torch.float32)
SETTINGS = Training(epochs=6, batch=4, warmup=0.1)
ALL = {"0/0": True, "1/0": True}
DEFAULT = RoundingChoice()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> list[Tensor]:
    return [draw(WIDTH, WIDTH, seed=i) * WIDTH**-0.5 for i in range(2)]


def make_blocks(choice: RoundingChoice = DEFAULT, frozen: Sequence[int] = ()) -> list[TrainedBlock]:
    """Two blocks of one linear layer."""
    blocks = []
    for index, weight in enumerate(weights()):
        first = rtn(weight, GRID)
        layer = TrainedLinear(
            start_rounding(weight, first, choice, seed=index),
            first,
            draw(WIDTH, seed=10 + index),
            QuantizedLayer(first, None),
            SharedInput(differentiable=True),
            frozen=index in frozen,
        )
        blocks.append(TrainedBlock(index, nn.Sequential(layer), {"0": layer}, {}, {}))
    return blocks


def make_task(
    blocks: Sequence[TrainedBlock], settings: Training = SETTINGS, **changes: Any
) -> Task:
    """Reproduce what the float blocks make of correlated inputs."""
    mixing = draw(WIDTH, WIDTH, seed=5)
    x = draw(COUNT, LENGTH, WIDTH, seed=6) @ (mixing @ mixing.T / WIDTH)
    y = x
    for index, weight in enumerate(weights()):
        y = nn.functional.linear(y, weight, draw(WIDTH, seed=10 + index))
    task = Task(
        blocks=blocks,
        read=lambda numbers: (x[numbers], [y[numbers]]),
        loss=lambda outputs, targets, _: reconstruction_loss(outputs[0], targets[0]),
        fitting=torch.arange(COUNT - HELD),
        held=torch.arange(COUNT - HELD, COUNT),
        length=LENGTH,
        settings=settings,
        steps=ALL,
        dtype=torch.float32,
        seed=3,
    )
    return replace(task, **changes)


class KilledError(Exception):
    """The run is killed."""


@dataclass
class Memory:
    """A keeper in memory; at step ``stop`` it keeps a copy of everything, and raises."""

    blocks: Sequence[TrainedBlock]
    stop: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    ticks: int = 0
    loads: int = 0
    saved: tuple[Progress, dict[str, Tensor], dict[str, Tensor]] | None = None

    def save_best(self) -> None:
        self.best = snapshot(self.blocks)

    def load_best(self) -> None:
        self.loads += 1
        restore(self.blocks, self.best)

    def save_start(self) -> None:
        self.start = snapshot(self.blocks)

    def load_start(self) -> None:
        restore(self.blocks, self.start)

    def tick(self, progress: Progress, optimiser: Optimiser) -> None:
        self.ticks += 1
        if self.ticks == self.stop:
            state = {n: t.clone() for n, t in optimiser.state()}
            self.saved = copy.deepcopy(progress), state, snapshot(self.blocks)
            raise KilledError


def snapshot(blocks: Sequence[TrainedBlock]) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in parameters_of(blocks).items()}


def restore(blocks: Sequence[TrainedBlock], tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters_of(blocks).items():
        parameter.copy_(tensors[name])


def run(task: Task, stop: int | None = None) -> tuple[Progress, Memory]:
    keeper = Memory(task.blocks, stop)
    return fit(task, keeper, None, {}), keeper


def hard(blocks: Sequence[TrainedBlock]) -> list[Tensor]:
    return [layer.hardened().qtensor.dequantize() for _, layer in layers_of(blocks)]


def first(blocks: Sequence[TrainedBlock]) -> list[Tensor]:
    return [layer.first.dequantize() for _, layer in layers_of(blocks)]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- learning rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_rates_rise_then_fall(schedule: Any, total: int, warmup: float) -> None:
    chosen = Training(schedule=schedule, warmup=warmup)
    found = [rate_factor(chosen, step, total) for step in range(total)]
    warm = round(warmup * total)
    assert all(0 < f <= 1 for f in found)
    assert found[:warm] == pytest.approx([(i + 1) / (warm + 1) for i in range(warm)])
    rest = found[warm:]
    assert rest == sorted(rest, reverse=True)
    if rest:
        assert rest[0] == 1.0
        left = 1 / len(rest)
        last = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        assert rest[-1] == pytest.approx(last[schedule])


# -- it helps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        (RoundingChoice(), SETTINGS),
        (RoundingChoice(parameter="low_rank", reach=0.5), SETTINGS),
        (RoundingChoice("zero"), Training(epochs=30, batch=2, rounding=0.05)),
        (RoundingChoice(mode="sigmoid"), Training(epochs=10, batch=2, rounding=0.1)),
        (
            RoundingChoice("zero", "low_rank", "sigmoid"),
            Training(epochs=60, batch=2, rounding=0.1),
        ),
    ],
)
def test_training_lowers_the_held_out_loss_of_the_integers(
    choice: RoundingChoice, settings: Training
) -> None:
    blocks = make_blocks(choice)
    untrained = held_out(make_task(make_blocks()))
    progress, _ = run(make_task(blocks, settings))
    assert progress.before == pytest.approx(untrained, rel=1e-5)
    assert progress.best < 0.9 * untrained
    assert progress.best_at > 0
    assert progress.best_at % make_task(blocks, settings).steps_an_epoch == 0
    # The best loss is that of what is stored, not of the soft weights.
    assert held_out(make_task(blocks)) == progress.best
    assert len(progress.losses) == settings.epochs
    assert not equal(hard(blocks), first(blocks))
    report = outcome(progress)
    assert (report["before"], report["after"]) == (progress.before, progress.best)
    assert report["attempts"] == 1
    assert report["epochs"][0].keys() == {"training", "held_out"}


def test_steps_stay_where_they_are_not_trained() -> None:
    blocks = make_blocks()
    run(make_task(blocks, steps={"0/0": True, "1/0": False}))
    moved = [float(layer.state.parameters["step"].abs().max()) for _, layer in layers_of(blocks)]
    assert moved[0] > 0
    assert moved[1] == 0
    rates = make_task(make_blocks(), Training(epochs=2, step=0.0))
    run(rates)
    steps = [layer.state.parameters["step"] for _, layer in layers_of(rates.blocks)]
    assert equal(steps, [torch.zeros_like(s) for s in steps])


def test_what_is_frozen_stays() -> None:
    blocks = make_blocks(frozen=[0])
    run(make_task(blocks))
    found, start = hard(blocks), first(blocks)
    assert torch.equal(found[0], start[0])
    assert not torch.equal(found[1], start[1])


@pytest.mark.parametrize("base", ["frac", "zero"])
def test_a_window_in_which_nothing_is_trained(base: Any) -> None:
    blocks = make_blocks(RoundingChoice(base), frozen=[0, 1])
    for _, layer in layers_of(blocks):
        layer.forget()
    progress, _ = run(make_task(blocks))
    assert equal(hard(blocks), first(blocks))
    assert (progress.done, progress.events) == (0, [])
    assert progress.best == progress.before


def test_no_epochs_leave_the_first_integers() -> None:
    for choice in (RoundingChoice(), RoundingChoice("zero", mode="sigmoid")):
        blocks = make_blocks(choice)
        progress, _ = run(make_task(blocks, Training(epochs=0)))
        assert equal(hard(blocks), first(blocks))
        assert progress.best == progress.before == held_out(make_task(make_blocks()))


class Routed(nn.Module):
    """An expert for inputs that are large; none is."""

    def __init__(self, always: nn.Module, expert: nn.Module) -> None:
        super().__init__()
        self.always, self.expert = always, expert

    def forward(self, x: Tensor) -> Tensor:
        large = x.abs().amax(-1) > 1e9
        out: Tensor = self.always(x)
        if bool(large.any()):
            out[large] = out[large] + self.expert(x[large])
        return out


@pytest.mark.parametrize("frozen", [(), (0,)])
def test_an_expert_without_tokens_keeps_its_integers(frozen: tuple[int, ...]) -> None:
    """Also if it is all that is trained, so that the loss has no gradient."""
    one, two = make_blocks(frozen=frozen)
    layers = {"always": one.layers["0"], "expert": two.layers["0"]}
    block = TrainedBlock(0, Routed(*layers.values()), layers, {}, {})
    task = make_task([block], steps={"0/always": True, "0/expert": True})
    progress, _ = run(task)
    assert equal(hard([block])[1:], first([block])[1:])
    assert equal(hard([block])[:1], first([block])[:1]) == bool(frozen)
    assert progress.best <= progress.before


# -- it goes wrong --------------------------------------------------------------------------------


def spoilt(task: Task, when: Callable[[int], bool]) -> Loss:
    """The task's loss; training losses (from 0) that ``when`` names are not a number."""
    count = 0

    def loss(outputs: list[Tensor], targets: list[Tensor], ahead: float) -> Tensor:
        nonlocal count
        value = task.loss(outputs, targets, ahead)
        if outputs[0].requires_grad:
            count += 1
            if when(count - 1):
                return value * math.nan
        return value

    return loss


def test_one_bad_loss_rolls_back_and_goes_on_at_half_the_rates() -> None:
    blocks = make_blocks()
    task = make_task(blocks)
    rates: list[float] = []

    class Watching(Memory):
        def tick(self, progress: Progress, optimiser: Optimiser) -> None:
            rates.extend(g["lr"] for g in optimiser.each["0/0"].param_groups[:1])
            if progress.attempt and not progress.done:
                restored.append(equal(list(snapshot(blocks).values()), list(self.best.values())))
            super().tick(progress, optimiser)

    restored: list[bool] = []
    keeper = Watching(blocks)
    progress = fit(replace(task, loss=spoilt(task, lambda i: i == 4)), keeper, None, {})
    assert progress.events == ["training loss nan at step 5"]
    assert restored == [True]
    assert progress.attempt == 1
    assert progress.best < progress.before
    assert len(progress.losses) == 2 + SETTINGS.epochs
    # Of the retry's steps, after the default rate of its new optimiser.
    assert rates[5:9] == pytest.approx([0.5 * r for r in rates[:4]])
    assert held_out(task) == progress.best


@pytest.mark.parametrize("base", ["frac", "zero"])
def test_bad_losses_without_end_keep_the_first_integers(base: Any) -> None:
    blocks = make_blocks(RoundingChoice(base))
    task = make_task(blocks)
    progress, keeper = run(replace(task, loss=spoilt(task, lambda i: i >= 1)))
    assert equal(hard(blocks), first(blocks))
    assert progress.attempt == SETTINGS.retries
    assert len(progress.events) == SETTINGS.retries + 2
    assert progress.events[-1].startswith("training did not help")
    assert keeper.loads == SETTINGS.retries + 2
    assert progress.best == progress.before == held_out(make_task(make_blocks()))
    assert all(layer.begun for _, layer in layers_of(blocks))
    assert all(layer.frozen == (base == "zero") for _, layer in layers_of(blocks))


def test_what_had_begun_goes_back_to_its_start_where_nothing_helps() -> None:
    blocks = [make_blocks()[0], make_blocks(RoundingChoice(base="zero"))[1]]
    start = snapshot(blocks[:1])
    settings = Training(epochs=2, batch=4, rounding=50.0)
    found = fit(make_task(blocks, settings), Memory(blocks), None, {})
    assert "did not help" in found.events[-1]
    assert all(torch.equal(p, start[n]) for n, p in parameters_of(blocks[:1]).items())
    assert held_out(make_task(blocks)) == found.best


def test_a_rate_that_is_too_high_is_given_up() -> None:
    blocks = make_blocks()
    settings = Training(epochs=3, batch=2, step=5.0, schedule="constant", retries=1)
    progress, _ = run(make_task(blocks, settings))
    assert equal(hard(blocks), first(blocks))
    assert [e.partition(" after ")[0][:13] for e in progress.events] == [
        *["held-out loss"] * 2,
        "training did ",
    ]
    assert progress.best == progress.before == held_out(make_task(make_blocks()))


def test_a_start_that_is_not_finite_ends() -> None:
    task = make_task(make_blocks())
    progress, _ = run(replace(task, loss=lambda outputs, targets, _: outputs[0].sum() * math.inf))
    assert not math.isfinite(progress.before)
    assert equal(hard(task.blocks), first(task.blocks))
    assert all("\n" not in event for event in progress.events)


@pytest.mark.parametrize("rounding", [1e-4, 1e-2, 0.3, 30.0])
@pytest.mark.parametrize("choice", [RoundingChoice(), RoundingChoice("zero", "low_rank")])
def test_it_is_never_worse_than_before(choice: RoundingChoice, rounding: float) -> None:
    blocks = make_blocks(choice)
    run(make_task(blocks, Training(epochs=2, rounding=rounding)))
    assert held_out(make_task(blocks)) <= held_out(make_task(make_blocks()))


# -- a layer in training --------------------------------------------------------------------------


def test_weights_are_there_only_while_they_are_used() -> None:
    blocks = make_blocks(RoundingChoice("zero", mode="sigmoid"), frozen=[1])
    layers = [layer for _, layer in layers_of(blocks)]
    with pytest.raises(AssertionError, match="not materialised"):
        blocks[0].run(torch.zeros(1, 2, WIDTH))
    with materialised(blocks, torch.float32, grad=True):
        assert [layer.weight is not None and layer.weight.requires_grad for layer in layers] == [
            True,
            False,
        ]
    with materialised(blocks, torch.bfloat16, hard=True, first=True):
        assert layers[0].weight is not None
        assert torch.equal(layers[0].weight, layers[0].first.dequantize().bfloat16())
    assert [layer.weight for layer in layers] == [None, None]


@pytest.mark.parametrize(
    ("found", "best", "ceiling", "expected"),
    [
        (0.02, 0.01, None, True),
        (0.014, 0.01, None, False),
        # Small shares are as good as ratios.
        (0.02, 0.01, 1.0, True),
        (0.014, 0.01, 1.0, False),
        # Relative errors of 2.33 and 4: no more than 1.14 times as large a share.
        (0.8, 0.7, 1.0, True),
        (0.75, 0.7, 1.0, False),
        (1.6, 1.4, 2.0, True),
        (1.0, 0.99, 1.0, True),
        (1.0, 1.0, 1.0, False),
    ],
)
def test_divergence_is_seen_below_a_ceiling(
    found: float, best: float, ceiling: float | None, expected: bool
) -> None:
    assert diverges(found, best, ceiling) is expected
