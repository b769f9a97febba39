"""The kernel, the removal experiment and the outlier statistics against brute force."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.kernel import (
    KernelSetting,
    KernelStats,
    RatioHistogram,
    kernel_mask,
    loss_threshold,
    remove_smallest,
    theta_for_proportion,
    zero_bound,
)
from crossbit.activations.outliers import OutlierStats
from crossbit.activations.quantize import fake_quantize_activation
from crossbit.errors import InputError, WorkError


def activations(
    seed: int, tokens: int = 23, channels: int = 17, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal values with an outlier channel, a massive token, a dead channel and a zero row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=g)
    x[:, 3] *= 40
    x[0, 5] = 3000.0
    x[:, 7] = 0
    x[11] = 0
    return x.to(dtype)


def reference_bound(
    x: Tensor, i: int, j: int, q: float, alpha: float, c: list[float], rescaled: bool
) -> float:
    """The definition, one element at a time, in Python's fp64."""
    row: list[float] = [abs(v) for v in x[i].double().tolist()]
    if rescaled:
        f = [m ** (1 - alpha) for m in c]
        scale = max(v / w if w > 0 else 0.0 for v, w in zip(row, f, strict=True)) * f[j]
    else:
        scale = max(row) ** alpha * c[j] ** (1 - alpha)
    return float(scale / q / 2)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(("bits", "q"), [(8, 127.0), (4, 7.0), (8, 127.5)])
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 1.0])
def test_bound_and_mask_follow_the_definition(
    bits: int, q: float, alpha: float, rescaled: bool
) -> None:
    x = activations(1)
    c = x.double().abs().amax(0).tolist()
    bound = zero_bound(x, bits, alpha, divisor=q, rescaled=rescaled)
    mask = kernel_mask(x, bits, alpha, divisor=q, rescaled=rescaled)
    assert bound.shape == x.shape
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            expected = reference_bound(x, i, j, q, alpha, c, rescaled)
            if expected > 0:
                assert float(bound[i, j]) == pytest.approx(expected, rel=2e-6)
            size = abs(float(x[i, j]))
            if abs(size - expected) > 1e-5 * expected:
                assert bool(mask[i, j]) == (size <= expected)
    assert bool(mask[11].all())
    assert bool(mask[:, 7].all())


def test_default_divisor_is_the_papers() -> None:
    x = activations(2)
    assert torch.equal(zero_bound(x, 8, 0.15), zero_bound(x, 8, 0.15, divisor=127))
    assert not torch.equal(zero_bound(x, 8, 0.15), zero_bound(x, 8, 0.15, divisor=127.5))


@pytest.mark.parametrize("bits", [8, 4])
def test_alpha_one_is_per_token_bit_for_bit(bits: int) -> None:
    x = activations(3)
    x[4, 2] = x[4].abs().max() / (2 ** (bits - 1) - 1) / 2  # a tie, to even: zero
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = torch.where(step > 0, torch.round(x / step), 0)
    rows = (step > 0).flatten()
    assert torch.equal(zero_bound(x, bits, 1.0)[rows], (step[rows] / 2).expand(-1, x.shape[1]))
    assert torch.equal(kernel_mask(x, bits, 1.0), codes == 0)
    assert torch.equal(kernel_mask(x, bits, 1.0, rescaled=True), codes == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["per_token", "cross_dynamic", "cross_static"])
def test_the_kernel_is_the_quantizers_own(kind: str, dtype: torch.dtype) -> None:
    """No ulp apart: the mask is exactly where the quantizer in use returns zero."""
    x = activations(4, tokens=200, channels=64, dtype=dtype)
    c = activations(5, tokens=200, channels=64).abs().amax(0).clamp(min=0.5)
    alpha = 1.0 if kind == "per_token" else 0.15
    grid = ActivationGrid(bits=4, kind=kind, alpha=alpha)  # type: ignore[arg-type]
    static = kind == "cross_static"
    out = fake_quantize_activation(x, grid, columns=c if static else None)
    mask = kernel_mask(x, 4, alpha, c if static else None, grid.effective_divisor, rescaled=static)
    assert torch.equal(mask, out == 0)


def test_static_maxima_differ_from_the_windows_and_must_fit() -> None:
    x = activations(6)
    c = torch.full((17,), 2.0)
    for i, j in ((0, 0), (5, 3), (20, 16)):
        expected = float(x[i].abs().max()) ** 0.3 * 2.0**0.7 / 127 / 2
        assert float(zero_bound(x, 8, 0.3, c)[i, j]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(WorkError, match="17 channels"):
        zero_bound(x, 8, 0.3, torch.ones(4))
    with pytest.raises(WorkError, match="tokens, channels"):
        zero_bound(torch.ones(3), 8, 0.3)


matrices = st.builds(
    lambda seed, t, c, spread: (
        torch.randn(t, c, generator=torch.Generator().manual_seed(seed))
        * torch.exp(
            spread * torch.randn(1, c, generator=torch.Generator().manual_seed(seed + 1))
            + spread * torch.randn(t, 1, generator=torch.Generator().manual_seed(seed + 2))
        )
    ),
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 3),
)
alphas = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(matrices, alphas)
def test_dynamic_scale_bounds_every_element(x: Tensor, alpha: float) -> None:
    """|x| / (t^alpha c^(1-alpha)) <= 1 up to fp32 rounding: nothing clips."""
    full_scale = zero_bound(x, 8, alpha, divisor=0.5)  # half a step of divisor 1/2 is full scale
    assert bool((x.abs() <= full_scale * (1 + 2e-6)).all())


@settings(max_examples=60, deadline=None)
@given(matrices, alphas, st.sampled_from([4, 8]))
def test_rescaled_kernel_is_inside_the_dynamic_one(x: Tensor, alpha: float, bits: int) -> None:
    inner = zero_bound(x, bits, alpha, rescaled=True)
    outer = zero_bound(x, bits, alpha)
    assert bool((inner <= outer * (1 + 2e-6)).all())
    outside = kernel_mask(x, bits, alpha, rescaled=True) & ~kernel_mask(x, bits, alpha)
    assert bool((x.abs()[outside] >= outer[outside] * (1 - 2e-6)).all())


def test_rescaled_kernel_is_strictly_inside_on_real_shapes_but_not_with_static_maxima() -> None:
    x = activations(7, tokens=256, channels=64)
    inner = kernel_mask(x, 4, 0.15, rescaled=True)
    outer = kernel_mask(x, 4, 0.15)
    assert not bool((inner & ~outer).any())
    assert int(inner.sum()) < int(outer.sum())
    static = x.abs().amax(0) / 4  # calibration that saw smaller values: r_i > 1
    inner = kernel_mask(x, 4, 0.15, static, rescaled=True)
    assert bool((inner & ~kernel_mask(x, 4, 0.15, static)).any())


@settings(max_examples=60, deadline=None)
@given(matrices, alphas, st.sampled_from([4, 8]))
def test_the_bound_shrinks_exactly_where_the_column_is_below_the_row(
    x: Tensor, alpha: float, bits: int
) -> None:
    ratio = (zero_bound(x, bits, alpha) / zero_bound(x, bits, 1.0)).double()
    c_over_t = (x.abs().amax(0) / x.abs().amax(1, keepdim=True)).double()
    assert torch.allclose(ratio, c_over_t.pow(1 - alpha), rtol=1e-5, atol=0)
    smaller = c_over_t < 1 - 1e-5
    gone = kernel_mask(x, bits, alpha) & ~kernel_mask(x, bits, 1.0)
    assert not bool((gone & smaller).any())


SETTINGS = [
    KernelSetting(8, 1.0),
    KernelSetting(8, 0.15),
    KernelSetting(4, 1.0),
    KernelSetting(4, 0.15),
    KernelSetting(4, 0.15, rescaled=True),
]


def test_stats_stream_merge_and_weigh_by_elements() -> None:
    stats = KernelStats(SETTINGS)
    windows = {
        "a": [activations(s, channels=17) for s in (10, 11)],
        "b": [activations(12, tokens=40, channels=9)],
        "c": [activations(13, tokens=12, channels=30)],
    }
    for layer, chunks in windows.items():
        for x in chunks:
            stats.update(layer, x)
    types = {"a": "q", "b": "down", "c": "q"}
    for key in SETTINGS:
        count = {
            n: sum(int(kernel_mask(x, key.bits, key.alpha, rescaled=key.rescaled).sum()) for x in w)
            for n, w in windows.items()
        }
        size = {n: sum(x.numel() for x in w) for n, w in windows.items()}
        zeros = {n: sum(int((x == 0).sum()) for x in w) for n, w in windows.items()}
        for n in windows:
            assert stats.layers[n].proportion(key) == count[n] / size[n]
            expected = (count[n] - zeros[n]) / (size[n] - zeros[n])
            assert stats.layers[n].proportion_nonzero(key) == expected
        merged = stats.by_type(types)
        assert list(merged) == ["q", "down"]
        together = (count["a"] + count["c"]) / (size["a"] + size["c"])
        assert merged["q"].proportion(key) == together
        assert stats.total().proportion(key) == sum(count.values()) / sum(size.values())
    below = sum(int((x.abs().amax(0) < x.abs().amax(1, keepdim=True)).sum()) for x in windows["a"])
    assert stats.layers["a"].column_below_row == below
    plain = stats.total().as_dict()
    assert [k["bits"] for k in plain["kernel"]] == [8, 8, 4, 4, 4]
    assert plain["kernel"][4]["rescaled"] is True


def test_static_statistics_do_not_depend_on_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = activations(14, tokens=50), torch.rand(17, generator=torch.Generator().manual_seed(1))
    whole, parts = KernelStats(SETTINGS), KernelStats(SETTINGS)
    whole.update("l", x, c)
    monkeypatch.setattr("crossbit.activations.kernel._BLOCK_ELEMENTS", 40)  # two rows a block
    for chunk in (x[:1], x[1:30], x[30:30], x[30:]):
        parts.update("l", chunk, c)
    assert whole.layers == parts.layers
    dynamic, blocks = KernelStats(SETTINGS), KernelStats(SETTINGS)
    blocks.update("l", x)
    monkeypatch.undo()
    dynamic.update("l", x)
    assert dynamic.layers == blocks.layers


def test_stats_refuse_what_they_cannot_count() -> None:
    with pytest.raises(InputError, match="no \\(bits, alpha\\)"):
        KernelStats([])
    with pytest.raises(InputError, match="alpha"):
        KernelStats([(8, 1.5)])
    with pytest.raises(InputError, match="bits"):
        KernelStats([(1, 0.5)])
    with pytest.raises(InputError, match="divisor"):
        KernelStats([(8, 0.5)], {8: 0.0})
    stats = KernelStats([(8, 0.5)])
    for bad in (math.nan, math.inf):
        x = activations(1)
        x[2, 2] = bad
        with pytest.raises(WorkError, match=r"layer\.3.*NaN"):
            stats.update("layer.3", x)
    with pytest.raises(WorkError, match="no kernel was counted"):
        stats.total().proportion((4, 0.5))
    stats.update("l", activations(1))
    other = KernelStats([(4, 0.5)])
    other.update("l", activations(1))
    with pytest.raises(WorkError, match="different settings"):
        stats.layers["l"].add(other.layers["l"])


# ---- the remove-kernel experiment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remove_smallest_zeroes_only_what_is_small(dtype: torch.dtype) -> None:
    x = activations(20, dtype=dtype)
    kept = remove_smallest(x.view(1, *x.shape), 0.01)[0]
    assert kept.dtype == dtype
    for i in range(x.shape[0]):
        t = max(abs(v) for v in x[i].tolist())
        for j in range(x.shape[1]):
            value = float(x[i, j])
            assert float(kept[i, j]) == (0.0 if abs(value) < 0.01 * t else value)
    assert torch.equal(remove_smallest(x, 0.0), x)


def test_removal_at_half_a_step_is_the_per_token_kernel() -> None:
    x = activations(21, tokens=300, channels=50)
    for bits in (4, 8):
        removed = remove_smallest(x, 1 / (2 * (2 ** (bits - 1) - 1))) == 0
        assert torch.equal(removed, kernel_mask(x, bits, 1.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_theta_removes_the_chosen_proportion(seed: int, p: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 80, generator=g).relu() if seed % 2 else torch.randn(64, 80, generator=g)
    theta = theta_for_proportion(x, p)
    share = float((remove_smallest(x, theta) == 0).double().mean())
    zeros = float((x == 0).double().mean())
    ratio = (x.abs() / x.abs().amax(1, keepdim=True)).flatten().sort().values
    if p <= zeros:
        assert theta == 0
        assert share == zeros
        return
    # Every share that some edge m * 2^e with a 9-bit mantissa m reaches; ours is the nearest to p.
    values = ratio[ratio > 0].double()
    octave = torch.exp2(torch.floor(torch.log2(values)))
    edges = torch.unique(torch.floor(values / octave * 512) / 512 * octave)
    reached = [zeros, 1.0, *(torch.searchsorted(ratio.double(), edges) / len(ratio)).tolist()]
    assert abs(share - p) == pytest.approx(min(abs(r - p) for r in reached), abs=1e-7)
    histogram = RatioHistogram()
    histogram.update(x)
    assert histogram.proportion(theta) == share  # counts on bin edges are exact


def test_theta_is_monotone_and_spans_nothing_to_everything() -> None:
    x = activations(22, tokens=100, channels=40)
    thetas = [theta_for_proportion(x, k / 50) for k in range(51)]
    assert thetas == sorted(thetas)
    assert thetas[0] == 0
    assert bool((remove_smallest(x, thetas[-1]) == 0).all())
    tiny = torch.tensor([[1.0, 1e-20, 0.0, 1e-3]])
    assert 0 < theta_for_proportion(tiny, 0.5) <= 2**-32
    shares = [float((remove_smallest(x, t) == 0).double().mean()) for t in thetas]
    zeros = float((x == 0).double().mean())
    for k, share in enumerate(shares):
        assert share == pytest.approx(max(k / 50, zeros), abs=0.01)


def test_histogram_streams_and_refuses() -> None:
    x = activations(23, tokens=60)
    whole, parts = RatioHistogram(), RatioHistogram()
    whole.update(x)
    for chunk in (x[:7], x[7:8], x[8:]):
        parts.update(chunk)
    assert [whole.theta(p / 9) for p in range(10)] == [parts.theta(p / 9) for p in range(10)]
    with pytest.raises(InputError, match="from 0 to 1"):
        whole.theta(1.1)
    with pytest.raises(WorkError, match="no activations"):
        RatioHistogram().theta(0.5)


def test_loss_threshold_interpolates_the_crossing() -> None:
    points = [(0.3, 0.05), (0.0, 0.0), (0.1, 0.002), (0.2, 0.01)]
    assert loss_threshold(points, 0.02) == pytest.approx(0.225)
    assert loss_threshold(points, 0.01) == pytest.approx(0.2)
    assert loss_threshold(points, 1.0) is None
    assert loss_threshold([(0.1, 0.5)], 0.1) == 0.1


# ---- outliers


def test_outliers_against_brute_force() -> None:
    stats = OutlierStats()
    sequences = [activations(s, tokens=30) for s in (30, 31)]
    sequences[1][0, 5] = 1.0  # only the first sequence starts with a massive token,
    sequences[1][9, 2] = -50000.0  # the second has one at position 9
    for x in sequences:
        stats.update("l", x)
    rows = [(s, i, x[i].tolist()) for s, x in enumerate(sequences) for i in range(len(x))]

    def ratio(kept: list[list[float]]) -> float:
        columns = [max(abs(r[j]) for r in kept) for j in range(17)]
        return max(columns) / statistics.median(columns)

    found = stats.summary("l")
    assert found.tokens == 60
    assert found.massive_positions == {0: 1, 9: 1}
    assert found.absmax == 50000
    assert found.top_channels[0] == (2, 50000.0)
    assert found.top_channels[1] == (5, 3000.0)
    assert found.ratio == pytest.approx(ratio([r for _, _, r in rows]))
    without_first = ratio([r for _, i, r in rows if i > 0])
    assert found.ratio_without_first == pytest.approx(without_first)
    usual = [r for s, i, r in rows if (s, i) not in ((0, 0), (1, 9))]
    assert found.ratio_without_massive == pytest.approx(ratio(usual))
    values = [v for _, _, r in rows for v in r]
    mean = statistics.fmean(values)
    m2 = statistics.fmean([(v - mean) ** 2 for v in values])
    m4 = statistics.fmean([(v - mean) ** 4 for v in values])
    assert found.kurtosis == pytest.approx(m4 / m2**2, rel=1e-9)
    assert torch.equal(stats.channel_absmax("l"), torch.cat(sequences).abs().amax(0))
    assert stats.layers() == ["l"]


def test_kurtosis_survives_uneven_chunks_and_an_offset() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(5)) + 20
    x[:40] -= 37
    stats = OutlierStats()
    for chunk in (x[:1], x[1:301], x[301:]):
        stats.update("l", chunk)
    d = x.double() - x.double().mean()
    expected = float((d**4).mean() / (d**2).mean() ** 2)
    assert stats.summary("l").kurtosis == pytest.approx(expected, rel=1e-10)


def test_degenerate_activations_have_no_ratio() -> None:
    stats = OutlierStats()
    stats.update("dead", torch.zeros(4, 6))
    stats.update("one", torch.ones(1, 6))
    assert stats.summary("dead").ratio is None
    assert stats.summary("dead").kurtosis is None
    assert stats.summary("dead").massive_positions == {}
    assert stats.summary("one").ratio == 1
    assert stats.summary("one").ratio_without_first is None
    with pytest.raises(WorkError, match="channels after"):
        stats.update("one", torch.ones(1, 5))
    with pytest.raises(WorkError, match="NaN"):
        stats.update("one", torch.full((1, 6), math.nan))
