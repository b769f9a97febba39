"""Training that amounts to something known: to GPTQ, or to block-wise reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines import shorten
from tests.training import A8, GPTQ, recipe, train, weights_of

from crossbit.engine import loop
from crossbit.engine.closing import close_block
from crossbit.engine.fit import Task, fit
from crossbit.engine.job import Job
from crossbit.engine.live import parameters_of
from crossbit.engine.opening import open_block
from crossbit.engine.originals import embedded, through_original
from crossbit.engine.progress import Reporter
from crossbit.engine.trained import layers_of, make_trainable
from crossbit.engine.workdir import WorkDir
from crossbit.objective import reconstruction_loss

pytestmark = pytest.mark.usefixtures("quick", "no_collection")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        out = tmp_path_factory.mktemp("untrained") / "out"
        train(llama, text, out, recipe({"kind": "gptq"}, activations=A8, training={}))
    return out


@pytest.mark.parametrize(
    ("objective", "solver"),
    [
        ({"window": 1, "overlap": 0}, {}),
        ({"window": 2, "overlap": 1}, {"mode": "sigmoid", "parameter": "low_rank"}),
        ({"window": 3, "overlap": 0}, {"base": "zero"}),
        ({"window": 1, "overlap": 0, "expand": "ends"}, {}),
    ],
)
def test_without_epochs_it_is_gptq(
    objective: Any, solver: dict[str, Any], llama: Path, text: Path, untrained: Path, tmp_path: Path
) -> None:
    """Whatever the windows, a block opens on what the quantized ones before it produce."""
    chosen = recipe({**GPTQ, **solver}, activations=A8, objective=objective, training={"epochs": 0})
    train(llama, text, tmp_path / "out", chosen)
    assert weights_of(tmp_path / "out") == weights_of(untrained)


class Memory:
    """The least that a training needs to remember."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def save_best(self) -> None:
        self.best = {n: p.clone() for n, p in parameters_of(self.blocks).items()}

    def load_best(self) -> None:
        for name, parameter in parameters_of(self.blocks).items():
            parameter.copy_(self.best[name])

    def save_start(self) -> None:
        """No layer is undecided here."""

    def load_start(self) -> None:
        """No layer is undecided here."""

    def tick(self, *_: Any) -> None:
        pass


def plain(job: Job, work: WorkDir, reporter: Reporter) -> None:
    """Block-wise reconstruction as a loop: its target is what the original makes of its input."""
    teacher = embedded(job, work, "teacher-00000")
    entering = loop._entering(job, work, 0)
    count, length = entering.shape[:2]
    held = job.held_out
    for index in range(job.shell.num_blocks):
        kwargs = job.shell.block_kwargs(length, job.dtype)[index]
        teacher = through_original(job, work, index, teacher, f"teacher-{index + 1:05d}")
        opened = open_block(job, index, entering, None)
        block = make_trainable(index, opened, job.plan.blocks[index], kwargs, job.dtype, 0)
        x, y = entering.read(0, count), teacher.read(0, count)
        task = Task(
            blocks=[block],
            read=lambda numbers, x=x, y=y: (x[numbers], [y[numbers]]),  # type: ignore[misc]
            loss=lambda outputs, targets, _: reconstruction_loss(outputs[0], targets[0]),
            fitting=torch.arange(count - held),
            held=torch.arange(count - held, count),
            length=length,
            settings=job.recipe.training,
            steps={name: True for name, _ in layers_of([block])},
            dtype=job.dtype,
            seed=index,
        )
        fit(task, Memory([block]), None, {})
        closing = block.hardened()
        closing.target = through_original(job, work, index, entering, "target", held=True)
        job.shell.place_block(index, closing.module)
        leaving = close_block(job, work, index, closing, entering)
        assert leaving is not None
        entering = leaving


def test_windows_of_one_block_are_block_wise_reconstruction(
    llama: Path, text: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(objective={"window": 1, "overlap": 0}, activations=A8)
    result = train(llama, text, tmp_path / "windows", chosen)
    # Training that helps nowhere would leave the same bytes, whatever it does.
    assert sum(row["after"] < row["before"] for row in result["training"]) >= 2
    assert weights_of(tmp_path / "windows") != weights_of(untrained)
    monkeypatch.setattr("crossbit.pipeline.run_blocks", plain)
    train(llama, text, tmp_path / "plain", chosen)
    assert weights_of(tmp_path / "windows") == weights_of(tmp_path / "plain")
