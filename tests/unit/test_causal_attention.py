"""``causal_attention`` against float64, and where it takes torch's place."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from crossbit.engine import loop
from crossbit.errors import WorkError
from crossbit.runtime import attention as seam
from crossbit.runtime.attention import calibrating
from crossbit.runtime.causal_attention import causal_attention, is_fast


def _inputs(
    batch: int, heads: int, shared: int, length: int, width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, length, width) for n in (heads, shared, shared, heads)]
    q, k, v, g = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return q, k, v, g


def _reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients in float64, heads repeated and the whole matrix made."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in leaves[1:])
    scores = leaves[0] @ keys.transpose(2, 3) * scale
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ values
    torch.autograd.backward(out, g.double())
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = causal_attention(leaves[0], leaves[1], leaves[2], scale)
    torch.autograd.backward(out, g)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 4),
    length=st.sampled_from([1, 2, 127, 128, 129, 300]),
    width=st.sampled_from([8, 24]),
)
@settings(max_examples=25, deadline=None)
def test_output_and_gradients(batch: int, shared: int, group: int, length: int, width: int) -> None:
    inputs = _inputs(batch, shared * group, shared, length, width)
    for ours, exact in zip(_ours(*inputs, 0.3), _reference(*inputs, 0.3), strict=True):
        # At length 1 queries and keys have no influence: their gradient is 0 up to rounding.
        size = max(float(exact.norm()), 1e-3 * float(inputs[3].double().norm()))
        assert float((ours.double() - exact).norm()) < 2e-2 * size


def test_as_near_to_float64_as_torch() -> None:
    """The bound above is bfloat16's, not one that hides a mistake: torch's kernel has its own."""
    inputs = _inputs(2, 6, 2, 256, 64)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    fused = functional.scaled_dot_product_attention(
        leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True, scale=0.125
    )
    torch.autograd.backward(fused, inputs[3])
    exact = _reference(*inputs, 0.125)[1:]
    ours = _ours(*inputs, 0.125)[1:]
    for mine, leaf, wanted in zip(ours, leaves, exact, strict=True):
        assert leaf.grad is not None
        size = float(wanted.norm())
        assert float((mine - wanted).norm()) / size < 0.01
        assert float((leaf.grad - wanted).norm()) / size < 0.01


def test_several_tiles_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(2, 4, 2, 200, 16)
    whole = _ours(*inputs, 0.25)
    monkeypatch.setattr("crossbit.runtime.causal_attention._SCORES", 1)
    for one, other in zip(_ours(*inputs, 0.25), whole, strict=True):
        assert torch.equal(one, other)


def _module(causal: bool = True) -> nn.Module:
    module = nn.Module()
    config = SimpleNamespace(_attn_implementation=seam.IMPLEMENTATION)
    for name, value in {"is_causal": causal, "num_key_value_groups": 2, "config": config}.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ({}, True),
        ({"grad": False}, False),
        ({"grad": False, "calibrating": True}, True),
        ({"grad": False, "calibrating": True, "causal": False}, False),
        ({"dtype": torch.float32, "calibrating": True}, False),
        ({"dtype": torch.float32}, False),
        ({"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}, False),
        ({"causal": False}, False),
        ({"kwargs": {"dropout": 0.1}}, False),
    ],
)
def test_only_for_gradients_and_calibration(
    what: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return causal_attention(*inputs)

    monkeypatch.setattr(seam, "causal_attention", counted)
    q, k, v, _ = (x.to(what.get("dtype", torch.bfloat16)) for x in _inputs(1, 4, 2, 8, 16))
    q.requires_grad_(what.get("grad", True))
    module = _module(what.get("causal", True))
    kwargs = {"scaling": 0.25, **what.get("kwargs", {})}
    with calibrating() if what.get("calibrating") else nullcontext():
        out, _ = seam.attention(module, q, k, v, what.get("mask"), **kwargs)
    assert out.shape == (1, 8, 4, 16)
    assert bool(calls) == taken
    plain, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, what.get("mask"), **kwargs)
    if taken:
        assert torch.allclose(out.float(), plain.float(), atol=3e-2)
    elif "dropout" not in kwargs:
        assert torch.equal(out, plain)


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_prefix_is_the_beginning_of_a_causal_sequence(
    calibrate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask is made, and evaluation stays as exact as torch's kernel with one."""
    monkeypatch.setattr(seam, "_with_prefix_visible", None)
    length, prefix = 300, 3
    q, k, v, _ = _inputs(2, 4, 2, length + prefix, 16)
    k[1, :, :prefix], v[1, :, :prefix] = k[0, :, :prefix], v[0, :, :prefix]
    module = _with_prefix(k[:1, :, :prefix], v[:1, :, :prefix])
    own = [x[:, :, prefix:] for x in (q, k, v)]
    with calibrating() if calibrate else nullcontext():
        out, _ = seam.attention(module, own[0], own[1], own[2], None, scaling=0.25)
    assert out.is_contiguous()
    seen = torch.ones(length, length + prefix, dtype=torch.bool).tril(prefix)[None, None]
    masked, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, own[0], k, v, seen, scaling=0.25)
    exact = _reference(q, k, v, torch.zeros_like(q), 0.25)[0][:, :, prefix:].transpose(1, 2)
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (out, masked)]
    assert errors[0] < (2 if calibrate else 1.05) * errors[1]


def _with_prefix(key: Tensor, value: Tensor, *, causal: bool = True) -> nn.Module:
    module = _module(causal)
    change = seam.AttentionChange(prefix_key=key, prefix_value=value)
    setattr(module, seam._STATE, seam._State(change))
    return module


@pytest.mark.parametrize(("sink", "bound"), [(0.0, 0.01), (8.0, 0.02)])
def test_gradients_after_a_prefix(sink: float, bound: float) -> None:
    """Of queries, keys and values of the sequence; most of the attention may be on the prefix."""
    prefix, scale = 2, 0.25
    q, k, v, g = _inputs(2, 4, 2, 200 + prefix, 16)
    toward = torch.ones(16) / 4  # every query has a part along it that the prefix answers
    q = (q + 4 * toward).bfloat16()
    k[:, :, :prefix] = sink * toward.bfloat16()
    v[1, :, :prefix] = v[0, :, :prefix]
    g[:, :, :prefix] = 0  # of the prefix nothing comes out
    exact = _reference(q, k, v, g, scale)
    module = _with_prefix(k[:1, :, :prefix], v[:1, :, :prefix])
    own = [x[:, :, prefix:].clone().requires_grad_() for x in (q, k, v)]
    out, _ = seam.attention(module, own[0], own[1], own[2], None, scaling=scale)
    torch.autograd.backward(out.transpose(1, 2), g[:, :, prefix:])
    found = [out.detach().transpose(1, 2), *(x.grad for x in own)]
    for ours, wanted in zip(found, exact, strict=True):
        assert ours is not None
        wanted = wanted[:, :, prefix:]
        assert float((ours.double() - wanted).norm()) < bound * float(wanted.norm())


def test_without_causality_all_see_all_after_a_prefix() -> None:
    q, k, v, _ = (x.float() for x in _inputs(1, 4, 2, 12, 16))
    module = _with_prefix(k[:, :, :3], v[:, :, :3], causal=False)
    out, _ = seam.attention(module, q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], None, scaling=0.25)
    keys, values = (x.repeat_interleave(2, 1).double() for x in (k, v))
    wanted = (q[:, :, 3:].double() @ keys.transpose(2, 3) * 0.25).softmax(-1) @ values
    assert torch.allclose(out.transpose(1, 2).double(), wanted, atol=1e-5)


def test_blocks_are_quantized_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing after them is, should they fail too."""
    seen: list[bool] = []

    def run(*_: Any) -> None:
        seen.append(seam._calibrating.get())
        raise WorkError("no")

    monkeypatch.setattr(loop, "_run_blocks", run)
    nothing: Any = None
    with pytest.raises(WorkError):
        loop.run_blocks(nothing, nothing, nothing)
    assert seen == [True]
    assert not seam._calibrating.get()


def test_not_for_other_shapes() -> None:
    q, k, v, _ = _inputs(1, 2, 2, 8, 16)
    assert is_fast(q, k, v)
    assert not is_fast(q[:, :, :4], k, v)
    assert not is_fast(q, k, v[..., :8])


def test_a_bias_of_the_keys_costs_no_precision() -> None:
    """Scores of hundreds that differ by ones, as where the layer of the keys has a large bias."""
    q, k, v, g = _inputs(1, 4, 2, 256, 32)
    q, k = (
        (q + 4).bfloat16(),
        (k + 12 * torch.randn(32, generator=torch.Generator().manual_seed(1))).bfloat16(),
    )
    assert 0.2 * float((q[:, ::2] @ k.transpose(2, 3)).abs().max()) > 100
    for ours, exact in zip(_ours(q, k, v, g, 0.2), _reference(q, k, v, g, 0.2), strict=True):
        assert float((ours - exact).norm()) < 0.03 * float(exact.norm())
