"""Gradients of equivalent transformations (LET) in training, and the steps taken with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.equivalents import FAMILIES, LET, WEIGHTS, WHOLE, a_task, shaken
from tests.opened import (
    entering,
    float_block,
    kwargs_of,
    open_trained,
    run_block,
    tiny_job,
)
from torch import Tensor
from torch.func import functional_call

from crossbit.engine.equivalent import LIMIT, Equivalent
from crossbit.engine.fit import Optimiser, Progress, Task, _step
from crossbit.engine.job import Job
from crossbit.engine.let import QUERY_KEY
from crossbit.engine.trained import TrainedBlock, materialised
from crossbit.models.scores import QueryKey
from crossbit.models.structure import NormSource, RowSource
from crossbit.solvers.rounding import fake_weight

Trained = Mapping[str, Mapping[str, Tensor]]  # name -> "log" and perhaps "shift"


def as_function_of(job: Job, block: TrainedBlock, trained: Trained) -> dict[str, Tensor]:
    """Parameters of the float block in float64: the rounding errors of columns stay as they are.

    Those of rows follow their factor, with their steps.
    """
    followed: dict[str, Tensor] = {}
    own = float_block(job, block.index, torch.float64)
    first = {n: p.detach() for n, p in own.named_parameters()}
    found = dict(first)
    for group in job.plan.blocks[block.index].structure.groups:
        if group.name not in trained:
            continue
        source = group.source
        entries = trained[group.name]["log"].exp()
        shift = trained[group.name].get("shift", torch.zeros_like(entries))
        if isinstance(source, NormSource):
            factor = entries
            weight = f"{source.module}.weight"
            found[weight] = (found[weight] + source.gain_offset) / factor - source.gain_offset
            if source.has_bias:
                bias = f"{source.module}.bias"
                found[bias] = (found[bias] - shift) / factor
        else:
            assert isinstance(source, RowSource)
            # One entry a source row, in the rows' order; channels of grouped heads share one.
            rows = torch.unique(source.rows)
            taken = torch.zeros(found[f"{source.linear}.weight"].shape[0], dtype=torch.float64)
            bias = f"{source.linear}.bias"
            if bias in found:
                found[bias] = found[bias] - taken.index_put((rows,), shift)
            multiplied(found, followed, source.linear, rows, 1 / entries)
            places = {int(row): i for i, row in enumerate(rows)}
            channel = [places[int(row)] for row in source.rows]
            factor, shift = entries[channel], shift[channel]
        for name in group.consumers:
            if "shift" in trained[group.name]:
                found[f"{name}.bias"] = found[f"{name}.bias"] + first[f"{name}.weight"] @ shift
            found[f"{name}.weight"] = found[f"{name}.weight"] * factor
    if QUERY_KEY in trained:
        pairs = job.plan.blocks[block.index].structure.query_key
        assert isinstance(pairs, QueryKey)
        entries = trained[QUERY_KEY]["log"].exp()
        halves = entries[pairs.query_factors]
        multiplied(found, followed, pairs.queries, pairs.query_rows, 1 / halves)
        multiplied(found, followed, pairs.keys, pairs.key_rows, entries[pairs.key_factors])
    for name, layer in block.layers.items():
        rounded = fake_weight(layer.state, torch.float64)
        rows = followed.get(name, torch.ones(rounded.shape[0], dtype=torch.float64))[:, None]
        moved = found[f"{name}.weight"] / rows
        found[f"{name}.weight"] = rows * (moved + (rounded / rows - moved).detach())
    return found


def multiplied(
    found: dict[str, Tensor],
    followed: dict[str, Tensor],
    name: str,
    rows: Tensor,
    values: Tensor,
) -> None:
    """Rows of a layer, weight and bias, times values; the factors of all of them are kept."""
    ones = torch.ones(found[f"{name}.weight"].shape[0], dtype=torch.float64)
    factor = ones.index_put((rows,), values)
    followed[name] = followed.get(name, torch.ones_like(factor)) * factor
    found[f"{name}.weight"] = found[f"{name}.weight"] * factor[:, None]
    if f"{name}.bias" in found:
        found[f"{name}.bias"] = found[f"{name}.bias"] * factor


def gradients_of(
    task: Task, block: TrainedBlock, patch: pytest.MonkeyPatch
) -> dict[tuple[str, str], Tensor]:
    """What a step of the training finds for each parameter; they stay."""
    seen: dict[tuple[str, str], Tensor] = {}

    def watched(
        self: Any, name: str, factor: Equivalent, gradients: dict[str, Tensor], rate: float
    ) -> None:
        assert name == f"factors/{block.index}/{factor.name}"
        assert gradients.keys() == factor.parameters.keys()
        for key, gradient in gradients.items():
            assert gradient.shape == factor.parameters[key].shape
            seen[factor.name, key] = gradient.clone()

    patch.setattr(Optimiser, "update_moving", watched)
    patch.setattr(Optimiser, "update", lambda *_: None)
    _step(task, Optimiser(task), Progress(), 4)
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("recipe", [LET, WHOLE])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_block(
    family: str, recipe: dict[str, Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd in float64, straight through the rounding.

    Without rounding errors they would be 0, the difference of large numbers: large steps here.
    """
    job = tiny_job(family, **recipe, weights={**WEIGHTS, "bits": 4})
    kwargs = kwargs_of(job, 0)
    hidden = torch.randn(entering(job).shape, generator=torch.Generator().manual_seed(2))
    target = run_block(float_block(job, 0), hidden, kwargs)
    target = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
    block = open_trained(job)
    for layer in block.layers.values():
        layer.state.scale.mul_(3)  # the moved weights stay on their grids
        layer.activations = None  # whose rounding has no true gradient
    shaken(block, 0.4)
    trained = {
        f.name: {key: p.double().requires_grad_() for key, p in f.parameters.items()}
        for f in block.equivalents
    }
    leaves = {(name, key): p for name, own in trained.items() for key, p in own.items()}
    found = gradients_of(
        a_task(job, [block], hidden, target, checkpointed=checkpointed), block, monkeypatch
    )
    assert found.keys() == leaves.keys()
    module = float_block(job, 0, torch.float64)
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }
    if "position_embeddings" in wide:
        wide["position_embeddings"] = tuple(t.double() for t in wide["position_embeddings"])
    with torch.enable_grad():
        parameters = as_function_of(job, block, trained)
        out = functional_call(module, parameters, (hidden[:3].double(),), wide)
        out = out[0] if isinstance(out, tuple) else out
        loss = (out - target[:3].double()).square().mean()
        wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # Rounded alike whatever their factors, queries and keys change nothing between them.
        nothing = name[0] == QUERY_KEY
        assert (float(gradient.norm()) < 1e-9 * largest) == nothing
        size = largest if nothing else float(gradient.norm())
        assert float((found[name].double() - gradient).norm()) < 1e-4 * size, name


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job("opt", **LET)
    hidden = entering(job)
    target = torch.zeros_like(hidden)
    block = open_trained(job)
    shaken(block, 0.2)
    with monkeypatch.context() as patch:
        whole = gradients_of(a_task(job, [block], hidden, target), block, patch)
    with monkeypatch.context() as patch:
        parts = gradients_of(a_task(job, [block], hidden, target, tokens=16), block, patch)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "biases"),
    [(LET, 1), (WHOLE, 5)],  # of v; and of q and k, of what else reads a shifted input
)
def test_gradients_reach_nothing_afterwards(recipe: dict[str, Any], biases: int) -> None:
    job = tiny_job("opt", **recipe)
    block = open_trained(job)
    with materialised([block], job.dtype, grad=True):
        made = [p for p in block.module.parameters() if p.requires_grad]
        assert len(made) == 2 * 2 + biases  # two norms
    assert not any(p.requires_grad or p.grad is not None for p in block.module.parameters())
    with materialised([block], job.dtype):
        assert not any(p.requires_grad for p in block.module.parameters())


def test_factors_stay_within_their_limit() -> None:
    job = tiny_job("llama", **LET, training={"let": 100.0})
    block = open_trained(job)
    task = a_task(job, [block], entering(job), entering(job))
    _step(task, Optimiser(task), Progress(done=1), 4)
    for factor in block.equivalents:
        assert float(factor.log.abs().max()) == pytest.approx(LIMIT)


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (0.01, True)])
def test_the_rate_is_that_of_the_recipe(rate: float, moves: bool) -> None:
    job = tiny_job("opt", **WHOLE, training={"let": rate, "warmup": 0.0})
    block = open_trained(job)
    task = a_task(job, [block], entering(job), entering(job))
    _step(task, Optimiser(task), Progress(), 4)
    assert len(block.equivalents) == 4
    for factor in block.equivalents:
        for parameter in factor.parameters.values():
            largest = float(parameter.abs().max())
            assert largest == pytest.approx(rate, rel=1e-3)  # Adam's first step
            assert (largest > 0) == moves
