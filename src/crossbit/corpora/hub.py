"""Texts of the Hugging Face hub: WikiText-2 and C4, in the protocols that papers report."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from crossbit.corpora.corpus import Corpus, Split, one_line
from crossbit.errors import InputError

CONNECT_SECONDS = 6.0
"""How long the hub may take to answer before it counts as out of reach."""

C4_CALIBRATION_DOCUMENTS = 4096  # about 9 MB, 2 million tokens: 1000 windows of 2048
C4_EVALUATION_DOCUMENTS = 1100  # as in GPTQ's protocol, which joins them with one space


@dataclass(frozen=True)
class HubText:
    """Where a text lies on the hub and how its rows become documents."""

    repository: str
    config: str | None
    splits: dict[Split, str]
    files: dict[Split, str] | None
    rows: dict[Split, int | None]
    joiner: dict[Split, str]
    licence: str


HUB_TEXTS = {
    "wikitext2": HubText(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits={"calibration": "train", "evaluation": "test"},
        files=None,
        rows={"calibration": None, "evaluation": None},
        joiner={"calibration": "\n\n", "evaluation": "\n\n"},
        licence="CC BY-SA 3.0",
    ),
    "c4": HubText(
        repository="allenai/c4",
        config=None,
        splits={"calibration": "train", "evaluation": "validation"},
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        rows={"calibration": C4_CALIBRATION_DOCUMENTS, "evaluation": C4_EVALUATION_DOCUMENTS},
        joiner={"calibration": "\n\n", "evaluation": " "},
        licence="ODC-BY 1.0",
    ),
}


def hub_corpus(name: str, split: Split) -> Corpus:
    """Load one of HUB_TEXTS through ``datasets``, from its cache if the hub is out of reach.

    Raises InputError, within seconds, when it is neither reachable (or open to this account) nor
    in the cache of datasets.
    """
    import huggingface_hub

    text = HUB_TEXTS[name]
    offline = huggingface_hub.is_offline_mode()
    unreachable = not offline and not _reachable()
    try:
        with _cache_only(unreachable):
            rows = _rows(text, split)
    except Exception as error:  # datasets, its HTTP clients and fsspec raise from many families
        if offline:
            reason = "HF_HUB_OFFLINE is set and there is no cached copy"
        elif unreachable:
            reason = f"no answer from {huggingface_hub.constants.ENDPOINT} and no cached copy"
        else:
            reason = one_line(error, 160)
        raise InputError(
            f'the text "{name}" ({text.repository}) cannot be loaded from the Hugging Face hub '
            f"({reason}); log in with hf auth login if it asks for an account, "
            "check the network, or give a local .txt, .jsonl or .parquet file"
        ) from error
    if not any(row.strip() for row in rows):
        raise InputError(f'the text "{name}" ({text.repository}) came back empty; try again')
    documents: Iterable[str] = wikitext_articles(rows) if name == "wikitext2" else rows
    part = text.files[split] if text.files else f"{text.config}, {text.splits[split]} split"
    return Corpus.of(
        name,
        documents,
        source=f"{text.repository} {part}",
        licence=text.licence,
        joiner=text.joiner[split],
    )


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    r"""Group WikiText's rows (paragraphs) into articles, joining theirs with two newlines.

    Joining the articles with two newlines then gives the bytes that joining all rows gives, which
    is the text everyone's perplexity on WikiText-2 is measured on. An article starts at a row
    ``" = Title = \n"``; sections have more than one equals sign.
    """
    article: list[str] = []
    for row in rows:
        if row.startswith(" = ") and not row.startswith(" = =") and any(article):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if article:
        yield "\n\n".join(article)


def _rows(text: HubText, split: Split) -> list[str]:
    import datasets

    options: dict[str, Any] = {"split": text.splits[split]}
    if text.files is not None:
        # one shard of a data set of hundreds of gigabytes, read as a stream
        options |= {"data_files": {text.splits[split]: text.files[split]}, "streaming": True}
    loaded = datasets.load_dataset(text.repository, text.config, **options)
    if text.files is None:
        return list(loaded["text"])
    return [row["text"] for row in itertools.islice(loaded, text.rows[split])]


@contextlib.contextmanager
def _cache_only(active: bool) -> Iterator[None]:
    """Let datasets look in its cache only: its clients retry each file for tens of seconds."""
    import datasets
    import huggingface_hub

    places = (
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    )
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    try:
        for place, name, _ in before if active else ():
            setattr(place, name, True)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _reachable() -> bool:
    """Ask the hub once, without retries; any answer but a server error counts."""
    import huggingface_hub

    try:
        answer = huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=CONNECT_SECONDS
        )
    except Exception:  # no route, no name, refused, too slow, bad certificate: all the same here
        return False
    return bool(answer.status_code < 500)
