"""Queries and keys: the rows that make them, and which of those may share a factor.

The scores q k^T stay what they are if a channel of the queries is divided by a factor and the same
channel of the keys multiplied with it. The rotary embedding mixes two channels of a head, so the
two have one factor; query heads that read one key head have that head's factors. A norm behind the
projection would take a factor away again: there are none then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crossbit.models.families import QueryKeyRule


@dataclass(frozen=True)
class QueryKey:
    """Rows of a block's queries and keys that a common factor may divide and multiply.

    Attributes:
        queries: linear layer whose rows ``query_rows`` are the queries.
        keys: that of the keys, the same where they are stacked.
        query_rows: int64 [Q].
        query_factors: int64 [Q], number of the factor that divides each of them.
        key_rows: int64 [R].
        key_factors: int64 [R], number of the factor that multiplies each.
    """

    queries: str
    keys: str
    query_rows: Tensor = field(compare=False)
    query_factors: Tensor = field(compare=False)
    key_rows: Tensor = field(compare=False)
    key_factors: Tensor = field(compare=False)

    @property
    def count(self) -> int:
        """Number of factors."""
        return int(self.key_factors.max()) + 1


def query_key(
    rule: QueryKeyRule,
    modules: Mapping[str, nn.Module],
    config: object,
    rotary: int | None,
) -> QueryKey | str:
    """The rows in one block, or why no factor of them is exact.

    Args:
        rule: of the family.
        modules: of the block, by relative name.
        config: has ``num_attention_heads``.
        rotary: channels of a head that the rotary embedding turns, of which channel i and channel
            i + rotary / 2 are a pair (see ``rotary_width``).
    """
    queries, keys = modules.get(rule.queries), modules.get(rule.keys)
    if not isinstance(queries, nn.Linear) or not isinstance(keys, nn.Linear):
        return "no projections of queries and keys are known"
    attention = modules[rule.queries.rpartition(".")[0]]
    if any("norm" in name for name, _ in attention.named_children()):
        return "queries or keys are normed behind their projections, which undoes a factor"
    if rotary is None:
        return "it is not known which channels the rotary embedding mixes"
    heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    parts = {
        "kv_heads": heads,
        "qkv_stacked": heads + 2 * kv_heads,
        "qkv_per_head": 3 * heads,
    }[rule.layout]
    width = queries.out_features // parts
    expected = kv_heads if rule.layout == "kv_heads" else parts
    if (
        width * parts != queries.out_features
        or width * expected != keys.out_features
        or heads % kv_heads
        or rotary > width
    ):
        return "its heads have sizes that are not known"
    query, key = torch.arange(heads * width), torch.arange(kv_heads * width)
    query_factors = _factors(heads, width, rotary, heads // kv_heads)
    key_factors = _factors(kv_heads, width, rotary, 1)
    if rule.layout == "qkv_stacked":
        key = key + heads * width
    elif rule.layout == "qkv_per_head":
        query = query + 2 * width * (query // width)
        key = query + width
    return QueryKey(rule.queries, rule.keys, query, query_factors, key, key_factors)


def rotary_width(model: nn.Module) -> int | None:
    """Channels of a head that the rotary embedding turns, 0 without one, None if not known."""
    found = [m for m in model.modules() if "Rotary" in type(m).__name__]
    tables = [getattr(module, "inv_freq", None) for module in found]
    widths = {None if table is None else 2 * int(table.numel()) for table in tables}
    return widths.pop() if len(widths) == 1 else None if found else 0


def _factors(heads: int, width: int, rotary: int, share: int) -> Tensor:
    """Number of the factor of each channel of ``heads``, of which ``share`` in a row have one."""
    channel = torch.arange(width)
    half = rotary // 2
    slot = torch.where(channel < rotary, channel % max(half, 1), channel - half)
    head = torch.arange(heads) // share
    return (head[:, None] * (width - half) + slot).flatten()
