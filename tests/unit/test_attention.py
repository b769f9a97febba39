"""Changes inside attention: against plain transformers, longer sequences, loops over values."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    SLIDING_WINDOW,
    DictCheckpoint,
    exact_float64,
    sample_ids,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from crossbit.activations.kv import KVGrid, dequantize_kv, fake_quantize_kv, quantize_kv
from crossbit.errors import InputError, WorkError
from crossbit.models.experts import unfuse_experts
from crossbit.models.families import family_of
from crossbit.models.shell import Shell
from crossbit.runtime.attention import (
    AttentionChange,
    attach,
    attached,
    attention,
    detach,
    positions_after,
    prefix_kwargs,
    recording_kv,
    register,
)
from crossbit.runtime.kv_cache import QuantizedCache, decode, encode

register()

DENSE = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "opt"]
SEPARATE = [f for f in FAMILIES if f not in ("phi3", "gpt_neox")]
PREFIX, LENGTH = 3, 21
GRIDS = [
    KVGrid(b, symmetric=s, clip=c) for b in (2, 4, 8) for s in (False, True) for c in (1.0, 0.8)
]


def open_tiny(family: str, *, dtype: torch.dtype = torch.float64, window: int = 64) -> Any:
    """A tiny model that runs as "crossbit", by default with a window larger than all sequences."""
    model = tiny_model(family, dtype=dtype)
    if getattr(model.config, "sliding_window", None) is not None:
        model.config.sliding_window = window
    model.set_attn_implementation("crossbit")
    return model


def attentions(model: nn.Module) -> list[nn.Module]:
    names = ("self_attn", "attention")
    return [m for n, m in model.named_modules() if n.rpartition(".")[2] in names]


def head_dim(module: Any) -> int:
    return int(getattr(module, "head_dim", None) or module.head_size)


def attach_all(model: nn.Module, change: AttentionChange) -> None:
    for module in attentions(model):
        attach(module, change)


def orthogonal(n: int, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return q


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    """Logits [B, L, V], computed in float64 throughout by a float64 model."""
    with exact_float64() if model.dtype == torch.float64 else nullcontext():
        found: Tensor = model(**kwargs, use_cache=False).logits
    return found


def prefix_of(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each attention module for the prefix tokens ``ids`` [1, P]."""
    found = []
    for module in attentions(model):
        with recording_kv(module) as seen:
            logits(model, input_ids=ids)
        assert len(seen) == 1
        found.append(seen[0])
    return found


def attach_prefix(model: Any, ids: Tensor, **others: Any) -> None:
    for module, (key, value) in zip(attentions(model), prefix_of(model, ids), strict=True):
        attach(module, AttentionChange(prefix_key=key, prefix_value=value, **others))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def keys(*shape: int, seed: int = 0) -> Tensor:
    """Random keys with an outlier channel, a token of zeros and one of equal values."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] += 30
    x[:, :, 0] = 0
    x[:, :, 1] = 2.5
    return x


# -- the quantizer ----------------------------------------------------------------------------


def slow_fake(x: Tensor, grid: KVGrid) -> Tensor:
    """Row by row and value by value in Python's float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        row = [float(v) for v in x[tuple(index)]]
        levels = 2**grid.bits - 1
        if grid.symmetric:
            last = 2 ** (grid.bits - 1) - 1
            step = max(abs(v) for v in row) * grid.clip / last
            base, first = 0.0, -last
        else:
            low, high = min(row), max(row)
            step = (high - low) * grid.clip / levels
            base, first, last = (low + high) / 2 - step * levels / 2, 0, levels
        for i, v in enumerate(row):
            code = 0 if step == 0 else min(max(round((v - base) / step), first), last)
            out[tuple(index)][i] = base + code * step
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantizer_equals_a_loop_over_the_definition(grid: KVGrid) -> None:
    x = keys(2, 3, 5, 16)
    actual = fake_quantize_kv(x, grid)
    torch.testing.assert_close(actual.double(), slow_fake(x, grid), rtol=1e-5, atol=1e-5)
    codes = quantize_kv(x, grid)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) <= 2**grid.bits - 1
    assert codes.scale.shape == (2, 3, 5, 1)
    assert torch.equal(dequantize_kv(codes, grid, x.dtype), actual)
    if grid.clip == 1.0:  # exact by construction
        assert torch.equal(actual[:, :, 0], x[:, :, 0])
        assert grid.symmetric or torch.equal(actual[:, :, 1], x[:, :, 1])
    half = fake_quantize_kv(x.bfloat16(), grid)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, fake_quantize_kv(x.bfloat16().float(), grid).bfloat16())


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([1.0, 0.7]), st.integers(-8, 8), st.integers()
)
@settings(deadline=None, max_examples=40)
def test_a_token_and_head_have_a_scale_of_their_own(
    bits: int, symmetric: bool, clip: float, power: int, seed: int
) -> None:
    """Scaling one token's key scales its dequantized key and touches no other."""
    grid = KVGrid(bits, symmetric=symmetric, clip=clip)
    x = keys(1, 2, 6, 8, seed=seed % 2**31)
    before = fake_quantize_kv(x, grid)
    factor = torch.ones(1, 2, 6, 1)
    factor[0, 1, 4] = 2.0**power
    assert torch.equal(fake_quantize_kv(x * factor, grid), before * factor)
    assert torch.equal(fake_quantize_kv(x[:, :, 2:3], grid), before[:, :, 2:3])
    assert torch.equal(fake_quantize_kv(x.flip(2), grid), before.flip(2))
    third = fake_quantize_kv(x / 3, grid) * 3  # a code may flip at a tie, no more
    assert (third - before).abs().max() <= 1.01 * quantize_kv(x, grid).scale.max() + 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_falls_with_bits_and_eight_are_nearly_lossless(symmetric: bool) -> None:
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float((fake_quantize_kv(x, KVGrid(b, symmetric=symmetric)) - x).norm() / x.norm())
        for b in range(2, 9)
    ]
    assert all(b < 0.65 * a for a, b in pairwise(errors))
    assert errors[-1] < 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradient_is_straight_through_but_for_what_the_clip_cuts_off(grid: KVGrid) -> None:
    x = keys(1, 2, 5, 16)[:, :, 2:].requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    loss = (fake_quantize_kv(x, grid) * weight).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    if grid.clip == 1.0:
        assert torch.equal(x.grad, weight)
        return
    lost = x.grad == 0
    assert torch.equal(x.grad[~lost], weight[~lost])
    # The outlier; a clip of 0.8 leaves it less than half a step outside of two or three steps.
    assert bool(lost[..., 1].all()) == (grid.bits > 2)
    error = (fake_quantize_kv(x, grid) - x).abs() / quantize_kv(x, grid).scale
    assert bool((error[lost] > 0.49).all())
    assert bool((error[~lost] < 0.51).all())


def test_settings_that_make_no_sense_are_refused() -> None:
    for bad in ({"bits": 1}, {"bits": 9}, {"clip": 0.0}, {"clip": 1.1}):
        with pytest.raises(InputError):
            KVGrid(**bad)
    before = KVGrid(8, before_rope=True)
    part = torch.zeros(1, 2, 3, 16)
    with pytest.raises(InputError, match="values have no rotary"):
        AttentionChange(value=before)
    with pytest.raises(InputError, match="rotated after RoPE"):
        AttentionChange(key=before, rotation=torch.eye(16))
    with pytest.raises(InputError, match="both its keys"):
        AttentionChange(prefix_key=part)
    with pytest.raises(InputError, match="prefix of shapes"):
        AttentionChange(prefix_key=part, prefix_value=part[:, :, 1:])


# -- the seam ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_change_all_is_as_before_bit_for_bit(family: str) -> None:
    """As "sdpa", and as "eager" where transformers has nothing else (Gemma-2)."""
    model = tiny_model(family, dtype=torch.float32)
    ids = sample_ids(2, LENGTH)
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    for mask in (None, padded):
        model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            model.set_attn_implementation("crossbit")
            actual = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            attach_all(model, AttentionChange())
            nothing = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        keep = slice(None) if mask is None else mask.bool()
        assert torch.equal(actual[keep], expected[keep])
        assert torch.equal(nothing, actual)
        for module in attentions(model):
            detach(module)
            detach(module)  # no harm
            assert attached(module) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_of_queries_and_keys_changes_nothing(family: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = open_tiny(family, dtype=dtype, window=SLIDING_WINDOW)
        ids = sample_ids(2, LENGTH)
        matrix = orthogonal(head_dim(attentions(model)[0]))

        expected = logits(model, input_ids=ids)
        for rotation in (matrix, lambda x, r=matrix: x @ r.to(x.dtype)):
            attach_all(model, AttentionChange(rotation=rotation))
            assert close(logits(model, input_ids=ids), expected, tolerance)


def hadamard(n: int) -> Tensor:
    h: Tensor = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h.div(n**0.5)


def test_a_hadamard_rotation_makes_keys_with_an_outlier_channel_easy_to_quantize() -> None:
    x = keys(1, 2, 8, 64)[:, :, 2:]
    change = AttentionChange(key=KVGrid(4), rotation=hadamard(64))
    rotated = change.rotate(x)
    assert close(rotated @ hadamard(64).T, x, 1e-5)
    errors = [float((fake_quantize_kv(k, KVGrid(4)) - k).norm()) for k in (x, rotated)]
    assert errors[1] < 0.5 * errors[0]
    half = x.bfloat16()  # the matrix is not rounded
    assert torch.equal(change.rotate(half), (half.float() @ hadamard(64)).bfloat16())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("given_mask", [None, "bool", "additive"])
def test_all_changes_together_equal_a_loop_over_queries(
    given_mask: str | None, softcap: float | None
) -> None:
    """Rotate, quantize, put the prefix in front; softmax(q k^T s) v query by query in float64."""
    module: Any = attentions(open_tiny("llama"))[0]
    b, heads, groups, n, p, d = 2, 4, 2, 5, 3, 16
    q, k, v = keys(b, heads, n, d, seed=1), keys(b, groups, n, d), keys(b, groups, n, d, seed=2)
    pk, pv = keys(1, groups, p, d, seed=3), keys(1, groups, p, d, seed=4)
    matrix, kg, vg = hadamard(d), KVGrid(3), KVGrid(4, symmetric=True, clip=0.9)
    attach(module, AttentionChange(kg, vg, matrix, pk, pv))
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    mask = None
    if given_mask is not None:
        visible[4, :2] = False
        mask = visible.expand(b, 1, n, n)
    if given_mask == "additive":
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(b, 1, n, n)
    extra = {} if softcap is None else {"softcap": softcap}
    actual, weights = attention(module, q, k, v, mask, scaling=0.05, **extra)
    assert weights is None
    assert actual.shape == (b, n, heads, d)
    kk = torch.cat((pk.expand(b, -1, -1, -1) @ matrix, fake_quantize_kv(k @ matrix, kg)), 2)
    vv = torch.cat((pv.expand(b, -1, -1, -1), fake_quantize_kv(v, vg)), 2).double()
    for i, h, t in torch.cartesian_prod(*map(torch.arange, (b, heads, n))).tolist():
        seen = torch.cat((torch.ones(p, dtype=torch.bool), visible[t]))
        g = h // (heads // groups)
        scores = kk[i, g, seen].double() @ (q[i, h, t] @ matrix).double() * 0.05
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        expected = scores.softmax(0) @ vv[i, g, seen]
        torch.testing.assert_close(actual[i, t, h].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SEPARATE)
def test_keys_before_rope_are_what_k_proj_or_k_norm_gives(family: str) -> None:
    model = open_tiny(family)
    ids = sample_ids(1, LENGTH)
    grid = KVGrid(3, before_rope=True)
    clean = logits(model, input_ids=ids)

    def by_hand(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heads = output.reshape(*output.shape[:-1], -1, head_dim(attentions(model)[0]))
        return fake_quantize_kv(heads, grid).reshape(output.shape)

    hooks = [
        getattr(m, "k_norm" if hasattr(m, "k_norm") else "k_proj").register_forward_hook(by_hand)
        for m in attentions(model)
    ]
    expected = logits(model, input_ids=ids)
    for hook in hooks:
        hook.remove()
    attach_all(model, AttentionChange(key=grid))
    attach_all(model, AttentionChange(key=grid))  # in place of the first, not besides it
    assert torch.equal(logits(model, input_ids=ids), expected)
    assert not close(expected, clean, 1e-6)
    if family != "opt":  # which has no rotary embedding
        attach_all(model, AttentionChange(key=replace(grid, before_rope=False)))
        assert not close(logits(model, input_ids=ids), expected, 1e-6)
    for module in attentions(model):
        detach(module)
    assert torch.equal(logits(model, input_ids=ids), clean)


@pytest.mark.parametrize("before_rope", [False, True])
def test_a_copy_shares_the_change_and_can_lose_it_alone(before_rope: bool) -> None:
    model = open_tiny("qwen3")
    ids = sample_ids(1, LENGTH)
    clean = logits(model, input_ids=ids)
    change = AttentionChange(key=KVGrid(2, before_rope=before_rope))
    attach_all(model, change)
    changed = logits(model, input_ids=ids)
    twin = copy.deepcopy(model)
    assert all(attached(m) is change for m in attentions(twin))
    assert torch.equal(logits(twin, input_ids=ids), changed)
    for module in attentions(twin):
        detach(module)
    assert torch.equal(logits(twin, input_ids=ids), clean)
    assert torch.equal(logits(model, input_ids=ids), changed)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_attach_refuses_what_would_be_ignored_or_does_not_fit() -> None:
    plain = tiny_model("llama")
    for act in (lambda m: attach(m, AttentionChange()), lambda m: recording_kv(m).__enter__()):
        with pytest.raises(InputError, match='attn="crossbit"'):
            act(attentions(plain)[0])
    before = AttentionChange(key=KVGrid(8, before_rope=True))
    for family in ("phi3", "gpt_neox"):
        with pytest.raises(InputError, match="in one layer"):
            attach(attentions(open_tiny(family))[0], before)
    module = attentions(open_tiny("llama"))[0]
    part = torch.zeros(1, 4, 3, 16)
    with pytest.raises(InputError, match="does not fit"):
        attach(module, AttentionChange(prefix_key=part, prefix_value=part))
    with pytest.raises(InputError, match="does not fit"):
        attach(module, AttentionChange(rotation=torch.eye(8)))
    assert attached(module) is None


def test_a_key_layer_replaced_after_attach_is_noticed() -> None:
    model = open_tiny("llama")
    attach_all(model, AttentionChange(key=KVGrid(8, before_rope=True)))
    module: Any = attentions(model)[1]
    module.k_proj = copy.deepcopy(plain := nn.Linear(64, 32).double())
    with pytest.raises(WorkError, match="attach the change again"):
        logits(model, input_ids=sample_ids(1, 4))
    assert not plain._forward_hooks


# -- prefix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_equals_a_longer_sequence(family: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = open_tiny(family, dtype=dtype)
        ids = sample_ids(2, PREFIX + LENGTH)
        ids[:, :PREFIX] = ids[0, :PREFIX]
        own = {"input_ids": ids[:, PREFIX:], "position_ids": positions_after(PREFIX, LENGTH)}
        expected = logits(model, input_ids=ids)[:, PREFIX:]
        rotation = orthogonal(head_dim(attentions(model)[0]))
        others: Any
        for others in ({}, {"rotation": rotation}):
            attach_prefix(model, ids[:1, :PREFIX], **others)
            actual = logits(model, **own)
            mask = torch.ones(2, LENGTH, dtype=torch.long)
            masked = logits(model, **own, attention_mask=mask)
            assert close(actual, expected, tolerance)
            assert close(masked, expected, tolerance)
            for module in attentions(model):
                detach(module)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_prefix_is_visible_beyond_the_sliding_window(family: str) -> None:
    model = open_tiny(family, window=SLIDING_WINDOW)
    ids = sample_ids(1, PREFIX + LENGTH)
    total = PREFIX + LENGTH
    visible = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        for k in range(q + 1):
            visible[q, k] = k < PREFIX or q - k < SLIDING_WINDOW
    full = torch.ones(total, total, dtype=torch.bool).tril()
    masks: Any = {"sliding_attention": visible[None, None], "full_attention": full[None, None]}
    if family == "mistral":
        masks = visible[None, None]
    whole = logits(model, input_ids=ids, attention_mask=masks)[:, PREFIX:]
    windowed = logits(model, input_ids=ids)[:, PREFIX:]
    attach_prefix(model, ids[:, :PREFIX])
    own = logits(model, input_ids=ids[:, PREFIX:], position_ids=positions_after(PREFIX, LENGTH))
    assert close(own, whole, 1e-12)
    assert not close(windowed, whole, 1e-6)


def checkpoint_of(model: Any) -> DictCheckpoint:
    return DictCheckpoint(dict(model.state_dict()))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_the_shell_run_after_a_prefix(family: str) -> None:
    """The arguments of P + L tokens, cut, and a change attached block by block."""
    model = open_tiny(family, dtype=torch.float32)
    unfuse_experts(model, family_of(model.config))
    ids = sample_ids(2, PREFIX + LENGTH)
    ids[:, :PREFIX] = ids[0, :PREFIX]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, PREFIX:]
        prefix = prefix_of(model, ids[:1, :PREFIX])
        shell = Shell(model.config, attn="crossbit")
        shell.load_outside(checkpoint_of(model), torch.float32)
        hidden = shell.embed(ids)[:, PREFIX:]
        captured = shell.block_kwargs(PREFIX + LENGTH, torch.float32)
        known = [dict(k) for k in captured]
        for i in range(shell.num_blocks):
            block = shell.load_block(i, checkpoint_of(model), torch.float32)
            (module,) = attentions(block)
            attach(module, AttentionChange(prefix_key=prefix[i][0], prefix_value=prefix[i][1]))
            hidden = shell.run_block(i, hidden, prefix_kwargs(captured[i], PREFIX))
            shell.free_block(i)
            shell.load_block(i, checkpoint_of(model), torch.float32)
            assert attached(attentions(shell.block(i))[0]) is None  # pristine again
        actual = shell.logits(hidden)
    assert close(actual, expected, 1e-5)
    assert all(a.keys() == b.keys() for a, b in zip(captured, known, strict=True))


def test_prefix_kwargs_cut_positions_and_mask() -> None:
    shell = Shell(tiny_config("mistral", tied=False), attn="crossbit")
    shell.load_outside(checkpoint_of(tiny_model("mistral")), torch.float32)
    whole, own = (shell.block_kwargs(n, torch.float32)[0] for n in (PREFIX + LENGTH, LENGTH))
    cut = prefix_kwargs(whole, PREFIX)
    assert cut.keys() == own.keys()
    assert torch.equal(cut["attention_mask"], own["attention_mask"])
    assert torch.equal(cut["position_ids"], own["position_ids"] + PREFIX)
    for table, longer in zip(cut["position_embeddings"], whole["position_embeddings"], strict=True):
        assert torch.equal(table, longer[:, PREFIX:])
    assert torch.equal(prefix_kwargs({"cache_position": torch.arange(5)}, 3)["cache_position"],
                       torch.tensor([3, 4]))  # fmt: skip
    with pytest.raises(InputError, match="no rule"):
        prefix_kwargs({"surprise": torch.zeros(2)}, 1)
    with pytest.raises(InputError, match="no token is left"):
        prefix_kwargs(own, LENGTH)


def test_gradients_reach_prefix_and_weights_through_the_quantizers() -> None:
    model = open_tiny("gemma3_text", dtype=torch.float32, window=SLIDING_WINDOW)
    ids = sample_ids(2, PREFIX + LENGTH)
    parts = [
        (k.requires_grad_(), v.requires_grad_()) for k, v in prefix_of(model, ids[:1, :PREFIX])
    ]
    others: dict[str, Any] = {
        "key": KVGrid(4),
        "value": KVGrid(4, clip=0.9),
        "rotation": orthogonal(32),
    }
    for module, (key, value) in zip(attentions(model), parts, strict=True):
        attach(module, AttentionChange(prefix_key=key, prefix_value=value, **others))
        module.k_proj.weight.requires_grad_()  # type: ignore[union-attr]
    out = model(
        input_ids=ids[:, PREFIX:], position_ids=positions_after(PREFIX, LENGTH), use_cache=False
    ).logits
    out.square().mean().backward()
    trained = [t for pair in parts for t in pair]
    trained += [m.k_proj.weight for m in attentions(model)]  # type: ignore[misc, union-attr]
    for t in trained:
        assert t.grad is not None
        assert bool(t.grad.isfinite().all())
        assert float(t.grad.abs().max()) > 0


# -- generation -------------------------------------------------------------------------------


def generate(model: Any, ids: Tensor, tokens: int = 14, **kwargs: Any) -> Tensor:
    """Greedy continuation int64 [B, tokens]."""
    model.config.use_cache = True
    out: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0, **kwargs,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("family", DENSE)
def test_generation_with_a_cache_equals_one_full_forward(family: str) -> None:
    """Beyond the sliding window, after a prefix that stays visible."""
    model = open_tiny(family, window=SLIDING_WINDOW)
    whole = sample_ids(1, PREFIX + 6)
    ids = whole[:, PREFIX:].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    for before_rope in (False, True):
        key = KVGrid(4, before_rope=before_rope)
        attach_prefix(model, whole[:, :PREFIX], key=key, value=KVGrid(4, symmetric=True))
        with exact_float64():  # a difference in the last bits of float32 may flip a code
            new = generate(model, ids, position_ids=positions_after(PREFIX, 6))
        text = torch.cat((ids, new), 1)
        positions = positions_after(PREFIX, text.shape[1])
        full = logits(model, input_ids=text, position_ids=positions)
        full[..., model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        assert torch.equal(full[:, ids.shape[1] - 1 : -1].argmax(-1), new)
        for module in attentions(model):
            detach(module)


@pytest.mark.parametrize("family", DENSE)
def test_generation_after_a_prefix_equals_generation_of_the_longer_prompt(family: str) -> None:
    model = open_tiny(family)
    ids = sample_ids(1, PREFIX + 6)
    expected = generate(model, ids)
    attach_prefix(model, ids[:, :PREFIX])
    positions = positions_after(PREFIX, 6)
    assert torch.equal(generate(model, ids[:, PREFIX:], position_ids=positions), expected)


@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize("grid", [*GRIDS, KVGrid(3), None], ids=str)
def test_stored_bytes_give_back_what_the_fake_quantizer_gives(
    grid: KVGrid | None, width: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = keys(2, 3, 5, width).to(dtype)
        stored = encode(x, grid)
        assert stored.dtype == torch.uint8
        expected = x if grid is None else fake_quantize_kv(x, grid)
        assert torch.equal(decode(stored, grid, width, dtype), expected)
        if grid is not None:
            codes = -(-width // 2) if grid.bits <= 4 else width
            assert stored.shape[-1] == codes + (4 if grid.symmetric else 8)


@pytest.mark.parametrize("window", [SLIDING_WINDOW, 64])
@pytest.mark.parametrize("family", [*DENSE, "gpt_neox", "phi3"])
def test_a_quantized_cache_changes_the_memory_and_no_value(family: str, window: int) -> None:
    model = open_tiny(family, dtype=torch.float32, window=window)
    grids = {"key": KVGrid(4), "value": KVGrid(4, symmetric=True)}
    ids = sample_ids(2, 20)
    prefix = prefix_of(model, ids[:1, :PREFIX])
    for i, module in enumerate(attentions(model)[:-1]):  # the last has no grid
        pair = {"prefix_key": prefix[i][0], "prefix_value": prefix[i][1]}
        attach(module, AttentionChange(**grids, **pair))  # type: ignore[arg-type]
    plain, stored = DynamicCache(config=model.config), QuantizedCache(model.config, model.modules())
    for start, stop in ((0, 5), (5, 6), (6, 11), *((i, i + 1) for i in range(11, 20))):
        out = []
        for cache in (plain, stored):
            with torch.no_grad():
                positions = positions_after(PREFIX + start, stop - start)
                part = {"input_ids": ids[:, start:stop], "position_ids": positions}
                out.append(model(**part, past_key_values=cache, use_cache=True).logits)
        assert torch.equal(out[0], out[1])
    assert stored.get_seq_length() == 20
    for i in range(BLOCKS):
        ratio = stored.layers[i].keys.nbytes / plain.layers[i].keys.nbytes
        width = head_dim(attentions(model)[0])
        assert ratio == (1.0 if i == BLOCKS - 1 else (width / 2 + 8) / (4 * width))
    stored.reorder_cache(torch.tensor([1, 0]))
    plain.reorder_cache(torch.tensor([1, 0]))
    last = {"input_ids": ids[:, :1], "position_ids": positions_after(PREFIX + 20, 1)}
    with torch.no_grad():
        a, b = (model(**last, past_key_values=c, use_cache=True).logits for c in (plain, stored))
    assert torch.equal(a, b)


def test_a_quantized_cache_holds_rotated_keys_and_refuses_keys_before_rope() -> None:
    model = open_tiny("mistral", window=SLIDING_WINDOW)
    ids = sample_ids(2, 6)
    attach_all(model, AttentionChange(key=KVGrid(4), value=KVGrid(8), rotation=orthogonal(16)))
    cache = QuantizedCache(model.config, model.modules())
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    attach_all(model, AttentionChange(key=KVGrid(8, before_rope=True)))
    with pytest.raises(InputError, match="before RoPE"):
        QuantizedCache(model.config, model.modules())
