"""CFP: truncation of outlier weights, scaling of outlier channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.outlying import COLUMNS, planted, spread_out
from tests.tiny import logits_float64, sample_ids, tiny_model
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import Grid
from crossbit.models.structure import discover
from crossbit.recipe import Cfp
from crossbit.transforms import cfp
from crossbit.transforms.cfp import detect, outlier_factor, truncate
from crossbit.transforms.fold import fold
from crossbit.transforms.search import Candidate, FoldProblem, search

# -- truncation ------------------------------------------------------------------------------------


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


# -- scaling ---------------------------------------------------------------------------------------


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
