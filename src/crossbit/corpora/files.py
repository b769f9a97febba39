"""Texts in local files: .txt, .jsonl and .parquet, with text or with chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossbit.corpora.chat import chat_to_text
from crossbit.corpora.corpus import Corpus, one_line
from crossbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
_FIELDS = ("text", "messages")


def file_corpus(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """Read a local file.

    ``.txt`` is one document; each line of ``.jsonl`` and each row of ``.parquet`` is one, out of
    its ``text`` or, through the tokenizer's chat template, its ``messages``; empty ones are left
    out. Raises InputError for a file that cannot be read, is not UTF-8, is malformed (with the
    line), lacks the field, or holds no text.
    """
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file of {_listed()}")
    if reader is None:
        raise InputError(f"{path}: a text file has to be one of {_listed()}")
    try:
        documents = tuple(text for text in reader(path, tokenizer) if text.strip())
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{path} cannot be read ({reason}); check the file") from error
    if not documents:
        raise InputError(f"{path} holds no text; give a file with text in it")
    return Corpus.of(path.name, documents, source=f"local file {path.name}")


def _listed() -> str:
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(f"{where} is not text (it holds a NUL byte); convert it to UTF-8 text")
    return text


def _text(path: Path, _: PreTrainedTokenizerBase | None) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path))


def _jsonl(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            where = f"{path} line {number}"
            line = _decode(raw, where)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where} is not valid JSON ({one_line(error)}); one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object; write one object a line")
            yield _document(row, tokenizer, where)


def _document(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    text = row.get("text")
    if isinstance(text, str):
        return text
    if text is None and row.get("messages") is not None:
        return chat_to_text(row["messages"], tokenizer, where=where)
    if "text" in row:
        raise InputError(f'{where}: "text" is {type(text).__name__}, not a string')
    found = ", ".join(sorted(map(str, row))) or "none"
    raise InputError(f'{where} has no "text" and no "messages" field (it has: {found})')


def _parquet(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            column = next((field for field in _FIELDS if field in names), None)
            if column is None:
                raise InputError(
                    f'{path} has no column "text" or "messages" (it has: {", ".join(names)})'
                )
            row = 0
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if value is not None:
                        yield _document({column: value}, tokenizer, f"{path} row {row}")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a readable parquet file ({one_line(error)}); check or rewrite it"
        ) from error
