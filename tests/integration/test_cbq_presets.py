"""Every preset of CBQ runs on a tiny model and little text, and its result is verified."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.model_folders import save_folder, tiny_tokenizer, write_gguf
from tests.pipelines import run
from tests.training import weights_of

from crossbit.export.reader import QuantizedCheckpoint
from crossbit.models.source import resolve_model
from crossbit.recipe_files import preset_names

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

PRESETS = [name for name in preset_names() if name.startswith("cbq-")]
SHORT = ("training.epochs=1", "evaluation.windows=0")


def train(model: Path, text: Path, out: Path, name: str, *settings: str) -> dict[str, Any]:
    return run(model, text, out, name, settings=(*SHORT, *settings))


def test_the_presets_that_are_promised_are_there() -> None:
    weights = [f"cbq-w{bits}a16{form}" for bits in (4, 3, 2) for form in ("", "-channel")]
    both = ["cbq-w4a8", "cbq-w6a6", "cbq-w4a4", "cbq-w4a4-channel"]
    widths = ("w4a16", "w3a16", "w2a16", "w4a8", "w6a6", "w4a4")
    paper = [f"cbq-paper-{bits}" for bits in widths]
    assert {*weights, *both, *paper} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str, llama: Path, text: Path, tmp_path: Path) -> None:
    """The folder has the bits and the groups that the name says."""
    result = train(llama, text, tmp_path / "out", name)
    assert result["recipe"]["name"] == name
    assert result["kind"] == "plain"
    assert result["verify"]["passed"] is True
    windows = [row["blocks"] for row in result["training"] if "what" not in row]
    assert {block for first, last in windows for block in range(first, last + 1)} == {0, 1, 2}
    assert all(math.isfinite(row["after"]) for row in result["training"])
    bits = re.search(r"w(\d)a(\d+)", name)
    assert bits is not None
    weights, inputs = map(int, bits.groups())
    channel = name.endswith("-channel") or "paper" in name or name == "cbq-w6a6"
    written = QuantizedCheckpoint(tmp_path / "out")
    for row in result["layers"]:
        layer = written.layer(row["name"])
        assert layer is not None
        grid = layer.qtensor.grid
        assert (grid.bits, grid.strategy) == (weights, "channel" if channel else "group")
        assert grid.group_size == (None if channel else 64)
        assert (16 if layer.activations is None else layer.activations.bits) == inputs


# -- from other files than one -------------------------------------------------------------------

# One width of this model is 96.
SMALL = "weights.group=32"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as one file, in shards, and as GGUF."""
    place = tmp_path_factory.mktemp("files")
    whole = save_folder(place / "whole")
    save_folder(place / "sharded", sharded=True)
    write_gguf(place / "tiny.gguf", whole, tiny_tokenizer())
    return {name: place / name for name in ("whole", "sharded", "tiny.gguf")}


def test_shards_make_the_same_bytes(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    assert len(list(files["sharded"].glob("*.safetensors"))) > 3
    for name in ("whole", "sharded"):
        result = train(files[name], text, tmp_path / name, "cbq-w4a16", SMALL)
        assert result["verify"]["passed"] is True
    assert weights_of(tmp_path / "sharded") == weights_of(tmp_path / "whole")


def test_a_gguf_makes_the_bytes_of_what_it_converts_to(
    files: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path / "cache"))
    result = train(files["tiny.gguf"], text, tmp_path / "gguf", "cbq-w4a8", SMALL)
    assert result["verify"]["passed"] is True
    converted = resolve_model(str(files["tiny.gguf"])).path
    assert converted.is_relative_to(tmp_path / "cache")
    train(converted, text, tmp_path / "folder", "cbq-w4a8", SMALL)
    assert weights_of(tmp_path / "gguf") == weights_of(tmp_path / "folder")
