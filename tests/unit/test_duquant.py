"""DuQuant's rotation: its factors, that it changes nothing, and what it is worth."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.rotations import duquant
from crossbit.rotations.duquant import (
    DuRotation,
    block_size_for,
    choose_rotation,
    greedy_rotation,
    outlier_gain,
    zigzag_permutation,
)

WIDTH, BLOCK, STEPS = 96, 32, 48


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(tokens: int, width: int = WIDTH, *, seed: int = 0) -> Tensor:
    """Channels of different sizes; in a few of them, three of one block, values far from zero."""
    x = normal(tokens, width, seed=seed) * (0.5 * normal(width, seed=101)).exp()
    for i, channel in enumerate((1, 4, 7, width // 2 + 3)):
        x[:, channel] += (-1) ** i * (12 + 8 * i) * (1 + 0.2 * normal(tokens, seed=seed + 7 + i))
    # One token in a hundred has a value that is larger again.
    x[:: max(tokens // 100, 100), 4] += 150
    return x


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def rounding_error(x: Tensor, bits: int = 4) -> float:
    """Mean squared error of symmetric rounding, one step a token."""
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / top
    return float(((x / step).round() * step - x).square().mean())


def random_orthogonal(n: int, seed: int) -> Tensor:
    q, r = torch.linalg.qr(normal(n, n, seed=seed))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def blockwise(x: Tensor, rotation: Tensor) -> Tensor:
    """Against this the block products are tested: the dense block-diagonal matrix."""
    n = rotation.shape[-1]
    dense = x.new_zeros(x.shape[-1], x.shape[-1])
    for b in range(x.shape[-1] // n):
        at = slice(b * n, (b + 1) * n)
        dense[at, at] = rotation if rotation.dim() == 2 else rotation[b]
    return x @ dense


@pytest.mark.parametrize(
    ("width", "wanted", "size"),
    [
        *((576, 128, 64), (1536, 128, 128), (4096, 128, 128), (11008, 128, 128), (640, 128, 128)),
        *((96, 128, 32), (48, 128, 48), (100, 128, 100), (262, 128, 131), (127, 128, 127)),
        *((64, 16, 16), (64, 100, 64), (36, 8, 12), (7, 4, 7), (2, 128, 2)),
    ],
)
def test_block_sizes(width: int, wanted: int, size: int) -> None:
    assert block_size_for(width, wanted) == size


@pytest.mark.parametrize(("width", "wanted"), [(257, 128), (1, 128), (0, 128), (11, 4), (64, 1)])
def test_widths_without_a_block_size_are_refused(width: int, wanted: int) -> None:
    with pytest.raises(InputError, match="block") as caught:
        block_size_for(width, wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [2, 7, 32])
def test_the_matrix_of_a_step_spreads_the_first_channel_evenly(n: int) -> None:
    matrix = duquant._spreading(n, torch.Generator().manual_seed(3))
    torch.testing.assert_close(matrix @ matrix.T, identity(n), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("shared", [True, False])
def test_rotations_are_orthogonal(shared: bool) -> None:
    found = greedy_rotation(outliers(64), block=BLOCK, steps=256, shared=shared)
    assert found.dtype == torch.float64
    assert found.shape == ((BLOCK, BLOCK) if shared else (WIDTH // BLOCK, BLOCK, BLOCK))
    product = found @ found.mT
    torch.testing.assert_close(product, identity(BLOCK).expand_as(product), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_peak_never_grows_with_the_steps(shared: bool) -> None:
    """The random matrices do not depend on how many steps are asked for."""
    x = outliers(80)
    peaks = []
    for steps in (0, 1, 4, 16, 64):
        rotation = greedy_rotation(x, block=BLOCK, steps=steps, shared=shared)
        rotated = blockwise(x, rotation).reshape(80, -1, BLOCK).abs()
        peaks.append(rotated.amax() if shared else rotated.amax((0, 2)))
    assert float(peaks[0].amax()) == float(x.abs().amax())
    for before, after in pairwise(peaks):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert bool((peaks[-1] < 0.5 * peaks[0]).any())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 3.0]), st.booleans())
def test_no_sample_gets_a_larger_peak(seed: int, spread: float, shared: bool) -> None:
    """Also one that is flat already, where every step would make it worse."""
    x = normal(6, 24, seed=seed).sign() * (spread * normal(6, 24, seed=seed + 1)).exp()
    found = greedy_rotation(x, block=8, steps=5, seed=seed, shared=shared)
    assert float(blockwise(x, found).abs().amax()) <= float(x.abs().amax()) * (1 + 1e-12)


def test_a_single_outlier_is_spread_to_its_lower_bound() -> None:
    x = torch.zeros(5, 64, dtype=torch.float64)
    x[2, 40] = 100.0
    found = greedy_rotation(x, block=32, steps=1)
    assert float(blockwise(x, found).abs().amax()) == pytest.approx(100 / 32**0.5)


def test_rows_left_out_of_a_search_cannot_hold_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    x = outliers(400)
    fewer = duquant._rows_that_matter(x.reshape(1, -1, BLOCK))
    assert fewer.shape[1] < x.numel() // BLOCK
    found = greedy_rotation(x, block=BLOCK, steps=STEPS)
    monkeypatch.setattr(duquant, "_rows_that_matter", lambda rows: rows)
    torch.testing.assert_close(found, greedy_rotation(x, block=BLOCK, steps=STEPS))


def test_a_search_on_some_rows_is_checked_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows decide the search; flat rows that a rotation would raise are not forgotten."""
    monkeypatch.setattr(duquant, "SEARCH_ROWS", 2)
    x = normal(200, BLOCK).sign() * 0.95
    x[:2] = 0.0
    x[:2, 5] = 5.5
    assert duquant._rows_that_matter(x[None]).shape[1] == 2
    found = greedy_rotation(x, block=BLOCK, steps=3)
    assert float((x @ found).abs().amax()) <= 5.5
    x[:2, 5] = 0.0
    x[:2, :30] = 1.0
    assert torch.equal(greedy_rotation(x, block=BLOCK, steps=3), identity(BLOCK))


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([0.1, 1, 4]))
def test_zigzag_is_a_balanced_bijection(blocks: int, size: int, seed: int, spread: float) -> None:
    maxima = (spread * normal(blocks * size, seed=seed)).exp()
    p = zigzag_permutation(maxima, blocks)
    assert p.dtype == torch.int64
    assert torch.equal(p.sort().values, torch.arange(blocks * size))
    means = maxima[p].reshape(blocks, size).mean(1)
    bound = float(maxima.amax() - maxima.amin()) / size
    assert float(means.amax() - means.amin()) <= bound * (1 + 1e-9) + 1e-12
    # Every block has one channel of each run of neighbours in rank.
    rank = maxima.argsort(descending=True).argsort()
    runs = (rank[p] // blocks).reshape(blocks, size).sort(1).values
    assert torch.equal(runs, torch.arange(size).expand(blocks, size))


def test_zigzag_deals_there_and_back() -> None:
    maxima = torch.arange(12, 0, -1).float()
    dealt = zigzag_permutation(maxima, 3).reshape(3, 4)
    assert dealt.tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    assert zigzag_permutation(torch.ones(4), 2).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("permute", [True, False])
def test_the_layer_computes_the_same(shared: bool, permute: bool) -> None:
    x, weight = outliers(40), normal(24, WIDTH, seed=5)
    g = choose_rotation(x, block=BLOCK, steps=STEPS, shared=shared, permute=permute)
    assert (g.width, g.block) == (WIDTH, BLOCK)
    torch.testing.assert_close(g.apply(x) @ g.fold(weight).T, x @ weight.T, atol=1e-10, rtol=1e-10)
    matrix = g.apply(identity(WIDTH))
    torch.testing.assert_close(matrix @ matrix.T, identity(WIDTH), atol=1e-10, rtol=0)
    dense = blockwise(blockwise(x, g.first)[:, g.permutation], g.second)
    torch.testing.assert_close(g.apply(x), dense)
    torch.testing.assert_close(g.apply_transposed(x), x @ matrix.T)
    assert torch.equal(g.permutation, torch.arange(WIDTH)) is not permute


def test_the_second_rotation_belongs_to_the_permuted_sample() -> None:
    x = outliers(40)
    g = choose_rotation(x, block=BLOCK, steps=STEPS, seed=4)
    torch.testing.assert_close(g.first, greedy_rotation(x, block=BLOCK, steps=STEPS, seed=4))
    first = blockwise(x, g.first)
    assert torch.equal(g.permutation, zigzag_permutation(first.abs().amax(0), WIDTH // BLOCK))
    peaks = [float(y.abs().amax()) for y in (x, first, g.apply(x))]
    assert peaks[0] > 2 * peaks[1]
    assert peaks[1] > 1.1 * peaks[2]


@pytest.mark.parametrize("shape", [(WIDTH,), (2, 5, WIDTH), (0, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = choose_rotation(outliers(40), block=BLOCK, steps=8)
    x = normal(*shape).to(dtype)
    y = g.apply(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    # In half dtypes the result is rounded once: nothing in between was.
    assert torch.equal(y, g.apply(x.float()).to(dtype))
    rounding = max(4 * torch.finfo(dtype).eps, 5e-6)
    torch.testing.assert_close(g.apply_transposed(y), x, atol=rounding, rtol=rounding)
    torch.testing.assert_close(g.to("cpu", torch.float32).apply(x), y)


def test_a_weight_is_folded_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duquant, "FOLD_ROWS", 5)
    g = choose_rotation(outliers(40), block=BLOCK, steps=8)
    weight = normal(13, WIDTH).to(torch.bfloat16).requires_grad_()
    folded = g.fold(weight)
    assert folded.dtype == torch.float32
    assert not folded.requires_grad
    assert torch.equal(folded, g.apply(weight.detach().double()).float())
    assert g.fold(weight.double()).dtype == torch.float64


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared: bool) -> None:
    g = choose_rotation(normal(20, 12), block=4, steps=8, shared=shared)
    x = normal(3, 12, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(g.apply, (x,))
    assert torch.autograd.gradcheck(g.apply_transposed, (x,))
    upstream = normal(3, 12, seed=3)
    (gradient,) = torch.autograd.grad(g.apply(x), x, upstream)
    torch.testing.assert_close(gradient, g.apply_transposed(upstream))


@pytest.mark.parametrize(("width", "block"), [(512, 64), (576, 64)])
def test_it_is_worth_it_at_four_bits(width: int, block: int) -> None:
    """On other tokens than the rotation was chosen on, against plain rotations of equal cost."""
    fitting, held_out = outliers(300, width), outliers(300, width, seed=50)
    g = choose_rotation(fitting, block=block)
    error = rounding_error(g.apply(held_out))
    assert error < 0.2 * rounding_error(held_out)
    plain = [rounding_error(blockwise(held_out, random_orthogonal(block, s))) for s in range(5)]
    assert error < 0.7 * min(plain)
    unpermuted = choose_rotation(fitting, block=block, permute=False)
    assert error < 0.9 * rounding_error(unpermuted.apply(held_out))


def test_gains_are_those_of_the_definition() -> None:
    x = outliers(60)
    x[7] = 0.0
    g = choose_rotation(x, block=BLOCK, steps=STEPS)
    gain = outlier_gain(x, g)
    for name, values in (("before", x), ("after", g.apply(x))):
        assert gain[f"peak_{name}"] == float(values.abs().amax())
        rows = [float(v.abs().amax() / v.square().mean().sqrt()) for v in values if v.any()]
        assert gain[f"row_peak_{name}"] == pytest.approx(sum(rows) / len(rows))
    assert gain["peak_after"] < 0.5 * gain["peak_before"]
    assert gain["row_peak_after"] < 0.7 * gain["row_peak_before"]
    assert set(outlier_gain(torch.zeros(2, WIDTH), g).values()) == {0.0}


def test_the_same_seed_gives_the_same_rotation() -> None:
    x = outliers(40).to(torch.bfloat16)
    first, again, other = (choose_rotation(x, block=BLOCK, steps=8, seed=s) for s in (3, 3, 4))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert not torch.equal(first.first, other.first)
    assert not torch.equal(first.first, first.second)


@pytest.mark.parametrize("shared", [True, False])
def test_stored_and_read_back(shared: bool, tmp_path: Path) -> None:
    x = outliers(40)
    g = choose_rotation(x, block=BLOCK, steps=8, shared=shared)
    save_file(g.tensors(), tmp_path / "rotation.safetensors")
    back = DuRotation.from_tensors(load_file(tmp_path / "rotation.safetensors"))
    assert torch.equal(back.apply(x), g.apply(x))


def test_damaged_rotations_are_refused() -> None:
    good = choose_rotation(outliers(40), block=BLOCK, steps=8).tensors()
    p = good["permutation"]
    damaged: list[tuple[str, Tensor, str]] = [
        ("first", good["first"] * 1.01, "first rotation is not orthogonal"),
        ("second", good["second"] * float("nan"), "second rotation is not orthogonal"),
        ("first", torch.tensor(1.0), "shape"),
        ("second", identity(16), "second rotation of 96 channels has shape"),
        ("second", good["second"].long(), "int64"),
        ("permutation", p.clone().fill_(1), "each of 96 channels once"),
        ("permutation", p.int(), "int64"),
        ("permutation", p.double(), "int64"),
        ("permutation", p[:-1], "do not divide 95"),
        ("permutation", p.reshape(2, -1), "int64"),
    ]
    for name, tensor, words in damaged:
        with pytest.raises(InputError, match=words) as caught:
            DuRotation.from_tensors({**good, name: tensor})
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="lacks permutation, second"):
        DuRotation.from_tensors({"first": good["first"]})


def test_bad_samples_are_refused() -> None:
    x = outliers(8)
    with pytest.raises(InputError, match="do not divide 96"):
        greedy_rotation(x, block=36)
    with pytest.raises(InputError, match="do not divide 96"):
        choose_rotation(x, block=0)
    with pytest.raises(InputError, match="-1 steps"):
        greedy_rotation(x, block=BLOCK, steps=-1)
    with pytest.raises(WorkError, match=r"\[T, K\]"):
        greedy_rotation(x[0], block=BLOCK)
    with pytest.raises(WorkError, match=r"\[T, K\]"):
        choose_rotation(x[:0], block=BLOCK)
    with pytest.raises(InputError, match="7 equal blocks"):
        zigzag_permutation(torch.ones(96), 7)
    with pytest.raises(WorkError, match="finite"):
        zigzag_permutation(torch.tensor([1.0, float("nan")]), 2)
    g = choose_rotation(x, block=BLOCK, steps=2)
    for call in (g.apply, g.apply_transposed, g.fold):
        with pytest.raises(WorkError, match="96 channels"):
            call(x[:, :-1])
    with pytest.raises(WorkError, match="at least one row"):
        outlier_gain(x[:0], g)
    x[3, 3] = float("inf")
    with pytest.raises(WorkError, match="not finite"):
        greedy_rotation(x, block=BLOCK)
