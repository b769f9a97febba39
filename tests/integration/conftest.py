"""Fixtures that several files of whole-job tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import pipelines, running
from tests.running import Cli
from tests.tiny import tiny_folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short embedded text and no report, for the whole test."""
    pipelines.shorten(monkeypatch)


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection before work starts walks all that pytest holds: a third of a tiny run."""
    monkeypatch.setattr("crossbit.pipeline.gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text for ``pipelines.run``."""
    return pipelines.write_text(tmp_path_factory.mktemp("text") / "calibration.txt", 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """Tiny models by family."""
    place = tmp_path_factory.mktemp("models")
    others = {n: tiny_folder(place / n, n) for n in ("gemma3_text", "opt", "mixtral")}
    return {**others, "llama": llama}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with ``text.txt`` beside it."""
    place = tmp_path_factory.mktemp("bad")
    running.write_text(place / "text.txt")
    return tiny_folder(place / "model", "llama")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """The command line with a cache of its own."""
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path / "cache"))
    return Cli(capsys, monkeypatch)
