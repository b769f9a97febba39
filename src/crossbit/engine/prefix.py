"""A prefix that takes the outlier tokens (PrefixQuant, arXiv 2410.05265).

Some tokens carry activations hundreds of times as large as all others: the first of a sequence, and
a few of little meaning. They serve attention as a place to look at, and once there are enough of
them no more appear. Put before every text as a fixed prefix, of which only the keys and values in
floating point are kept, they are gone from what has to be quantized.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.progress import release_memory
from crossbit.errors import InputError
from crossbit.models.experts import Weights, is_expert
from crossbit.models.families import needs_bos
from crossbit.models.shell import Shell
from crossbit.positions import free_positions
from crossbit.recipe import Prefix
from crossbit.runtime.attention import recording_kv
from crossbit.runtime.online import PrefixTokens, attention_of

_INPUTS = ("down_proj", "fc2")


@torch.no_grad()
def outlier_tokens(shell: Shell, weights: Weights, ids: Tensor, config: Prefix) -> Tensor:
    """Which tokens are outliers at the input of some down_proj: bool [S, L].

    A token is one where its largest magnitude exceeds ``config.ratio`` times the median token's of
    the same block.

    Args:
        shell: the original model, embedding and head loaded.
        weights: its weights.
        ids: int64 [S, L].
        config: says what an outlier is.
    """
    found = torch.zeros(ids.shape, dtype=torch.bool)
    hidden = torch.cat([shell.embed(part) for part in torch.split(ids, 1)])
    kwargs = shell.block_kwargs(ids.shape[1], hidden.dtype)
    for index in range(shell.num_blocks):
        structure = shell.structure.blocks[index]
        names = [
            n
            for n, info in structure.linears.items()
            if info.role in _INPUTS and not is_expert(f".{n}")
        ]
        block = shell.load_block(index, weights, hidden.dtype)
        weights.close()
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0].detach().abs().amax(-1).float().reshape(-1))

        handles = [block.get_submodule(n).register_forward_pre_hook(keep) for n in names]
        for row in range(ids.shape[0]):
            hidden[row : row + 1] = shell.run_block(index, hidden[row : row + 1], kwargs[index])
        for handle in handles:
            handle.remove()
        shell.free_block(index)
        release_memory()
        if seen:
            largest = torch.stack(seen).reshape(ids.shape[0], -1, ids.shape[1]).amax(1)
            found |= largest > config.ratio * largest.median()
    return found


def choose_prefix(ids: Tensor, outliers: Tensor, first: int | None, config: Prefix) -> list[int]:
    """The prefix: the most frequent outlier tokens, as many as a sequence has of them, then BOS.

    Args:
        ids: int64 [S, L].
        outliers: bool [S, L]. What stands first in a sequence is one whatever it is, and not
            counted.
        first: the token that begins a text, None if the model has none. It stands last, and
            nowhere else.
        config: ``largest`` limits the length.
    """
    later = outliers[:, 1:]
    mean = float(later.sum(1).float().mean())
    counts = Counter(t for t in ids[:, 1:][later].tolist() if t != first)
    wanted = min(math.ceil(mean), config.largest - (first is not None))
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[: max(0, wanted)]
    return [*frequent, *([] if first is None else [first])]


def starts_with_bos(config: Any, prefix: Prefix | None) -> bool:
    """Whether windows of text start with BOS, in a run with the prefix of a recipe if it has one.

    A prefix that has yet to be searched ends with BOS, see ``choose_prefix``.
    """
    if prefix is None:
        return needs_bos(config)
    first = getattr(config, "bos_token_id", None)
    return needs_bos(config, prefix.tokens or (() if first is None else (first,)))


def check_tokens(tokens: Sequence[int], config: Any) -> None:
    """Refuse a prefix that the model of ``config`` cannot take.

    Raises:
        InputError: no token, one without an embedding, or more than the model has positions.
    """
    if not tokens:
        raise InputError("prefix: the text has no outlier token and the model no BOS; name tokens")
    free = free_positions(config, len(tokens))
    if free is not None and free < 1:
        raise InputError(
            f"prefix: {len(tokens)} tokens leave none of the model's {free + len(tokens)} "
            "positions; give fewer tokens"
        )
    outside = [token for token in tokens if not 0 <= token < config.vocab_size]
    if outside:
        raise InputError(
            f"prefix: token {outside[0]} is outside the vocabulary of {config.vocab_size}; "
            "give other tokens"
        )


@torch.no_grad()
def prefix_tokens(
    shell: Shell, weights: Weights, tokens: Sequence[int], dtype: torch.dtype
) -> PrefixTokens:
    """Keys and values of the prefix in every block of a model without any quantization.

    Args:
        shell: opened with crossbit's attention; embedding loaded, and no prefix yet.
        weights: what is quantized.
        tokens: the prefix.
        dtype: of computation.

    Raises:
        InputError: the model cannot take it.
    """
    check_tokens(tokens, shell.config)
    hidden = shell.embed(torch.tensor([list(tokens)]))
    kwargs = shell.block_kwargs(len(tokens), dtype)
    keys, values = [], []
    for index in range(shell.num_blocks):
        block = shell.load_block(index, weights, dtype)
        weights.close()
        with recording_kv(attention_of(shell.structure.blocks[index], block)) as seen:
            hidden = shell.run_block(index, hidden.to(dtype), kwargs[index])
        ((key, value),) = seen
        keys.append(key.clone())
        values.append(value.clone())
        shell.free_block(index)
    return PrefixTokens(torch.tensor(tokens), tuple(keys), tuple(values))
