"""What a recipe says of one layer: later overrides win, and patterns name layers."""

from __future__ import annotations

import pytest

from crossbit.recipe import Activations, Gptq, Recipe, Rtn, matches

Q_PROJ = ("model.layers.2.self_attn.q_proj", "q_proj")
DOWN = ("model.layers.2.mlp.down_proj", "down_proj")


def test_later_overrides_win_and_each_sets_only_what_it_names() -> None:
    recipe = Recipe.parse(
        {
            "weights": {"bits": 4},
            "activations": {"bits": 8},
            "overrides": [
                {"match": "*.mlp.*", "weights": {"bits": 8}, "solver": {"kind": "gptq"}},
                {"match": "down_proj", "weights": {"bits": 6}},
                {"match": "model.layers.2", "activations": "none"},
            ],
        },
        "x",
    )
    weights, activations, solver = recipe.for_layer(*DOWN)
    assert (weights.bits, activations, solver) == (6, None, Gptq())
    weights, activations, solver = recipe.for_layer(*Q_PROJ)
    assert (weights.bits, activations, solver) == (4, None, Rtn())
    weights, activations, solver = recipe.for_layer("model.layers.20.mlp.up_proj", "up_proj")
    assert (weights.bits, activations, solver) == (8, Activations(bits=8), Gptq())

    reverse = recipe.model_dump(mode="json")
    reverse["overrides"].reverse()
    assert Recipe.parse(reverse, "x").for_layer(*DOWN)[0].bits == 8


def test_override_can_quantize_activations_that_the_recipe_leaves() -> None:
    recipe = Recipe.parse(
        {"overrides": [{"match": "q_proj", "activations": {"bits": 8, "kind": "cross_static"}}]},
        "x",
    )
    assert recipe.for_layer(*Q_PROJ)[1] == Activations(bits=8, kind="cross_static")
    assert recipe.for_layer(*DOWN)[1] is None
    assert recipe.research


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("model.layers.1.mlp.down_proj", [True, False, False]),
        ("down_proj", [True, True, False]),
        ("mlp.down_proj", [True, True, False]),
        ("model.layers.1", [True, False, True]),
        ("model.layers.1.mlp", [True, False, False]),
        ("model.layers.1*", [True, True, True]),
        ("*.layers.1?.*", [False, True, False]),
        ("*proj", [True, True, True]),
        ("own_proj", [False, False, False]),
        ("down", [False, False, False]),
        ("model.layers.1.mlp.down_pro", [False, False, False]),
        ("DOWN_PROJ", [False, False, False]),
        ("", [False, False, False]),
    ],
)
def test_patterns(pattern: str, matched: list[bool]) -> None:
    names = [
        "model.layers.1.mlp.down_proj",
        "model.layers.10.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert [matches(pattern, name) for name in names] == matched
    recipe = Recipe.parse({"ignore": [pattern]}, "x")
    assert [recipe.ignores(name) for name in names] == matched


def test_ignore_takes_roles_and_names() -> None:
    recipe = Recipe.parse({"ignore": ["o_proj", "*.layers.0.*"]}, "x")
    assert recipe.ignores("model.layers.4.self_attn.out_proj", "o_proj")
    assert recipe.ignores("model.layers.0.fc1", "fc1")
    assert not recipe.ignores("model.layers.4.fc1", "fc1")


def test_a_block_is_named_by_its_path() -> None:
    """Whole dotted parts match, digits do not run on."""
    name = "model.layers.1.self_attn.q_proj"
    assert matches("layers.1", name)
    assert matches("self_attn", name)
    assert not matches("layers.1", name.replace("layers.1", "layers.11"))
    assert not matches("proj", name)
