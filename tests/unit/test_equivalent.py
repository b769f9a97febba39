"""Factors of inputs that are trained (LET): exact, with true gradients, kept by every state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.opened import (
    entering,
    float_block,
    kwargs_of,
    open_trained,
    run_block,
    tiny_job,
    token_error,
)
from torch import Tensor, nn
from torch.func import functional_call

from crossbit.engine.equivalent import LIMIT, Equivalent
from crossbit.engine.fit import Optimiser, Progress, Task, _step
from crossbit.engine.job import Job
from crossbit.engine.live import pack, parameters_of, unpack
from crossbit.engine.trained import TrainedBlock, layers_of, materialised
from crossbit.models.structure import NormSource, RowSource
from crossbit.runtime.install import install
from crossbit.solvers.rounding import fake_weight
from crossbit.solvers.rounding_state import moved_weight

LET: dict[str, Any] = {"transforms": [{"kind": "let"}]}
A8 = {"bits": 8, "kind": "per_token"}
WEIGHTS = {"bits": 8, "group": 16, "scale_dtype": "float32"}
# Grouped heads with a bias of v, an offset of the gain, norms with a bias, fused matrices, experts.
FAMILIES = ("llama", "qwen2", "opt", "gemma3_text", "qwen3", "mixtral", "phi3", "gpt_neox")


def shaken(block: TrainedBlock, size: float = 1.0, seed: int = 0) -> None:
    """Any factors, between exp(-size) and exp(size)."""
    rng = torch.Generator().manual_seed(seed)
    for factor in block.equivalents:
        factor.log.copy_(size * (2 * torch.rand(factor.log.shape, generator=rng) - 1))
        factor.apply()


def unrounded(block: TrainedBlock, dtype: torch.dtype) -> None:
    """Let the layers run with what would be rounded."""
    for layer in block.layers.values():
        layer.weight = moved_weight(layer.state).to(dtype)


# -- the function of the block --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_leave_the_function_of_the_block(family: str) -> None:
    job = tiny_job(family, **LET)
    hidden = entering(job)
    for index in (0, 1):
        wanted = run_block(float_block(job, index), hidden, kwargs_of(job, index))
        block = open_trained(job, index)
        before = {n: moved_weight(layer.state).clone() for n, layer in block.layers.items()}
        shaken(block)
        unrounded(block, job.dtype)
        with torch.no_grad():
            assert token_error(block.run(hidden), wanted) < 1e-5
        moved = {n for n, w in before.items() if not torch.equal(w, block.layers[n].weight)}  # type: ignore[arg-type]
        readers = {n for factor in block.equivalents for n in factor.consumers}
        makers = {
            f.group.source.linear
            for f in block.equivalents
            if isinstance(f.group.source, RowSource)
        }
        assert moved == readers | makers
        hidden = wanted


@pytest.mark.parametrize(
    ("family", "index", "groups"),
    [
        ("llama", 0, ["qkv", "o", "gate_up"]),
        ("gemma3_text", 0, ["qkv", "o", "gate_up"]),
        ("opt", 0, ["qkv", "o", "fc1"]),
        ("opt_post_norm", 0, ["o"]),
        ("gpt_neox", 0, ["qkv", "o", "fc1"]),
        ("mixtral", 0, ["qkv", "o"]),
        ("qwen2_moe", 0, ["qkv", "o"]),  # the router reads what the experts do
        ("qwen2_moe", 1, ["qkv", "o", "gate_up"]),
    ],
)
def test_which_inputs_have_factors(family: str, index: int, groups: list[str]) -> None:
    block = open_trained(tiny_job(family, **LET), index)
    assert [factor.group.name for factor in block.equivalents] == groups


@pytest.mark.parametrize(
    ("changed", "groups"),
    [
        ({"overrides": [{"match": "v_proj", "solver": {"kind": "rtn"}}]}, ["gate_up"]),
        ({"overrides": [{"match": "o_proj", "solver": {"kind": "rtn"}}]}, ["qkv", "gate_up"]),
        ({"ignore": ["k_proj"]}, ["o", "gate_up"]),
        ({"ignore": ["v_proj", "up_proj"]}, []),
    ],
)
def test_what_is_not_trained_has_no_factor(changed: Any, groups: list[str]) -> None:
    """Neither reads such a layer an input that has one, nor makes it."""
    block = open_trained(tiny_job("llama", **LET, **changed))
    assert [factor.group.name for factor in block.equivalents] == groups
    for factor in block.equivalents:
        made = [] if factor.producer is None else [factor.producer]
        assert not any(layer.frozen for layer in (*factor.consumers.values(), *made))  # type: ignore[attr-defined]


def test_without_let_there_are_none() -> None:
    assert open_trained(tiny_job("llama")).equivalents == []


def factor_of(block: TrainedBlock, name: str) -> Equivalent:
    return next(factor for factor in block.equivalents if factor.group.name == name)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_rounded_gain_defines_the_factor(family: str) -> None:
    """In bfloat16 the gain takes few values; columns and gain stay each other's inverse."""
    job = tiny_job(family, dtype=torch.bfloat16, **LET)
    original = float_block(job, 0)
    block = open_trained(job)
    shaken(block)
    factor = factor_of(block, "qkv")
    source = factor.group.source
    assert isinstance(source, NormSource)
    old = original.get_submodule(source.module).get_parameter("weight").float() + source.gain_offset
    new = block.module.get_submodule(source.module).get_parameter("weight")
    assert new.dtype == torch.bfloat16
    columns = block.layers["self_attn.q_proj"].state.columns
    assert columns is not None
    torch.testing.assert_close((new.float() + source.gain_offset) * columns, old, rtol=3e-7, atol=0)
    asked = factor.log.exp()
    assert float((columns / asked - 1).abs().max()) > 1e-4  # else nothing was rounded
    assert float((columns / asked - 1).abs().median()) < 2**-8
    for name in ("self_attn.k_proj", "self_attn.v_proj"):
        other = block.layers[name].state.columns
        assert other is not None
        assert torch.equal(other, columns)
    if source.has_bias:
        bias = block.module.get_submodule(source.module).get_parameter("bias").float()
        wanted = original.get_submodule(source.module).get_parameter("bias").float()
        torch.testing.assert_close(bias * columns, wanted, rtol=2**-8, atol=0)


def test_factors_are_not_applied_twice() -> None:
    """What the factors are of stays, however often they are applied."""
    job = tiny_job("opt", **LET)
    block = open_trained(job)
    before = {n: p.clone() for n, p in block.module.named_parameters()}
    shaken(block, seed=1)
    assert any(not torch.equal(p, before[n]) for n, p in block.module.named_parameters())
    shaken(block, seed=2)
    shaken(block, seed=2)
    once = {n: p.clone() for n, p in block.module.named_parameters()}
    other = open_trained(job)
    shaken(other, seed=2)
    for name, parameter in other.module.named_parameters():
        assert torch.equal(parameter, once[name])
    for factor in block.equivalents:
        factor.log.zero_()
        factor.apply()
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_moved_weight_follows_a_step() -> None:
    """It is made once between two steps, and anew after one."""
    block = open_trained(tiny_job("llama", **LET))
    for size in (0.5, 0.1):
        shaken(block, size)
        known = {n: moved_weight(layer.state) for n, layer in block.layers.items()}
        for name, layer in block.layers.items():
            state = layer.state
            wanted = state.weight
            for part, axis in ((state.rows, 1), (state.columns, 0)):
                wanted = wanted if part is None else wanted * part.unsqueeze(axis)
            assert torch.equal(known[name], wanted)
            assert moved_weight(state) is known[name]
    v = block.layers["self_attn.v_proj"].state
    assert v.rows is not None
    assert v.columns is not None
    o = factor_of(block, "o")
    o.log.add_(0.1)
    o.apply()
    assert not torch.equal(moved_weight(v), known["self_attn.v_proj"])


# -- gradients ------------------------------------------------------------------------------------


def a_task(
    job: Job, blocks: list[TrainedBlock], hidden: Tensor, target: Tensor, **changed: Any
) -> Task:
    def loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        return (outputs[0] - targets[0]).square().mean()

    options: dict[str, Any] = {
        "blocks": blocks,
        "read": lambda numbers: (hidden[numbers], [target[numbers]]),
        "loss": loss,
        "fitting": torch.arange(3),
        "held": torch.arange(3, 4),
        "length": hidden.shape[1],
        "settings": job.recipe.training,
        "steps": {name: True for name, _ in layers_of(blocks)},
        "dtype": job.dtype,
        "seed": 0,
        **changed,
    }
    return Task(**options)


def as_function_of_logs(
    job: Job, block: TrainedBlock, logs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters of the float block in float64: rounding errors stay, all else follows the logs."""
    own = float_block(job, block.index, torch.float64)
    found = {n: p.detach() for n, p in own.named_parameters()}
    for group in job.plan.blocks[block.index].structure.groups:
        if group.name not in logs:
            continue
        source = group.source
        if isinstance(source, NormSource):
            factor = logs[group.name].exp()
            weight = f"{source.module}.weight"
            found[weight] = (found[weight] + source.gain_offset) / factor - source.gain_offset
            if source.has_bias:
                found[f"{source.module}.bias"] = found[f"{source.module}.bias"] / factor
        else:
            assert isinstance(source, RowSource)
            # One log a source row, in the rows' order; channels of grouped heads share one.
            rows = torch.unique(source.rows)
            places = {int(row): i for i, row in enumerate(rows)}
            shared = logs[group.name].exp()
            factor = shared[[places[int(row)] for row in source.rows]]
            divisor = torch.ones(found[f"{source.linear}.weight"].shape[0], dtype=torch.float64)
            divisor = divisor.index_put((rows,), shared)
            found[f"{source.linear}.weight"] = found[f"{source.linear}.weight"] / divisor[:, None]
            if f"{source.linear}.bias" in found:
                found[f"{source.linear}.bias"] = found[f"{source.linear}.bias"] / divisor
        for name in group.consumers:
            found[f"{name}.weight"] = found[f"{name}.weight"] * factor
    for name, layer in block.layers.items():
        rounded = fake_weight(layer.state, torch.float64)
        moved = found[f"{name}.weight"]
        found[f"{name}.weight"] = moved + (rounded - moved).detach()
    return found


def gradients_of(task: Task, block: TrainedBlock, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What a step of the training finds for the logs; they stay."""
    seen: dict[str, Tensor] = {}

    def watched(self: Any, name: str, log: Tensor, gradient: Tensor, factor: float) -> None:
        assert name.startswith(f"factors/{block.index}/")
        assert gradient.shape == log.shape
        seen[name.rpartition("/")[2]] = gradient.clone()

    patch.setattr(Optimiser, "update_factor", watched)
    patch.setattr(Optimiser, "update", lambda *_: None)
    _step(task, Optimiser(task), Progress(), 4)
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_block(
    family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd in float64, straight through the rounding.

    Without rounding errors they would be 0, the difference of large numbers: large steps here.
    """
    job = tiny_job(family, **LET, weights={**WEIGHTS, "bits": 4})
    kwargs = kwargs_of(job, 0)
    hidden = torch.randn(entering(job).shape, generator=torch.Generator().manual_seed(2))
    target = run_block(float_block(job, 0), hidden, kwargs)
    target = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
    block = open_trained(job)
    for layer in block.layers.values():
        layer.state.scale.mul_(3)  # the moved weights stay on their grids
    shaken(block, 0.4)
    logs = {f.group.name: f.log.double().requires_grad_() for f in block.equivalents}
    found = gradients_of(
        a_task(job, [block], hidden, target, checkpointed=checkpointed), block, monkeypatch
    )
    assert found.keys() == logs.keys()
    module = float_block(job, 0, torch.float64)
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }
    if "position_embeddings" in wide:
        wide["position_embeddings"] = tuple(t.double() for t in wide["position_embeddings"])
    with torch.enable_grad():
        parameters = as_function_of_logs(job, block, logs)
        out = functional_call(module, parameters, (hidden[:3].double(),), wide)
        out = out[0] if isinstance(out, tuple) else out
        loss = (out - target[:3].double()).square().mean()
        wanted = dict(zip(logs, torch.autograd.grad(loss, list(logs.values())), strict=True))
    for name, gradient in wanted.items():
        assert float(gradient.norm()) > 0
        error = float((found[name].double() - gradient).norm() / gradient.norm())
        assert error < 1e-4, name


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


def test_gradients_reach_nothing_afterwards() -> None:
    job = tiny_job("opt", **LET)
    block = open_trained(job)
    with materialised([block], job.dtype, grad=True):
        made = [p for p in block.module.parameters() if p.requires_grad]
        assert len(made) == 2 * 2 + 1  # two norms, the bias of v
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
    job = tiny_job("llama", **LET, training={"let": rate, "warmup": 0.0})
    block = open_trained(job)
    task = a_task(job, [block], entering(job), entering(job))
    _step(task, Optimiser(task), Progress(), 4)
    for factor in block.equivalents:
        largest = float(factor.log.abs().max())
        assert largest == pytest.approx(rate, rel=1e-3)  # Adam's first step
        assert (largest > 0) == moves


# -- what is written, and what is kept ------------------------------------------------------------

MOVING = {
    "steps": {"kind": "rounding"},
    "range": {"kind": "rounding", "parameter": "none", "limits": "range"},
    "expansion": {
        "kind": "rounding",
        "parameter": "none",
        "limits": "range",
        "expansion": {"kind": "band", "width": 2},
    },
}


def trained_for(steps: int, task: Task, optimiser: Optimiser, done: int = 0) -> None:
    for number in range(done, done + steps):
        _step(task, optimiser, Progress(done=number), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", MOVING)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_written_is_what_was_trained(family: str, solver: str, dtype: torch.dtype) -> None:
    weights = {"bits": 4, "group": 16, "symmetric": solver == "steps"}
    job = tiny_job(
        family,
        dtype=dtype,
        **LET,
        weights=weights,
        activations=A8,
        solver=MOVING[solver],
        training={"let": 0.05, "expansion": 0.05},
    )
    hidden = entering(job)
    block = open_trained(job)
    task = a_task(job, [block], hidden, torch.zeros_like(hidden))
    trained_for(3, task, Optimiser(task))
    with torch.no_grad(), materialised([block], dtype):
        faked = {n: layer.weight for n, layer in block.layers.items()}
        wanted = block.run(hidden)
    opened = block.hardened()
    for name, layer in opened.layers.items():
        kept = faked[name]
        assert kept is not None
        assert torch.equal(layer.qtensor.dequantize().to(dtype), kept)
    install(opened.module, job.plan.blocks[0].structure, opened.layers, dtype, "fake")
    with torch.no_grad():
        found = run_block(opened.module, hidden, block.kwargs)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "solver"), [("llama", "expansion"), ("opt", "steps")])
def test_a_state_goes_on_bit_for_bit(family: str, solver: str, dtype: torch.dtype) -> None:
    job = tiny_job(
        family,
        dtype=dtype,
        **LET,
        solver=MOVING[solver],
        training={"let": 0.05, "batch": 2},
    )
    hidden = entering(job)
    target = torch.zeros_like(hidden)

    def go(blocks: list[TrainedBlock], saved: dict[str, Tensor] | None, done: int) -> Optimiser:
        task = a_task(job, blocks, hidden, target)
        optimiser = Optimiser(task)
        if saved is not None:
            optimiser.load(saved)
        trained_for(2, task, optimiser, done)
        return optimiser

    blocks = [open_trained(job, index) for index in (0, 1)]
    kept = go(blocks, None, 0)
    tensors, record = pack(blocks)
    tensors = {n: t.detach().clone() for n, t in tensors.items()}
    saved = {n: t.clone() for n, t in kept.state()}
    for again in (blocks, unpack(job, tensors, record)):
        go(again, {n: t.clone() for n, t in saved.items()}, 2)
        if again is blocks:
            first = {n: p.clone() for n, p in parameters_of(blocks).items()}
            names = [n for n in first if n.startswith("factors/")]
            assert len(names) == 6
            assert any(not torch.equal(first[n], tensors[f"parameter/{n}"]) for n in names)
    for name, parameter in parameters_of(again).items():
        assert torch.equal(parameter, first[name]), name
    for one, other in zip(blocks, again, strict=True):
        assert_same(one.hardened().module, other.hardened().module)
        codes = [{n: h.hardened().qtensor for n, h in b.layers.items()} for b in (one, other)]
        for name, tensor in codes[0].items():
            assert torch.equal(tensor.codes, codes[1][name].codes)
            assert torch.equal(tensor.scale, codes[1][name].scale)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    own = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, own[name]), name


def test_what_is_hardened_has_the_factors_of_its_moment() -> None:
    """Parameters that come back from a file are not in the norms yet, nor are those of a state."""
    job = tiny_job("opt", **LET)
    block, same = open_trained(job), open_trained(job)
    shaken(same, seed=2)
    shaken(block, seed=1)
    for factor, wanted in zip(block.equivalents, same.equivalents, strict=True):
        factor.log.copy_(wanted.log)
    tensors, record = pack([block])
    (other,) = unpack(job, {n: t.detach().clone() for n, t in tensors.items()}, record)
    wanted_layers = {n: layer.hardened().qtensor for n, layer in same.layers.items()}
    for found in (block.hardened(), other.hardened()):
        assert_same(found.module, same.module)
        for name, layer in found.layers.items():
            assert torch.equal(layer.qtensor.codes, wanted_layers[name].codes)
