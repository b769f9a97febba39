"""The metric of hidden states: Fisher information of the predictions, measured block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.opened import Held, tiny_job
from tests.tiny import FAMILIES, tiny_model
from torch import Tensor

from crossbit.engine import sensitivity
from crossbit.engine.job import Job
from crossbit.engine.progress import Reporter
from crossbit.engine.sensitivity import (
    FLOOR,
    load_metric,
    measure_sensitivity,
    metric_name,
    metric_of,
)
from crossbit.engine.window import _loss, _metrics
from crossbit.engine.workdir import WorkDir
from crossbit.errors import WorkError
from crossbit.objective import reconstruction_loss
from crossbit.windows import Window


def folder(path: Path) -> WorkDir:
    work = WorkDir(path / "work")
    work.begin({}, resume=False)
    return work


def whole_model(family: str, job: Job, sequences: int = 16) -> list[Tensor]:
    """F after each block by one backward pass through all of the model in float64."""
    model = tiny_model(family, dtype=torch.float32).double()
    model.requires_grad_(False)
    assert job.ids is not None
    ids = job.ids[: job.ids.shape[0] - job.held_out][:sequences]
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


@pytest.mark.parametrize(("tokens", "sequences"), [(5, 16), (16, 2), (7, 3)])
def test_parts_of_texts_add_up(
    tokens: int, sequences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokens through the head at once, a sequence through the blocks, a few in all."""
    monkeypatch.setattr(sensitivity, "TOKENS", tokens)
    monkeypatch.setattr(sensitivity, "SEQUENCES", sequences)
    monkeypatch.setattr("crossbit.engine.job.TOKENS_AT_ONCE", 16)
    job, work = tiny_job("llama"), folder(tmp_path)
    measure_sensitivity(job, work, Reporter(quiet=True))
    for index, information in enumerate(whole_model("llama", job, sequences)):
        wanted = metric_of(information)
        torch.testing.assert_close(load_metric(work, index).double(), wanted, rtol=1e-3, atol=1e-3)


def test_of_later_blocks_only(tmp_path: Path) -> None:
    job, work = tiny_job("llama"), folder(tmp_path)
    measure_sensitivity(job, work, Reporter(quiet=True), 1)
    assert not work.has("metric-00000")
    assert work.has("metric-00001")


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    job, work = tiny_job("llama"), folder(tmp_path)
    tensors = dict(tiny_model("llama", dtype=torch.float32).state_dict())
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    job = replace(job, checkpoint=Held(tensors))
    with pytest.raises(WorkError, match=r"block 0: .* not finite; use --dtype float32"):
        measure_sensitivity(job, work, Reporter(quiet=True))


def test_the_loss_of_a_window_is_in_its_metrics(tmp_path: Path) -> None:
    """With k + 1 times the identity after block k, in look-ahead and homologous terms alike."""
    data = {"window": 1, "overlap": 0, "ahead": [1.0, 1.0], "homologous": 0.5, "norm": "token"}
    plain, sensed = (
        tiny_job("llama", objective={**data, "metric": metric})
        for metric in ("euclidean", "fisher")
    )
    work, window = folder(tmp_path), Window(1, 1, 2, 1)
    for index in range(plain.shell.num_blocks):
        work.save_state(metric_name(index), {"metric": (index + 1.0) * torch.eye(8)}, {})
    outputs = [torch.randn(2, 3, 8) for _ in range(2)]
    targets = [torch.randn(2, 3, 8) for _ in range(3)]

    def loss(job: Job) -> float:
        terms = (1.0, 1.0)
        return float(
            _loss(job, False, terms, _metrics(job, work, window, 2))(outputs, targets, 1.0)
        )

    def term(output: Tensor, target: Tensor) -> float:
        return float(reconstruction_loss(output, target, norm="token"))

    first = term(outputs[0], targets[0]) + 0.5 * term(outputs[0], targets[2])
    second = term(outputs[1], targets[1])
    assert loss(plain) == pytest.approx(first + second, rel=1e-5)
    assert loss(sensed) == pytest.approx(2 * first + 3 * second, rel=1e-5)


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    job = tiny_job("llama", objective={"metric": "fisher"})
    work = folder(tmp_path)
    measure_sensitivity(job, work, Reporter(quiet=True))
    blocks = range(job.shell.num_blocks)
    first = [load_metric(work, index) for index in blocks]
    written = {p.name: p.stat().st_mtime_ns for p in work.path.iterdir()}
    measure_sensitivity(job, work, Reporter(quiet=True))
    assert written == {p.name: p.stat().st_mtime_ns for p in work.path.iterdir()}
    (work.path / "sensitivity-input-00000.safetensors").touch()  # killed before it went
    measure_sensitivity(job, work, Reporter(quiet=True))
    assert written.keys() == {p.name for p in work.path.iterdir()}
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
