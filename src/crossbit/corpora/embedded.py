"""The default text, on every machine without a download: Wikipedia articles inside gensim.

gensim ships a shortened Wikipedia dump among its test data (CC BY-SA). The article is the unit of
the split: the SHA-256 of its title decides, so that the two parts share no article, an article's
part never depends on the others, and the parts are the same on every machine.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import importlib.metadata
import io
import json
from pathlib import Path

from crossbit.cache import atomic_write, crossbit_cache_dir
from crossbit.corpora import markup
from crossbit.corpora.corpus import Corpus, Split, one_line
from crossbit.errors import InputError

MIN_ARTICLE_CHARACTERS = 2000
"""Articles with less prose than this are disambiguation pages and stubs: left out (13 of 101)."""

EVALUATION_ONE_IN = 5
"""One title hash in five goes to evaluation: 18 of the 88 articles, 17.5 % of the bytes."""

_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_LICENCE = "CC BY-SA 3.0"
_INSTALL = "install it with pip install 'gensim>=4.4,<4.5', or give a text file instead"

Articles = dict[str, str]
"""Title to prose, in the order of the dump."""


def split_of(title: str) -> Split:
    """Return the part an article belongs to; a fixed function of its title."""
    digest = int(hashlib.sha256(title.encode("utf-8")).hexdigest(), 16)
    return "evaluation" if digest % EVALUATION_ONE_IN == 0 else "calibration"


def embedded_corpus(split: Split) -> Corpus:
    """Return the embedded default's calibration or evaluation part.

    The first call cleans the dump (about 5 s) and keeps the result in the cache folder; later ones
    read that. Raises InputError when gensim, or its test data, is not installed.
    """
    articles = _load()
    return Corpus.of(
        f"embedded (Wikipedia, {split})",
        (prose for title, prose in articles.items() if split_of(title) == split),
        source="English Wikipedia articles in the test data of gensim",
        licence=_LICENCE,
    )


def _load() -> Articles:
    dump = _find_dump()
    try:
        packed = dump.read_bytes()
    except OSError as error:
        raise InputError(
            f"the embedded text: {dump} cannot be read ({error.strerror}); {_INSTALL}"
        ) from error
    # The key holds all that the result depends on, so that a stale cache cannot be read.
    key = hashlib.sha256(packed)
    key.update(Path(markup.__file__).read_bytes())
    key.update(str(MIN_ARTICLE_CHARACTERS).encode())
    cached = crossbit_cache_dir() / "corpora" / f"wikipedia-{key.hexdigest()[:16]}.json"
    articles = _read_cache(cached)
    if articles is None:
        articles = _clean(packed)
        with contextlib.suppress(OSError):  # the cache saves time only: work without it
            _write_cache(cached, articles)
    return articles


def _find_dump() -> Path:
    """Find the dump without importing gensim, which takes a second."""
    try:
        distribution = importlib.metadata.distribution("gensim")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"the embedded text is inside the package gensim, which is missing; {_INSTALL}"
        ) from error
    path = Path(str(distribution.locate_file(_DUMP)))
    if not path.is_file():
        raise InputError(
            f"the embedded text is not in the installed gensim {distribution.version} "
            f"(no {Path(_DUMP).name}); {_INSTALL}"
        )
    return path


def _clean(packed: bytes) -> Articles:
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ImportError as error:
        raise InputError(
            f"the embedded text: gensim cannot be imported ({one_line(error)}); {_INSTALL}"
        ) from error
    try:
        pages = extract_pages(io.BytesIO(bz2.decompress(packed)), filter_namespaces=("0",))
        articles = {title: markup.prose(raw, filter_wiki) for title, raw, _ in pages if raw}
    except (OSError, ValueError, SyntaxError) as error:  # ParseError is a SyntaxError
        raise InputError(
            f"the embedded text: gensim's {Path(_DUMP).name} is damaged "
            f"({one_line(error)}); {_INSTALL}"
        ) from error
    return {t: prose for t, prose in articles.items() if len(prose) >= MIN_ARTICLE_CHARACTERS}


def _write_cache(path: Path, articles: Articles) -> None:
    body = json.dumps(articles, ensure_ascii=False).encode("utf-8")
    atomic_write(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read_cache(path: Path) -> Articles | None:
    """Return the cached articles, or None when there are none or they are damaged."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
        return None
    articles: Articles = json.loads(body)
    return articles
