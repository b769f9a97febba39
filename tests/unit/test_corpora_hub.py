"""Texts of the hub: the protocol on stand-in rows, and the hub out of reach. No network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import pytest

from crossbit.corpora import hub, load_text
from crossbit.errors import InputError

ROWS = [
    "",
    " = First = \n",
    "",
    " Prose with a = sign . \n",
    " = = Section = = \n",
    " More . \n",
    "",
    " = Second = \n",
    " End . \n",
    "",
]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "_reachable", lambda: True)


def serve(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    """Put ``result`` (raised if an exception) in place of datasets.load_dataset."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, config: str | None = None, **options: Any) -> Any:
        calls.append((repository, config, options))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_wikitext_is_the_rows_joined_with_two_newlines(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = serve(monkeypatch, datasets.Dataset.from_dict({"text": ROWS}))
    corpus = load_text("wikitext2", split="evaluation")
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})]
    assert corpus.text == "\n\n".join(ROWS)
    assert len(corpus.documents) == 2
    assert corpus.documents[1].startswith(" = Second = ")
    assert corpus.name == "wikitext2"
    assert corpus.source == "Salesforce/wikitext wikitext-2-raw-v1, test split"
    load_text("wikitext2", split="calibration")
    assert calls[1][2] == {"split": "train"}


@pytest.mark.parametrize(
    ("split", "part", "taken", "joiner"),
    [
        ("calibration", "train", hub.C4_CALIBRATION_DOCUMENTS, "\n\n"),
        ("evaluation", "validation", hub.C4_EVALUATION_DOCUMENTS, " "),
    ],
)
def test_c4_streams_the_first_documents_of_one_shard(
    split: Any, part: str, taken: int, joiner: str, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            yield {"text": f"document {number}"}
            number += 1

    calls = serve(monkeypatch, endless())
    corpus = load_text("c4", split=split)
    ((repository, _, options),) = calls
    assert repository == "allenai/c4"
    assert options["split"] == part
    assert options["streaming"] is True
    assert list(options["data_files"]) == [part]
    assert f"en/c4-{part}.00000-of-" in options["data_files"][part]
    assert len(corpus.documents) == taken
    assert corpus.text.startswith(f"document 0{joiner}document 1{joiner}")


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset is gated.\nYou must be authenticated"),
        ConnectionError("Couldn't reach it"),
        TimeoutError(),
        ValueError("x" * 3000),
    ],
)
def test_failures_become_one_line_with_the_way_out(
    error: Exception, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, error)
    with pytest.raises(InputError) as caught:
        load_text("wikitext2", split="evaluation")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in ("wikitext2", "Salesforce/wikitext", "hf auth login", ".jsonl"):
        assert part in message


def test_a_cached_copy_serves_where_the_hub_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    seen = []

    def load_dataset(*_: Any, **__: Any) -> Any:
        seen.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text("wikitext2", split="evaluation").text == "\n\n".join(ROWS)
    assert seen == [(True, True)]  # cache only while loading, as before afterwards
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_an_empty_answer_is_refused(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, datasets.Dataset.from_dict({"text": ["", " \n"]}))
    with pytest.raises(InputError, match="came back empty"):
        load_text("wikitext2", split="evaluation")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9"),
    ],
)
def test_a_hub_out_of_reach_fails_fast(
    environment: dict[str, str], reason: str, tmp_path: Any
) -> None:
    code = (
        "import time, datasets, huggingface_hub\n"
        "from crossbit.corpora import load_text\n"
        "started = time.perf_counter()\n"
        "for name in ('wikitext2', 'c4'):\n"
        "    try: load_text(name, split='evaluation')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "print(time.perf_counter() - started)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *lines, seconds = done.stdout.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("wikitext2", "c4"), strict=True):
        assert line.startswith("InputError ")
        assert name in line
        assert reason in line
        assert "hf auth login" in line
    assert float(seconds) < 2 * hub.CONNECT_SECONDS + 3  # datasets alone retries for 23 s a file
    assert "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr


def test_the_probe_gives_up_on_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.3)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        started = time.perf_counter()
        assert not hub._reachable()
        assert time.perf_counter() - started < 5
