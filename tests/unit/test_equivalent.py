"""What is trained of equivalent transformations (LET): exact, with true gradients, kept by states.

Factors of inputs, their shifts, factors of queries and keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.equivalents import FAMILIES, LET, WEIGHTS, WHOLE, a_task, shaken, unrounded
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

from crossbit.engine.equivalent import Equivalent
from crossbit.engine.fit import Optimiser, Progress, Task, _step
from crossbit.engine.let import QUERY_KEY
from crossbit.engine.live import pack, parameters_of, unpack
from crossbit.engine.trained import TrainedBlock, materialised
from crossbit.runtime.install import install
from crossbit.solvers.rounding_state import moved_weight

# -- the function of the block --------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [LET, WHOLE])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_of_the_block_stays(family: str, recipe: dict[str, Any]) -> None:
    job = tiny_job(family, **recipe)
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
        makers = {rows.name for factor in block.equivalents for rows in factor.rows}
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
    assert [factor.name for factor in block.equivalents] == groups


# Shifts need a bias on both sides, rows of queries and keys no norm behind them.
@pytest.mark.parametrize(
    ("family", "shifts", "pairs"),
    [
        ("llama", ["o"], 2 * 8),  # the norms have no bias; two heads of keys of 16 channels
        ("mistral", [], 2 * 8),
        ("qwen2", [], 2 * 8),  # o_proj has no bias
        ("gemma2", [], 2 * 16),
        ("gemma3_text", [], 0),
        ("qwen3", [], 0),
        ("opt", ["qkv", "o", "fc1"], 4 * 16),  # no rotary embedding
        ("opt_post_norm", ["o"], 4 * 16),
        ("gpt_neox", ["qkv", "o", "fc1"], 4 * (2 + 12)),  # that of 4 channels of 16
        ("gpt_neox_serial", ["qkv", "o", "fc1"], 4 * (2 + 12)),
        ("phi3", [], 2 * 8),
        ("mixtral", [], 2 * 8),
        ("qwen2_moe", [], 2 * 8),
        ("qwen3_moe", [], 0),
    ],
)
def test_what_has_shifts_and_which_queries_factors(
    family: str, shifts: list[str], pairs: int
) -> None:
    block = open_trained(tiny_job(family, **WHOLE))
    assert [f.name for f in block.equivalents if f.shift is not None] == shifts
    assert sum(f.log.numel() for f in block.equivalents if f.name == QUERY_KEY) == pairs


@pytest.mark.parametrize(
    ("changed", "shifts", "pairs"),
    [
        ({}, True, True),
        ({"cache": None}, True, False),  # rows have scales of their own
        ({"cache": None, "weights": {**WEIGHTS, "group": "tensor"}}, True, True),
        ({"activations": None}, False, True),
        ({"transforms": [{"kind": "let", "shift": False}]}, False, True),
        ({"transforms": [{"kind": "let", "qk": False}]}, True, False),
        ({"prefix": {"tokens": [1]}}, True, False),  # whose keys have no factor
        ({"ignore": ["k_proj"]}, True, False),
        ({"overrides": [{"match": "q_proj", "solver": {"kind": "rtn"}}]}, True, False),
    ],
)
def test_where_there_would_be_nothing_to_learn(
    changed: dict[str, Any], shifts: bool, pairs: bool
) -> None:
    block = open_trained(tiny_job("opt", **{**WHOLE, **changed}))
    assert any(f.shift is not None for f in block.equivalents) == shifts
    assert any(f.name == QUERY_KEY for f in block.equivalents) == pairs


def test_of_down_proj_there_is_no_shift() -> None:
    """A nonlinearity stands before it."""
    down = {**WHOLE, "transforms": [{"kind": "let", "down": True}]}
    model = {n: open_trained(tiny_job(n, **down)) for n in ("opt", "llama")}
    for name, group in (("opt", "fc2"), ("llama", "down")):
        assert factor_of(model[name], group).shift is None


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
    assert [factor.name for factor in block.equivalents] == groups
    for factor in block.equivalents:
        names = [*factor.consumers, *(rows.name for rows in factor.rows)]
        assert not any(block.layers[name].frozen for name in names)


def test_without_let_there_are_none() -> None:
    assert open_trained(tiny_job("llama")).equivalents == []


def factor_of(block: TrainedBlock, name: str) -> Equivalent:
    return next(factor for factor in block.equivalents if factor.name == name)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_rounded_gain_defines_the_factor(family: str) -> None:
    """In bfloat16 the gain takes few values; columns and gain stay each other's inverse."""
    job = tiny_job(family, dtype=torch.bfloat16, **LET)
    original = float_block(job, 0)
    block = open_trained(job)
    shaken(block)
    factor = factor_of(block, "qkv")
    assert factor.norm is not None
    source = factor.norm.source
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
    """What factors and shifts are of stays, however often they are applied."""
    job = tiny_job("opt", **WHOLE)
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
        for trained in factor.parameters.values():
            trained.zero_()
        factor.apply()
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_a_rounded_bias_defines_the_shift(family: str) -> None:
    """In bfloat16 what a norm's bias loses goes to the biases behind it."""
    job = tiny_job(family, dtype=torch.bfloat16, **WHOLE)
    block = open_trained(job)
    shaken(block)
    qkv = factor_of(block, "qkv")
    assert qkv.norm is not None
    assert qkv.norm.bias is not None
    assert qkv.shift is not None
    name, layer = next(iter(qkv.consumers.items()))
    columns, stored = layer.state.columns, qkv.norm.parameters[1]
    assert columns is not None
    assert stored.dtype == torch.bfloat16
    # own = s b + d, the d being what the layer behind has taken up
    realised = qkv.norm.bias - columns * stored.float()
    taken = qkv.biases[name].entered
    assert taken is not None
    torch.testing.assert_close(taken, layer.state.weight @ realised, rtol=1e-4, atol=1e-5)
    difference = (realised - qkv.shift).abs()
    assert float(difference.max()) > 1e-4  # else nothing was rounded
    assert float((difference / (columns * stored.float()).abs()).median()) < 2**-8


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
        **WHOLE,
        weights=weights,
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
@pytest.mark.parametrize(
    ("family", "solver", "recipe", "count"),
    [
        ("llama", "expansion", LET, 3),
        ("opt", "steps", LET, 3),
        ("opt", "expansion", WHOLE, 7),
        ("gpt_neox", "steps", WHOLE, 7),
    ],
)
def test_a_state_goes_on_bit_for_bit(
    family: str, solver: str, recipe: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    job = tiny_job(
        family,
        dtype=dtype,
        **recipe,
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
            assert len(names) == 2 * count
            assert not any(torch.equal(first[n], tensors[f"parameter/{n}"]) for n in names)
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
    job = tiny_job("opt", **WHOLE)
    block, same = open_trained(job), open_trained(job)
    shaken(same, seed=2)
    shaken(block, seed=1)
    for factor, wanted in zip(block.equivalents, same.equivalents, strict=True):
        for key, parameter in factor.parameters.items():
            parameter.copy_(wanted.parameters[key])
    tensors, record = pack([block])
    (other,) = unpack(job, {n: t.detach().clone() for n, t in tensors.items()}, record)
    wanted_layers = {n: layer.hardened().qtensor for n, layer in same.layers.items()}
    for found in (block.hardened(), other.hardened()):
        assert_same(found.module, same.module)
        for name, layer in found.layers.items():
            assert torch.equal(layer.qtensor.codes, wanted_layers[name].codes)
