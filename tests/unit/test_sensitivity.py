"""The metric of hidden states: Fisher information of the predictions, measured block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.opened import tiny_job
from tests.tiny import FAMILIES, tiny_model
from torch import Tensor

from crossbit.engine.job import Job
from crossbit.engine.progress import Reporter
from crossbit.engine.sensitivity import FLOOR, load_metric, measure_sensitivity, metric_of
from crossbit.engine.workdir import WorkDir


def folder(path: Path) -> WorkDir:
    work = WorkDir(path / "work")
    work.begin({}, resume=False)
    return work


def whole_model(family: str, job: Job) -> list[Tensor]:
    """F after each block by one backward pass through all of the model in float64."""
    model = tiny_model(family, dtype=torch.float32).double()
    model.requires_grad_(False)
    assert job.ids is not None
    ids = job.ids[: job.ids.shape[0] - job.held_out]
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.requires_grad_()
        hidden.retain_grad()
        kept.append(hidden)

    for name in job.shell.structure.block_names:
        model.get_submodule(name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(job.recipe.calibration.seed)
    found = [torch.zeros(model.config.hidden_size, model.config.hidden_size).double()] * len(
        job.shell.structure.block_names
    )
    for row in ids:
        kept.clear()
        with torch.enable_grad():
            likelihood = model(row[None]).logits[0].log_softmax(-1)
            # The same labels: drawn from float32, as there.
            drawn = torch.multinomial(likelihood.detach().float().exp(), 1, generator=generator)
            likelihood.gather(-1, drawn).sum().backward()
        for index, hidden in enumerate(kept):
            assert hidden.grad is not None
            size = hidden.detach()[0].square().mean(-1, keepdim=True).sqrt()
            rows = hidden.grad[0] * size
            found[index] = found[index] + rows.t() @ rows
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    job = tiny_job(family, objective={"metric": "fisher"})
    work = folder(tmp_path)
    measure_sensitivity(job, work, Reporter(quiet=True))
    assert not work.names("sensitivity-")
    for index, information in enumerate(whole_model(family, job)):
        metric = load_metric(work, index)
        torch.testing.assert_close(metric.double(), metric_of(information), rtol=1e-3, atol=1e-3)
        assert float(metric.trace()) == pytest.approx(len(metric), rel=1e-5)
        assert torch.equal(metric, metric.t())
        assert float(torch.linalg.eigvalsh(metric.double())[0]) > 0.9 * FLOOR / (1 + FLOOR)


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    job = tiny_job("llama", objective={"metric": "fisher"})
    work = folder(tmp_path)
    measure_sensitivity(job, work, Reporter(quiet=True))
    blocks = range(job.shell.num_blocks)
    first = [load_metric(work, index) for index in blocks]
    written = {p.name: p.stat().st_mtime_ns for p in work.path.iterdir()}
    measure_sensitivity(job, work, Reporter(quiet=True))
    assert written == {p.name: p.stat().st_mtime_ns for p in work.path.iterdir()}
    work.drop("metric-00000")  # killed before the last one
    measure_sensitivity(job, work, Reporter(quiet=True))
    assert written.keys() == {p.name for p in work.path.iterdir()}
    for index in blocks:
        assert torch.equal(load_metric(work, index), first[index])


def test_without_any_information_every_direction_counts_alike() -> None:
    assert torch.equal(metric_of(torch.zeros(4, 4)), torch.eye(4))
    assert torch.allclose(metric_of(torch.eye(4) * 7), torch.eye(4))
    one = torch.zeros(4, 4)
    one[1, 1] = 3.0
    wanted = torch.tensor([FLOOR, 4 + FLOOR, FLOOR, FLOOR]) / (1 + FLOOR)
    torch.testing.assert_close(metric_of(one).diagonal(), wanted)
