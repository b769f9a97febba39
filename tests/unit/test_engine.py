"""What the loop remembers of a layer's input, how it plans, folds and keeps its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_config, tiny_folder, tiny_model
from torch import Tensor, nn

from crossbit.engine.observe import GroupState, Point, attach, make_states
from crossbit.engine.plan import make_plan
from crossbit.engine.scale import apply_transforms
from crossbit.engine.solve import solve_block
from crossbit.engine.statistics import MASSIVE_RATIO, InputStatistics
from crossbit.errors import InputError
from crossbit.grid import Grid
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.structure import InputGroup, ModelStructure, NormSource
from crossbit.recipe import Recipe
from crossbit.transforms.cross_fold import cross_factor

TOKENS, COLUMNS = 60, 12


def activations(tokens: int = TOKENS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Channels of different sizes; values that bfloat16 holds, so that products are exact."""
    rng = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(columns, generator=rng))
    return (torch.randn(tokens, columns, generator=rng) * spread).bfloat16().float()


def filled(x: Tensor, parts: int = 3, **options: Any) -> InputStatistics:
    stats = InputStatistics(x.shape[1], tokens=x.shape[0], **options)
    for part in x.tensor_split(parts):
        stats.add(part)
    return stats


# -- column maxima --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("percentile", [100.0, 99.0, 95.0, 90.0, 60.0])
def test_column_maximum_is_a_percentile(percentile: float, parts: int) -> None:
    """The smallest value that at least ``percentile`` % of the tokens do not exceed, or less."""
    x = activations()
    c = filled(x, parts, percentile=percentile).column_maximum()
    above = (x.abs() > c).sum(0)
    allowed = (1 - percentile / 100) * TOKENS
    assert bool((above <= allowed + 1e-6).all())
    # One rank at most from torch's quantile, which interpolates.
    rank = 1 / TOKENS
    low = torch.quantile(x.abs(), max(0.0, percentile / 100 - rank), dim=0, interpolation="lower")
    high = torch.quantile(x.abs(), min(1.0, percentile / 100 + rank), dim=0, interpolation="higher")
    assert bool((c >= low).all())
    assert bool((c <= high).all())
    assert bool((x.abs() == c).any(0).all())  # a value that was seen
    if percentile == 100.0:
        assert torch.equal(c, x.abs().amax(0))


def test_a_batch_axis_changes_nothing() -> None:
    x = activations()
    flat, deep = filled(x, 1, hessian=True), InputStatistics(COLUMNS, tokens=TOKENS, hessian=True)
    deep.add(x.reshape(4, 15, COLUMNS))
    assert torch.equal(flat.column_maximum(), deep.column_maximum())
    assert torch.equal(flat.column_mean(), deep.column_mean())
    assert torch.equal(flat.hessian_matrix(), deep.hessian_matrix())
    assert flat.tokens == deep.tokens == TOKENS


def with_massive(rows: tuple[int, ...]) -> Tensor:
    x = activations()
    x[list(rows), 3] = 4 * MASSIVE_RATIO * float(x.abs().amax())
    return x


@pytest.mark.parametrize("percentile", [100.0, 95.0])
def test_massive_tokens_are_left_out_on_request(percentile: float) -> None:
    rows = (5, 31, 59)
    x = with_massive(rows)
    stats = filled(x, percentile=percentile)
    assert stats.massive_tokens == len(rows)
    kept = torch.tensor([i for i in range(TOKENS) if i not in rows])
    ordinary = x[kept].abs()
    c = stats.column_maximum(skip_massive=True)
    if percentile == 100.0:
        assert torch.equal(stats.column_maximum(), x.abs().amax(0))
        assert torch.equal(c, ordinary.amax(0))
    assert bool((c <= ordinary.amax(0)).all())
    assert bool((c >= torch.quantile(ordinary, 0.9, dim=0)).all())


def test_a_large_channel_is_not_a_massive_token() -> None:
    x = activations()
    x[:, 3] *= 1000
    stats = filled(x)
    assert stats.massive_tokens == 0
    assert torch.equal(stats.column_maximum(skip_massive=True), x.abs().amax(0))


def test_means_sample_and_tokens() -> None:
    x = with_massive((7,))
    stats = filled(x, hessian=True)
    torch.testing.assert_close(stats.column_mean(), x.abs().double().mean(0).float())
    assert stats.sample.shape == (0, COLUMNS)
    stats.add_sample(x[:20].reshape(2, 10, COLUMNS))
    stats.add_sample(x[20:30])
    kept = torch.tensor([i for i in range(30) if i != 7])
    assert torch.equal(stats.sample, x[kept])
    assert stats.tokens == TOKENS


def test_nothing_seen() -> None:
    stats = InputStatistics(COLUMNS, percentile=90, tokens=100)
    stats.add(torch.zeros(0, COLUMNS))
    assert stats.tokens == 0
    assert torch.equal(stats.column_maximum(), torch.zeros(COLUMNS))
    assert torch.equal(stats.column_mean(), torch.zeros(COLUMNS))


# -- the Hessian ----------------------------------------------------------------------------------


def test_the_hessian_is_the_mean_over_all_tokens() -> None:
    """Held-out tokens count for it, and for nothing else."""
    x, held = activations(), activations(20, seed=1)
    stats = filled(x, hessian=True)
    maxima = stats.column_maximum()
    stats.add_hessian_only(held.reshape(2, 10, COLUMNS))
    every = torch.cat((x, held)).double()
    torch.testing.assert_close(
        stats.hessian_matrix().double(), every.T @ every / 80, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(stats.column_maximum(), maxima)
    assert stats.tokens == TOKENS


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3), st.sampled_from([100.0, 90.0]))
def test_rescaled_statistics_are_those_of_the_rescaled_input(
    seeds: list[int], percentile: float
) -> None:
    """After any number of folds, in closed form: maxima, means, sample and Hessian of X / f."""
    x = with_massive((11,))
    stats = filled(x, percentile=percentile, hessian=True)
    stats.add_sample(x)
    divided = x.double()
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        f = torch.exp2(torch.randint(-4, 5, (COLUMNS,), generator=rng).double())
        stats.rescale(f)
        divided = divided / f
    after = divided.float()
    fresh = InputStatistics(COLUMNS, percentile=percentile, tokens=TOKENS, hessian=True)
    fresh.add(after)
    # Factors of 2 divide exactly: no tolerance.
    assert torch.equal(stats.column_maximum(), fresh.column_maximum())
    kept = torch.tensor([i for i in range(TOKENS) if i != 11])
    assert torch.equal(stats.sample, after[kept])
    torch.testing.assert_close(stats.column_mean(), fresh.column_mean())
    torch.testing.assert_close(
        stats.hessian_matrix().double(), divided.T @ divided / TOKENS, rtol=1e-5, atol=1e-4
    )
    assert torch.equal(stats.hessian_matrix(), stats.hessian_matrix().T)


def test_shifted_statistics_are_those_of_the_shifted_input() -> None:
    """Between folds: the Hessian in closed form, maxima and means of the sample."""
    x, held = with_massive((11,)) + 3, activations(20, seed=1) + 3
    stats = filled(x, hessian=True, centres=True)
    stats.add_hessian_only(held)
    stats.add_sample(held)
    every = torch.cat((x, held)).double()
    for seed in (0, 1):
        rng = torch.Generator().manual_seed(seed)
        factor = torch.exp2(torch.randint(-2, 3, (COLUMNS,), generator=rng).double())
        shift = torch.randn(COLUMNS, generator=rng).bfloat16()
        stats.rescale(factor)
        stats.shift(shift)
        every, held = every / factor - shift, held / factor.float() - shift
    found = stats.hessian_matrix()
    wanted = every.T @ every / every.shape[0]
    spread = wanted.diagonal().sqrt()
    error = (found.double() - wanted) / torch.outer(spread, spread)
    assert float(error.abs().max()) < 1e-4
    assert torch.equal(found, found.T)
    torch.testing.assert_close(stats.sample, held)
    assert torch.equal(stats.column_maximum(), stats.sample.abs().amax(0))
    torch.testing.assert_close(stats.column_mean(), held.abs().mean(0))
    assert stats.fitting.shape == (0, COLUMNS)


def test_which_tokens_are_massive_does_not_depend_on_folds() -> None:
    x = with_massive((11,))
    stats = filled(x)
    f = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.1
    stats.rescale(f)
    kept = torch.tensor([i for i in range(TOKENS) if i != 11])
    torch.testing.assert_close(stats.column_maximum(skip_massive=True), (x[kept] / f).abs().amax(0))


# -- groups and points ----------------------------------------------------------------------------


def group_state(*parts: Tensor) -> GroupState:
    group = InputGroup("g", ("a",), COLUMNS, NormSource("norm", 0, False))
    points = []
    for part in parts:
        stats = filled(part, 1)
        stats.add_sample(part)
        points.append(Point(("a",), stats))
    return GroupState(group, points)


def test_a_group_of_several_points_sees_all_their_tokens() -> None:
    one, other, empty = activations(), activations(15, seed=1) * 3, torch.zeros(0, COLUMNS)
    state = group_state(one, other, empty)
    every = torch.cat((one, other)).abs()
    assert torch.equal(state.column_maximum(skip_massive=False), every.amax(0))
    torch.testing.assert_close(state.column_mean(), every.mean(0))
    rows = state.sample(1000)
    assert torch.equal(rows, torch.cat((one, other)))
    few = state.sample(10)
    assert few.shape == (10, COLUMNS)
    assert torch.equal(few[0], rows[0])
    assert torch.equal(few[-1], rows[-1])
    state.rescale(torch.full((COLUMNS,), 2.0))
    assert torch.equal(state.column_maximum(skip_massive=False), every.amax(0) / 2)


def opened(folder: Path) -> tuple[Shell, Checkpoint, ModelStructure]:
    checkpoint = Checkpoint(folder)
    shell = Shell(open_config(folder))
    return shell, checkpoint, shell.structure


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_hooks_see_what_the_layers_read(family: str, tmp_path: Path) -> None:
    shell, checkpoint, structure = opened(tiny_folder(tmp_path / "m", family))
    shell.load_outside(checkpoint, torch.float32)
    block = shell.load_block(0, checkpoint, torch.float32)
    states = make_states(
        structure.blocks[0], percentile=100.0, tokens=64, ranges=True, hessian=lambda _: False
    )
    names = [n for state in states for p in state.points for n in p.consumers]
    assert sorted(names) == sorted(structure.blocks[0].linears)
    seen: dict[str, list[Tensor]] = {n: [] for n in names}
    hooks = [
        block.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen[n].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for n in names
    ]
    hidden = shell.embed(torch.arange(64).reshape(2, 32))
    kwargs = shell.block_kwargs(32, torch.float32)[0]
    handles = attach(block, states, lambda stats, x: stats.add(x))
    with torch.no_grad():
        shell.run_block(0, hidden, kwargs)
    for handle in (*handles, *hooks):
        handle.remove()
    reached = 0
    for state in states:
        for point in state.points:
            for name in point.consumers:
                rows = torch.cat(seen[name]) if seen[name] else torch.zeros(0, state.group.width)
                assert rows.shape[0] == point.statistics.tokens
                if rows.shape[0]:
                    reached += 1
                    assert torch.equal(point.statistics.column_maximum(), rows.abs().amax(0))
    assert reached >= 4
    before = [p.statistics.tokens for s in states for p in s.points]
    with torch.no_grad():
        shell.run_block(0, hidden, kwargs)  # hooks are gone
    assert before == [p.statistics.tokens for s in states for p in s.points]


# -- folding with statistics ----------------------------------------------------------------------


def test_transforms_fold_what_they_choose(tmp_path: Path) -> None:
    """Two transforms in a row: the second sees the statistics of the input the first left."""
    shell, checkpoint, structure = opened(tiny_folder(tmp_path / "m", "llama"))
    shell.load_outside(checkpoint, torch.float32)
    recipe = Recipe.parse(
        {
            "weights": {"bits": 8},
            "activations": {"kind": "cross_folded"},
            "transforms": [
                {"kind": "cross_fold", "alpha": 0.5},
                {"kind": "cross_fold", "alpha": 0.5, "skip_massive": False},
            ],
            "ignore": ["down_proj"],
        },
        "mine",
    )
    plan = make_plan(structure, recipe, 64).blocks[0]
    block = shell.load_block(0, checkpoint, torch.float32)
    original = {n: p.clone() for n, p in block.named_parameters()}
    states = make_states(
        structure.blocks[0], percentile=100.0, tokens=64, ranges=True, hessian=lambda _: True
    )
    hidden = shell.embed(torch.arange(64).reshape(2, 32))
    kwargs = shell.block_kwargs(32, torch.float32)[0]

    def both(stats: InputStatistics, x: Tensor) -> None:
        stats.add(x)
        stats.add_sample(x)

    handles = attach(block, states, both)
    with torch.no_grad():
        before = shell.run_block(0, hidden, kwargs)
    for handle in handles:
        handle.remove()
    first = {s.group.name: s.column_maximum(skip_massive=True) for s in states}
    with torch.no_grad():
        records = apply_transforms(block, plan, states, recipe.folds, torch.float32)
        after = shell.run_block(0, hidden, kwargs)
    assert float((after - before).norm() / before.norm()) < 1e-5
    folded = [r["group"] for r in records]
    assert folded == 2 * folded[: len(folded) // 2]
    assert all(r["chosen"] == 0.5 for r in records)
    # c^(1/2) twice is c^(3/4): what is left of the maxima is c^(1/4).
    norm_group = next(s for s in states if isinstance(s.group.source, NormSource))
    c = first[norm_group.group.name]
    left = norm_group.column_maximum(skip_massive=True)
    torch.testing.assert_close(left / left[0], (c / c[0]) ** 0.25, rtol=1e-3, atol=1e-5)
    ratio = original["input_layernorm.weight"] / block.get_parameter("input_layernorm.weight")
    f = cross_factor(c, 0.25)
    torch.testing.assert_close(ratio / ratio[0], f / f[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(
        original["mlp.down_proj.weight"], block.get_parameter("mlp.down_proj.weight")
    )
    # The statistics are those of a fresh run of the folded block.
    fresh = make_states(
        structure.blocks[0], percentile=100.0, tokens=64, ranges=True, hessian=lambda _: True
    )
    handles = attach(block, fresh, both)
    with torch.no_grad():
        shell.run_block(0, hidden, kwargs)
    for handle in handles:
        handle.remove()
    for state, again in zip(states, fresh, strict=True):
        torch.testing.assert_close(
            state.column_maximum(skip_massive=False),
            again.column_maximum(skip_massive=False),
            rtol=1e-4,
            atol=1e-5,
        )
        one = state.points[0].statistics.hessian_matrix()
        other = again.points[0].statistics.hessian_matrix()
        assert (
            float((one - other).norm() / other.norm()) < 5e-3
        )  # products in bfloat16 on some machines


# -- plans ----------------------------------------------------------------------------------------


def plan_of(family: str = "llama", **data: Any) -> Any:
    shell = Shell(tiny_config(family, tied=False))
    recipe = Recipe.parse({"weights": {"group": 16}, **data}, "mine")
    return make_plan(shell.structure, recipe, 64)


def test_plans_count_every_layer() -> None:
    plan = plan_of(ignore=["model.layers.1", "v_proj"])
    assert plan.quantized == 21 - 7 - 2
    assert len(plan.ignored) == 9
    assert not plan.blocks[1].layers
    assert plan.embedding == plan.head == Grid(8)
    assert all(layer.weights.signed for block in plan.blocks for layer in block.layers.values())
    plan = plan_of(ignore=["lm_head"], embedding=None)
    assert plan.embedding is None
    assert plan.head is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ignore": ["nothing.like.it"]}, "'nothing.like.it' matches no linear layer"),
        ({"overrides": [{"match": "q_prj", "weights": {"bits": 8}}]}, "'q_prj' matches no"),
        ({"ignore": ["*"]}, "every linear layer is ignored"),
        ({"weights": {"group": 48}}, "48 does not divide 64.*16, 32, 64"),
        (
            {
                "activations": {"kind": "per_token"},
                "overrides": [{"match": "q_proj", "activations": "none"}],
            },
            "read the same input",
        ),
    ],
)
def test_plans_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(**data)


def test_experts_have_float_inputs_and_float32_scales() -> None:
    plan = plan_of("mixtral", activations={"kind": "per_token"})
    layers = plan.blocks[0].layers
    expert = layers["mlp.experts.0.gate_proj"]
    assert expert.activations is None
    assert expert.weights.scale_dtype == torch.float32
    assert layers["self_attn.q_proj"].activations is not None
    assert layers["self_attn.q_proj"].weights.scale_dtype == torch.bfloat16


# -- solving --------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        model = tiny_model("llama", dtype=torch.float32)
        self.self_attn = model.model.layers[0].self_attn
        self.mlp = model.model.layers[0].mlp


@pytest.mark.parametrize(
    "solver", [{"kind": "rtn"}, {"kind": "gptq"}, {"kind": "rtn", "clip": "awq"}]
)
def test_errors_are_what_they_say(solver: dict[str, Any]) -> None:
    """Relative squared errors of weight and output, against the definition."""
    plan = plan_of(solver=solver).blocks[0]
    block = Pair().requires_grad_(False)
    states = make_states(
        plan.structure,
        percentile=100.0,
        tokens=200,
        ranges=True,
        hessian=lambda _: solver["kind"] == "gptq",
    )
    inputs = {s.group.name: activations(200, s.group.width) for s in states}
    for state in states:
        x = inputs[state.group.name]
        state.points[0].statistics.add(x)
        state.points[0].statistics.add_sample(x)
    for name, solved in solve_block(block, plan, states).items():
        x = inputs[plan.structure.group_of(name).name].double()
        weight = block.get_parameter(f"{name}.weight").double()
        difference = weight - solved.qtensor.dequantize().double()
        wanted = float(difference.square().sum() / weight.square().sum())
        assert solved.weight_error == pytest.approx(wanted, rel=1e-3)
        if solved.output_error is not None:
            output = float((x @ difference.T).square().sum() / (x @ weight.T).square().sum())
            assert solved.output_error == pytest.approx(output, rel=2e-2)
            assert 0 < solved.output_error < 0.1
        assert solver["kind"] in solved.solver


def test_an_unreached_layer_is_rounded_and_says_so() -> None:
    plan = plan_of(solver={"kind": "gptq"}).blocks[0]
    solved = solve_block(Pair().requires_grad_(False), plan, [])
    assert set(solved) == set(plan.layers)
    for result in solved.values():
        assert "no calibration token" in result.note
        assert result.output_error is None


def test_static_maximum_follows_a_fold() -> None:
    """A per-tensor scale must be that of the folded input."""
    x = torch.tensor([[4.0, -1.0], [2.0, 0.5]])
    factor = torch.tensor([4.0, 0.5])
    stats = InputStatistics(2)
    stats.add(x)
    stats.rescale(factor)
    assert stats.absolute_maximum == float((x / factor).abs().max()) == 2.0


def test_percentile_with_fewer_tokens_than_kept() -> None:
    """An expert that few tokens reach still has maxima."""
    stats = InputStatistics(3, percentile=95.0, tokens=100)
    x = torch.arange(1.0, 16.0).reshape(5, 3)
    stats.add(x)
    assert torch.equal(stats.column_maximum(), x.amax(0))
