"""Models whose attention is changed, and random keys."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from tests.tiny import exact_float64, tiny_model
from torch import Tensor, nn

from crossbit.activations.kv import KVGrid
from crossbit.runtime.attention import AttentionChange, attach, recording_kv, register

register()


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


def keys(*shape: int, seed: int = 0) -> Tensor:
    """Random keys with an outlier channel, a token of zeros and one of equal values."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] += 30
    x[:, :, 0] = 0
    x[:, :, 1] = 2.5
    return x
