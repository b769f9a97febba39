"""Add-ons of recipes: "NAME+sde+cl", and the suffix "-e2e"."""

from __future__ import annotations

import pytest
import yaml
from benchmarks.ablation import ROWS, SETTINGS
from tests.tiny import tiny_config

from crossbit.compat import check_recipe, warnings
from crossbit.errors import InputError
from crossbit.models.shell import Shell
from crossbit.recipe import Recipe, TrainedRounding
from crossbit.recipe_files import addon_names, addon_summary, recipe_text

ALIKE = {"name", "summary", "source"}


def refused(name: str) -> str:
    """The one line with which a recipe's name is refused."""
    with pytest.raises(InputError) as failure:
        Recipe.load(name)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize("addon", addon_names())
def test_addons_go_with_a_preset_and_are_described(addon: str) -> None:
    preset = "cbq-w4a16" if addon == "overlap" else "cbq-w4a4"  # which has it by itself
    recipe = Recipe.load(f"{preset}+{addon}")
    check_recipe(recipe)
    assert recipe.name == f"{preset}+{addon}"
    assert recipe.summary.endswith(addon_summary(addon))
    plain = Recipe.load(preset)
    alike = recipe.model_dump(exclude={"name", "summary"})
    assert alike != plain.model_dump(exclude={"name", "summary"})


def test_addons_stand_where_their_transforms_belong() -> None:
    recipe = Recipe.load("smoothquant-w8a8+duquant+rotate+sde", ["solver.kind=rounding"])
    assert [t.kind for t in recipe.transforms] == ["rotate", "smooth", "duquant"]
    both = Recipe.load("omniquant-w3a16+sde+cl")
    assert both.objective.ahead == (1, 0, 1)
    assert isinstance(both.solver, TrainedRounding)
    assert both.solver.expansion is not None
    assert both.solver.expansion.kind == "full"


def test_a_suffix_tunes_any_preset_end_to_end() -> None:
    """Of its own for 2 and 3 bits, with the codes held; an add-on for the others."""
    held = ["end_to_end.epochs=2", "end_to_end.hold=true", "end_to_end.step=3e-3"]
    windows = {"cbq-w2a16": [], "cbq-w3a16": ["objective.overlap=0", "training.step=1e-3"]}
    for preset, changes in windows.items():
        named = Recipe.load(f"{preset}-e2e")
        added = Recipe.load(f"{preset}+e2e", [*changes, *held])
        assert named.model_dump(exclude=ALIKE) == added.model_dump(exclude=ALIKE)
        assert named.name == f"{preset}-e2e"
    other = Recipe.load("cbq-w4a8-e2e+sde")
    added = Recipe.load("cbq-w4a8+e2e+sde")
    assert other.model_dump(exclude=ALIKE) == added.model_dump(exclude=ALIKE)
    assert other.name == "cbq-w4a8-e2e+sde"
    assert yaml.safe_load(recipe_text("cbq-w4a8-e2e"))["end_to_end"]["epochs"] == 1
    assert "did you mean 'cbq-w" in refused("cbq-w4a9-e2e")


@pytest.mark.parametrize("preset", ["cbq-w4a16", "best-w4a4-plain", "omniquant-w4a4"])
def test_a_union_starts_where_its_ranges_begin(preset: str) -> None:
    """From GPTQ's codes nothing would be left, and the run would say so."""
    structure = Shell(tiny_config("llama", tied=True)).structure
    union = Recipe.load(f"{preset}+union")
    codes = Recipe.load(f"{preset}+union", ["solver.start={kind: gptq}"])
    told = ["GPTQ's codes" in " ".join(warnings(r, structure)) for r in (union, codes)]
    assert told == [False, True]
    assert isinstance(union.solver, TrainedRounding)
    assert union.solver.expansion is not None
    assert union.solver.expansion.kind == "full"  # which fits layers of any shape


@pytest.mark.parametrize(
    ("addons", "row"),
    [
        ("blockwise", "block-wise"),
        ("window3", "windows of 3"),
        ("window4", "windows of 4"),
        ("overlap", "windows of 2, overlap 1"),
        ("ends", "expanding ends"),
        ("adaround", "AdaRound"),
        ("lora", "LoRA-Rounding, straight-through"),
        ("kl", "KL"),
        ("aug", "homologous"),
        ("cfp", "CFP"),
    ],
)
def test_what_the_ablation_changes_is_an_addon(addons: str, row: str) -> None:
    """But for the epochs, which are those of the table."""
    preset, settings = ROWS[row]
    changed = Recipe.load(preset, (*SETTINGS, *settings))
    added = Recipe.load(f"{preset}+{addons}", ["training.epochs=3"])
    assert added.model_dump(exclude=ALIKE) == changed.model_dump(exclude=ALIKE)


def test_unknown_addons_and_settings_that_do_not_fit_are_told() -> None:
    assert "did you mean 'sde'" in refused("omniquant-w4a4+sdee")
    assert "known: " in refused("omniquant-w4a4+")
    assert "solver" in refused("gptq-w4a16+sde")
