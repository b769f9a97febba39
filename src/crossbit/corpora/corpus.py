"""A text as the rest of the program sees it: documents, how they are joined, where from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Split = Literal["calibration", "evaluation"]
DEFAULT_JOINER = "\n\n"


@dataclass(frozen=True)
class Corpus:
    """A named text, immutable, with what a report has to say about it.

    Attributes:
        name: as shown in reports, e.g. ``"embedded (Wikipedia, calibration)"``.
        documents: the documents in order, none of them empty unless the source has empty ones.
        joiner: what stands between two documents when they are read as one string.
        sha256: hexadecimal SHA-256 of the joined text in UTF-8.
        licence: the licence of the text where it is known.
        source: where the text comes from; never a path of this machine.
    """

    name: str
    documents: tuple[str, ...]
    joiner: str
    sha256: str
    licence: str | None
    source: str

    @classmethod
    def of(
        cls,
        name: str,
        documents: Iterable[str],
        *,
        source: str,
        licence: str | None = None,
        joiner: str = DEFAULT_JOINER,
    ) -> Corpus:
        """Build a corpus and its fingerprint from documents."""
        kept = tuple(documents)
        digest = hashlib.sha256(joiner.join(kept).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, kept, joiner, digest, licence, source)

    @property
    def text(self) -> str:
        """All documents as one string."""
        return self.joiner.join(self.documents)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's message as one line, to be quoted in a message of ours."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."
