"""Recipes against a model: what is refused or warned of, and that every preset suits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tests.tiny import tiny_config
from tests.unit.test_compat import A8, ROUNDING, recipe_of

from crossbit.compat import check_model, warnings
from crossbit.errors import InputError
from crossbit.models.shell import build_empty
from crossbit.models.structure import ModelStructure, discover
from crossbit.recipe import Recipe, preset_names


@cache
def structure(family: str, tied: bool) -> ModelStructure:
    return discover(build_empty(tiny_config(family, tied=tied)))


def refusal(data: dict[str, Any], family: str = "llama", *, tied: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        check_model(recipe_of(data), structure(family, tied))
    assert "\n" not in str(caught.value)
    assert "valid: " in str(caught.value)
    return str(caught.value)


def test_tied_embedding_and_head_need_one_grid() -> None:
    assert "tied" in refusal({"head": None})
    assert "tied" in refusal({"embedding": None})
    check_model(recipe_of({"head": None}), structure("llama", False))
    check_model(recipe_of({"head": None, "embedding": None}), structure("llama", True))
    check_model(recipe_of({}), structure("llama", True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_need_one_scheme(family: str) -> None:
    eight = {"bits": 8}
    for broken in (
        {"ignore": ["*.experts.1.*"]},
        {"ignore": ["down_proj"]},
        {"ignore": ["*.experts.*"]},
        {"overrides": [{"match": "*.experts.*.down_proj", "weights": eight}]},
        {"overrides": [{"match": "model.layers.0.mlp", "weights": eight}]},
    ):
        assert "one scheme" in refusal(broken, family)
    assert "symmetric" in refusal({"weights": {"symmetric": False}}, family)
    for valid in (
        {"overrides": [{"match": "*.experts.*", "weights": eight}]},
        {"overrides": [{"match": "q_proj", "weights": {"symmetric": False}}]},
        {"ignore": ["q_proj"]},
    ):
        check_model(recipe_of(valid), structure(family, True))


def test_dense_models_take_any_overrides() -> None:
    data = {"ignore": ["down_proj"], "weights": {"symmetric": False}}
    check_model(recipe_of(data), structure("llama", True))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3_moe"])
@pytest.mark.parametrize("name", preset_names())
def test_presets_suit_dense_models_and_experts(name: str, family: str) -> None:
    recipe = Recipe.load(name)
    if family == "qwen3_moe" and not recipe.weights.symmetric:
        with pytest.raises(InputError, match="asymmetric experts"):
            check_model(recipe, structure(family, True))
        return
    check_model(recipe, structure(family, True))


@pytest.mark.parametrize(
    ("data", "family", "expected"),
    [
        ({"weights": {"bits": 3}}, "llama", "compressed-tensors 0.20"),
        ({"overrides": [{"match": "q_proj", "weights": {"bits": 6}}]}, "llama", "few GPU kernels"),
        ({"weights": {"symmetric": False}}, "llama", "asymmetric"),
        ({}, "llama", "--set embedding=null"),
        ({"activations": A8}, "mixtral", "experts"),
        ({"activations": A8}, "opt", "fc1 and fc2"),
        ({"activations": {"kind": "cross_dynamic"}}, "llama", "research"),
        ({"weights": {"group": 64}, "activations": A8}, "llama", "weights.signed=false"),
        (
            {"solver": ROUNDING, "objective": {"metric": "fisher", "norm": "mean"}},
            "llama",
            "use norm bounded or token",
        ),
        ({"end_to_end": {}}, "llama", "end_to_end change nothing"),
    ],
)
def test_warnings(data: dict[str, Any], family: str, expected: str) -> None:
    found = warnings(recipe_of(data), structure(family, True))
    assert sum(expected in note for note in found) == 1
    assert all("\n" not in note for note in found)
    for quiet in (
        {"weights": {"group": 64}},
        {"weights": {"group": "channel"}, "activations": A8},
        {"weights": {"group": 64, "signed": False}, "activations": A8},
        {"weights": {"group": 64, "symmetric": False}, "activations": A8},
    ):
        assert "negative" not in " ".join(warnings(recipe_of(quiet), structure("llama", True)))
    plain = recipe_of({"embedding": None, "head": None})
    assert warnings(plain, structure("llama", True)) == []
