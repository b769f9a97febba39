"""Texts to windows of token ids: drawn at random to calibrate, cut in order to evaluate."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossbit.corpora.corpus import Corpus
from crossbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def calibration_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: bool,
) -> Tensor:
    """Draw windows at random places of a text's token stream.

    The stream is the documents, each with the joiner after it, tokenised without special tokens
    and laid end to end. Where it is long enough the windows do not overlap (uniform over all such
    placements, in random order); where it is not, they overlap but no two are the same, and a
    warning is logged.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        samples: number of windows.
        length: tokens a window, a BOS token included.
        seed: same seed, same ids.
        bos: put the tokenizer's BOS token at the start of each window.

    Returns:
        int64 [samples, length] on the CPU.

    Raises:
        InputError: numbers out of range, too short a text, or no BOS token.
    """
    _check_positive("samples", samples)
    body, first = _body(tokenizer, length, bos)
    ids = _document_stream(corpus, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    needed = body + samples - 1  # fewer have no `samples` different starts
    if len(ids) < needed:
        raise _too_short(
            corpus, len(ids), needed, f"{samples} different windows of {length}", "samples"
        )
    free = len(ids) - samples * body
    if free >= 0:
        # Sorted gaps before each window: a placement without overlap, each equally likely in
        # the limit of a long text.
        gaps = torch.randint(free + 1, (samples,), generator=generator).sort().values
        starts = gaps + body * torch.arange(samples)
        starts = starts[torch.randperm(samples, generator=generator)]
    else:
        _log.warning(
            "%s has %d tokens, fewer than %d windows of %d need: the calibration windows overlap",
            corpus.name, len(ids), samples, length,
        )  # fmt: skip
        starts = torch.randperm(len(ids) - body + 1, generator=generator)[:samples]
    windows = ids[starts[:, None] + torch.arange(body)]
    return _with_first(windows, first)


def evaluation_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    windows: int | None,
    bos: bool,
) -> Tensor:
    """Cut a text into consecutive windows: the convention of GPTQ's perplexities.

    The joined text is tokenised once as one string without special tokens and cut into
    non-overlapping windows; a last partial one is left out. With ``bos`` each window is the BOS
    token and ``length - 1`` tokens of the text.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        length: tokens a window, a BOS token included; at least 2, the least that predicts.
        windows: how many windows, from the start; None for all there are.
        bos: put the tokenizer's BOS token at the start of each window.

    Returns:
        int64 [n, length] on the CPU, n at least 1.

    Raises:
        InputError: numbers out of range, fewer windows in the text than asked, no BOS token.
    """
    if windows is not None:
        _check_positive("windows", windows)
    body, first = _body(tokenizer, length, bos)
    ids = _tokenise(tokenizer, [corpus.text])
    wanted = 1 if windows is None else windows
    if len(ids) < wanted * body:
        raise _too_short(
            corpus, len(ids), wanted * body, f"{wanted} window(s) of {length}", "windows"
        )
    count = len(ids) // body if windows is None else windows
    return _with_first(ids[: count * body].reshape(count, body), first)


def _document_stream(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [n] of all documents; one by one, so that fast tokenizers use all cores."""
    *most, last = corpus.documents or ("",)
    return _tokenise(tokenizer, [*(document + corpus.joiner for document in most), last])


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Token ids of texts laid end to end, int64 [n]; no special tokens added."""
    # verbose=False: the text is longer than the model's context on purpose
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    parts = [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
    return torch.cat(parts)


def _body(tokenizer: PreTrainedTokenizerBase, length: int, bos: bool) -> tuple[int, int | None]:
    """Return how many tokens of the text a window holds, and the token before them if any."""
    if length < 2:
        raise InputError(
            f"a window of {length} token(s) predicts nothing; use a length of 2 or more"
        )
    if not bos:
        return length, None
    token = tokenizer.bos_token_id
    if token is None:
        raise InputError(
            "windows with a BOS token were asked for and the model's tokenizer has none; "
            "set bos_token in its tokenizer_config.json, or leave BOS out"
        )
    return length - 1, int(token)


def _with_first(windows: Tensor, first: int | None) -> Tensor:
    if first is None:
        return windows.contiguous()
    column = torch.full((windows.shape[0], 1), first, dtype=torch.int64)
    return torch.cat([column, windows], dim=1)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}; it has to be 1 or more")


def _too_short(corpus: Corpus, have: int, needed: int, what: str, option: str) -> InputError:
    return InputError(
        f"{corpus.name} is too short: {have} tokens, and {what} need {needed}; "
        f"give a longer text, or lower {option} or length"
    )
