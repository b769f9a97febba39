"""Every row of the benchmarks' tables is a recipe, and no two are the same."""

from __future__ import annotations

import pytest
from benchmarks import ablation, cqe, second
from benchmarks.low_bits import OURS, SETTINGS
from benchmarks.quantizing import FLOAT_ENDS
from benchmarks.rows import result_name

from crossbit.compat import check_recipe
from crossbit.recipe import Recipe

TABLES = {
    "ablation": (ablation.ROWS, ablation.SETTINGS),
    "cqe": (cqe.ROWS, cqe.BUDGET),
    "second": (second.ROWS, ()),
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


def test_the_ablation_is_of_three_epochs() -> None:
    for preset, changes in ablation.ROWS.values():
        assert Recipe.load(preset, [*ablation.SETTINGS, *changes]).training.epochs == 3


def test_long_rows_are_rows() -> None:
    assert set(cqe.LONG) < set(cqe.ROWS)
