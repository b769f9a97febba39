"""Folds leave the model's function unchanged, and a wrong fold is noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import MASSIVE_TOKEN, VARIANTS, logits_float64, sample_ids, tiny_model
from torch import Tensor, nn

from crossbit.errors import WorkError
from crossbit.models.experts import unfuse_experts
from crossbit.models.families import family_of
from crossbit.models.structure import InputGroup, ModelStructure, NormSource, RowSource, discover
from crossbit.transforms.fold import fold, power_of_two, shared_factor, shift

GroupChange = Callable[[InputGroup], InputGroup]


def prepared(family: str, tied: bool = False) -> tuple[Any, ModelStructure]:
    model = tiny_model(family, tied=tied)
    unfuse_experts(model, family_of(model.config))
    return model, discover(model)


def random_factor(width: int, rng: torch.Generator) -> Tensor:
    """Log-uniform in [0.1, 10], float64 [width]."""
    return 10 ** (torch.rand(width, generator=rng, dtype=torch.float64) * 2 - 1)


def fold_all(
    model: Any,
    structure: ModelStructure,
    change: GroupChange = lambda g: g,
    stored: torch.dtype | None = None,
) -> int:
    rng = torch.Generator().manual_seed(11)
    folded = 0
    for block in structure.blocks:
        for group in block.groups:
            if group.source is not None:
                f = random_factor(group.width, rng)
                fold(model.get_submodule(block.name), change(group), f, stored=stored)
                folded += 1
    return folded


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the spread of the logits (the massive token's own logit left out)."""
    kept = torch.arange(a.shape[-1]) != MASSIVE_TOKEN
    return float((a - b)[..., kept].abs().max() / a[..., kept].std())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", VARIANTS)
def test_all_folds_together_leave_logits_unchanged(family: str, tied: bool) -> None:
    model, structure = prepared(family, tied)
    ids = sample_ids(2, 20)
    before = logits_float64(model, ids)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    assert fold_all(model, structure) >= 6
    assert distance(before, logits_float64(model, ids)) < 1e-10
    # ... and it was not a no-op: every quantized layer changed, nothing outside the blocks did.
    for block in structure.blocks:
        for group in block.groups:
            for name in group.consumers if group.source else ():
                full = f"{block.name}.{name}.weight"
                assert not torch.equal(weights[full], model.get_parameter(full))
    for name, parameter in model.named_parameters():
        if not name.startswith(structure.family.blocks):
            assert torch.equal(weights[name], parameter)


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "opt_post_norm", "gpt_neox", "llama"])
def test_shifts_leave_logits_unchanged(family: str, stored: torch.dtype | None) -> None:
    """And the readers see x - d, with the d that was returned; a norm's rounding is part of it."""
    model, structure = prepared(family)
    ids = sample_ids(2, 20)
    before = logits_float64(model, ids)
    rng = torch.Generator().manual_seed(3)
    shifted = 0
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        for group in block.groups:
            source = group.source
            norm = isinstance(source, NormSource) and source.has_bias
            if not norm and group.name != "o":
                continue
            seen: list[Tensor] = []
            hook = module.get_submodule(group.consumers[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            logits_float64(model, ids)
            d = torch.randn(group.width, generator=rng, dtype=torch.float64)
            if isinstance(source, RowSource):
                d = torch.randn(int(source.rows.max()) + 1, generator=rng).double()[source.rows]
            realised = shift(module, group, d, stored=stored)
            logits_float64(model, ids)
            hook.remove()
            torch.testing.assert_close(seen[1], seen[0] - realised, rtol=1e-9, atol=1e-9)
            rounded = float((realised - d).abs().max())
            assert 1e-4 < rounded < 0.02 if stored and norm else rounded < 1e-12
            shifted += 1
    assert shifted == {"opt": 9, "gpt_neox": 9}.get(family, 3)
    assert distance(before, logits_float64(model, ids)) < 1e-10


@pytest.mark.parametrize("family", VARIANTS)
def test_each_group_alone_divides_its_input(family: str) -> None:
    """After a fold the group's consumers see x / f, with the f that `fold` returned."""
    model, structure = prepared(family)
    block = structure.blocks[0]
    module = model.get_submodule(block.name)
    ids = sample_ids(1, 9)
    rng = torch.Generator().manual_seed(5)
    for group in block.groups:
        if group.source is None:
            continue
        seen: list[Tensor] = []
        hook = module.get_submodule(group.consumers[0]).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        logits_float64(model, ids)
        realised = fold(module, group, random_factor(group.width, rng))
        logits_float64(model, ids)
        hook.remove()
        if seen:  # an expert may have got no token
            torch.testing.assert_close(seen[1], seen[0] / realised, rtol=1e-9, atol=1e-12)


def swapped_rows(group: InputGroup) -> InputGroup:
    """A plausible wrong layout: neighbouring rows exchanged, or q's rows for v's."""
    if not isinstance(group.source, RowSource):
        return group
    rows = group.source.rows
    wrong = dataclasses.replace(
        group.source, rows=rows - rows.min() if rows.min() else rows.flip(0)
    )
    return dataclasses.replace(group, source=wrong)


def wrong_offset(group: InputGroup) -> InputGroup:
    if not isinstance(group.source, NormSource):
        return group
    wrong = dataclasses.replace(group.source, gain_offset=1 - group.source.gain_offset)
    return dataclasses.replace(group, source=wrong)


def forgotten_bias(group: InputGroup) -> InputGroup:
    if not isinstance(group.source, NormSource):
        return group
    return dataclasses.replace(group, source=dataclasses.replace(group.source, has_bias=False))


def forgotten_reader(group: InputGroup) -> InputGroup:
    return dataclasses.replace(group, readers=group.readers[:-1])


def forgotten_consumer(group: InputGroup) -> InputGroup:
    return dataclasses.replace(group, consumers=group.consumers[:1])


@pytest.mark.parametrize(
    ("family", "mistake"),
    [(f, swapped_rows) for f in VARIANTS]
    + [(f, wrong_offset) for f in VARIANTS if f != "opt_post_norm"]
    + [(f, forgotten_bias) for f in ("opt", "gpt_neox", "gpt_neox_serial")]
    + [(f, forgotten_reader) for f in ("mixtral", "qwen3_moe", "qwen2_moe")]
    + [(f, forgotten_consumer) for f in ("llama", "gemma3_text", "opt", "mixtral")],
)
def test_a_wrong_fold_is_noticed(family: str, mistake: GroupChange) -> None:
    model, structure = prepared(family)
    ids = sample_ids(2, 20)
    before = logits_float64(model, ids)
    fold_all(model, structure, mistake)
    assert distance(before, logits_float64(model, ids)) > 1e-2


@pytest.mark.parametrize("family", VARIANTS)
def test_gains_stored_in_bfloat16_keep_the_function_exact(family: str) -> None:
    """Rounded quotients define f: a bfloat16 model folded in wider storage stays exact.

    Its gains are representable in bfloat16 before and after; norm biases round, and the consumers'
    biases take up the difference.
    """
    model, structure = prepared(family)
    norms = {
        f"{b.name}.{g.source.module}"
        for b in structure.blocks
        for g in b.groups
        if isinstance(g.source, NormSource)
    }
    for name in norms:
        for p in model.get_submodule(name).parameters():
            p.copy_(p.bfloat16())
    ids = sample_ids(2, 20)
    before = logits_float64(model, ids)
    fold_all(model, structure, stored=torch.bfloat16)
    assert distance(before, logits_float64(model, ids)) < 1e-10
    for name in norms:
        for p in model.get_submodule(name).parameters():
            assert torch.equal(p, p.bfloat16().to(p.dtype))


# -- one norm and two readers, by hand ---------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


def small_block(
    gain: Tensor, bias: Tensor | None = None, offset: int = 0
) -> tuple[Any, InputGroup]:
    block: Any = nn.Module()
    block.norm = Norm(gain, bias)
    width = len(gain)
    block.a = nn.Linear(width, 3, bias=False, dtype=gain.dtype)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        block.a.weight.copy_(torch.randn(3, width, generator=rng, dtype=torch.float64))
    source = NormSource("norm", offset, bias is not None)
    return block, InputGroup("in", ("a",), width, source)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.sampled_from([0, 1]),
)
@settings(max_examples=60, deadline=None)
def test_realised_factor_is_old_gain_over_stored_gain(
    seed: int, dtype: torch.dtype, offset: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    gain = torch.randn(32, generator=rng, dtype=torch.float64)
    gain = gain + 0.1 * gain.sign()  # large enough for quotients to be normal numbers in float16
    block, group = small_block((gain - offset).to(dtype), offset=offset)
    weight = block.norm.weight.detach().clone()
    f = random_factor(32, rng)
    realised = fold(block, group, f)
    new = block.norm.weight
    # The norm adds 1 in float32 (float64 for a float64 model).
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old_gain, new_gain = (w.to(wide) + offset for w in (weight, new))
    alive = old_gain != 0
    assert (realised > 0).all()
    torch.testing.assert_close(
        realised[alive], (old_gain.double() / new_gain.double())[alive], rtol=1e-14, atol=0
    )
    if offset == 0:
        # One rounding of the quotient: within half a unit in the last place of the asked factor.
        eps = torch.finfo(dtype).eps
        assert ((realised / f - 1).abs()[alive] <= eps / 2 + 1e-15).all()


def test_zero_gain_without_bias_keeps_factor_one() -> None:
    gain = torch.tensor([0.0, 1.5, -2.0], dtype=torch.bfloat16)
    block, group = small_block(gain)
    column = block.a.weight[:, 0].clone()
    realised = fold(block, group, torch.tensor([4.0, 4.0, 4.0]))
    assert realised.tolist() == [1.0, 4.0, 4.0]
    assert torch.equal(block.a.weight[:, 0], column)
    assert block.norm.weight.tolist() == [0.0, 0.375, -0.5]


def test_zero_gain_with_bias_folds_through_the_bias() -> None:
    gain = torch.tensor([0.0, 0.0, 1.0], dtype=torch.bfloat16)
    bias = torch.tensor([3.0, 0.0, 3.0], dtype=torch.bfloat16)
    block, group = small_block(gain, bias)
    realised = fold(block, group, torch.tensor([7.0, 7.0, 7.0]))
    new = block.norm.bias.detach().double()
    assert float(realised[0] * new[0]) == 3.0
    assert float(realised[1]) == 1.0
    assert realised[0] == pytest.approx(7, rel=2**-8)


def test_minus_one_weights_of_gemma_are_zero_gains() -> None:
    block, group = small_block(torch.tensor([-1.0, 0.0], dtype=torch.bfloat16), offset=1)
    assert fold(block, group, torch.tensor([8.0, 8.0])).tolist() == [1.0, 8.0]
    assert block.norm.weight.tolist() == [-1.0, -0.875]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gain_that_would_round_to_zero_stays_alive(dtype: torch.dtype) -> None:
    """1 + w near 0 cannot be stored finely: the realised factor is what could be stored."""
    block, group = small_block(torch.tensor([0.5, -3.0], dtype=dtype), offset=1)
    realised = fold(block, group, torch.tensor([1e9, 1e9]))
    new = block.norm.weight.float() + 1
    assert (new != 0).all()
    assert torch.equal(realised, torch.tensor([1.5, -2.0]).double() / new.double())
    assert (realised > 0).all()


def test_half_precision_overflow_is_clamped_or_refused() -> None:
    block, group = small_block(torch.tensor([60000.0, 1.0], dtype=torch.float16))
    realised = fold(block, group, torch.tensor([0.1, 1.0]))  # 600000 has no float16
    assert realised[0] == pytest.approx(60000 / 65504)
    block, group = small_block(torch.tensor([1.0, 1.0], dtype=torch.float16))
    kept = {n: p.clone() for n, p in block.named_parameters()}
    with pytest.raises(WorkError, match=r"a would hold .*float16"):
        fold(block, group, torch.tensor([1.0, 1e6]))
    assert all(torch.equal(kept[n], p) for n, p in block.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_bad_factors_are_refused_and_change_nothing(bad: float) -> None:
    block, group = small_block(torch.ones(4))
    kept = {n: p.clone() for n, p in block.named_parameters()}
    with pytest.raises(WorkError, match="channel 2"):
        fold(block, group, torch.tensor([1.0, 2.0, bad, 3.0]))
    assert all(torch.equal(kept[n], p) for n, p in block.named_parameters())


def test_other_refusals() -> None:
    block, group = small_block(torch.ones(4))
    with pytest.raises(WorkError, match=r"shape \(3,\).* 4 channels"):
        fold(block, group, torch.ones(3))
    with pytest.raises(WorkError, match=r"no factor folds .* because of GELU"):
        fold(
            block, dataclasses.replace(group, source=None, reason="because of GELU"), torch.ones(4)
        )
    block, group = small_block(torch.tensor([1.0, float("nan")]))
    with pytest.raises(WorkError, match="not finite"):
        fold(block, group, torch.ones(2))


# -- row sources ------------------------------------------------------------------------------


def rows_block(dtype: torch.dtype) -> tuple[Any, InputGroup]:
    """v [4 rows + bias] -> o [8 channels], two query heads of size 2 for each key/value head."""
    rng = torch.Generator().manual_seed(3)
    block: Any = nn.Module()
    block.v = nn.Linear(5, 4, dtype=dtype)
    block.o = nn.Linear(8, 3, dtype=dtype)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    return block, InputGroup("o", ("o",), 8, RowSource("v", rows))


def through(block: Any, rows: Tensor, x: Tensor) -> Tensor:
    v = x.double() @ block.v.weight.double().T + block.v.bias.double()
    out: Tensor = v[:, rows] @ block.o.weight.double().T + block.o.bias.double()
    return out


def test_shared_rows_take_the_largest_factor() -> None:
    block, group = rows_block(torch.float64)
    assert isinstance(group.source, RowSource)
    f = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 8.0, 0.25, 9.0])
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    before = through(block, group.source.rows, x)
    bias = block.v.bias.clone()
    expected = [3.0, 2.0, 3.0, 2.0, 4.0, 9.0, 4.0, 9.0]
    assert shared_factor(group, f).tolist() == expected
    assert fold(block, group, f).tolist() == expected
    torch.testing.assert_close(through(block, group.source.rows, x), before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(block.v.bias, bias / torch.tensor([3.0, 2.0, 4.0, 9.0]).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_fold_by_powers_of_two_exactly(dtype: torch.dtype) -> None:
    block, group = rows_block(dtype)
    assert isinstance(group.source, RowSource)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    before = through(block, group.source.rows, x)
    f = random_factor(8, torch.Generator().manual_seed(2))
    realised = fold(block, group, f)
    assert torch.equal(realised, power_of_two(shared_factor(group, f)))
    assert torch.equal(realised, torch.exp2(torch.log2(realised).round()))
    torch.testing.assert_close(through(block, group.source.rows, x), before, rtol=1e-13, atol=1e-13)


def test_float32_rows_fold_to_float32_accuracy() -> None:
    block, group = rows_block(torch.float32)
    assert isinstance(group.source, RowSource)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    before = through(block, group.source.rows, x)
    f = random_factor(8, torch.Generator().manual_seed(2))
    assert torch.equal(fold(block, group, f), shared_factor(group, f))
    torch.testing.assert_close(through(block, group.source.rows, x), before, rtol=1e-5, atol=1e-6)


@given(st.floats(1e-6, 1e6))
def test_power_of_two_is_within_a_factor_of_sqrt_two(value: float) -> None:
    p = float(power_of_two(torch.tensor([value], dtype=torch.float64)))
    assert 2**-0.5 - 1e-12 <= p / value <= 2**0.5 + 1e-12
    assert torch.frexp(torch.tensor(p)).mantissa == 0.5
