"""Changes inside attention: against plain transformers, longer sequences, loops over values."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attending import (
    LENGTH,
    PREFIX,
    attach_all,
    attach_prefix,
    attentions,
    head_dim,
    keys,
    logits,
    open_tiny,
    orthogonal,
    prefix_of,
)
from tests.tiny import FAMILIES, SLIDING_WINDOW, DictCheckpoint, sample_ids, tiny_config, tiny_model
from torch import Tensor, nn

from crossbit.activations.kv import KVGrid, fake_quantize_kv
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
)

SEPARATE = [f for f in FAMILIES if f not in ("phi3", "gpt_neox")]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


# -- the seam --------------------------------------------------------------------------------------


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


# -- prefix ----------------------------------------------------------------------------------------


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
