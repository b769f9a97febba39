"""Whole runs that train ranges and move weights along their singular directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.killing import Death, kill
from tests.running import Cli, short_run
from tests.tiny import BLOCKS
from tests.training import (
    interrupted_at,
    killed_and_resumed,
    recipe,
    train,
    uninterrupted,
    weights_of,
)
from torch import Tensor

from crossbit.engine.live import parameters_of
from crossbit.engine.trained import TrainedBlock, layers_of
from crossbit.engine.window import train_window
from crossbit.errors import InputError
from crossbit.recipe import Recipe
from crossbit.solvers.expansion import ExpansionChoice, learning_rate_scale

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

LAYERS = 7  # of a block
SOLVER: dict[str, Any] = {
    "start": {"kind": "rtn"},
    "parameter": "none",
    "limits": "range",
    "expansion": {"kind": "band", "width": 4},
}
ALONE = {"window": 1, "overlap": 0}
FAST: dict[str, Any] = {"epochs": 2, "batch": 2, "range": 0.05, "expansion": 0.01}
ASYMMETRIC: dict[str, Any] = {
    "weights": {"bits": 2, "group": 16, "symmetric": False},
    "embedding": None,
    "head": None,
}


def moving(solver: dict[str, Any] | None = None, **data: Any) -> Recipe:
    chosen = {"objective": ALONE, "training": FAST, **data}
    return recipe({**SOLVER, **(solver or {})}, **chosen)


W4, W2 = moving(), moving(**ASYMMETRIC)
# Two blocks at a time, what is rounded being trained too, and all blocks together afterwards.
WHOLE = moving(
    {"parameter": "low_rank", "expansion": {"kind": "square", "width": 3}},
    objective={"window": 2, "overlap": 1},
    end_to_end={"epochs": 1, "batch": 2},
)
CASES = {"w4": W4, "w2": W2, "whole": WHOLE}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> dict[str, Path]:
    """Results of uninterrupted runs, each verified."""
    folder = tmp_path_factory.mktemp("finished")
    return {name: uninterrupted(folder / name, llama, text, case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", ["w4", "w2"])
def test_a_rerun_gives_the_same_bytes(
    name: str, finished: dict[str, Path], llama: Path, text: Path, tmp_path: Path
) -> None:
    train(llama, text, tmp_path / "out", CASES[name])
    assert weights_of(tmp_path / "out") == weights_of(finished[name])
    known = json.loads((finished[name] / "crossbit.json").read_text())["training"]
    assert len(known) == BLOCKS
    assert all(window["after"] <= window["before"] for window in known)
    assert any(window["after"] < window["before"] for window in known)


def watch(patch: pytest.MonkeyPatch, see: Callable[[Sequence[TrainedBlock]], None]) -> None:
    """Show the blocks of every window once it is trained."""

    def watched(*args: Any) -> Any:
        found = train_window(*args)
        see(args[3])
        return found

    patch.setattr("crossbit.engine.loop.train_window", watched)


def test_weights_really_move(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In every layer both ends of the ranges and B are trained, at the recipe's rates."""
    moved: dict[str, dict[str, float]] = {}

    def see(blocks: Sequence[TrainedBlock]) -> None:
        for full, parameter in parameters_of(blocks).items():
            layer, _, name = full.rpartition("/")
            start = 4.0 if name in ("low", "high") else 0.0
            moved.setdefault(layer, {})[name] = float((parameter - start).abs().max())

    watch(monkeypatch, see)
    train(llama, text, tmp_path / "out", W2)
    assert len(moved) == LAYERS * BLOCKS
    steps = 4  # none of Adam's goes farther than the rate
    rates = {"low": FAST["range"], "high": FAST["range"]}
    rates["expansion"] = FAST["expansion"] * learning_rate_scale(ExpansionChoice("band", 4), 32)
    for layer, found in moved.items():
        assert found.keys() == rates.keys(), layer
        for name, distance in found.items():
            assert 0 < distance < steps * rates[name], (layer, name)


def test_blocks_of_the_leading_directions_are_trained(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the recipe to a verified folder; the last of the blocks is smaller than the others."""
    moved: list[float] = []

    def see(blocks: Sequence[TrainedBlock]) -> None:
        for _, layer in layers_of(blocks):
            assert layer.state.basis is not None
            assert layer.state.basis.s.numel() == 23
            inner = layer.state.parameters["expansion"]
            assert inner.shape == (5, 5, 5)
            moved.append(float(inner.abs().max()))

    watch(monkeypatch, see)
    chosen = moving({"expansion": {"kind": "blocks", "width": 5, "rank": 23}})
    result = train(llama, text, tmp_path / "out", chosen)
    assert result["verify"]["passed"] is True
    assert len(moved) == LAYERS * BLOCKS
    assert all(moved)


def test_moves_change_the_result(finished: dict[str, Path], llama: Path, text: Path) -> None:
    plain = moving({"expansion": None})
    out = uninterrupted(finished["w4"].with_name("plain"), llama, text, plain)
    assert weights_of(out) != weights_of(finished["w4"])


@pytest.mark.parametrize("name", ["w2", "whole"])
def test_at_rate_zero_it_is_the_method_that_it_plugs_into(
    name: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    """B stays 0, and the result is that of the same recipe without it, bit for bit."""
    data = CASES[name].model_dump(mode="json")
    data["training"]["expansion"] = 0.0
    if data["end_to_end"] is not None:
        data["end_to_end"]["expansion"] = 0.0
    recipes = {"still": Recipe.parse(data, "custom")}
    data["solver"]["expansion"] = None
    recipes["bare"] = Recipe.parse(data, "custom")
    results = {n: train(llama, text, tmp_path / n, chosen) for n, chosen in recipes.items()}
    assert weights_of(tmp_path / "still") == weights_of(tmp_path / "bare")
    assert any(window["best_at"] for window in results["bare"]["training"])


MOMENTS = {
    "w4": ("training", 1),
    "w2": ("training", 3),
    "whole": ("training", 8),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> dict[str, Path]:
    """Output folders of runs that were killed inside a window."""
    folder = tmp_path_factory.mktemp("killed")
    common = {"model": str(llama), "calibration": str(text), "samples": 4, "length": 32}
    deaths = []
    for name, (file, count) in MOMENTS.items():
        chosen = CASES[name].model_dump(mode="json")
        options = {**common, "recipe": chosen, "out": str(folder / name)}
        deaths.append(Death(f"{file}.safetensors", "after", options, count))
    kill(deaths, seconds=240)
    return {name: folder / name for name in MOMENTS}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_inside_a_window_it_resumes_to_the_same_bytes(
    name: str, killed: dict[str, Path], finished: dict[str, Path], llama: Path, text: Path
) -> None:
    out = killed[name]
    assert not out.exists()
    train(llama, text, out, CASES[name], resume=True)
    assert weights_of(out) == weights_of(finished[name])


# -- decompositions ------------------------------------------------------------------------------


def test_each_weight_is_decomposed_once(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A window that overlaps finds the directions of the last one, and so does a resumed run."""
    original, counts = torch.linalg.svd, [0, 0]

    def svd(*args: Any, **options: Any) -> Any:
        counts[-1] += 1
        return original(*args, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    with interrupted_at((0, 1)):
        train(llama, text, tmp_path / "out", WHOLE)
    counts.reverse()
    train(llama, text, tmp_path / "out", WHOLE, resume=True)
    assert counts == [2 * LAYERS, LAYERS]  # two blocks of three are open in the first window


def test_a_weight_that_cannot_be_decomposed_is_left_without_expansion(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others have theirs; the report names the layer, and a resumed run does the same."""
    original, expanded = torch.linalg.svd, {}

    def svd(weight: Tensor, full_matrices: bool) -> Any:
        if tuple(weight.shape) == (64, 128):  # of down_proj alone
            raise torch.linalg.LinAlgError("did not\nconverge")  # type: ignore[attr-defined]
        return original(weight, full_matrices=full_matrices)

    def see(blocks: Sequence[TrainedBlock]) -> None:
        for name, layer in layers_of(blocks):
            expanded[name] = layer.state.basis is not None

    monkeypatch.setattr(torch.linalg, "svd", svd)
    watch(monkeypatch, see)
    whole = train(llama, text, tmp_path / "whole", WHOLE)
    assert len(expanded) == LAYERS * BLOCKS
    assert {name for name, has in expanded.items() if not has} == {
        f"{index}/mlp.down_proj" for index in range(BLOCKS)
    }
    notes = [note for note in whole["warnings"] if "decomposed" in note]
    assert notes == [
        f"model.layers.{index}.mlp.down_proj: its weight could not be decomposed: "
        "left without expansion"
        for index in range(BLOCKS)
    ]
    killed_and_resumed((1, 1), llama, text, tmp_path / "out", WHOLE)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    again = json.loads((tmp_path / "out" / "crossbit.json").read_text())
    assert again["warnings"] == whole["warnings"]


# -- what does not go is said before work starts --------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a band": ({"expansion": {"kind": "band", "width": 64}}, r"width: band of 64 does not fit"),
    "blocks": ({"expansion": {"kind": "blocks", "width": 0}}, r"width: blocks of 0 is below 1"),
    "a rank": ({"expansion": {"rank": 999}}, r"rank: 999 is not possible for a weight"),
    "a mode": ({"mode": "sigmoid"}, r"mode sigmoid, .* use mode straight_through"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_move_that_does_not_fit_is_refused(
    what: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    solver, message = REFUSED[what]
    with pytest.raises(InputError, match=rf"^model\.layers\.0\.\S+: {message}") as found:
        train(llama, text, tmp_path / "out", moving(solver))
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def written(recipe: Recipe, path: Path) -> Path:
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    return path


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_band_wider_than_a_matrix_is_one_line_and_exit_code_two(
    command: str, cli: Cli, source: Path, tmp_path: Path
) -> None:
    wide = written(moving({"expansion": {"kind": "band", "width": 64}}), tmp_path / "wide.yaml")
    options = short_run(source.with_name("text.txt"))
    ran = cli(command, source, "--recipe", wide, *options, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "band of 64 does not fit" in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "wide.yaml"}


def test_an_override_that_moves_only_what_it_fits(llama: Path, text: Path, tmp_path: Path) -> None:
    """Layers are looked at one by one."""
    wide = {"kind": "rounding", **SOLVER, "expansion": {"kind": "band", "width": 40}}
    narrow = {**wide, "expansion": {"kind": "diagonal"}}
    small = [{"match": name, "solver": narrow} for name in ("k_proj", "v_proj")]
    with pytest.raises(InputError, match=r"k_proj: width: band of 40"):
        train(llama, text, tmp_path / "out", moving({"expansion": wide["expansion"]}))
    train(llama, text, tmp_path / "out", moving({"expansion": wide["expansion"]}, overrides=small))


# -- estimates ------------------------------------------------------------------------------------


def test_plan_runs_and_counts_what_moving_keeps(cli: Cli, source: Path, tmp_path: Path) -> None:
    results = {}
    for name, solver in {"moves": {}, "stays": {"expansion": None}}.items():
        chosen = written(moving(solver), tmp_path / f"{name}.yaml")
        options = short_run(source.with_name("text.txt"))
        place = ("--out", tmp_path / "out", "--json", tmp_path / "plan.json")
        ran = cli("plan", source, "--recipe", chosen, *options, *place)
        assert ran.code == 0, ran.err
        results[name] = json.loads((tmp_path / "plan.json").read_text())
    memory = {
        name: {row["stage"]: row["memory"] for row in result["stages"]}
        for name, result in results.items()
    }
    assert memory["moves"]["train"] > memory["stays"]["train"]
    assert "decompose" in results["moves"]["operations"]["open"]
    assert results["moves"]["rates"]["decompose"] > 0
    assert results["stays"]["rates"]["decompose"] == 0
