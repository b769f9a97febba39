"""What a training's result hangs on: its seed; not micro-batches, nor where it was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.test_fit import (
    LENGTH,
    KilledError,
    Memory,
    equal,
    make_blocks,
    make_task,
    restore,
    run,
    snapshot,
)
from torch import Tensor

from crossbit.engine.fit import Optimiser, Progress, fit, held_out, outcome
from crossbit.engine.progress import Reporter
from crossbit.engine.window import _BEST, _TRAINING, StateKeeper, interrupted_training
from crossbit.engine.workdir import WorkDir
from crossbit.recipe import Training
from crossbit.solvers.rounding_state import RoundingChoice
from crossbit.windows import Window

WINDOW = Window(0, 0, 2, 2)


def test_the_same_seed_gives_the_same_bytes() -> None:
    found = []
    for seed in (3, 3, 4, 2**63 - 1):
        blocks = make_blocks()
        progress, _ = run(make_task(blocks, seed=seed))
        found.append((snapshot(blocks), outcome(progress)))
    assert found[0][1] == found[1][1]
    assert equal(list(found[0][0].values()), list(found[1][0].values()))
    assert found[0][1]["epochs"] != found[2][1]["epochs"]


def test_micro_batches_change_nothing_but_the_order_of_sums() -> None:
    settings = Training(epochs=1, batch=4)
    found = []
    for tokens in (1, 2 * LENGTH, 4096):
        blocks = make_blocks()
        task = make_task(blocks, settings, tokens=tokens)
        progress, _ = run(task)
        found.append((progress.losses[0], snapshot(blocks), held_out(task)))
    for other in found[:2]:
        assert other[0] == pytest.approx(found[2][0], rel=1e-4)
        torch.testing.assert_close(other[1], found[2][1], rtol=1e-3, atol=1e-5)
        assert other[2] == pytest.approx(found[2][2], rel=1e-4)


def test_an_epoch_sees_every_sequence_once() -> None:
    seen: list[int] = []
    task = make_task(make_blocks(), Training(epochs=3, batch=4))

    def read(numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, targets = task.read(numbers)
        if torch.is_grad_enabled():
            seen.extend(numbers.tolist())
        return x, targets

    run(replace(task, read=read))
    epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert [sorted(e) for e in epochs] == [list(range(6))] * 3
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


@pytest.mark.parametrize("choice", [RoundingChoice(), RoundingChoice("zero", "low_rank")])
@pytest.mark.parametrize("rising", [1.5, 0.5])
def test_an_interrupted_training_ends_in_the_same_bytes(
    choice: RoundingChoice, rising: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every step; with ``rising`` below 1 an epoch may fail, so that it rolls back as well."""
    monkeypatch.setattr("crossbit.engine.fit.RISING", rising)
    settings = Training(epochs=2, batch=2, rounding=0.05)
    whole = make_blocks(choice)
    progress, keeper = run(make_task(whole, settings))
    assert (progress.attempt > 0) == (rising < 1 and choice.base == "frac")
    for stop in range(1, keeper.ticks + 1):
        killed = Memory(make_blocks(choice), stop)
        with pytest.raises(KilledError):
            fit(make_task(killed.blocks, settings), killed, None, {})
        assert killed.saved is not None
        known, optimiser, parameters = killed.saved
        blocks = make_blocks(choice)
        restore(blocks, parameters)
        again = Memory(blocks, best=killed.best, start=killed.start)
        assert fit(make_task(blocks, settings), again, known, optimiser) == progress
        assert equal(list(snapshot(blocks).values()), list(snapshot(whole).values()))


def test_a_state_on_disk_keeps_the_best_parameters_of_its_moment(tmp_path: Path) -> None:
    """Parameters that became the best after it was written do not replace them."""
    work = WorkDir(tmp_path / "work")
    work.begin({}, resume=False)
    blocks = make_blocks()
    task = make_task(blocks)
    optimiser, progress = Optimiser(task), Progress(best=1.0)
    offset = blocks[0].layers["0"].state.parameters["offset"]

    def keeper(best: str | None = None) -> StateKeeper:
        return StateKeeper(work, WINDOW, blocks, Reporter(True), task, best)

    def become(value: float, where: StateKeeper) -> None:
        offset.fill_(value)
        where.save_best()

    def resumed() -> float:
        state = interrupted_training(work, WINDOW)
        assert state is not None
        keeper(state[1]["best"]).load_best()
        return float(offset[0, 0])

    def saved() -> bool:
        return work.has(_TRAINING)

    running = keeper()
    become(1.0, running)
    running.tick(progress, optimiser)
    assert not saved()  # the start needs no state: the window begins anew
    become(2.0, running)
    running.tick(progress, optimiser)
    assert saved()  # at once, long before it is time
    become(3.0, running)
    assert resumed() == 2.0  # killed between the two files
    running.tick(progress, optimiser)
    assert resumed() == 3.0
    become(4.0, keeper(interrupted_training(work, WINDOW)[1]["best"]))  # type: ignore[index]
    assert resumed() == 3.0
    assert interrupted_training(work, replace(WINDOW, index=1)) is None
    for name in _BEST:
        work.drop(name)
    assert interrupted_training(work, WINDOW) is None
