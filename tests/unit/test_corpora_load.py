"""Names and local files to texts, and the one line that each bad input gets."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from crossbit.corpora import load_text
from crossbit.errors import InputError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('unknown role\nalien') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RENDERED = "<|user|>Hi</s><|assistant|>Hello</s>"


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    )
    tokenizer.chat_template = template
    return tokenizer


def refused(name: str, tokenizer: Any = None) -> str:
    """The message of the InputError that loading gives; checks that it is one line."""
    with pytest.raises(InputError) as caught:
        load_text(name, split="evaluation", tokenizer=tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_txt_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    data = " = Title = \n\n\r\nürgent \n".encode()
    path.write_bytes(data)
    corpus = load_text(str(path), split="evaluation")
    assert corpus.documents == (data.decode(),)
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.name == "a.TXT"
    assert str(tmp_path) not in corpus.source
    path.write_bytes(b"\xef\xbb\xbf" + data)  # a byte order mark is not text
    assert load_text(str(path), split="calibration") == corpus


def test_jsonl_reads_text_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\ntwo", "id": 1}, {"messages": CHAT}, {"text": "  "}, {"text": "three"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    corpus = load_text(str(path), split="calibration", tokenizer=chat_tokenizer())
    assert corpus.documents == ("one\ntwo", RENDERED, "three")
    assert corpus.text == f"one\ntwo\n\n{RENDERED}\n\nthree"
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


@pytest.mark.parametrize(
    "column", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text(tmp_path: Path, column: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    values = pa.array(["one", None, "", "two"]).cast(column)
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": values}), path)
    assert load_text(str(path), split="evaluation").documents == ("one", "two")


def test_parquet_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [CHAT, CHAT[:1]]}), path)
    corpus = load_text(str(path), split="evaluation", tokenizer=chat_tokenizer())
    assert corpus.documents == (RENDERED, "<|user|>Hi</s>")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text (byte 0xe9 at offset 3)"),
        ("a.txt", "abc".encode("utf-16-le"), "NUL byte"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n"y"\n', "line 3 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}\n', 'line 2 has no "text"'),
        ("a.jsonl", b'{"body": "y", "id": 1}\n', "it has: body, id"),
        ("a.jsonl", b'{"text": 5}\n', '"text" is int, not a string'),
        ("a.jsonl", b'{"text": null}\n', '"text" is NoneType'),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.parquet", b"PAR1 no more PAR1", "not a readable parquet file"),
        ("a.docx", b"x", ".txt, .jsonl or .parquet"),
        ("noext", b"x", ".txt, .jsonl or .parquet"),
    ],
)
def test_bad_files_get_one_line_that_names_them(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(str(path))
    assert says in message
    assert str(path) in message


def test_parquet_with_other_columns_or_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    message = refused(str(path))
    assert 'no column "text" or "messages" (it has: body, n)' in message
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert 'row 1: "text" is int, not a string' in refused(str(path))
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), path)
    assert "holds no text" in refused(str(path))


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(2000)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert str(path) in refused(str(path))
    path.write_bytes(whole[:100] + b"\0" * 200 + whole[300:])
    assert str(path) in refused(str(path))


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"messages": CHAT}, None, "tokenizer has none"),
        ({"messages": []}, TEMPLATE, "not a list with at least one message"),
        ({"messages": "Hi"}, TEMPLATE, "not a list with at least one message"),
        ({"messages": [{"content": "Hi"}]}, TEMPLATE, '"role"'),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            TEMPLATE,
            "refuses these messages (unknown role alien)",
        ),
    ],
)
def test_bad_messages(tmp_path: Path, row: Any, template: str | None, says: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    message = refused(str(path), chat_tokenizer(template))
    assert says in message
    assert f"{path} line 2" in message


def test_messages_without_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    assert "need the model's tokenizer" in refused(str(path))


def test_folder_and_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder" in refused(str(tmp_path))
    path = tmp_path / "a.txt"
    path.write_text("x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert f"{path} cannot be read (Permission denied)" in refused(str(path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wikitext-2", 'did you mean "wikitext2"?'),
        ("Embeded", 'did you mean "embedded"?'),
        ("qzzx", 'no text is called "qzzx"; known are embedded, wikitext2, c4'),
        ("", "known are"),
        ("nowhere/some.txt", "no such text file: nowhere/some.txt"),
        ("some.jsonl", "no such text file: some.jsonl"),
        ("x" * 5000, "cannot be opened (File name too long)"),
        ("nul\0byte", "no text is called"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    assert says in refused(name)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="calibration, evaluation"):
        load_text(None, split="train")  # type: ignore[arg-type]


def test_a_home_relative_path_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("text")
    assert load_text("~/t.txt", split="evaluation").documents == ("text",)
