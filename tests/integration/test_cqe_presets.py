"""Presets of CQE+, its bases and unions, run by name on a tiny model, alone and with add-ons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines import shorten
from tests.tiny import BLOCKS
from tests.training import interrupted_at, train, weights_of

from crossbit import Recipe
from crossbit.compat import windows_of
from crossbit.engine import window
from crossbit.engine.live import parameters_of
from crossbit.engine.window import train_window
from crossbit.recipe import DuQuant, preset_names

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

FAMILIES = ("omniquant-", "duquant-", "prefixquant-", "best-")
UNIONS = ("best-w4a4-plain+union", "best-w4a4+union", "cbq-w4a4+cfp+union")
NAMES = [*(n for n in preset_names() if n.startswith(FAMILIES)), "w4a4kv4", "w8a8kv8", *UNIONS]
BASES = ("omniquant-w2a16", "omniquant-w4a4", "duquant-w4a4", "prefixquant-w4a4")
RESUMED = [
    *((f"{base}+sde+cl", moment) for base in BASES for moment in ((0, 3), (1, 2))),
    (UNIONS[1], (3, 2)),  # of windows 0, 01, 012, 12, 2
]
Made = Callable[[str], tuple[Path, dict[str, Any]]]


def small(name: str, *more: str) -> Recipe:
    """The recipe of a preset with add-ons, shrunk to a tiny model and a few steps."""
    chosen = Recipe.load(name)
    settings = ["evaluation.windows=0"]
    if isinstance(chosen.weights.group, int):
        settings.append("weights.group=16")
    if chosen.trains:
        settings.append("training.epochs=2")
    for number, transform in enumerate(chosen.transforms):
        if isinstance(transform, DuQuant):
            settings += [f"transforms.{number}.block=16", f"transforms.{number}.steps=8"]
    if chosen.prefix is not None:
        settings.append("prefix.ratio=20")
    return Recipe.load(name, [*settings, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Made:
    """The folder and the result of a preset, quantized once."""
    place, known = tmp_path_factory.mktemp("presets"), {}

    def make(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                shorten(patch)
                known[name] = train(llama, text, place / name, small(name))
        return place / name, known[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_presets_run(name: str, made: Made) -> None:
    """What is done at run time is what the recipe says, and every window was trained."""
    out, result = made(name)
    chosen = Recipe.load(name)
    assert result["kind"] == chosen.kind
    assert {layer["bits"] for layer in result["layers"]} == {chosen.weights.bits}
    windows = windows_of(chosen, BLOCKS) if chosen.trains else []
    trained = [[w.start, w.stop - 1] for w in windows]
    if chosen.end_to_end is not None:
        trained.append([0, BLOCKS - 1])
    assert [row["blocks"] for row in result["training"]] == trained
    online = json.loads((out / "config.json").read_text()).get("crossbit_online", {})
    rotation = chosen.rotation
    assert bool(online.get("hadamard")) == (rotation is not None and rotation.down)
    assert bool(online.get("keys")) == (rotation is not None and rotation.keys)
    assert bool(online.get("rotations")) == (chosen.duquant is not None)
    assert bool(online.get("prefix")) == (chosen.prefix is not None)
    cache = online.get("cache")
    assert (None if cache is None else cache["bits"]) == (chosen.cache and chosen.cache.bits)


@pytest.mark.parametrize("base", BASES)
def test_each_add_on_makes_another_result(base: str, made: Made) -> None:
    parts = ["", "+sde", "+cl", "+sde+cl"]
    if base == BASES[0]:
        parts += ["+lsi", "+weights", "+cl111", "+cl001", "+aug"]
    found = [made(f"{base}{part}") for part in parts]
    assert len({weights_of(out) for out, _ in found}) == len(parts)
    for _, result in found:
        assert any(record["best_at"] for record in result["training"])


def test_weights_that_are_trained_go_beyond_the_next_code(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offsets are in steps; a reach of 1, as of the rounding alone, would end there."""
    offsets: list[float] = []

    def watched(*args: Any) -> Any:
        found = train_window(*args)
        known = parameters_of(args[3])
        offsets.extend(float(known[n].abs().max()) for n in known if n.endswith("/offset"))
        return found

    monkeypatch.setattr("crossbit.engine.loop.train_window", watched)
    long = ("training.epochs=16", "training.rounding=0.1")
    train(llama, text, tmp_path / "out", small("omniquant-w2a16+weights", *long))
    assert max(offsets) > 1


@pytest.mark.parametrize(("name", "moment"), RESUMED, ids=str)
def test_it_resumes_to_the_same_bytes(
    name: str, moment: tuple[int, int], made: Made, llama: Path, text: Path, tmp_path: Path
) -> None:
    """Singular directions, frozen blocks behind the window, and what turns inputs or a prefix."""
    out = tmp_path / "out"
    with interrupted_at(moment):
        train(llama, text, out, small(name))
    train(llama, text, out, small(name), resume=True)
    assert weights_of(out) == weights_of(made(name)[0])


@pytest.mark.parametrize("base", BASES)
def test_blocks_behind_the_window_are_those_that_made_the_targets(
    base: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see the prefix, and the rotated input of down_proj, too."""
    make_task, seen = window.make_task, []

    def watched(
        job: Any, chosen: Any, blocks: Any, entering: Any, targets: Any, **more: Any
    ) -> Any:
        task = make_task(job, chosen, blocks, entering, targets, **more)
        streams = [target.read(0, target.shape[0]) for target in targets]
        with torch.no_grad():
            for depth, run in enumerate(task.ahead):
                seen.append(torch.equal(run(streams[depth][:1]), streams[depth + 1][:1]))
        return task

    monkeypatch.setattr(window, "make_task", watched)
    train(llama, text, tmp_path / "out", small(f"{base}+cl"))
    assert seen == [True] * 3  # two blocks behind the first window, one behind the second
