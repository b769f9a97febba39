"""Windows of token ids: where they lie in the stream, BOS, determinism, too short texts."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crossbit.corpora import Corpus, calibration_windows, evaluation_windows
from crossbit.errors import InputError

WORDS = 3000
BOS = WORDS


def number_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, whose id is the number written: the stream can be read off the text."""
    vocabulary = {str(i): i for i in range(WORDS)} | {"<s>": BOS, "<unk>": WORDS + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=16,  # shorter than every text here: the warning has to stay away
        unk_token="<unk>",
        **({"bos_token": "<s>"} if bos else {}),
    )


TOKENIZER = number_tokenizer()


def numbers(count: int, documents: int = 1) -> Corpus:
    """The numbers 0, 1, ... count - 1 in so many documents."""
    bounds = [count * i // documents for i in range(documents + 1)]
    return Corpus.of(
        "numbers",
        [" ".join(map(str, range(low, high))) for low, high in itertools.pairwise(bounds)],
        source="test",
    )


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 400), length=st.integers(2, 50), documents=st.integers(1, 5),
    bos=st.booleans(),
)  # fmt: skip
def test_evaluation_windows_reconstruct_the_stream(
    count: int, length: int, documents: int, bos: bool
) -> None:
    body = length - bos
    corpus = numbers(count, documents)
    if count < body:
        with pytest.raises(InputError, match=f"{count} tokens"):
            evaluation_windows(corpus, TOKENIZER, length=length, windows=None, bos=bos)
        return
    windows = evaluation_windows(corpus, TOKENIZER, length=length, windows=None, bos=bos)
    assert windows.dtype == torch.int64
    assert windows.shape == (count // body, length)
    if bos:
        assert (windows[:, 0] == BOS).all()
    kept = windows[:, int(bos) :].flatten().tolist()
    assert kept == list(range(len(kept)))
    assert count - len(kept) < body  # only a partial window is left out


def test_evaluation_windows_takes_the_first_ones_asked_for() -> None:
    corpus = numbers(100)
    every = evaluation_windows(corpus, TOKENIZER, length=10, windows=None, bos=False)
    some = evaluation_windows(corpus, TOKENIZER, length=10, windows=3, bos=False)
    assert torch.equal(some, every[:3])


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(2, 400), length=st.integers(2, 40), samples=st.integers(1, 30),
    documents=st.integers(1, 4), seed=st.integers(0, 2**31), bos=st.booleans(),
)  # fmt: skip
def test_calibration_windows_lie_in_the_stream(
    count: int, length: int, samples: int, documents: int, seed: int, bos: bool
) -> None:
    body = length - bos
    corpus = numbers(count, documents)
    draw: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "bos": bos}
    if count < body + samples - 1:
        with pytest.raises(InputError, match=f"{count} tokens.* need {body + samples - 1};"):
            calibration_windows(corpus, TOKENIZER, **draw)
        return
    windows = calibration_windows(corpus, TOKENIZER, **draw)
    assert windows.dtype == torch.int64
    assert windows.shape == (samples, length)
    assert torch.equal(windows, calibration_windows(corpus, TOKENIZER, **draw))
    if bos:
        assert (windows[:, 0] == BOS).all()
    rows = windows[:, int(bos) :].tolist()
    assert all(row == list(range(row[0], row[0] + body)) for row in rows)
    assert all(row[0] >= 0 and row[-1] < count for row in rows)
    starts = sorted(row[0] for row in rows)
    least = body if count >= samples * body else 1
    assert all(later - earlier >= least for earlier, later in itertools.pairwise(starts))


def test_calibration_windows_depend_on_the_seed_and_cover_the_text() -> None:
    corpus = numbers(WORDS)
    draws = [
        calibration_windows(corpus, TOKENIZER, samples=10, length=20, seed=seed, bos=False)
        for seed in range(40)
    ]
    assert not torch.equal(draws[0], draws[1])
    starts = torch.stack(draws)[:, :, 0].float()
    # uniform placement: the mean start is the middle, and both ends are reached
    assert abs(starts.mean().item() / WORDS - 0.5) < 0.05
    assert starts.min() < 0.05 * WORDS
    assert starts.max() > 0.93 * WORDS
    # random order, not sorted by place
    assert not all(bool((row.diff() > 0).all()) for row in starts)


def test_calibration_uses_the_whole_of_a_text_that_just_fits() -> None:
    windows = calibration_windows(numbers(60), TOKENIZER, samples=6, length=10, seed=3, bos=False)
    assert sorted(windows.flatten().tolist()) == list(range(60))


def test_no_warning_about_length_and_one_about_overlap(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = number_tokenizer()
    with caplog.at_level(logging.WARNING):
        evaluation_windows(numbers(100), tokenizer, length=10, windows=None, bos=False)
        calibration_windows(numbers(100), tokenizer, samples=3, length=10, seed=0, bos=False)
        assert caplog.text == ""
        calibration_windows(numbers(100), tokenizer, samples=11, length=10, seed=0, bos=False)
    assert "overlap" in caplog.text
    assert "longer than" not in capfd.readouterr().err


def test_no_special_tokens_are_added() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = number_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    assert tokenizer("1 2")["input_ids"] == [BOS, 1, 2]  # the trap is set
    corpus = numbers(40, documents=4)
    assert (evaluation_windows(corpus, tokenizer, length=8, windows=None, bos=False) < BOS).all()
    drawn = calibration_windows(corpus, tokenizer, samples=4, length=10, seed=0, bos=False)
    assert sorted(drawn.flatten().tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 1}, "length of 2 or more"),
        ({"windows": 0}, "windows is 0"),
        ({"windows": 11}, "numbers is too short: 100 tokens, and 11 window(s) of 10 need 110"),
    ],
)
def test_evaluation_errors_are_one_line(change: dict[str, int], says: str) -> None:
    wanted: dict[str, Any] = {"length": 10, "windows": None, "bos": False} | change
    with pytest.raises(InputError) as caught:
        evaluation_windows(numbers(100), TOKENIZER, **wanted)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samples_below_one_and_missing_bos_are_refused() -> None:
    with pytest.raises(InputError, match="samples is 0"):
        calibration_windows(numbers(100), TOKENIZER, samples=0, length=10, seed=0, bos=False)
    bare = number_tokenizer(bos=False)
    with pytest.raises(InputError, match="BOS"):
        calibration_windows(numbers(99), bare, samples=1, length=9, seed=0, bos=True)
    with pytest.raises(InputError, match="BOS"):
        evaluation_windows(numbers(99), bare, length=9, windows=None, bos=True)


def test_the_joiner_stands_between_documents_only() -> None:
    corpus = Corpus.of("joined", ["1 2", "3", "4 5"], joiner=" 9 ", source="test")
    stream = [1, 2, 9, 3, 9, 4, 5]
    drawn = calibration_windows(corpus, TOKENIZER, samples=1, length=7, seed=0, bos=False)
    assert drawn.tolist() == [stream]
    cut = evaluation_windows(corpus, TOKENIZER, length=7, windows=None, bos=False)
    assert cut.tolist() == [stream]
