"""CFP: the detection's laws, what truncation and scaling may touch, and its place in the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import (
    logits_float64,
    sample_ids,
    tiny_folder,
    tiny_model,
)
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.engine.observe import attach, make_states
from crossbit.engine.plan import BlockPlan, make_plan
from crossbit.engine.scale import apply_transforms
from crossbit.engine.statistics import InputStatistics
from crossbit.errors import WorkError
from crossbit.grid import Grid
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.structure import discover
from crossbit.recipe import Cfp, Recipe
from crossbit.transforms import cfp
from crossbit.transforms.cfp import best_split, detect, outlier_factor, quartiles, truncate
from crossbit.transforms.fold import fold
from crossbit.transforms.search import Candidate, FoldProblem, search

COLUMNS = 64
magnitudes = st.lists(st.floats(0, 1e4, width=32), max_size=60).map(torch.tensor)
# Whole numbers: sums and scaled values are exact, so that no rounding decides.
whole = st.lists(st.integers(0, 1000), min_size=1, max_size=60).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


def spread_out(count: int, seed: int = 0) -> Tensor:
    """Magnitudes of a uniform bulk in [1, 2), none of which is a candidate."""
    return 1 + torch.rand(count, generator=torch.Generator().manual_seed(seed))


def planted(count: int = COLUMNS) -> Tensor:
    """A bulk, two moderate candidates close together, and two outliers far from them."""
    c = spread_out(count)
    c[3], c[17] = 4.0, 4.1
    c[5], c[40] = 60.0, 100.0
    return c


# -- a slow reference -----------------------------------------------------------------------------


def slow_merit(candidates: list[float], bulk: float, spread: float, reserved: int) -> float:
    """M of one split, by the definition."""
    kept = candidates[:reserved]
    gap = candidates[reserved] - (kept[-1] if kept else bulk)
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    variance = math.fsum((v - mean) ** 2 for v in kept) / len(kept) if kept else 0.0
    return gap * gap - spread * variance


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1.5, 1e4, width=32), min_size=1, max_size=40),
    st.floats(0.1, 1.5, exclude_max=True),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
)
def test_split_is_that_of_the_definition(values: list[float], bulk: float, spread: float) -> None:
    values = sorted(values)
    found = best_split(torch.tensor(values, dtype=torch.float64), bulk, spread)
    merits = [slow_merit(values, bulk, spread, k) for k in range(len(values))]
    # Rounding is relative to the size of the terms, not to their difference.
    allowed = 1e-11 * (values[-1] - bulk) ** 2
    assert merits[found] >= max(merits) - allowed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(11, 60), min_size=1, max_size=12), st.integers(1, 10))
def test_of_equal_splits_the_one_with_fewest_outliers(values: list[int], bulk: int) -> None:
    """Differences of whole numbers tie often."""
    numbers = [float(v) for v in sorted(values)]
    merits = [slow_merit(numbers, bulk, 0.0, k) for k in range(len(numbers))]
    wanted = max(k for k, m in enumerate(merits) if m == max(merits))
    assert best_split(torch.tensor(numbers, dtype=torch.float64), bulk, 0.0) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=50).map(torch.tensor))
def test_quartiles_are_those_of_torch(values: Tensor) -> None:
    wanted = torch.quantile(values.double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert quartiles(values) == pytest.approx(wanted.tolist(), rel=1e-12)


# -- detection ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(30, 300),
    st.lists(st.floats(50, 1000, width=32), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_planted_outliers_are_found(count: int, sizes: list[float], seed: int) -> None:
    """Far above a bulk that has no candidates, with gaps among them smaller than the one below."""
    bulk = spread_out(count, seed)
    outliers = torch.tensor(sizes) % 40 + 50  # in [50, 90): the gap below is the largest
    x = torch.cat((bulk, outliers))
    found = detect(x)
    assert found.outliers == found.candidates == len(sizes)
    assert found.limit == float(bulk.max())


def test_fine_detection_keeps_moderate_candidates() -> None:
    found = detect(planted())
    assert (found.candidates, found.outliers) == (4, 2)
    assert found.limit == pytest.approx(4.1)
    assert 2 < found.threshold < 4


def test_spread_and_fence_have_their_meaning() -> None:
    c = planted()
    assert detect(c, fence=200.0).outliers == 0
    # Reserving 45 pays while the gap to 100 is the larger one; the variance takes that back.
    c[5] = 45.0
    assert detect(c, spread=0.0).outliers == 1
    assert detect(c, spread=100.0).outliers == 2
    assert detect(c, spread=1e6).outliers == 4  # even 4.0 and 4.1 vary too much


@settings(max_examples=150, deadline=None)
@given(magnitudes, st.booleans(), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_decision_survives_permutation_and_powers_of_two(
    x: Tensor, gap: bool, exponent: int, random: Any
) -> None:
    x = x.where(x > 1e-6, 0.0)  # away from underflow
    order = list(range(x.numel()))
    random.shuffle(order)
    found = detect(x, gap=gap)
    assert detect(x[torch.tensor(order, dtype=torch.int64)], gap=gap) == found
    scaled = detect(x * 2.0**exponent, gap=gap)
    assert (scaled.candidates, scaled.outliers) == (found.candidates, found.outliers)
    assert scaled.limit == found.limit * 2.0**exponent
    assert scaled.threshold == found.threshold * 2.0**exponent


@settings(max_examples=150, deadline=None)
@given(whole, st.sampled_from([3.0, 7.0, 10.0, 1000.0, 4099.0]))
def test_decision_survives_scaling(x: Tensor, by: float) -> None:
    found, scaled = detect(x), detect(x * by)
    assert (scaled.candidates, scaled.outliers) == (found.candidates, found.outliers)
    assert scaled.limit == found.limit * by


@pytest.mark.parametrize("by", [0.1, 1 / 3, 1e-20, 1e20, math.pi])
def test_decision_survives_inexact_scaling(by: float) -> None:
    found = detect(planted() * by)
    assert (found.candidates, found.outliers) == (4, 2)
    assert found.limit == pytest.approx(4.1 * by, rel=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0),
        torch.zeros(5),
        torch.tensor([3.0]),
        torch.tensor([0.0, 0.0, 7.0]),  # one magnitude: nothing to compare it with
        torch.full((9,), 2.0),
        spread_out(50),
    ],
)
def test_nothing_stands_out(x: Tensor) -> None:
    found = detect(x)
    assert (found.candidates, found.outliers, found.limit) == (0, 0, math.inf)


@pytest.mark.parametrize("size", [1, 4])
def test_a_lone_candidate_and_equal_ones_are_outliers(size: int) -> None:
    """The reserved set is empty then; the bulk stands in for it."""
    x = torch.cat((spread_out(40), torch.full((size,), 9.0)))
    found = detect(x)
    assert (found.candidates, found.outliers) == (size, size)
    assert found.limit == float(x[:40].max())
    flat = torch.cat((torch.ones(40), torch.full((size,), 9.0)))  # an IQR of 0
    assert detect(flat).outliers == size
    assert detect(flat).limit == 1.0


def test_zeros_take_no_part() -> None:
    """With the quartiles of pruned weights all of what is left would be an outlier."""
    x = planted()
    assert detect(torch.cat((x, torch.zeros(1000)))) == detect(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_magnitudes_are_refused(bad: float) -> None:
    with pytest.raises(WorkError, match="finite and not negative"):
        detect(torch.tensor([1.0, bad]))


def test_more_values_than_torch_quantile_takes() -> None:
    x = torch.linspace(1, 2, (1 << 24) + 9)
    x[123] = 50.0
    found = detect(x)
    assert (found.outliers, found.limit) == (1, 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert detect(planted().to(dtype)).outliers == 2


def test_a_tail_without_gaps_has_no_outliers_where_a_gap_is_asked_for() -> None:
    """M alone calls every candidate of a thinning tail an outlier."""
    quantile = torch.linspace(0.5, 1, 20001, dtype=torch.float64)[:-1]
    tail = torch.special.ndtri(quantile)  # half a normal distribution
    plain, gap = detect(tail), detect(tail, gap=True)
    assert plain.outliers > 0.9 * plain.candidates > 0
    assert (gap.candidates, gap.outliers, gap.limit) == (plain.candidates, 0, math.inf)
    spiked = torch.cat((tail, torch.tensor([20.0, 21.0, -0.0], dtype=torch.float64)))
    assert detect(spiked, gap=True).outliers == 2
    assert truncate(tail.reshape(100, -1)).limit is None
    assert truncate(tail.reshape(100, -1), gap=False).fraction > 0.01


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(11, 200), min_size=1, max_size=30), st.integers(1, 10))
def test_asking_for_a_gap_only_leaves_splits_out(values: list[int], bulk: int) -> None:
    numbers = [float(v) for v in sorted(values)]
    candidates = torch.tensor(numbers, dtype=torch.float64)
    found = best_split(candidates, bulk, 1.0, gap=True)
    below = [bulk, *numbers]
    wide = [
        k
        for k in range(len(numbers))
        if (numbers[k] - below[k]) ** 2 > float(candidates.var(correction=0))
    ]
    assert (found in wide) if wide else found == len(numbers)
    if wide:
        merits = {k: slow_merit(numbers, bulk, 1.0, k) for k in wide}
        assert merits[found] == pytest.approx(max(merits.values()), rel=1e-9, abs=1e-6)


# -- truncation -----------------------------------------------------------------------------------


def outlier_weight(rows: int = 24, columns: int = 32, seed: int = 0) -> Tensor:
    """Uniform magnitudes of random sign in [-2, -1] and [1, 2], three of them made outliers."""
    rng = torch.Generator().manual_seed(seed)
    w = 1 + torch.rand(rows, columns, generator=rng)
    w *= torch.randint(0, 2, w.shape, generator=rng) * 2 - 1
    w[0, 0], w[1, 5], w[7, 9] = 50.0, -60.0, 70.0
    return w


def test_truncation_clamps_outliers_and_keeps_signs() -> None:
    w = outlier_weight()
    result = truncate(w)
    changed = result.weight != w
    assert changed.nonzero().tolist() == [[0, 0], [1, 5], [7, 9]]
    assert result.weight[changed].tolist() == [result.limit, -result.limit, result.limit]  # type: ignore[operator]
    assert result.fraction == 3 / w.numel()
    wanted = (result.weight - w).double().square().sum() / w.double().square().sum()
    assert result.change == pytest.approx(float(wanted), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=48),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_truncation_touches_nothing_below_the_threshold(
    values: list[float], per_channel: bool, gap: bool, dtype: torch.dtype
) -> None:
    w = torch.tensor(values[: len(values) // 4 * 4]).reshape(4, -1).to(dtype)
    before = w.clone()
    result = truncate(w, per_channel=per_channel, gap=gap)
    assert torch.equal(w, before)
    changed = result.weight != w
    assert int(changed.sum()) == round(result.fraction * w.numel())
    assert bool((result.weight.abs() <= w.abs()).all())
    assert bool((result.weight.sign() == w.sign()).all())
    for i, (row, mask) in enumerate(zip(w, changed, strict=True)):
        found = detect(row.abs() if per_channel else w.abs(), gap=gap)
        assert not bool(mask[row.abs().double() <= found.threshold].any()), i
        assert bool((result.weight[i][mask].abs() == found.limit).all())
        assert bool((row[mask].abs() > found.limit).all())
    assert (result.limit is None) == (result.fraction == 0) == (result.change == 0)


def test_weights_without_outliers_are_the_same_tensor() -> None:
    w = spread_out(512).reshape(8, 64)
    for per_channel in (False, True):
        result = truncate(w, per_channel=per_channel)
        assert result.weight is w
        assert (result.fraction, result.change, result.limit) == (0.0, 0.0, None)
    assert truncate(torch.zeros(4, 6)).limit is None


def test_per_channel_sees_what_the_matrix_hides() -> None:
    """A large row is no outlier of its own; a spike in a small row is none of the matrix."""
    w = spread_out(24 * 32).reshape(24, 32) * 0.01
    w[:12] *= 100
    w[20, 3] = 1.5
    assert truncate(w).fraction == 0
    result = truncate(w, per_channel=True)
    assert (result.weight != w).nonzero().tolist() == [[20, 3]]
    assert result.weight[20, 3] == w[20, torch.arange(32) != 3].max()


def test_tiny_and_huge_weights_have_a_change() -> None:
    w = outlier_weight()
    wanted = truncate(w).change
    for by in (2.0**-100, 2.0**100):
        assert truncate(w * by).change == pytest.approx(wanted, rel=1e-6)


# -- scaling --------------------------------------------------------------------------------------


def test_outlier_factor_is_a_power_of_the_ratio() -> None:
    c = planted()
    found = detect(c)
    for power in (0.5, 0.7):
        f = outlier_factor(c, found, power)
        wanted = torch.ones(COLUMNS, dtype=torch.float64)
        wanted[5], wanted[40] = (60 / found.limit) ** power, (100 / found.limit) ** power
        torch.testing.assert_close(f.double(), wanted, rtol=1e-6, atol=0)
        assert int((f != 1).sum()) == 2
    none = detect(spread_out(COLUMNS))
    assert torch.equal(outlier_factor(spread_out(COLUMNS), none, 0.5), torch.ones(COLUMNS))


def problem(c: Tensor, bits: int = 4, shared: Tensor | None = None) -> FoldProblem:
    """Activations with the given column maxima."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(80, COLUMNS, generator=rng).clamp(-3, 3) / 3 * c
    weight = torch.randn(32, COLUMNS, generator=rng)
    grid = Grid(8, scale_dtype=torch.float32)
    return FoldProblem([weight], [grid], ActivationGrid(bits), c, c / 4, x, shared)


def test_choose_folds_what_was_detected_and_records_both_errors() -> None:
    c = planted()
    choice = cfp.choose(problem(c), Cfp(power=0.7))
    assert torch.equal(choice.factor, outlier_factor(c, detect(c), 0.7))
    assert (choice.parameter, choice.label, choice.detail) == (0.7, "0.7", {"scaled": 2})
    assert set(choice.losses) == {"0", "0.7"}
    assert choice.losses["0.7"] < choice.losses["0"]


@pytest.mark.parametrize("judge", [False, True])
def test_judge_refuses_what_does_not_help(judge: bool) -> None:
    """Float activations gain nothing from a fold, and two-bit weights lose much."""
    p = problem(planted())
    p = FoldProblem(p.weights, [Grid(2)], None, p.column_maximum, p.column_mean, p.sample)
    choice = cfp.choose(p, Cfp(judge=judge, power=1.0))
    better = min(choice.losses, key=lambda label: choice.losses[label])
    assert choice.label == (better if judge else "1")
    assert (choice.label == "0") == bool((choice.factor == 1).all())
    assert (choice.detail["scaled"] == 0) == (choice.label == "0")


def test_no_outliers_no_factor() -> None:
    p = problem(spread_out(COLUMNS))
    choice = cfp.choose(p, Cfp())
    assert torch.equal(choice.factor, torch.ones(COLUMNS))
    assert choice.detail == {"scaled": 0}
    assert choice.losses == search(p, [Candidate(0.0, torch.ones(COLUMNS))]).losses
    unreached = cfp.choose(problem(torch.zeros(COLUMNS)), Cfp())  # an expert without tokens
    assert torch.equal(unreached.factor, torch.ones(COLUMNS))


def test_channels_of_one_row_are_scaled_together() -> None:
    shared = torch.arange(COLUMNS) % (COLUMNS // 2)
    choice = cfp.choose(problem(planted(), shared=shared), Cfp())
    assert choice.detail == {"scaled": 4}
    assert torch.equal(choice.factor[: COLUMNS // 2], choice.factor[COLUMNS // 2 :])


def test_scaling_leaves_the_unquantized_model_unchanged() -> None:
    """In float64, every foldable input of a tiny LLaMA; the planted outlier channel is scaled."""
    model = tiny_model("llama")
    structure = discover(model)
    ids = sample_ids(2, 20)
    before = logits_float64(model, ids)
    scaled = 0
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        for group in block.groups:
            if group.source is None:
                continue
            seen: list[Tensor] = []
            hook = module.get_submodule(group.consumers[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            logits_float64(model, ids)
            hook.remove()
            c = torch.cat(seen).abs().amax(0)
            factor = outlier_factor(c, detect(c), 0.5)
            realised = fold(module, group, factor)
            scaled += int((realised != 1).sum())
    assert scaled >= 3
    after = logits_float64(model, ids)
    assert float((after - before).abs().max() / before.std()) < 1e-10


# -- in the engine --------------------------------------------------------------------------------


class Engine:
    """Block 0 of a tiny model as the loop has it before transforms: float32, observed."""

    def __init__(self, folder: Path, **data: Any) -> None:
        checkpoint = Checkpoint(folder)
        self.shell = Shell(open_config(folder))
        self.shell.load_outside(checkpoint, torch.float32)
        self.recipe = Recipe.parse({"weights": {"bits": 8}, **data}, "mine")
        self.plan: BlockPlan = make_plan(self.shell.structure, self.recipe, 64).blocks[0]
        self.block = self.shell.load_block(0, checkpoint, torch.float32)
        # An outlier for every layer; the hidden states have an outlier channel of their own.
        with torch.no_grad():
            for name in self.plan.structure.linears:
                weight = self.block.get_parameter(f"{name}.weight")
                weight[1, 2] = 40 * weight.abs().max()
        self.original = {n: p.clone() for n, p in self.block.named_parameters()}
        self.states = make_states(
            self.plan.structure, percentile=100.0, tokens=64, ranges=True, hessian=lambda _: False
        )

        def take(stats: InputStatistics, x: Tensor) -> None:
            stats.add(x)
            stats.add_sample(x)

        handles = attach(self.block, self.states, take)
        self.before = self.run()
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def run(self) -> Tensor:
        hidden = self.shell.embed(torch.arange(64).reshape(2, 32))
        return self.shell.run_block(0, hidden, self.shell.block_kwargs(32, torch.float32)[0])

    @torch.no_grad()
    def transform(self) -> list[dict[str, Any]]:
        transforms = self.recipe.folds
        return apply_transforms(self.block, self.plan, self.states, transforms, torch.float32)

    def changed(self) -> set[str]:
        return {n for n, p in self.block.named_parameters() if not torch.equal(p, self.original[n])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "m", "llama")


def test_weights_alone_are_truncated_in_every_planned_layer(folder: Path) -> None:
    engine = Engine(
        folder,
        transforms=[{"kind": "cfp", "activations": False}],
        ignore=["k_proj"],
    )
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    planned = {n for n in engine.plan.structure.linears if not n.endswith("k_proj")}
    assert engine.changed() == {f"{n}.weight" for n in planned}
    assert {r["layer"].removeprefix("model.layers.0.") for r in records} == planned
    for record in records:
        name = record["layer"].removeprefix("model.layers.0.")
        weight = engine.original[f"{name}.weight"]
        wanted = truncate(weight)
        assert torch.equal(engine.block.get_parameter(f"{name}.weight"), wanted.weight)
        assert record["truncated"] == wanted.fraction > 0
        assert record["weight_change"] == wanted.change > 0
        state = next(s for s in engine.states if name in s.group.consumers)
        x = state.sample(2048).double()
        moved = x @ (wanted.weight - weight).double().T
        output = moved.square().sum() / (x @ weight.double().T).square().sum()
        assert record["output_change"] == pytest.approx(float(output), rel=1e-3)


def test_weights_without_a_fold_are_truncated_too(tmp_path: Path) -> None:
    """fc2 of a block with GELU has no source."""
    engine = Engine(
        tiny_folder(tmp_path / "x", "gpt_neox"),
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp"}],
    )
    assert any(g.source is None for g in engine.plan.structure.groups)
    records = engine.transform()
    assert any("skipped" in r for r in records)
    assert all(r["truncated"] > 0 for r in records if "layer" in r)
    assert sum("layer" in r for r in records) == len(engine.plan.layers)


def test_scaling_alone_leaves_the_block_unchanged(folder: Path) -> None:
    engine = Engine(
        folder,
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp", "weights": False}],
    )
    maxima = {s.group.name: s.column_maximum(skip_massive=False) for s in engine.states}
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    assert len(records) == len(engine.states)
    after = engine.run()
    assert float((after - engine.before).norm() / engine.before.norm()) < 1e-5
    assert sum(r["scaled"] for r in records) > 0
    for record, state in zip(records, engine.states, strict=True):
        found = detect(maxima[state.group.name])
        assert record["scaled"] >= found.outliers
        assert record["chosen"] == (0.5 if found.outliers else 0.0)
        left = state.column_maximum(skip_massive=False)
        assert float(left.max()) <= float(maxima[state.group.name].max())


def test_float_inputs_are_not_scaled(folder: Path) -> None:
    engine = Engine(
        folder,
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp", "weights": False}],
        overrides=[{"match": "down_proj", "activations": "none"}],
    )
    records = engine.transform()
    skipped = [r for r in records if "skipped" in r]
    assert [r["skipped"] for r in skipped] == ["its input is not quantized"]
    assert len(records) == len(engine.states)
    assert "mlp.down_proj.weight" not in engine.changed()


def test_weights_are_truncated_before_the_fold(folder: Path) -> None:
    """The fold makes columns of outlier channels large: those are no outliers of the weights."""
    engine = Engine(folder, activations={"kind": "per_token"}, transforms=[{"kind": "cfp"}])
    records = engine.transform()
    first = next(i for i, r in enumerate(records) if "chosen" in r)
    assert all("layer" in r for r in records[:first])
    assert not any("layer" in r for r in records[first:])
    for record in records[:first]:
        name = record["layer"].removeprefix("model.layers.0.")
        assert record["truncated"] == truncate(engine.original[f"{name}.weight"]).fraction


def test_judged_truncation_is_never_worse(folder: Path) -> None:
    engine = Engine(
        folder,
        weights={"bits": 8, "group": 16},
        transforms=[{"kind": "cfp", "activations": False, "judge": True}],
    )
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    changed = engine.changed()
    for record in records:
        losses = record["losses"]
        name = record["layer"].removeprefix("model.layers.0.")
        assert (f"{name}.weight" in changed) == (losses["truncated"] < losses["kept"])
        assert (record["truncated"] > 0) == (f"{name}.weight" in changed)
    assert len(changed) < len(records)  # at 8 bits a weight 40 times the others is worth its range


def test_recipe_reads_cfp() -> None:
    recipe = Recipe.parse({"transforms": [{"kind": "cfp", "power": 0.7, "spread": 2}]}, "mine")
    assert recipe.transforms == (Cfp(power=0.7, spread=2.0),)
