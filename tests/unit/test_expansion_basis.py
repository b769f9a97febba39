"""The singular basis of a weight, and where training starts in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.expanded import SEEDS, SHAPES, matrix, problems
from torch import Tensor

from crossbit.errors import WorkError
from crossbit.solvers.expansion import (
    ExpansionChoice,
    dense,
    expand,
    singular_basis,
    start_expansion,
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# -- the basis -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_the_weight(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    basis = singular_basis(weight)
    r = min(shape)
    assert (basis.u.shape, basis.vt.shape, basis.s.shape) == ((shape[0], r), (r, shape[1]), (r,))
    assert {t.dtype for t in (basis.u, basis.vt, basis.s)} == {torch.float32}
    u, s, vt = basis.u.double(), basis.s.double(), basis.vt.double()
    assert float((u * s @ vt - weight).norm() / weight.norm()) < 1e-6
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=2e-6)
    torch.testing.assert_close(vt @ vt.T, eye, rtol=0, atol=2e-6)
    assert bool((s.diff() <= 0).all())
    # The increment that is the singular values themselves doubles the weight (LSI).
    parameters = {"expansion": basis.s.unsqueeze(0)}
    doubled = expand(basis, ExpansionChoice("diagonal"), parameters)
    assert float((doubled - weight).norm() / weight.norm()) < 1e-6


def test_the_basis_is_reproducible() -> None:
    weight = matrix(150, 96)
    one = singular_basis(weight)
    assert bool((one.u.gather(0, one.u.abs().argmax(0, keepdim=True)) > 0).all())
    unaligned = torch.cat([torch.zeros(1), weight.flatten()])[1:].reshape(150, 96)
    threads = torch.get_num_threads()
    try:
        others = [
            singular_basis(weight),
            singular_basis(unaligned),
            singular_basis(weight.double()),
        ]
        torch.set_num_threads(threads + 1)
        others.append(singular_basis(weight.T.contiguous().T))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert torch.equal(one.u, other.u)
        assert torch.equal(one.vt, other.vt)
        assert torch.equal(one.s, other.s)
    turned = singular_basis(-weight)  # the signs of V alone change
    torch.testing.assert_close(turned.u, one.u, rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.vt, -one.vt, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_decomposed_in_float32_and_stays(dtype: torch.dtype) -> None:
    weight = matrix(12, 9).to(dtype).requires_grad_()
    before = weight.detach().clone()
    basis = singular_basis(weight)
    assert torch.equal(basis.u, singular_basis(before.float()).u)
    assert not any(t.requires_grad for t in (basis.u, basis.vt, basis.s))
    assert torch.equal(weight, before)


def test_a_rank_keeps_the_leading_directions() -> None:
    weight = matrix(20, 30)
    whole, part = singular_basis(weight), singular_basis(weight, 4)
    assert torch.equal(part.u, whole.u[:, :4])
    assert torch.equal(part.vt, whole.vt[:4])
    assert torch.equal(part.s, whole.s[:4])
    for tensor in (part.u, part.vt, part.s):  # nothing else is kept alive
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(6, 4), torch.eye(5)])
def test_weights_without_full_rank_have_a_basis(weight: Tensor) -> None:
    basis = singular_basis(weight)
    torch.testing.assert_close(basis.u * basis.s @ basis.vt, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.u.T @ basis.u, torch.eye(min(weight.shape)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("failure", ["raises", "not finite"])
def test_a_decomposition_that_fails_is_tried_in_float64(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix(8, 6)
    right = singular_basis(weight)
    original, tried = torch.linalg.svd, []
    hopeless = False

    def svd(given_: Tensor, full_matrices: bool) -> Any:
        tried.append(given_.dtype)
        u, s, vt = original(given_, full_matrices=full_matrices)
        if given_.dtype == torch.float64 and not hopeless:
            return u, s, vt
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not\nconverge")  # type: ignore[attr-defined]
        return u, s, vt * math.nan

    monkeypatch.setattr(torch.linalg, "svd", svd)
    basis = singular_basis(weight)
    assert tried == [torch.float32, torch.float64]
    assert basis.u.dtype == basis.vt.dtype == basis.s.dtype == torch.float32
    torch.testing.assert_close(basis.u, right.u, rtol=0, atol=1e-5)
    hopeless = True
    with pytest.raises(WorkError, match=r"weight \[8, 6\].*did not converge") as caught:
        singular_basis(weight)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = matrix(8, 6)
    weight[2, 3] = value
    with pytest.raises(WorkError, match=r"weight \[8, 6\].*not finite") as caught:
        singular_basis(weight)
    assert "\n" not in str(caught.value)


# -- where training starts -------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(problems(), SEEDS)
def test_untrained_it_is_the_weight_bit_for_bit(
    problem: tuple[Tensor, ExpansionChoice], seed: int
) -> None:
    weight, choice = problem
    basis = singular_basis(weight, choice.rank)
    parameters = start_expansion(basis, choice)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for sign in (1.0, -1.0):  # an optimiser leaves zeros of either
        delta = expand(basis, choice, {n: p * sign for n, p in parameters.items()})
        assert delta.dtype == torch.float32
        assert float(delta.abs().max()) == 0.0
        assert torch.equal(bits(weight + delta), bits(weight))
        assert torch.equal(bits(delta + weight), bits(weight))
    assert int(dense(choice, parameters, basis.u.shape[1]).count_nonzero()) == 0


def test_parameters_have_the_stated_shapes() -> None:
    basis = singular_basis(matrix(10, 12))
    shapes: dict[ExpansionChoice, dict[str, tuple[int, ...]]] = {
        ExpansionChoice("diagonal"): {"expansion": (1, 10)},
        ExpansionChoice(): {"expansion": (17, 10)},
        ExpansionChoice("blocks", 4): {"expansion": (3, 4, 4)},
        ExpansionChoice("square", 4): {"expansion": (1, 10), "square": (4, 4)},
        ExpansionChoice("full"): {"expansion": (10, 10)},
        ExpansionChoice("full", width=0): {"expansion": (10, 10)},
    }
    for choice, wanted in shapes.items():
        assert {n: tuple(p.shape) for n, p in start_expansion(basis, choice).items()} == wanted
