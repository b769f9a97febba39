"""Causal attention in bfloat16 on CPUs, with its gradient, for training and calibration.

torch's fused kernel keeps scores in float32 and works through them in tiles; on a CPU with bfloat16
products its backward pass runs at a fraction of their speed. Here a few heads and rows of scores
are made at a time, small enough for the cache, by plain matrix products: 2 to 2.5 times as fast
forward and backward. Scores are rounded to bfloat16 on the way, after what is common to all of a
query's is taken out, so it is for gradients and for what they are taken against, not for
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crossbit.products import slow_dtypes

_ROWS = 128  # queries of a head at once; what is above the diagonal of a tile is wasted
_SCORES = 1 << 20  # scores at once: with their gradients, what a cache holds


def is_fast(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if ``causal_attention`` is the faster way for these tensors."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2]
        and query.shape[3] == value.shape[3]
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, each token seeing itself and what is before it) v.

    Args:
        query: [B, H, L, D].
        key, value: [B, Hkv, L, D], Hkv a divisor of H; query head h reads head h // (H / Hkv).
        scale: of the scores.

    Returns:
        [B, H, L, D]; gradients flow to all three.
    """
    dtype = query.dtype
    if query.shape[2] <= _ROWS or dtype in slow_dtypes():
        # Nothing to gain from bfloat16, and of few keys' gradients little is left to round.
        query, key, value = (x.float() for x in (query, key, value))
    found: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return found.to(dtype)


class _Causal(torch.autograd.Function):
    """The scores are made again in the backward pass: nothing of their size is kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        shared = key.shape[1]
        # Heads that read the same keys are rows of one product.
        q = (query * scale).reshape(batch * shared, heads // shared, length, width)
        k, v = (x.reshape(batch * shared, length, width) for x in (_centred(key), value))
        out = torch.empty_like(q)
        later = _later(q)
        for part, rows, end in _tiles(q):
            weights = _weights(_rows_of(q, part, rows), k[part, :end], rows, later)
            made = torch.bmm(weights, v[part, :end])
            out[part, :, rows] = made.reshape(out[part, :, rows].shape)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return out.reshape(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients at queries, keys and values."""
        q, k, v = ctx.saved_tensors
        gradient = gradient.reshape(q.shape)
        at_q = torch.empty_like(q)
        # Sums over all the tiles of queries: in bfloat16 late ones would get lost.
        at_k, at_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        later = _later(q)
        for part, rows, end in _tiles(q):
            queries, incoming = _rows_of(q, part, rows), _rows_of(gradient, part, rows)
            weights = _weights(queries, k[part, :end], rows, later)
            at_v[part, :end] += torch.bmm(weights.transpose(1, 2), incoming)
            slopes = torch.bmm(incoming, v[part, :end].transpose(1, 2))
            slopes = torch.ops.aten._softmax_backward_data(slopes, weights, -1, weights.dtype)
            at_q[part, :, rows] = torch.bmm(slopes, k[part, :end]).reshape(q[part, :, rows].shape)
            at_k[part, :end] += torch.bmm(slopes.transpose(1, 2), queries)
        queried, shared = ctx.shapes
        return (
            at_q.mul_(ctx.scale).reshape(queried),
            at_k.to(k.dtype).reshape(shared),
            at_v.to(v.dtype).reshape(shared),
            None,
        )


def _centred(key: Tensor) -> Tensor:
    """Keys without their mean over the tokens, which adds the same to all scores of a query.

    The softmax does not see it, but rounded scores would lose their differences in it: keys of a
    layer with a large bias have scores of hundreds that differ by ones. Gradients are the same,
    since those at the scores of a query add up to nothing.
    """
    wide = key.float()
    return (wide - wide.mean(2, keepdim=True)).to(key.dtype)


def _tiles(q: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Heads of keys, queries, and the end of the keys that those see, of q [n, G, L, D]."""
    count, group, length, _ = q.shape
    heads = max(1, _SCORES // (group * min(_ROWS, length) * length))
    for first in range(0, count, heads):
        for start in range(0, length, _ROWS):
            end = min(start + _ROWS, length)
            yield slice(first, min(first + heads, count)), slice(start, end), end


def _rows_of(x: Tensor, part: slice, rows: slice) -> Tensor:
    """[n, G, L, D] -> [n', G * rows, D]."""
    return x[part, :, rows].flatten(1, 2)


def _later(q: Tensor) -> Tensor:
    """-inf where a key comes after a query of the same tile, 0 elsewhere."""
    side = min(_ROWS, q.shape[2])
    return torch.full((side, side), float("-inf"), dtype=q.dtype).triu_(1)


def _weights(queries: Tensor, keys: Tensor, rows: slice, later: Tensor) -> Tensor:
    """Attention weights [n', G * rows, K] of queries that are the last of K positions."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    count = rows.stop - rows.start
    by_head = scores.view(scores.shape[0], -1, count, scores.shape[2])
    by_head[..., rows].add_(later[:count, :count])
    return torch.softmax(scores, -1)
