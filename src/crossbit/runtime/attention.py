"""What happens inside attention: quantized keys and values, a rotated head dimension, a prefix.

One seam for calibration, evaluation and generation. ``register`` makes "crossbit" an attention
implementation of transformers; a model opened with it computes what "sdpa" computes, bit for bit,
until ``attach`` gives one of its attention modules an ``AttentionChange``. Where gradients are
wanted on a CPU, or within ``calibrating``, and no mask says more than causal, as a sliding window
would, it takes a faster way to nearly the same (``causal_attention``). Models with
soft-capped scores (Gemma-2) run as "eager" only in transformers, and are computed here as "eager"
does.

Order of the changes, for queries [B, H, L, D], keys and values [B, Hkv, K, D] after RoPE:
rotate queries and keys; quantize keys and values; put the prefix in front, unquantized.

With a cache of transformers the keys and values that arrive here are all cached ones, as they were
before any change: each step quantizes them anew. The scale of a token depends on that token alone,
so the values are those of one forward pass, but the cache takes as much memory as before.
``runtime.kv_cache.QuantizedCache``, which generation uses, keeps the integers instead.

Sources: QuaRot (arXiv 2404.00456) for the rotation of queries and keys, PrefixQuant (arXiv
2410.05265) for the prefix; the grids are those of ``activations.kv``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from crossbit.activations.kv import KVGrid, fake_quantize_kv
from crossbit.errors import InputError, WorkError
from crossbit.runtime.causal_attention import causal_attention, is_fast

IMPLEMENTATION = "crossbit"  # the value of ``attn`` and of ``attn_implementation``
Rotation = Callable[[Tensor], Tensor]
_STATE = "crossbit_attention"  # attributes of an attention module
_RECORD = "crossbit_recorded_kv"
_STORED = "crossbit_stored"  # attribute of a tensor that a cache has already rotated and quantized


_calibrating: ContextVar[bool] = ContextVar("calibrating", default=False)


@contextmanager
def calibrating() -> Iterator[None]:
    """Within it, passes of text through blocks attend as training does, gradients or not.

    What a block is compared with and what it is trained to give then come from the same products.
    """
    token = _calibrating.set(True)
    try:
        yield
    finally:
        _calibrating.reset(token)


@dataclass(frozen=True, eq=False)
class AttentionChange:
    """What one attention module does differently.

    A change is never written to, so a copy of a module (``copy.deepcopy`` of a block) shares the
    change of the original, its tensors included; ``detach`` and ``attach`` on the copy leave the
    original as it is.

    Args:
        key: grid of the keys, None for floating point.
        value: grid of the values.
        rotation: orthogonal map of the head dimension, applied to queries and keys after RoPE: a
            callable [..., D] -> [..., D], or a matrix [D, D] that is multiplied from the right. It
            leaves q k^T unchanged, and spreads outlier channels of the keys before they are
            quantized.
        prefix_key: keys of prefix tokens [1, Hkv, P, D], after RoPE at positions 0..P-1, before
            ``rotation`` (``recording_kv`` gives them so). Every query sees all of them, whatever
            the sliding window, and they are not quantized. Positions of the sequence then start at
            P: see ``prefix_kwargs`` and ``positions_after``.
        prefix_value: their values [1, Hkv, P, D].

    Raises:
        InputError: settings that contradict each other.
    """

    key: KVGrid | None = None
    value: KVGrid | None = None
    rotation: Rotation | Tensor | None = None
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.value.before_rope:
            raise InputError("before_rope is for keys: values have no rotary embedding")
        if self.key is not None and self.key.before_rope and self.rotation is not None:
            raise InputError(
                "keys are rotated after RoPE: quantize them there too, or leave out the rotation"
            )
        if (self.prefix_key is None) != (self.prefix_value is None):
            raise InputError("a prefix needs both its keys and its values")
        if self.prefix_key is not None and self.prefix_value is not None:
            shape, other = tuple(self.prefix_key.shape), tuple(self.prefix_value.shape)
            if shape != other or len(shape) != 4 or shape[0] != 1:
                raise InputError(
                    f"prefix of shapes {shape}, {other}: both must be [1, heads, P, D]"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionChange:
        return self

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys [B, H, L, D] through ``rotation``, in their dtype."""
        if self.rotation is None:
            return x
        if not isinstance(self.rotation, Tensor):
            return self.rotation(x)
        # A matrix in bfloat16 would not be orthogonal.
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) @ self.rotation.to(x.device, wide)).to(x.dtype)


@dataclass
class _State:
    """What a module carries: its change, and the handle of the hook on its keys."""

    change: AttentionChange
    hook: Any = None


class _KeyHook:
    """Forward hook that quantizes keys before RoPE; it knows no module, so copies are free."""

    def __init__(self, grid: KVGrid, head_dim: int) -> None:
        self.grid = grid
        self.head_dim = head_dim

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heads = output.reshape(*output.shape[:-1], -1, self.head_dim)
        return fake_quantize_kv(heads, self.grid).reshape(output.shape)


def _key_source(module: nn.Module) -> nn.Module:
    """The submodule whose output is the keys before RoPE."""
    for name in ("k_norm", "k_proj"):
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(
        f"{type(module).__name__} computes queries, keys and values in one layer: its keys cannot "
        "be quantized before RoPE, set before_rope to false"
    )


def attach(module: nn.Module, change: AttentionChange) -> None:
    """Give an attention module its change, in place of one that it may have.

    For keys before RoPE attach after quantized layers are installed: the hook sits on the layer
    that is there now.

    Raises:
        InputError: the model was not opened with "crossbit", or the change does not fit the module.
    """
    config = cast(Any, module).config
    if config._attn_implementation != IMPLEMENTATION:
        raise InputError(
            f"attention runs as {config._attn_implementation!r}: call register() and open the "
            f'model with attn="{IMPLEMENTATION}" to change it'
        )
    _check_shapes(module, change)
    before = change.key is not None and change.key.before_rope
    source = _key_source(module) if before else None
    detach(module)
    state = _State(change)
    if source is not None:
        assert change.key is not None
        state.hook = source.register_forward_hook(_KeyHook(change.key, _head_dim(module)))
    setattr(module, _STATE, state)


def _head_dim(module: nn.Module) -> int:
    # GPT-NeoX has its own name for it.
    return int(getattr(module, "head_dim", None) or cast(Any, module).head_size)


def _check_shapes(module: nn.Module, change: AttentionChange) -> None:
    """Raise ``InputError`` where prefix or matrix have other heads or dimensions."""
    width = _head_dim(module)
    if change.prefix_key is not None:
        config = cast(Any, module).config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if (found := change.prefix_key.shape)[1::2] != (heads, width):
            raise InputError(f"prefix {tuple(found)} does not fit: [1, {heads}, P, {width}] needed")
    if isinstance(change.rotation, Tensor) and change.rotation.shape != (width, width):
        shape = tuple(change.rotation.shape)
        raise InputError(f"rotation {shape} does not fit: [{width}, {width}] needed")


def detach(module: nn.Module) -> None:
    """Take the change away again; nothing happens where there is none."""
    state = getattr(module, _STATE, None)
    if state is not None:
        if state.hook is not None:
            state.hook.remove()
        delattr(module, _STATE)


def attached(module: nn.Module) -> AttentionChange | None:
    """The change of a module, None if it has none."""
    state = getattr(module, _STATE, None)
    return None if state is None else cast(_State, state).change


@contextmanager
def recording_kv(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys (after RoPE) and values [B, Hkv, K, D] of every call, as they reach attention.

    Neither rotated nor quantized, except by a hook before RoPE; without an attached prefix. Run the
    prefix tokens alone in here and the one entry is ``prefix_key`` and ``prefix_value``.
    """
    if cast(Any, module).config._attn_implementation != IMPLEMENTATION:
        raise InputError(f'open the model with attn="{IMPLEMENTATION}" to record keys and values')
    before = getattr(module, _RECORD, None)
    found: list[tuple[Tensor, Tensor]] = []
    setattr(module, _RECORD, found)
    try:
        yield found
    finally:
        setattr(module, _RECORD, before)


def register() -> None:
    """Make "crossbit" known to transformers, with the masks of "sdpa"; again is no harm."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    # Without masks of its own an implementation gets none at all, not even a causal one.
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered; called by transformers.

    Args:
        module: the attention module.
        query: [B, H, L, D] after RoPE.
        key: [B, Hkv, K, D], with those of the cache.
        value: [B, Hkv, K, D].
        attention_mask: bool or additive [B or 1, 1, L, K]; None is causal, all visible for L = 1.
        kwargs: scaling, dropout, softcap and what else the model passes.

    Returns:
        Output [B, L, H, D], and None for the weights.

    Raises:
        WorkError: the layer whose output is quantized before RoPE was replaced after ``attach``.
    """
    record: list[tuple[Tensor, Tensor]] | None = getattr(module, _RECORD, None)
    if record is not None:
        record.append((key.detach(), value.detach()))
    state: _State | None = getattr(module, _STATE, None)
    added = 0  # queries in front
    capped = kwargs.get("softcap") is not None
    if state is not None:
        if state.hook is not None and state.hook.id not in _key_source(module)._forward_hooks:
            raise WorkError("a key layer was replaced after attach(): attach the change again")
        change = state.change
        query = change.rotate(query)
        key, value = _changed(change, key, value)
        if change.prefix_key is not None and change.prefix_value is not None:
            prefix = change.prefix_key.shape[2]
            causal = _is_causal(module, kwargs)
            if causal and not capped and _is_whole(query, key, attention_mask):
                query, added = functional.pad(query, (0, 0, prefix, 0)), prefix
            else:
                attention_mask = _with_prefix_visible(attention_mask, query, key, prefix, causal)
            key = _prepend(change.rotate(change.prefix_key), key)
            value = _prepend(change.prefix_value, value)
    if capped:
        return _softcapped(module, query, key, value, attention_mask, **kwargs), None
    if _fast(module, query, key, value, attention_mask, kwargs):
        scale = _scale(query, kwargs.get("scaling"))
        found = causal_attention(query, key, value, scale).transpose(1, 2)
    else:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found, _ = plain(module, query, key, value, attention_mask, **kwargs)
    return found[:, added:].contiguous(), None


def _is_whole(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """True for sequences from their first token on, of which each sees all before it.

    After a prefix they are the end of a causal sequence. With queries for the prefix too, whose
    outputs are dropped, no mask is needed, which the kernels take two to three times as long with.
    """
    return mask is None and query.shape[2] == key.shape[2] > 1


def _fast(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> bool:
    """True if plain causal attention is for gradients or calibration, and ours the faster way."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return (
        (wanted or _calibrating.get())
        and mask is None
        and _is_causal(module, kwargs)
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and is_fast(query, key, value)
    )


def _is_causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """What the call says, or the module."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _scale(query: Tensor, scaling: float | None) -> float:
    """Of the scores; transformers' default is that of the head's width."""
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _changed(change: AttentionChange, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if not getattr(key, _STORED, False):
        key = change.rotate(key)
        if change.key is not None and not change.key.before_rope:
            key = fake_quantize_kv(key, change.key)
    if change.value is not None and not getattr(value, _STORED, False):
        value = fake_quantize_kv(value, change.value)
    return key, value


def mark_stored(x: Tensor) -> Tensor:
    """Mark keys or values that come from a cache already rotated and quantized; returns them."""
    setattr(x, _STORED, True)
    return x


def _prepend(prefix: Tensor, x: Tensor) -> Tensor:
    own = prefix.to(x.device, x.dtype).expand(x.shape[0], -1, -1, -1)
    return torch.cat((own, x), dim=2)


def _causal(length: int, keys: int, device: torch.device) -> Tensor:
    """Bool [1, 1, L, K], aligned at the upper left as the flag of SDPA is."""
    return torch.ones(1, 1, length, keys, dtype=torch.bool, device=device).tril()


def _with_prefix_visible(
    mask: Tensor | None, query: Tensor, key: Tensor, prefix: int, causal: bool
) -> Tensor | None:
    """A mask [., 1, L, K] with P columns in front that everybody sees; None if all see all."""
    if mask is None:
        if query.shape[2] == 1 or not causal:
            return None
        mask = _causal(query.shape[2], key.shape[2], query.device)
    return functional.pad(mask, (prefix, 0), value=True if mask.dtype == torch.bool else 0.0)


def _softcapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """Attention with scores capped as softcap * tanh(scores / softcap), which SDPA cannot.

    The steps and dtypes of transformers' eager code, so results are the same bit for bit.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * _scale(query, scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = _causal(query.shape[2], key.shape[2], query.device)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def positions_after(prefix: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Position ids int64 [1, L] of a sequence after a prefix of P tokens.

    For a whole model: ``model(ids, position_ids=...)`` and ``model.generate(ids,
    position_ids=...)``, which continues them. The cache holds the sequence's own tokens only.
    """
    return torch.arange(prefix, prefix + length, device=device).unsqueeze(0)


def start_after(model: nn.Module, prefix: int) -> None:
    """Let a whole model count positions from P on, whoever calls it, with a cache or without.

    What a caller gives as ``position_ids`` is counted from 0, as generation does.
    """

    def shift(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("position_ids")
        if given is None:
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            assert isinstance(ids, Tensor)
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            given = positions_after(past, ids.shape[1], ids.device)
        return args, {**kwargs, "position_ids": given + prefix}

    model.register_forward_pre_hook(shift, with_kwargs=True)


def prefix_kwargs(kwargs: Mapping[str, Any], prefix: int) -> dict[str, Any]:
    """Keyword arguments of a block for sequences of L tokens after a prefix of P.

    The mask is that of the own tokens [., 1, L, L]; ``attention`` adds the prefix. Where positions
    are added before the blocks (OPT), the hidden state too must be cut from an embedding of P + L
    tokens.

    Args:
        kwargs: captured at length P + L (``Shell.block_kwargs``); not changed.
        prefix: P.

    Raises:
        InputError: the block gets a tensor that is not known here, or no more than P tokens.
    """
    found = dict(kwargs)
    for name, value in kwargs.items():
        if name == "attention_mask" and isinstance(value, Tensor):
            found[name] = value[..., prefix:, prefix:]
        elif name == "position_embeddings" and isinstance(value, tuple):
            found[name] = tuple(table[..., prefix:, :] for table in value)
        elif name in ("position_ids", "cache_position") and isinstance(value, Tensor):
            found[name] = value[..., prefix:]
        elif isinstance(value, Tensor):
            raise InputError(f"no rule how the block's argument {name} is cut after a prefix")
        if isinstance(found[name], Tensor) and found[name].shape[-1] == 0:
            raise InputError(f"no token is left after a prefix of {prefix}")
    return found
