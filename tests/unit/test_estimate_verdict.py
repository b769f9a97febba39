"""What a run will need: whether it fits, and what would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.estimating import MIB, TUNED, description, recipe_of, room

from crossbit.errors import InputError
from crossbit.estimate import verdict
from crossbit.estimate.describe import with_recipe
from crossbit.estimate.disk import disk
from crossbit.estimate.machine import available_disk, available_memory, held_memory
from crossbit.estimate.verdict import Room, advice, changed, changes, estimate, refuse
from crossbit.recipe import Recipe


def test_advice_is_the_smallest_change_that_fits() -> None:
    # Long sequences, so that calibration and not the whole model decides.
    d = description(recipe_of("calibration.length=4096", "training.batch=8", "objective.window=3"))
    d = replace(d, verify_length=1, windows=0)
    need = estimate(d, held=0).peak[1]
    option = advice(d, room(memory=need - 1), 0)
    assert option is not None
    known = dict(changes(d.recipe))
    assert option in known
    fitted = with_recipe(d, changed(d.recipe, known[option]))
    assert estimate(fitted, held=0).peak[1] < need
    earlier = list(known)[: list(known).index(option)]
    for other in earlier:
        tried = with_recipe(d, changed(d.recipe, known[other]))
        assert estimate(tried, held=0).peak[1] >= need


def test_advice_takes_several_settings_where_one_is_not_enough() -> None:
    d = description(recipe_of("calibration.length=4096", "calibration.samples=64"))
    every = [update for _, update in changes(d.recipe)]
    least = estimate(with_recipe(d, changed(d.recipe, *every)), held=0)
    option = advice(d, room(work=least.disk.work * 1.05), 0)
    assert option is not None
    assert option.count("-") > 2
    assert advice(d, room(work=least.disk.work * 0.5), 0) is None
    assert advice(d, room(memory=1000), 0) is None


def test_leaving_out_the_tuning_is_proposed_where_it_would_fit() -> None:
    d = description(recipe_of(*TUNED, "calibration.length=128"))
    d = replace(d, verify_length=1, windows=0)
    plain = with_recipe(d, changed(d.recipe, {"end_to_end": None}))
    assert plain.end_to_end is None
    without, need = estimate(plain, held=0), estimate(d, held=0)
    for limit in (room(memory=without.peak[1]), room(work=without.disk.work)):
        assert limit.lacks(need)
        assert advice(d, limit, 0) == "--set end_to_end=null"
    assert Recipe.load(d.recipe, ["end_to_end=null"]) == plain.recipe
    # Together with others, where it is not enough.
    every = [update for _, update in changes(d.recipe)]
    least = estimate(with_recipe(d, changed(d.recipe, *every)), held=0)
    option = advice(d, room(work=least.disk.work), 0)
    assert option is not None
    assert "--set end_to_end=null" in option
    assert "end_to_end.batch" not in option


def test_a_recipe_without_calibration_is_not_told_to_calibrate_less() -> None:
    d = description(recipe_of(base="rtn-w4a16"))
    assert advice(d, room(work=estimate(d, held=0).disk.work - 1), 0) is None


def test_refuses_with_a_setting_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = description(recipe_of("calibration.length=16384", base="gptq-w4a16"))
    d = replace(d, verify_length=1, windows=0)
    need = estimate(d, held=held_memory()).peak[1]
    refuse(d, "model", tmp_path / "work", tmp_path / "out")
    monkeypatch.setattr(verdict, "available_memory", lambda: need - 8 * MIB)
    with pytest.raises(InputError, match="of memory") as error:
        refuse(d, "model", tmp_path / "work", tmp_path / "out")
    message = str(error.value)
    assert message.startswith("model: needs ")
    assert "\n" not in message
    option = message.partition("it would fit with ")[2].partition(",")[0]
    known = dict(changes(d.recipe))
    fitted = with_recipe(d, changed(d.recipe, known[option]))
    refuse(fitted, "model", tmp_path / "work", tmp_path / "out")
    # Tensors are on another device: its memory is not looked at.
    refuse(d, "model", tmp_path / "work", tmp_path / "out", memory=False)


def test_refuses_for_want_of_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = description(recipe_of("calibration.samples=64", base="gptq-w4a16"))
    need = disk(d).work
    monkeypatch.setattr(verdict, "available_disk", lambda _: need - MIB)
    with pytest.raises(InputError, match=r"of disk in the work folder.*--samples 32.*--work"):
        refuse(d, "model", tmp_path / "work", tmp_path / "out")


def test_what_there_is(tmp_path: Path) -> None:
    assert 10 * MIB < held_memory() < available_memory()
    (tmp_path / "work").mkdir()
    empty = available_disk(tmp_path / "work")
    assert empty > 0
    (tmp_path / "work" / "kept").write_bytes(bytes(4 * MIB))
    # What a folder holds may be written again.
    assert available_disk(tmp_path / "work") == pytest.approx(empty, abs=64 * MIB)
    assert available_disk(tmp_path / "not" / "yet" / "there") > 0
    assert Room.here(tmp_path / "work", tmp_path / "out").output is None
