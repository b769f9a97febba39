"""Every row of the benchmarks' tables is a recipe, and no two are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks import ablation, cqe, probe, run, second
from benchmarks.low_bits import OURS, SETTINGS
from benchmarks.quantizing import FLOAT_ENDS
from benchmarks.rows import Table, result_name
from benchmarks.run import steps
from benchmarks.store import claimed
from benchmarks.tables_low_bits import PRESETS, REFUSED

from crossbit.compat import check_recipe
from crossbit.recipe import Recipe

TABLES = {
    "ablation": (ablation.ROWS, (*ablation.SETTINGS, "calibration.samples=32")),
    "cqe": (cqe.ROWS, cqe.BUDGET),
    "second": (second.ROWS, ()),
    "probe": (probe.TABLE.rows, probe.TABLE.settings),
    **{
        f"low_bits {name}": (rows, SETTINGS[name].overrides + FLOAT_ENDS)
        for name, rows in OURS.items()
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_recipes(name: str) -> None:
    rows, settings = TABLES[name]
    found = {}
    for row, (preset, changes) in rows.items():
        recipe = Recipe.load(preset, [*settings, *changes])
        check_recipe(recipe)
        found[row] = recipe.digest
    assert len(set(found.values())) == len(rows)
    assert len({result_name(name, row, 0) for row in rows}) == len(rows)


@pytest.mark.parametrize(("place", "preset"), (PRESETS | REFUSED).items())
def test_rows_that_became_presets(place: tuple[str, str], preset: str) -> None:
    """The same recipe but for what it is called, and for a stage that was refused."""
    setting, method = place
    recipe, changes = OURS[setting][method.removeprefix("ours-")]
    called = {"name", "summary", "source"} | ({"end_to_end"} if place in REFUSED else set())
    settings = [*SETTINGS[setting].overrides, *FLOAT_ENDS, *changes]
    made = Recipe.load(recipe, settings).model_dump(exclude=called)
    assert made == Recipe.load(preset, FLOAT_ENDS).model_dump(exclude=called)


def test_the_ablation_is_of_three_epochs() -> None:
    for preset, changes in ablation.ROWS.values():
        assert Recipe.load(preset, [*ablation.SETTINGS, *changes]).training.epochs == 3


@pytest.mark.parametrize("table", [ablation, cqe])
def test_long_rows_are_rows(table: Any) -> None:
    assert set(table.LONG) < set(table.ROWS)


def test_all_of_them_are_run() -> None:
    """Every module that measures something, the rows that take hours too; tables come last."""
    made = steps("text", "work", "python")
    known = {
        path.stem
        for path in Path(run.__file__).parent.glob("*.py")
        if "once(" in path.read_text("utf8") or "run(" in path.read_text("utf8")
    }
    names = [name for name, *_ in made]
    assert known - {"run", "rows", "store", "measure"} <= set(names)
    assert names[-1] == "tables"
    named = {row for _, *options in made for row in (options or [""])[-1].split(";")}
    assert set(ablation.LONG) | set(cqe.LONG) <= named


def test_rows_on_the_embedded_text_need_not_be_listed() -> None:
    listed = Table("t", {"a": ("rtn-w8a8", ())}, samples=1, length=1)
    with pytest.raises(KeyError, match="rtn-w4a16"):
        listed.row("rtn-w4a16")
    found = probe.TABLE.row("rtn-w4a16+cl training.epochs=2")
    assert found == ("rtn-w4a16+cl", ("training.epochs=2",))
    assert probe.TABLE.original != Table("t", {}, samples=1, length=1, windows=12).original


def test_a_row_is_measured_by_one_process_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path, "row") as first, claimed(tmp_path, "row") as second:
        assert (first, second) == (True, False)
        with claimed(tmp_path, "other") as other:
            assert other
    with claimed(tmp_path, "row") as again:
        assert again
