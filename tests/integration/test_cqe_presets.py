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
from crossbit.engine import window
from crossbit.recipe import DuQuant, TrainedRounding, preset_names

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

FAMILIES = ("omniquant-", "duquant-", "prefixquant-", "best-")
NAMES = [*(n for n in preset_names() if n.startswith(FAMILIES)), "w4a4kv4", "w8a8kv8"]
BASES = ("duquant-w4a4", "prefixquant-w4a4")
Made = Callable[[str], tuple[Path, dict[str, Any]]]


def small(name: str) -> Recipe:
    """The recipe of a preset with add-ons, shrunk to a tiny model and a few steps."""
    chosen = Recipe.load(name)
    settings = ["evaluation.windows=0"]
    if isinstance(chosen.weights.group, int):
        settings.append("weights.group=16")
    if chosen.trains:
        settings.append("training.epochs=2")
    if isinstance(chosen.solver, TrainedRounding) and chosen.solver.expansion is not None:
        settings.append("solver.expansion.width=8")  # keys have 32 directions
    for number, transform in enumerate(chosen.transforms):
        if isinstance(transform, DuQuant):
            settings += [f"transforms.{number}.block=16", f"transforms.{number}.steps=8"]
    if chosen.prefix is not None:
        settings.append("prefix.ratio=20")
    return Recipe.load(name, settings)


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
    windows = BLOCKS + 1 - chosen.objective.window if chosen.trains else 0
    assert len(result["training"]) == windows
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
    names = [f"{base}{addons}" for addons in ("", "+sde", "+cl", "+sde+cl")]
    assert len({weights_of(made(name)[0]) for name in names}) == 4
    for name in names:
        assert any(record["best_at"] for record in made(name)[1]["training"])


@pytest.mark.parametrize("moment", [(0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_with_both_it_resumes_to_the_same_bytes(
    base: str, moment: tuple[int, int], made: Made, llama: Path, text: Path, tmp_path: Path
) -> None:
    """Singular directions, frozen blocks behind the window, and what turns inputs or a prefix."""
    name, out = f"{base}+sde+cl", tmp_path / "out"
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
