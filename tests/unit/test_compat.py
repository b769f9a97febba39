"""The compatibility table: every rule is broken once, and its advice holds."""

from __future__ import annotations

from typing import Any

import pytest

from crossbit.compat import RULES, check_recipe
from crossbit.errors import InputError
from crossbit.recipe import Recipe

A8 = {"bits": 8, "kind": "per_token"}
FOLD = [{"kind": "cross_fold"}]
TENSOR = {"bits": 8, "group": "tensor"}
ASYMMETRIC = {"symmetric": False}
DYNAMIC = {"kind": "cross_dynamic"}
GPTQ, ROUNDING = {"kind": "gptq"}, {"kind": "rounding"}
NOTHING = {"parameter": "none", "steps": False}
CLIPPED = {"bits": 4, "kind": "per_token_clip"}

# Index of the rule in the table, a recipe that breaks it, what the message has to offer, and
# recipes that follow the advice.
Case = tuple[int, dict[str, Any], tuple[str, ...], list[dict[str, Any]]]

UNFOLDED: list[Case] = [
    (
        1,
        {"activations": {"kind": kind}, "transforms": FOLD},
        ("cross_folded", "per_token", "cross_dynamic"),
        [{"activations": A8, "transforms": FOLD}, {"activations": {"kind": kind}}],
    )
    for kind in ("cross_dynamic", "cross_static", "cross_static_clip")
]
OUTSIDE: list[Case] = [
    (7, {part: grid}, ("bits: 8", "channel", "null"), [{part: None}, {part: {"bits": 8}}])
    for part in ("embedding", "head")
    for grid in ({"bits": 4}, {"bits": 8, "group": 64}, {"bits": 8, "symmetric": False})
]
CASES: list[Case] = [
    (
        0,
        {"activations": {"kind": "cross_folded"}},
        ("cross_fold", "per_token"),
        [
            {"activations": {"kind": "cross_folded"}, "transforms": FOLD},
            {"activations": {"kind": "per_token"}},
        ],
    ),
    (
        0,
        {"overrides": [{"match": "down_proj", "activations": {"kind": "cross_folded"}}]},
        ("cross_fold", "per_token"),
        [{"overrides": [{"match": "down_proj", "activations": A8}]}],
    ),
    *UNFOLDED,
    (
        2,
        {"transforms": FOLD},
        ("activations", "awq_scale"),
        [{"transforms": FOLD, "activations": A8}, {"transforms": [{"kind": "awq_scale"}]}, {}],
    ),
    (
        2,
        {
            "transforms": [{"kind": "smooth"}],
            "overrides": [{"match": "down_proj", "activations": "none"}],
        },
        ("activations", "awq_scale"),
        [{"transforms": [{"kind": "smooth"}], "activations": A8}],
    ),
    (
        3,
        {"activations": {"kind": "cross_folded", "alpha": 0.5}, "transforms": FOLD},
        ("transforms", "alpha"),
        [
            {
                "activations": {"kind": "cross_folded"},
                "transforms": [{"kind": "cross_fold", "alpha": 0.5}],
            }
        ],
    ),
    (
        4,
        {"activations": {"kind": "per_token", "divisor": 127}},
        ("divisor", "cross_dynamic", "evaluate --divisor"),
        [
            {"activations": {"kind": "per_token", "divisor": 127.5}},
            {"activations": {"kind": "cross_dynamic", "divisor": 127}},
            {"activations": A8},
        ],
    ),
    (
        5,
        {"activations": {"kind": "per_tensor_static", "bits": 4}},
        ("bits: 8", "per_token"),
        [
            {"activations": {"kind": "per_tensor_static", "bits": 8}},
            {"activations": {"kind": "per_token", "bits": 4}},
        ],
    ),
    (
        6,
        {"solver": GPTQ, "weights": TENSOR},
        ("channel", "auto", "rtn"),
        [
            {"solver": GPTQ, "weights": {"group": "auto"}},
            {"solver": GPTQ, "weights": {"group": 64}},
            {"solver": {"kind": "rtn"}, "weights": TENSOR},
        ],
    ),
    (
        6,
        {"solver": GPTQ, "overrides": [{"match": "q_proj", "weights": TENSOR}]},
        ("channel", "rtn"),
        [
            {
                "solver": GPTQ,
                "overrides": [{"match": "q_proj", "weights": TENSOR, "solver": {"kind": "rtn"}}],
            }
        ],
    ),
    (
        6,
        {"weights": TENSOR, "overrides": [{"match": "q_proj", "solver": GPTQ}]},
        ("channel", "rtn"),
        [
            {
                "weights": TENSOR,
                "overrides": [{"match": "q_proj", "solver": GPTQ, "weights": {"bits": 8}}],
            }
        ],
    ),
    *OUTSIDE,
    (
        8,
        {"weights": {"bits": 8}, "activations": {"bits": 4}},
        ("W8A8", "W4A8", "W4A4"),
        [
            {"weights": {"bits": 8}, "activations": {"bits": 8}},
            {"weights": {"bits": 4}, "activations": {"bits": 8}},
            {"weights": {"bits": 4}, "activations": {"bits": 4}},
        ],
    ),
    (
        8,  # an override elsewhere does not hide it
        {
            "weights": {"bits": 8},
            "activations": {"bits": 4},
            "overrides": [{"match": "down_proj", "activations": A8}],
        },
        ("W8A8", "W4A8", "W4A4"),
        [
            {
                "weights": {"bits": 4},
                "activations": {"bits": 4},
                "overrides": [{"match": "down_proj", "weights": {"bits": 8}, "activations": A8}],
            }
        ],
    ),
    (
        8,
        {
            "weights": {"bits": 4},
            "activations": {"bits": 4},
            "overrides": [{"match": "down_proj", "weights": {"bits": 8}}],
        },
        ("W8A8", "W4A8", "W4A4"),
        [
            {
                "weights": {"bits": 4},
                "activations": {"bits": 4},
                "overrides": [
                    {"match": "down_proj", "weights": {"bits": 8}, "activations": "none"}
                ],
            }
        ],
    ),
    (
        25,
        {"norms": True},
        ("solver {kind: rounding}", "norms: false"),
        [{"norms": True, "solver": ROUNDING}, {}],
    ),
    (
        26,
        {"norms": True, "transforms": [{"kind": "let"}], "solver": ROUNDING},
        ("norms: false", "no let"),
        [
            {"transforms": [{"kind": "let"}], "solver": ROUNDING},
            {"norms": True, "solver": ROUNDING},
        ],
    ),
    (
        27,
        {"norms": True, "activations": {"kind": "per_tensor_static"}, "solver": ROUNDING},
        ("per_token",),
        [{"norms": True, "activations": A8, "solver": ROUNDING}],
    ),
    (
        28,
        {"solver": {"kind": "rounding", "steps": False}, "end_to_end": {"hold": True}},
        ("steps: true", "norms: true", "end_to_end.hold: false"),
        [
            {"solver": ROUNDING, "end_to_end": {"hold": True}},
            {
                "solver": {"kind": "rounding", "steps": False},
                "norms": True,
                "end_to_end": {"hold": True},
            },
            {"solver": {"kind": "rounding", "steps": False}, "end_to_end": {}},
        ],
    ),
    (
        29,
        {
            "transforms": [{"kind": "let"}],
            "solver": ROUNDING,
            "end_to_end": {"hold": True},
        },
        ("end_to_end.hold: false",),
        [
            {"transforms": [{"kind": "let"}], "solver": ROUNDING, "end_to_end": {}},
            {"solver": ROUNDING, "end_to_end": {"hold": True}},
        ],
    ),
]
OTHERWISE: list[dict[str, Any]] = [
    {"weights": {**ASYMMETRIC, "group": 64}, "embedding": None, "head": None},
    {"weights": {"symmetric": False, "group": 64}, "activations": A8},
    {"weights": {"group": 64}},
]
OUTSIDES: list[dict[str, Any]] = [
    {},
    {"activations": DYNAMIC},
]
CASES += [
    (
        9,
        {"weights": {"symmetric": False, "group": 64}, **outside},
        ("embedding: null", "symmetric weights"),
        OTHERWISE,
    )
    for outside in OUTSIDES
]
NOT_ONE_SCHEME: list[dict[str, Any]] = [
    {"head": None},
    {"embedding": None},
    {"embedding": None, "head": None, "weights": {**ASYMMETRIC, "group": "auto"}},
    {"embedding": None, "head": None, "overrides": [{"match": "q_proj", "weights": {}}]},
]
CASES += [
    (9, {"weights": ASYMMETRIC, **rest}, ("channel or a number", "no overrides"), [])
    for rest in NOT_ONE_SCHEME
]
CFP_A8 = {"transforms": [{"kind": "cfp"}], "activations": A8}
CFP_WEIGHTS = {"transforms": [{"kind": "cfp", "activations": False}]}
CASES += [
    (10, {"transforms": [{"kind": "cfp"}]}, ("activations: false",), [CFP_A8, CFP_WEIGHTS]),
    (
        10,
        {
            "transforms": [{"kind": "cfp", "weights": False}, {"kind": "awq_scale"}],
            "overrides": [{"match": "down_proj", "activations": "none"}],
        },
        ("activations: false", "set activations"),
        [
            {"transforms": [{"kind": "cfp", "weights": False}], "activations": A8},
            {**CFP_A8, "transforms": [*CFP_A8["transforms"], *FOLD]},
            {"transforms": [*CFP_WEIGHTS["transforms"], {"kind": "awq_scale"}]},
        ],
    ),
    (
        11,
        {"transforms": [{"kind": "cfp", "activations": False, "weights": False}]},
        ("activations: true", "weights: true"),
        [CFP_WEIGHTS],
    ),
    (
        12,
        {"weights": {"symmetric": False, "signed": True}, "activations": A8},
        ("weights.signed null",),
        [
            {"weights": {"symmetric": False, "signed": False}, "activations": A8},
            {"weights": {"symmetric": False}, "activations": A8},
            {"weights": {"bits": 8, "signed": True}},
        ],
    ),
    (
        13,
        {"activations": CLIPPED, "solver": GPTQ},
        ("solver {kind: rounding}", "kind per_token"),
        [
            {"activations": CLIPPED, "solver": ROUNDING},
            {"activations": CLIPPED, "solver": ROUNDING, "transforms": FOLD},
            {"activations": {**CLIPPED, "divisor": 7.0}, "solver": ROUNDING},
            {"activations": {"kind": "per_token"}, "solver": GPTQ},
        ],
    ),
    (
        13,
        {
            "activations": CLIPPED,
            "solver": ROUNDING,
            "overrides": [{"match": "down_proj", "solver": GPTQ}],
        },
        ("solver {kind: rounding}",),
        [
            {
                "activations": CLIPPED,
                "solver": ROUNDING,
                "overrides": [{"match": "down_proj", "solver": GPTQ, "activations": A8}],
            }
        ],
    ),
    (
        14,
        {"activations": A8, "transforms": [{"kind": "smooth"}, {"kind": "rotate"}]},
        ("first in the list",),
        [{"activations": A8, "transforms": [{"kind": "rotate"}, {"kind": "smooth"}]}],
    ),
    (
        15,
        {"activations": A8, "transforms": [{"kind": "duquant"}, {"kind": "smooth"}]},
        ("last in the list",),
        [{"activations": A8, "transforms": [{"kind": "smooth"}, {"kind": "duquant"}]}],
    ),
    (
        16,
        {
            "activations": {"kind": "per_tensor_static"},
            "transforms": [{"kind": "duquant"}],
        },
        ("per_token", "or none"),
        [{"transforms": [{"kind": "duquant"}], **more} for more in ({}, {"activations": A8})],
    ),
    (
        17,
        {"transforms": [{"kind": "let"}]},
        ("solver {kind: rounding}",),
        [{"transforms": [{"kind": "let"}], "solver": ROUNDING}],
    ),
    (
        18,
        {
            "activations": A8,
            "transforms": [{"kind": "let"}, {"kind": "smooth"}],
            "solver": ROUNDING,
        },
        ("last in the list",),
        [
            {
                "activations": A8,
                "transforms": [{"kind": "smooth"}, {"kind": "let"}],
                "solver": ROUNDING,
            }
        ],
    ),
    (
        19,
        {
            "activations": {"kind": "per_tensor_static"},
            "transforms": [{"kind": "let"}],
            "solver": ROUNDING,
        },
        ("per_token",),
        [{"activations": A8, "transforms": [{"kind": "let"}], "solver": ROUNDING}],
    ),
    (
        20,
        {"transforms": [{"kind": "let"}], "solver": {"kind": "rounding", "mode": "sigmoid"}},
        ("straight_through", "frac"),
        [{"transforms": [{"kind": "let"}], "solver": ROUNDING}],
    ),
    (
        21,
        {"cache": {"before_rope": True}, "transforms": [{"kind": "rotate", "keys": True}]},
        ("cache.before_rope: false",),
        [
            {"cache": {}, "transforms": [{"kind": "rotate", "keys": True}]},
            {"cache": {"before_rope": True}, "transforms": [{"kind": "rotate"}]},
        ],
    ),
    (
        22,
        {"transforms": [{"kind": "rotate", "residual": False, "heads": False}]},
        ("residual: true", "keys: true"),
        [{"transforms": [{"kind": "rotate", "residual": False}]}, {}],
    ),
    (
        23,
        {"solver": {**ROUNDING, **NOTHING}},
        ("low_rank", "steps true", "expansion"),
        [
            {"solver": {**ROUNDING, **NOTHING, **change}}
            for change in ({"parameter": "full"}, {"steps": True}, {"expansion": {"width": 2}})
        ],
    ),
    (
        23,
        {"overrides": [{"match": "down_proj", "solver": {**ROUNDING, **NOTHING}}]},
        ("parameter full",),
        [{"overrides": [{"match": "down_proj", "solver": GPTQ}]}],
    ),
    (
        24,
        {"solver": ROUNDING, "objective": {"homologous": 1.0, "ahead": [0.0, 1.0]}},
        ("objective.ahead", "homologous: 0"),
        [
            {"solver": ROUNDING, "objective": {"homologous": 1.0, "ahead": [0.5, 1.0]}},
            {"solver": ROUNDING, "objective": {"ahead": [0.0, 1.0]}},
        ],
    ),
    (
        30,
        {"solver": ROUNDING, "objective": {"ahead": [0.0, 1.0], "ahead_share": 0.5}},
        ("objective.ahead", "ahead_share: 1"),
        [
            {"solver": ROUNDING, "objective": {"ahead": [1.0, 1.0], "ahead_share": 0.5}},
            {"solver": ROUNDING, "objective": {"ahead": [0.0, 1.0]}},
        ],
    ),
]


def recipe_of(data: dict[str, Any]) -> Recipe:
    return Recipe.parse({"name": "mine", **data}, "mine")


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(range(len(RULES)))


@pytest.mark.parametrize(("index", "data", "offered", "valid"), CASES)
def test_rules(
    index: int, data: dict[str, Any], offered: tuple[str, ...], valid: list[dict[str, Any]]
) -> None:
    rule, recipe = RULES[index], recipe_of(data)
    assert [i for i, r in enumerate(RULES) if r.broken(recipe)] == [index]
    with pytest.raises(InputError) as caught:
        check_recipe(recipe)
    message = str(caught.value)
    assert "\n" not in message
    assert message == f"recipe mine: {rule.why}; valid: {rule.valid}"
    for choice in offered:
        assert choice in message.partition("valid: ")[2]
    for allowed in valid:
        check_recipe(recipe_of(allowed))
