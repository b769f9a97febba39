"""The embedded text: a fixed, disjoint split of clean prose, cached; and the cache helpers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import time
from pathlib import Path

import pytest

from crossbit.cache import atomic_write, crossbit_cache_dir
from crossbit.corpora import Corpus, embedded, load_text, markup
from crossbit.corpora.markup import clean_line, prose, write_out
from crossbit.errors import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSBIT_CACHE", str(cache))


@pytest.fixture
def parts(_in_cache: None) -> tuple[Corpus, Corpus]:
    return load_text(None, split="calibration"), load_text("embedded", split="evaluation")


def test_split_is_fixed_and_disjoint(parts: tuple[Corpus, Corpus]) -> None:
    calibration, evaluation = parts
    assert len(calibration.documents) == 70
    assert len(evaluation.documents) == 18
    assert calibration.name == "embedded (Wikipedia, calibration)"
    assert evaluation.name == "embedded (Wikipedia, evaluation)"
    # Published figures rest on these very bytes: a change here has to be a decision.
    assert calibration.sha256[:16] == "9aae58313516e739"
    assert evaluation.sha256[:16] == "7cc5652d3ea59a2c"
    paragraphs = [{p for d in part.documents for p in d.split("\n")} for part in parts]
    assert not paragraphs[0] & paragraphs[1]
    sizes = [len(part.text.encode()) for part in parts]
    assert 2.4e6 < sum(sizes) < 2.8e6
    assert 0.15 < sizes[1] / sum(sizes) < 0.25
    assert "CC BY-SA" in str(calibration.licence)
    assert not re.search(r"/(home|root|work|tmp|usr)\b", calibration.source)


@pytest.mark.parametrize(
    "left",
    [
        "''", "[[", "]]", "{{", "}}", "{|", "|}", "|", "<ref", "</", "&nbsp;", "&amp;", "http://",
        "https://", "www.", "File:", "Image:", "Category:", "colspan", "()", "( ", " )", "  ",
        "ISBN", "\u00a0", "\u200b", "\ue000", "\ue001", "\ue002",
    ],
)  # fmt: skip
def test_no_markup_is_left(left: str, parts: tuple[Corpus, Corpus]) -> None:
    for part in parts:
        for document in part.documents:
            # the ASCII article lists ()" as the characters of a typewriter's keys
            text = document.replace("\"#$%_&'()", "keys")
            assert left not in text, text[max(0, text.find(left) - 60) :][:120]


def test_lines_are_prose(parts: tuple[Corpus, Corpus]) -> None:
    lines = [line for part in parts for d in part.documents for line in d.split("\n")]
    assert min(map(len, lines)) > 120
    assert all(line == line.strip() for line in lines)
    sentences = sum(
        line.rstrip("\"')\u201d\u2019").endswith((".", "!", "?", ":", ";")) for line in lines
    )
    assert sentences / len(lines) > 0.97


def test_second_load_reads_the_cache(
    parts: tuple[Corpus, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markup, "prose", lambda *_: pytest.fail("cleaned again"))
    started = time.perf_counter()
    again = load_text(None, split="calibration")
    assert time.perf_counter() - started < 1.0  # 0.02 s on an idle machine
    assert again == parts[0]


def test_damaged_cache_is_rebuilt(
    parts: tuple[Corpus, Corpus], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (cache / "corpora").iterdir()
    whole = file.read_bytes()
    monkeypatch.setattr(embedded, "_clean", lambda _: {"A title": "rebuilt " * 500})
    for damaged in (whole[:-100], whole[:500] + b"X" + whole[501:], b""):
        file.write_bytes(damaged)
        texts = [load_text(None, split=s).text for s in ("calibration", "evaluation")]
        assert sorted(map(len, texts)) == [0, 4000]
    file.write_bytes(whole)
    assert load_text(None, split="calibration") == parts[0]


def test_works_where_the_cache_cannot_be_written(
    parts: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    monkeypatch.setenv("CROSSBIT_CACHE", str(in_the_way))
    title = next(t for t in ("A", "B", "C", "D", "E", "F") if embedded.split_of(t) == "calibration")
    monkeypatch.setattr(embedded, "_clean", lambda _: {title: "text"})
    assert load_text(None, split="calibration").documents == ("text",)


def test_missing_gensim_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"gensim, which is missing; .*pip install") as caught:
        load_text(None, split="evaluation")
    assert "\n" not in str(caught.value)


def test_damaged_or_absent_dump_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = tmp_path / "dump.xml.bz2"
    dump.write_bytes(b"BZh91AY&SY but no more of it")
    monkeypatch.setattr(embedded, "_find_dump", lambda: dump)
    with pytest.raises(InputError, match=r"is damaged .*pip install"):
        load_text(None, split="evaluation")
    dump.unlink()
    with pytest.raises(InputError, match=r"cannot be read .*pip install"):
        load_text(None, split="evaluation")


def test_gensim_without_its_test_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stripped:
        version = "4.4.0"

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Stripped())
    with pytest.raises(InputError, match=r"not in the installed gensim 4\.4\.0"):
        load_text(None, split="evaluation")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("stretches {{convert|1200|mi|km}} west", "stretches 1200 miles west"),
        ("from {{convert|10|to|20|C|F}} on", "from 10 to 20 °C on"),
        ("called ''{{lang|grc|μανία}}''", "called μανία"),
        ("{{as of|2015|6|30}}, it", "As of June 2015, it"),
        ("the {{nihongo|'''Hip throw'''|腰投げ|koshinage}}", "the Hip throw (腰投げ, koshinage)"),
        ("a<ref name=x /> b<ref>see {{cite|x}} <br/> there</ref> c", "a b c"),
        ("'''''Animal Farm''''' and ''Titanic'''s", "Animal Farm and Titanic's"),
        ("the [[Bering Strait|strait]] and [[Asia]]", "the strait and Asia"),
        ("a [[File:x.jpg|thumb|A [[link|caption]] here]] b", "a b"),
        ("born ({{IPAc-en|x}}; 1905)", "born (1905)"),
        ("the spear ({{nope|x}}), staff", "the spear, staff"),
        ("in {{nope}}, vehicles {{citation needed|date=x}}.", "in, vehicles."),
        ("if a < b and c > d", "if a < b and c > d"),
        ("{| class=wikitable\n| cell {| nested |} \n|}\ntext", "text"),
        ("* ** a point", "a point"),
        ("5&amp;nbsp;km &mdash; far", "5&nbsp;km — far"),
        ("the observed <math>y_i</math> from", ""),
        ("see {{val|1.5|e=3}} there", ""),
        ("Holzer, H. (2015). A book. ISBN 978-0", ""),
        ("text\n==References==\nAuthor, Title", "text"),
    ],
)
def test_markup_is_written_out(raw: str, shown: str) -> None:
    result = "\n".join(clean_line(line) for line in write_out(raw).split("\n")).strip()
    assert result == shown


def test_prose_drops_short_lines() -> None:
    long = "word " * 30
    assert prose(f"short\n{long}\n== Heading ==\n", lambda text: text) == long.strip()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path / "x"))
    assert crossbit_cache_dir() == tmp_path / "x"
    monkeypatch.delenv("CROSSBIT_CACHE")
    assert crossbit_cache_dir() == Path.home() / ".cache" / "crossbit"


def test_atomic_write_replaces_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write(path, b"second")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"third")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
