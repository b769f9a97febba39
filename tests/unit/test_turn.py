"""Rotated inputs (DuQuant) in a block: statistics, folds, what turns the input at run time."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.opened import (
    entering,
    float_block,
    kwargs_of,
    open_rounded,
    run_block,
    tiny_job,
    token_error,
)
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.engine.job import Job
from crossbit.engine.observe import GroupState, Point, attach, make_states
from crossbit.engine.opening import OpenBlock
from crossbit.engine.plan import BlockPlan, LayerPlan
from crossbit.engine.statistics import MASSIVE_RATIO, InputStatistics
from crossbit.engine.trained import TrainedBlock, make_trainable, materialised
from crossbit.engine.turn import turn_inputs
from crossbit.grid import Grid
from crossbit.models.structure import BlockStructure, InputGroup, LinearInfo
from crossbit.recipe import Activations, DuQuant, Rtn
from crossbit.rotations.duquant import DuRotation, choose_rotation
from crossbit.rotations.hadamard import apply_hadamard
from crossbit.runtime.install import QuantizedLayer, TurnedInput, install, shared_turns
from crossbit.runtime.online import HadamardInput, turn_input
from crossbit.solvers.rtn import rtn

CONFIG = DuQuant(block=16, steps=8)
A4 = {"bits": 4, "kind": "per_token"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Channels of different sizes, one much larger than the others."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng) * torch.exp(torch.randn(shape[-1], generator=rng))
    x[..., 3] *= 20
    return x


def a_rotation(width: int, seed: int = 0, block: int = 16) -> DuRotation:
    return choose_rotation(draw(64, width, seed=seed), block=block, steps=8).to(
        "cpu", torch.float32
    )


# -- statistics -----------------------------------------------------------------------------------


def filled(x: Tensor, held: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], tokens=x.shape[0], hessian=True)
    for part in x.tensor_split(3):
        statistics.add(part)
    statistics.add_fitting(x)
    for part in held.tensor_split(2):
        statistics.add_hessian_only(part)
        statistics.add_sample(part)
    return statistics


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_statistics_are_those_of_rotated_inputs(factor: float | None, known: bool) -> None:
    x, held, rotation = draw(90, 32), draw(40, 32, seed=1), a_rotation(32)
    statistics = filled(x, held)
    if known:
        statistics.hessian_matrix()
    if factor is not None:  # a fold before the rotation
        f = factor ** torch.linspace(-1, 1, 32)
        statistics.rescale(f)
        x, held = x / f, held / f
    statistics.rotate(rotation)
    wanted = filled(rotation.apply(x), rotation.apply(held))
    found = statistics.hessian_matrix()
    assert float((found - wanted.hessian_matrix()).abs().max()) < 1e-5 * float(found.abs().max())
    torch.testing.assert_close(found, found.t(), rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    torch.testing.assert_close(statistics.sample, wanted.sample, rtol=1e-5, atol=1e-4)
    assert statistics.tokens == wanted.tokens
    # Of the rest only the sample tells.
    sample = statistics.sample.abs()
    assert torch.equal(statistics.column_maximum(), sample.amax(0))
    assert torch.equal(statistics.column_maximum(skip_massive=True), sample.amax(0))
    assert statistics.absolute_maximum == float(sample.max())
    torch.testing.assert_close(statistics.column_mean(), sample.mean(0))
    assert statistics.fitting.shape == (0, 32)


def test_statistics_without_a_hessian_or_tokens_rotate() -> None:
    rotation = a_rotation(32)
    plain = InputStatistics(32, tokens=10)
    plain.add_sample(draw(10, 32))
    plain.rotate(rotation)
    torch.testing.assert_close(plain.sample, rotation.apply(draw(10, 32)))
    empty = InputStatistics(32, hessian=True)
    empty.rotate(rotation)
    assert empty.sample.shape == (0, 32)
    assert torch.equal(empty.column_maximum(), torch.zeros(32))


# -- the fold -------------------------------------------------------------------------------------


class Two(nn.Module):
    """Layers a and b that read one input, c that reads another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, columns in (("a", width), ("b", width), ("c", 12)):
            linear = nn.Linear(columns, 8, bias=False).requires_grad_(False)
            linear.weight.copy_(torch.randn(8, columns, generator=rng))
            self.add_module(name, linear)


def plan_of(
    width: int, *, planned: str = "abc", activations: dict[str, Any] | None = A4
) -> BlockPlan:
    linears = {n: LinearInfo(n, n, width if n in "ab" else 12, 8, False) for n in "abc"}
    groups = [InputGroup("ab", ("a", "b"), width, None), InputGroup("c", ("c",), 12, None)]
    config = None if activations is None else Activations(**activations)
    grid = None if config is None else config.grid()
    layers = {n: LayerPlan(linears[n], Grid(8), grid, config, Rtn()) for n in planned}
    return BlockPlan(BlockStructure("block", linears, groups), layers)


def states_of(plan: BlockPlan, inputs: dict[str, Tensor]) -> list[GroupState]:
    states = []
    for group in plan.structure.groups:
        x = inputs[group.name]
        statistics = InputStatistics(group.width, tokens=x.shape[0], hessian=True)
        statistics.add(x)
        statistics.add_sample(x)
        states.append(GroupState(group, [Point(group.consumers, statistics)]))
    return states


@pytest.mark.parametrize(
    ("width", "wanted", "size"),
    [
        (64, 16, 16),
        (64, 128, 64),
        (36, 16, 18),
        (35, 16, 7),
        (48, 32, 48),
    ],
)
def test_the_product_stays(width: int, wanted: int, size: int) -> None:
    block, plan = Two(width), plan_of(width)
    inputs = {"ab": draw(50, width), "c": draw(50, 12, seed=1)}
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    states = states_of(plan, inputs)
    records, rotations = turn_inputs(block, plan, states, DuQuant(block=wanted, steps=8))
    assert rotations.keys() == {"a", "b", "c"}
    assert rotations["a"] is rotations["b"]
    assert rotations["a"].first.dtype == torch.float32
    assert [record["group"] for record in records] == ["ab", "c"]
    assert records[0]["block"] == rotations["a"].block == size
    assert records[0]["kind"] == "duquant"
    assert records[0]["peak_after"] < records[0]["peak_before"]
    for name, group in (("a", "ab"), ("b", "ab"), ("c", "c")):
        weight = block.get_submodule(name).get_parameter("weight")
        old = before[f"{name}.weight"]
        assert not torch.equal(weight, old)
        x = inputs[group].double()
        found = rotations[name].apply(x) @ weight.double().t()
        torch.testing.assert_close(found, x @ old.double().t(), rtol=1e-5, atol=1e-4)
    sample = states[0].points[0].statistics.sample
    torch.testing.assert_close(sample, rotations["a"].apply(inputs["ab"]))


@pytest.mark.parametrize(
    ("floats", "planned", "wanted"),
    [("abc", "abc", "abc"), ("c", "abc", "ab"), ("abc", "c", "c"), ("", "ab", "ab")],
)
def test_float_inputs_are_rotated_where_all_are(floats: str, planned: str, wanted: str) -> None:
    """A block of which no input is quantized has weights to rotate for."""
    plan = plan_of(32, planned=planned)
    for name in set(floats) & set(planned):
        layer = replace(plan.layers[name], activations=None, activation_config=None)
        plan.layers[name] = layer
    inputs = {"ab": draw(50, 32), "c": draw(50, 12)}
    _, rotations = turn_inputs(Two(32), plan, states_of(plan, inputs), CONFIG)
    assert rotations.keys() == set(wanted)


def test_what_cannot_be_rotated_is_said() -> None:
    inputs = {"ab": draw(50, 32), "c": torch.zeros(0, 12)}
    plan, block = plan_of(32, planned="ac"), Two(32)
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    records, rotations = turn_inputs(block, plan, states_of(plan, inputs), CONFIG)
    assert rotations == {}
    assert {r["group"]: r["skipped"] for r in records} == {
        "ab": "b, which is not quantized, reads it too",
        "c": "no calibration token reached it",
    }
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())


def test_a_width_without_a_block_size_is_left_as_it_is() -> None:
    plan, block = plan_of(67), Two(67)
    inputs = {"ab": draw(50, 67), "c": draw(50, 12)}
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    records, rotations = turn_inputs(block, plan, states_of(plan, inputs), CONFIG)
    assert rotations.keys() == {"c"}
    assert records[0]["skipped"].startswith("67 channels cannot be split into rotation blocks")
    assert "skipped" not in records[1]
    changed = {n for n, p in block.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"c.weight"}


def test_inputs_of_float_layers_are_left_alone() -> None:
    plan = plan_of(32, planned="")
    inputs = {"ab": draw(50, 32), "c": draw(50, 12)}
    assert turn_inputs(Two(32), plan, states_of(plan, inputs), CONFIG) == ([], {})


def test_settings_of_the_recipe_reach_the_rotation() -> None:
    plan, inputs = plan_of(64), {"ab": draw(50, 64), "c": draw(50, 12)}

    def made(**settings: Any) -> DuRotation:
        config = DuQuant(**{"block": 16, "steps": 8, **settings})
        return turn_inputs(Two(64), plan, states_of(plan, inputs), config)[1]["a"]

    base = made()
    assert torch.equal(made().first, base.first)
    assert not torch.equal(made(seed=1).first, base.first)
    assert made(shared=False).first.shape == (4, 16, 16)
    assert torch.equal(made(permute=False).permutation, torch.arange(64))
    assert not torch.equal(base.permutation, torch.arange(64))
    assert not torch.equal(made(steps=1).second, base.second)


def test_massive_tokens_do_not_make_it() -> None:
    """They are in no sample, and have a scale of their own."""
    x = draw(50, 32)
    x[7] *= 100 * MASSIVE_RATIO
    plan = plan_of(32)
    with_it, without = (
        turn_inputs(Two(32), plan, states_of(plan, {"ab": rows, "c": draw(50, 12)}), CONFIG)[1]["a"]
        for rows in (x, torch.cat((x[:7], x[8:])))
    )
    assert torch.equal(with_it.first, without.first)


# -- at run time ----------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that are rotated in the test."""
    seen: list[torch.Size] = []
    apply = DuRotation.apply

    def counted(self: DuRotation, x: Tensor) -> Tensor:
        seen.append(x.shape)
        return apply(self, x)

    monkeypatch.setattr(DuRotation, "apply", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_turned_input_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    rotation = a_rotation(64)
    x = draw(2, 5, 64).to(dtype)
    found = TurnedInput(rotation)(x)
    assert found.dtype == dtype
    wide = rotation.to("cpu", torch.float64).apply(x.double())
    torch.testing.assert_close(
        found.double(),
        wide,
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-5 if dtype.itemsize > 2 else 0,
    )


def test_a_turned_input_is_made_once(products: list[torch.Size]) -> None:
    turned, x = TurnedInput(a_rotation(64)), draw(5, 64)
    with torch.no_grad():
        first = turned(x)
        assert turned(x) is first
        assert len(products) == 1
        x.add_(1)
        assert not torch.equal(turned(x), first)  # another input in the same memory
        again = turned(x.clone())
    assert torch.equal(again, turned(x))
    # What was made without a graph has no gradient to give.
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        turned(leaf)
    with torch.enable_grad():
        assert turned(leaf).requires_grad
        assert turned(leaf) is turned(leaf)


def test_a_copy_of_a_turned_input_has_a_memory_of_its_own() -> None:
    turned, x = TurnedInput(a_rotation(64)), draw(5, 64)
    with torch.no_grad():
        known = turned(x)
        other = copy.deepcopy(turned)(x)
    assert other is not known
    assert torch.equal(other, known)


def test_groups_share_what_turns_their_input() -> None:
    structure = tiny_job("llama").plan.blocks[0].structure
    grid = Grid(8)
    layers = {
        name: QuantizedLayer(
            rtn(draw(info.out_features, info.in_features), grid),
            None,
            rotation=None if info.role == "down_proj" else a_rotation(info.in_features),
        )
        for name, info in structure.linears.items()
    }
    turns = shared_turns(structure, layers)
    assert turns.keys() == structure.linears.keys() - {"mlp.down_proj"}
    assert len({id(turn) for turn in turns.values()}) == 3
    for group in structure.groups[:3]:
        assert len({id(turns[name]) for name in group.consumers}) == 1


def turned_block(job: Job, index: int = 0) -> OpenBlock:
    """A block with weights and inputs rotated as a run does it."""
    plan, hidden = job.plan.blocks[index], entering(job)
    opened = open_rounded(job, index)
    states = make_states(
        plan.structure, percentile=100, tokens=64, ranges=False, hessian=lambda _: False
    )
    handles = attach(opened.module, states, lambda stats, x: stats.add_sample(x))
    with torch.no_grad():
        run_block(opened.module, hidden, kwargs_of(job, index))
    for handle in handles:
        handle.remove()
    _, rotations = turn_inputs(opened.module, plan, states, CONFIG)
    for name, rotation in rotations.items():
        weight = opened.module.get_submodule(name).get_parameter("weight").detach()
        opened.starts[name] = weight
        grid = plan.layers[name].weights
        opened.layers[name] = replace(
            opened.layers[name], qtensor=rtn(weight, grid), rotation=rotation
        )
    return opened


def trained(job: Job) -> TrainedBlock:
    kwargs = kwargs_of(job, 0)
    return make_trainable(0, turned_block(job), job.plan.blocks[0], kwargs, job.dtype, 0)


TURNED: dict[str, Any] = {"activations": A4, "transforms": [{"kind": "duquant"}]}


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_a_trained_block_computes_what_the_float_block_does(
    family: str, products: list[torch.Size]
) -> None:
    """Without rounding, its gradient included; one product an input."""
    job = tiny_job(family, **TURNED)
    hidden = entering(job)
    float_input, own_input = (hidden.clone().requires_grad_() for _ in range(2))
    with torch.enable_grad():
        wanted = run_block(float_block(job, 0), float_input, kwargs_of(job, 0))
        wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    block = trained(job)
    for layer in block.layers.values():
        layer.activations = None
    with materialised([block], job.dtype, grad=True):
        for layer in block.layers.values():
            layer.weight = layer.state.weight.clone().requires_grad_()
        products.clear()
        with torch.enable_grad():
            found = block.run(own_input)
            found.square().sum().backward()  # type: ignore[no-untyped-call]
        assert len(products) == 4
        assert all(layer.weight.grad is not None for layer in block.layers.values())  # type: ignore[union-attr]
        products.clear()
        with torch.no_grad():
            block.run(own_input)
        assert len(products) == 4
    assert token_error(found, wanted) < 1e-5
    assert float_input.grad is not None
    assert own_input.grad is not None
    assert token_error(own_input.grad, float_input.grad) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_installed_block_turns_each_input_once(family: str, products: list[torch.Size]) -> None:
    """Whatever stood in the layers' place before: what it was trained as, or the float layers."""
    job = tiny_job(family, **TURNED, weights={"bits": 8, "scale_dtype": "float32"})
    hidden, structure = entering(job), job.plan.blocks[0].structure
    outputs = []
    block = trained(job)
    with torch.no_grad(), materialised([block], job.dtype):
        outputs.append(block.run(hidden))
    for opened in (block.hardened(), turned_block(job)):
        install(opened.module, structure, opened.layers, job.dtype, "fake")
        products.clear()
        with torch.no_grad():
            outputs.append(run_block(opened.module, hidden, kwargs_of(job, 0)))
        assert len(products) == 4
    # In the place of quantized layers, too.
    install(opened.module, structure, opened.layers, job.dtype, "fake")
    with torch.no_grad():
        assert torch.equal(run_block(opened.module, hidden, kwargs_of(job, 0)), outputs[-1])
    wanted = run_block(float_block(job, 0), hidden, kwargs_of(job, 0))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
    error = (outputs[0] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.median()) < 0.2  # 4 bits of the inputs


def test_what_turns_a_place_comes_before_what_turns_a_layer() -> None:
    """A Hadamard transform of the place, then the layer's rotation: both once, in that order."""
    job = tiny_job("mistral", **TURNED)
    opened = turned_block(job)
    name, width = "mlp.down_proj", 128
    turn_input(opened.module.get_submodule(name), HadamardInput(64))
    rotation = opened.layers[name].rotation
    assert rotation is not None
    block = make_trainable(0, opened, job.plan.blocks[0], kwargs_of(job, 0), job.dtype, 0)
    x = draw(5, width)
    wanted = rotation.apply(apply_hadamard(x, block=64))
    layer = block.layers[name]
    layer.activations = None
    with torch.no_grad(), materialised([block], job.dtype):
        layer.weight = torch.eye(width)
        torch.testing.assert_close(layer(x), wanted)
    hardened = block.hardened()
    eye = rtn(torch.eye(width), Grid(8, scale_dtype=torch.float32))
    hardened.layers[name] = QuantizedLayer(eye, None, rotation=rotation)
    install(hardened.module, job.plan.blocks[0].structure, hardened.layers, job.dtype)
    installed = hardened.module.get_submodule(name)
    with torch.no_grad():
        found = installed(x)
    torch.testing.assert_close(found, wanted @ eye.dequantize().t())


def test_layers_round_what_was_turned() -> None:
    """The grid's row maxima are those of X G."""
    job = tiny_job("llama", **TURNED)
    opened = turned_block(job)
    name = "mlp.down_proj"
    rotation = opened.layers[name].rotation
    assert rotation is not None
    install(opened.module, job.plan.blocks[0].structure, opened.layers, job.dtype, "fake")
    x = draw(5, 128)
    with torch.no_grad():
        found = opened.module.get_submodule(name)(x)
    turned = rotation.apply(x)
    scale = turned.abs().amax(1, keepdim=True) / ActivationGrid(4).effective_divisor
    rounded = (turned / scale).round().clamp(-8, 7) * scale
    bias = opened.module.get_submodule(name).bias
    assert isinstance(bias, Tensor)
    wanted = rounded @ opened.layers[name].qtensor.dequantize().t() + bias
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
