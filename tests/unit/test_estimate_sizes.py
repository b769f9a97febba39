"""What a run will need: sizes that equal the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.estimating import MOVES, TUNED, TURNS, description, recipe_of
from tests.pipelines import run, shorten, write_text
from tests.tiny import BLOCKS, tiny_folder

from crossbit.engine.closing import close_block
from crossbit.engine.window import train
from crossbit.engine.workdir import WorkDir, part_name
from crossbit.estimate.disk import disk, outside, packed, part, stream_bytes, trained

Tiny = tuple[Path, Path]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A model and a text for runs that are kept short."""
    shorten(monkeypatch)
    return tiny_folder(tmp_path / "model", "llama"), write_text(tmp_path / "text.txt", 1)


@pytest.mark.parametrize("base", ["gptq-w4a16", "crossquant-w8a8", "rtn-w3a16-g64"])
def test_bytes_of_files_are_those_of_a_run(
    base: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny
    found: dict[str, int] = {}

    def closing(*args: Any) -> Any:
        result = close_block(*args)
        for path in args[1].path.glob("*.safetensors"):
            found[path.stem] = path.stat().st_size
        return result

    monkeypatch.setattr("crossbit.engine.loop.close_block", closing)
    settings = ("weights.group=32", "calibration.samples=4", "calibration.length=32")
    run(model, text, tmp_path / "out", base, settings=(*settings, "evaluation.windows=0"))
    recipe = recipe_of(*settings, base=base)
    d = description(recipe, large=False)
    if d.samples:
        assert found["stream-00001"] == stream_bytes(d, 4)
        assert found["target"] == stream_bytes(d, d.held)
    # Headers and records are estimated, and larger than a tiny model's tensors.
    tensors = sum(x.stored for x in d.blocks[0].planned) + 4 * d.blocks[0].other
    assert 0 < found[part_name(0)] - tensors < 4500
    assert part(d, d.blocks[0]) == pytest.approx(found[part_name(0)], rel=0.35)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    stored = outside(d) + BLOCKS * tensors
    assert 0 < weights - stored < 4500 * (BLOCKS + 1)


@pytest.mark.parametrize("moves", [(), *MOVES.values(), *TURNS.values()], ids=str)
def test_trained_states_are_those_of_a_run(
    moves: tuple[str, ...], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny
    states: dict[str, int] = {}
    real = WorkDir.save_state

    def save(work: WorkDir, name: str, tensors: Any, record: Any) -> None:
        states.setdefault(name, sum(t.nbytes for t in tensors.values()))
        real(work, name, tensors, record)

    monkeypatch.setattr(WorkDir, "save_state", save)
    settings = ("calibration.samples=4", "calibration.length=32", "training.epochs=1", *moves)
    recipe = recipe_of(*settings)
    run(model, text, tmp_path / "out", recipe, settings=("evaluation.windows=0",))
    d = description(recipe, large=False)
    assert states["window-00001"] == packed(d, d.blocks[1])
    assert states["best-0"] == sum(trained(block) for block in d.blocks[:2])


def test_states_for_tuning_are_those_of_a_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny
    states: dict[str, int] = {}
    sizes: dict[str, int] = {}
    real = WorkDir.save_state

    def save(work: WorkDir, name: str, tensors: Any, record: Any) -> None:
        states[name] = sum(t.nbytes for t in tensors.values())
        real(work, name, tensors, record)
        if name == "refined":
            sizes.update({p.stem: p.stat().st_size for p in work.path.glob("*.safetensors")})

    monkeypatch.setattr(WorkDir, "save_state", save)
    settings = ("calibration.samples=4", "calibration.length=32", "training.epochs=1", *TUNED)
    recipe = recipe_of(*settings)
    run(model, text, tmp_path / "out", recipe, settings=("evaluation.windows=0",))
    d = description(recipe, large=False)
    opened = [f"open-{i:05d}" for i in range(BLOCKS)]
    assert [states[name] for name in opened] == [packed(d, block) for block in d.blocks]
    assert states["refined"] == sum(packed(d, block) for block in d.blocks)
    assert states["best-0"] == sum(trained(block) for block in d.blocks)
    # Files are those tensors and a header.
    heads = {name: sizes[name] - states[name] for name in (*opened, "refined")}
    assert all(0 < head < 10_000 * BLOCKS for head in heads.values()), heads
    ends = ("stream-00000", f"stream-{BLOCKS:05d}", f"teacher-{BLOCKS:05d}")
    assert [sizes[name] for name in ends] == [stream_bytes(d, 4)] * 3
    # All of it is still there when the result is put together.
    assert disk(d).work > sum(sizes[name] for name in (*opened, *ends)) + states["refined"]


@pytest.mark.parametrize("ahead", ["[1]", "[1,1]", "[0,1,1]", "[1,0,0,1]"])
def test_targets_ahead_are_those_of_a_run(
    ahead: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny
    found: list[dict[str, int]] = []
    frozen: list[int] = []

    def watched(work: WorkDir, window: Any, task: Any, *args: Any) -> Any:
        found.append({p.stem: p.stat().st_size for p in work.path.glob("*.safetensors")})
        frozen.append(len(task.ahead))
        return train(work, window, task, *args)

    monkeypatch.setattr("crossbit.engine.window.train", watched)
    settings = ("calibration.samples=4", "calibration.length=32", "training.epochs=1")
    recipe = recipe_of(
        *settings, "objective.window=1", "objective.overlap=0", f"objective.ahead={ahead}"
    )
    run(model, text, tmp_path / "out", recipe, settings=("evaluation.windows=0",))
    d = description(recipe, large=False)
    assert len(found) == BLOCKS
    assert frozen == [len(d.ahead(window)) for window in d.schedule]
    for sizes, window in zip(found, d.schedule, strict=True):
        streams = {name: size for name, size in sizes.items() if name.startswith("ahead-")}
        assert list(streams.values()) == [stream_bytes(d, 4)] * len(d.ahead(window))
        assert disk(d).work >= sum(sizes.values())
