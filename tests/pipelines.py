"""Short runs of the whole job on tiny models."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest

import crossbit
from crossbit.corpora import Corpus
from crossbit.corpora.embedded import embedded_corpus

EVALUATION = ("evaluation.windows=2", "evaluation.length=32")
RECIPE = "crossquant-w8a8"


@functools.cache
def short_corpus(split: Any) -> Corpus:
    """The beginning of the embedded text: byte tokenisation of all of it takes seconds."""
    whole = embedded_corpus(split)
    return Corpus.of(whole.name, [whole.text[:20_000]], source="test", licence="test")


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Use the short text, and write no report, which has tests of its own."""
    patch.setattr("crossbit.corpora.load.embedded_corpus", short_corpus)
    patch.setattr("crossbit.finish.write_report", lambda result, folder: folder)


def write_text(path: Path, seed: int) -> Path:
    """A calibration text of random words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 8))) for _ in range(60)]
    path.write_text(" ".join(rng.choice(words) for _ in range(200)))
    return path


def run(model: Path, text: Path, out: Path, recipe: Any = RECIPE, **options: Any) -> dict[str, Any]:
    """``crossbit.quantize`` with few, short windows."""
    chosen: dict[str, Any] = {"settings": EVALUATION, "samples": 4, "length": 32, **options}
    return crossbit.quantize(str(model), recipe, out=out, calibration=str(text), **chosen)


def custom(**data: Any) -> crossbit.Recipe:
    """A recipe of 4 bits in groups of 16, changed."""
    base: dict[str, Any] = {"weights": {"bits": 4, "group": 16}}
    return crossbit.Recipe.parse({**base, **data}, "custom")
