"""Texts to calibrate and to evaluate on, and their cutting into windows of token ids."""

from __future__ import annotations

from crossbit.corpora.corpus import Corpus, Split
from crossbit.corpora.load import TEXT_NAMES, load_text
from crossbit.corpora.windows import calibration_windows, evaluation_windows

__all__ = [
    "TEXT_NAMES",
    "Corpus",
    "Split",
    "calibration_windows",
    "evaluation_windows",
    "load_text",
]
