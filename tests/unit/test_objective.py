"""Losses of reconstruction against plain references in float64, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit import objective
from crossbit.errors import InputError
from crossbit.objective import Norm, homologous, logit_kl, reconstruction_loss

NORMS: tuple[Norm, ...] = ("sum", "mean", "token", "bounded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place of the gradient that is returned, and float32's own rounding.
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def pair(*shape: int, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(*shape, generator=generator) * 2 + 0.3
    return target + noise * torch.randn(*shape, generator=generator), target


def reference(
    output: Tensor,
    target: Tensor,
    norm: Norm,
    kl: float,
    temperature: float,
    metric: Tensor | None = None,
) -> Tensor:
    """The definition, traced by autograd in the dtype of its input; no negligible tokens."""
    error = output - target
    error = error.square() if metric is None else error * (error @ metric)
    relative = error.sum(-1) / target.square().sum(-1)
    loss = {
        "sum": error.sum(-1).mean(),
        "mean": error.mean(),
        "token": relative.mean(),
        "bounded": (relative / (1 + relative)).mean(),
    }[norm]
    return loss + kl * temperature**2 * plain_kl(output, target, temperature)


def plain_kl(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    return F.kl_div(
        F.log_softmax(output / temperature, -1).flatten(0, -2),
        F.log_softmax(target / temperature, -1).flatten(0, -2),
        reduction="batchmean",
        log_target=True,
    )


def value_and_gradient(loss: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
    leaf = output.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(3 * value, leaf)  # the incoming gradient must count
    return value.detach(), gradient / 3


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest error in shares of the largest element: gradients have entries that cancel."""
    error = (found.double() - expected.double()).abs().max()
    return float(error / expected.double().abs().max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kl", "temperature"), [(0.0, 1.0), (0.7, 1.0), (0.7, 2.5)])
def test_value_and_gradient_of_the_definition(
    norm: Norm, dtype: torch.dtype, kl: float, temperature: float
) -> None:
    output, target = (x.to(dtype) for x in pair(3, 5, 32))
    value, gradient = value_and_gradient(
        lambda o: reconstruction_loss(o, target, norm=norm, kl=kl, temperature=temperature), output
    )
    expected = value_and_gradient(
        lambda o: reference(o, target.double(), norm, kl, temperature), output.double()
    )
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert gradient.dtype == dtype
    assert gap(value, expected[0]) <= 1e-5
    # Scaling by 3 and back rounds twice more.
    assert gap(gradient, expected[1]) <= 3 * GRADIENT[dtype]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(NORMS), st.sampled_from(DTYPES), st.floats(0, 2), st.integers(0, 99))
def test_a_metric_weighs_directions(norm: Norm, dtype: torch.dtype, kl: float, seed: int) -> None:
    output, target = (x.to(dtype) for x in pair(3, 5, 32, seed=seed))
    half = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
    metric = half @ half.t() / 32
    value, gradient = value_and_gradient(
        lambda o: reconstruction_loss(o, target, norm=norm, kl=kl, metric=metric), output
    )
    expected = value_and_gradient(
        lambda o: reference(o, target.double(), norm, kl, 1.0, metric.double()), output.double()
    )
    assert gap(value, expected[0]) <= 1e-5
    assert gap(gradient, expected[1]) <= 3 * GRADIENT[dtype] + 1e-5
    # Both targets of the homologous form are measured with it; the identity changes nothing.
    both = homologous(output, target, target, weight=1.0, norm=norm, kl=kl, metric=metric)
    assert both.item() == pytest.approx(2 * value.item(), rel=1e-5)
    plain = reconstruction_loss(output, target, norm=norm, kl=kl)
    one = reconstruction_loss(output, target, norm=norm, kl=kl, metric=torch.eye(32))
    assert one.item() == pytest.approx(plain.item(), rel=1e-5)


def test_gradient_is_the_slope_of_the_loss() -> None:
    """Finite differences of the loss itself, apart from any reference."""
    output, target = pair(6, 16)
    direction = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    for norm in NORMS:

        def loss(o: Tensor, norm: Norm = norm) -> Tensor:
            return reconstruction_loss(o, target, norm=norm, kl=0.5, temperature=2.0)

        slope = (loss(output + 0.01 * direction) - loss(output - 0.01 * direction)) / 0.02
        _, gradient = value_and_gradient(loss, output)
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost_at_equality(norm: Norm, dtype: torch.dtype) -> None:
    _, target = pair(2, 7, 24)
    target = target.to(dtype)
    value, gradient = value_and_gradient(
        lambda o: reconstruction_loss(o, target, norm=norm, kl=1.0), target
    )
    assert value == 0
    assert not gradient.any()
    assert homologous(target, target, target, norm=norm, kl=1.0) == 0
    assert logit_kl(target, target) == 0


@settings(deadline=None, max_examples=50)
@given(exponent=st.floats(-6, 6), seed=st.integers(0, 99))
def test_token_norm_does_not_depend_on_scale(exponent: float, seed: int) -> None:
    output, target = pair(9, 16, seed=seed)
    target[0] = 0  # the guard scales with the rest
    plain = reconstruction_loss(output, target, norm="token")
    scaled = reconstruction_loss(output * 10**exponent, target * 10**exponent, norm="token")
    assert scaled.item() == pytest.approx(plain.item(), rel=1e-4)


def test_a_lost_token_is_no_more_than_lost_to_the_bounded_norm() -> None:
    """A massive activation where there should be none counts as one token of 64."""
    output, target = pair(64, 32)
    without = reconstruction_loss(output[1:], target[1:], norm="bounded").item()
    output[0] *= 1000
    found = reconstruction_loss(output, target, norm="bounded").item()
    assert found == pytest.approx((63 * without + 1) / 64, rel=1e-3)
    assert reconstruction_loss(output, target, norm="token") > 1000 * without


def test_a_massive_token_does_not_decide_the_token_norm() -> None:
    output, target = pair(64, 32)
    without = {n: reconstruction_loss(output[1:], target[1:], norm=n).item() for n in NORMS}
    # The first token a thousand times as long, with an error of the same relative size.
    output[0] *= 1000
    target[0] *= 1000
    found = {n: reconstruction_loss(output, target, norm=n).item() for n in NORMS}
    for norm in ("token", "bounded"):
        assert found[norm] == pytest.approx(without[norm], rel=0.1)
    assert found["sum"] > 1000 * without["sum"]
    assert found["mean"] > 1000 * without["mean"]
    # It does not move what the others weigh either.
    _, gradient = value_and_gradient(lambda o: reconstruction_loss(o, target, norm="token"), output)
    _, alone = value_and_gradient(
        lambda o: reconstruction_loss(o, target[1:], norm="token"), output[1:]
    )
    assert gap(gradient[1:] * 64, alone * 63) <= 1e-5


def test_targets_without_length_count_like_a_typical_token() -> None:
    output, target = pair(33, 16)
    output[0], target[0] = 0.1, 0.0
    output[1], target[1] = 0.1, 1e-9
    median = target[2:].square().sum(-1).sort().values
    value = reconstruction_loss(output, target, norm="token")
    plain = (output - target).square().sum(-1)
    regular = (plain[2:] / target[2:].square().sum(-1)).sum()
    bounds = [(regular + 2 * 16 * 0.01 / m) / 33 for m in (median.max(), median.min())]
    assert bounds[0] <= value <= bounds[1]


@pytest.mark.parametrize("length", [0.0, 1e-30])
def test_targets_that_are_all_zero_leave_the_squared_error(length: float) -> None:
    target = torch.full((4, 8), length)
    value, gradient = value_and_gradient(
        lambda o: reconstruction_loss(o, target, norm="token"), torch.full((4, 8), 0.5)
    )
    assert value.item() == pytest.approx(8 * 0.25)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
def test_bad_numbers_are_not_hidden(norm: Norm, bad: float) -> None:
    for side in (0, 1):
        states = pair(5, 8)
        states[side][2, 3] = bad
        assert not torch.isfinite(reconstruction_loss(*states, norm=norm))
        assert not torch.isfinite(reconstruction_loss(*states, norm=norm, kl=1.0))
    logits = pair(5, 8)
    logits[0][2, 3] = bad
    assert not torch.isfinite(logit_kl(*logits))


def test_the_squared_error_is_cbqs() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert reconstruction_loss(output, target, norm="sum") == (4 + 10) / 2
    assert reconstruction_loss(output, target, norm="mean") == (4 + 10) / 4
    assert reconstruction_loss(output, target, norm="token") == (4 / 1 + 10 / 25) / 2
    bounded = reconstruction_loss(output, target, norm="bounded")
    assert bounded.item() == pytest.approx((4 / 5 + 10 / 35) / 2)


def test_kl_is_of_the_target_against_the_output_with_its_weight_and_temperature() -> None:
    output, target = pair(2, 5, 12, noise=1.0)
    base = reconstruction_loss(output, target)
    for temperature in (0.5, 1.0, 4.0):
        loss = reconstruction_loss(output, target, kl=0.3, temperature=temperature)
        expected = 0.3 * temperature**2 * plain_kl(output, target, temperature)
        assert (loss - base).item() == pytest.approx(expected.item(), rel=1e-4)
    assert reconstruction_loss(output, target, temperature=9.0) == base


@pytest.mark.parametrize("norm", NORMS)
def test_chunks_do_not_change_the_loss(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    output, target = pair(3, 7, 16)

    def loss(o: Tensor) -> Tensor:
        return reconstruction_loss(o, target, norm=norm, kl=0.5)

    whole = value_and_gradient(loss, output)
    for elements in (1, 16 * 4, 16 * 21):
        monkeypatch.setattr(objective, "CHUNK_ELEMENTS", elements)
        for found, expected in zip(value_and_gradient(loss, output), whole, strict=True):
            assert gap(found, expected) <= 1e-6


def test_states_that_are_not_contiguous() -> None:
    output, target = pair(6, 4, 10)
    views = [
        (output.transpose(0, 1), target.transpose(0, 1)),
        (output[..., ::2], target[..., ::2]),
        (output.mT, target.mT),
    ]
    for o, t in views:
        for function in (lambda o, t: reconstruction_loss(o, t, kl=1.0), logit_kl):
            found = value_and_gradient(lambda x: function(x, t), o)  # noqa: B023
            dense = t.contiguous()
            expected = value_and_gradient(lambda x: function(x, dense), o.contiguous())  # noqa: B023
            assert gap(found[0], expected[0]) <= 1e-6
            assert gap(found[1], expected[1]) <= 1e-6


def test_targets_get_no_gradient_and_backward_can_be_repeated() -> None:
    output, target = (x.requires_grad_() for x in pair(4, 8))
    for function in (reconstruction_loss, logit_kl):
        loss = function(output, target)
        first, *none = torch.autograd.grad(
            loss, (output, target), retain_graph=True, allow_unused=True
        )
        assert none == [None]
        assert torch.equal(first, torch.autograd.grad(loss, output)[0])


def kept_by(function: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return kept


@pytest.mark.parametrize("norm", NORMS)
def test_reconstruction_keeps_nothing_but_its_inputs(norm: Norm) -> None:
    output, target = (x.bfloat16() for x in pair(2, 8, 32))
    output.requires_grad_()
    kept = kept_by(lambda: reconstruction_loss(output, target, norm=norm, kl=1.0))
    large = [x for x in kept if x.numel() > 2 * 8]
    assert {x.data_ptr() for x in large} == {output.data_ptr(), target.data_ptr()}


def test_logit_kl_keeps_the_gradient_alone_in_the_dtype_of_the_logits() -> None:
    student, teacher = (x.bfloat16() for x in pair(2, 8, 32))
    assert kept_by(lambda: logit_kl(student, teacher)) == []
    student.requires_grad_()
    (kept,) = kept_by(lambda: logit_kl(student, teacher))
    assert kept.dtype == torch.bfloat16
    assert kept.numel() == student.numel()
    assert kept.data_ptr() not in (student.data_ptr(), teacher.data_ptr())
    with torch.no_grad():
        assert kept_by(lambda: logit_kl(student, teacher)) == []


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 12),
    vocabulary=st.integers(1, 40),
    scale=st.floats(0.01, 30),
    noise=st.floats(1e-4, 3),
    seed=st.integers(0, 99),
)
def test_kl_is_not_negative_and_that_of_torch(
    tokens: int, vocabulary: int, scale: float, noise: float, seed: int
) -> None:
    student, teacher = pair(tokens, vocabulary, seed=seed, noise=noise)
    student, teacher = student * scale, teacher * scale
    found = logit_kl(student, teacher)
    assert found >= 0
    expected = plain_kl(student.double(), teacher.double(), 1.0)
    # Rounding of log-probabilities as large as the logits.
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6 * max(1.0, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_logit_kl_is_the_plain_one_in_value_and_gradient(
    dtype: torch.dtype, temperature: float
) -> None:
    student, teacher = (x.to(dtype) for x in pair(2, 9, 300, noise=0.5))
    value, gradient = value_and_gradient(lambda s: logit_kl(s, teacher, temperature), student)
    expected = value_and_gradient(
        lambda s: plain_kl(s, teacher.double(), temperature), student.double()
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gap(value, expected[0]) <= 1e-5
    assert gap(gradient, expected[1]) <= 4 * GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 2, 7, 18, 1000])
def test_chunks_of_tokens_do_not_change_the_kl(dtype: torch.dtype, chunk: int) -> None:
    student, teacher = (x.to(dtype) for x in pair(2, 9, 50))
    whole = value_and_gradient(lambda s: logit_kl(s, teacher), student)
    parts = value_and_gradient(lambda s: logit_kl(s, teacher, chunk_tokens=chunk), student)
    assert gap(parts[0], whole[0]) <= 1e-6
    assert gap(parts[1], whole[1]) <= GRADIENT[dtype]


def test_float16_gradients_of_many_tokens_survive_until_they_are_scaled() -> None:
    student, teacher = (x.half() for x in pair(4096, 8, noise=1e-2))
    _, found = value_and_gradient(lambda s: logit_kl(s, teacher) * 4096, student)
    _, exact = value_and_gradient(
        lambda s: plain_kl(s, teacher.double(), 1.0) * 4096, student.double()
    )
    assert gap(found, exact) <= 4 * GRADIENT[torch.float16]


def test_masked_logits_add_nothing() -> None:
    student, teacher = pair(3, 10)
    padding = torch.full((3, 2), float("-inf"))
    value, gradient = value_and_gradient(
        lambda s: logit_kl(s, torch.cat([teacher, padding], 1)), torch.cat([student, padding], 1)
    )
    expected = value_and_gradient(lambda s: logit_kl(s, teacher), student)
    assert gap(value, expected[0]) <= 1e-6
    assert gap(gradient[:, :10], expected[1]) <= 1e-6
    assert not gradient[:, 10:].any()


def test_homologous_adds_the_second_target_with_its_weight() -> None:
    output, target = pair(3, 4, 8)
    other = target + 0.2
    options: dict[str, Any] = {"norm": "mean", "kl": 0.5, "temperature": 2.0}

    for weight in (1.0, 0.25):

        def found(o: Tensor, weight: float = weight) -> Tensor:
            return homologous(o, target, other, weight=weight, **options)

        def expected(o: Tensor, weight: float = weight) -> Tensor:
            second = reconstruction_loss(o, other, **options)
            return reconstruction_loss(o, target, **options) + weight * second

        pairs = zip(
            value_and_gradient(found, output), value_and_gradient(expected, output), strict=True
        )
        for got, wanted in pairs:
            assert gap(got, wanted) <= 1e-6
    unread = torch.full_like(other, float("nan"))
    alone = homologous(output, target, unread, weight=0.0, **options)
    assert alone == reconstruction_loss(output, target, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "max"}, "'max' is unknown; use sum, mean, token, bounded"),
        ({"kl": -1.0}, "kl: -1.0 is not a weight"),
        ({"kl": float("nan")}, "kl: nan is not a weight"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"temperature": float("inf")}, "temperature: inf"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reconstruction_loss(*pair(2, 4), **options)


def test_arguments_that_do_not_go_together() -> None:
    output, target = pair(2, 4)
    with pytest.raises(InputError, match="weight: -1"):
        homologous(output, target, target, weight=-1)
    with pytest.raises(InputError, match="temperature: -2"):
        logit_kl(output, target, -2)
    for function in (reconstruction_loss, logit_kl):
        with pytest.raises(ValueError, match=r"\[2, 4\] and target \[1, 4\] differ"):
            function(output, target[:1])
        with pytest.raises(ValueError, match="no token"):
            function(output[:0], target[:0])
    with pytest.raises(ValueError, match="chunk_tokens"):
        logit_kl(output, target, chunk_tokens=0)
