"""Blocks at the end of a model that a recipe leaves alone: written as they are, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import BLOCKS
from tests.training import A8, recipe, train, weights_of

from crossbit.engine import loop
from crossbit.engine.closing import close_block
from crossbit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

REST = [f"model.layers.{index}" for index in range(1, BLOCKS)]
FLOAT: dict[str, Any] = {"embedding": None, "head": None, "ignore": REST}
RECIPES = {
    "gptq": recipe({"kind": "gptq"}, training={}, **FLOAT),
    "a window a block": recipe(activations=A8, **FLOAT),
    "overlap and look-ahead": recipe(
        objective={"window": 2, "overlap": 1, "ahead": [1, 1], "metric": "fisher"}, **FLOAT
    ),
}
HEAD = recipe({"kind": "gptq"}, training={}, ignore=REST)
SEVERAL = [*RECIPES, "gptq, its head too"]


def chosen(name: str) -> Recipe:
    return RECIPES.get(name, HEAD)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """Whether activations entered a block that was closed, of each."""
    seen: dict[int, bool] = {}

    def watched(job: Any, work: Any, index: int, opened: Any, entering: Any) -> Any:
        seen[index] = entering is not None
        return close_block(job, work, index, opened, entering)

    monkeypatch.setattr(loop, "close_block", watched)
    return seen


@pytest.mark.parametrize("name", SEVERAL)
def test_what_is_written_is_the_same(
    name: str,
    llama: Path,
    text: Path,
    tmp_path: Path,
    entered: dict[int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = train(llama, text, tmp_path / "out", chosen(name))
    needed = name not in RECIPES  # the head is solved with what leaves the last block
    assert entered == {0: True, 1: needed, 2: needed}
    errors = [row["relative_error"] for row in result["blocks"]]
    assert errors[0] > 0
    assert errors[1:] == ([0.0, 0.0] if needed else [None, None])
    monkeypatch.setattr(loop, "_untouched", lambda job: BLOCKS)
    train(llama, text, tmp_path / "through", chosen(name))
    assert all(entered.values())
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "through")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("block", [1, 2])
def test_a_run_stopped_there_goes_on(
    name: str, block: int, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(llama, text, tmp_path / "whole", chosen(name))

    def stop(job: Any, work: Any, index: int, opened: Any, entering: Any) -> Any:
        if index == block:
            raise KeyboardInterrupt
        return close_block(job, work, index, opened, entering)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "close_block", stop)
        with pytest.raises(KeyboardInterrupt):
            train(llama, text, tmp_path / "out", chosen(name))
    train(llama, text, tmp_path / "out", chosen(name), resume=True)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
