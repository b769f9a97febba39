"""From the name or path a user gives to a text."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from crossbit.corpora.corpus import Corpus, Split
from crossbit.corpora.embedded import embedded_corpus
from crossbit.corpora.files import SUFFIXES, file_corpus
from crossbit.corpora.hub import HUB_TEXTS, hub_corpus
from crossbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
TEXT_NAMES = (EMBEDDED, *HUB_TEXTS)


def load_text(
    name: str | None,
    *,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Load the text a user names.

    Args:
        name: None or "embedded" for the embedded default, "wikitext2" or "c4" for the hub's, or
            the path of a .txt, .jsonl or .parquet file. A known name wins over a file of that
            name in the current folder (write "./c4" for the file).
        split: which part of a text that has parts; a local file has one.
        tokenizer: the model's, for files with chat messages.

    Raises:
        InputError: an unknown name (with the nearest one), a file that is not there or not
            readable as text, a hub that cannot be reached.
    """
    if split not in get_args(Split):
        raise InputError(f'no split "{split}" of a text; use one of {", ".join(get_args(Split))}')
    if name is None or name == EMBEDDED:
        return embedded_corpus(split)
    if name in HUB_TEXTS:
        return hub_corpus(name, split)
    path = Path(name).expanduser()
    try:
        found = bool(name.strip()) and path.exists()
    except OSError as error:  # a folder on the way that may not be entered, a name too long
        shown = name if len(name) <= 100 else name[:97] + "..."
        raise InputError(
            f"the text {shown} cannot be opened ({error.strerror}); check the path"
        ) from error
    if found:
        return file_corpus(path, tokenizer)
    if "/" in name or "\\" in name or path.suffix.lower() in SUFFIXES:
        raise InputError(f"no such text file: {name}; check the path")
    nearest = difflib.get_close_matches(name.lower(), TEXT_NAMES, n=1, cutoff=0.4)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    known = ", ".join(TEXT_NAMES)
    raise InputError(
        f'no text is called "{name}"; {hint}known are {known}, '
        "or give the path of a .txt, .jsonl or .parquet file"
    )
