"""Recipes: presets, reading, validation, settings, grids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crossbit.compat import check_recipe
from crossbit.errors import InputError
from crossbit.recipe import (
    Activations,
    CrossFold,
    Gptq,
    Recipe,
    Rtn,
    Smooth,
    WeightGrid,
    nearest,
    preset_names,
    preset_text,
)


def refused(data: Any, *settings: str) -> str:
    """The one-line message with which a mapping (or a recipe's name) is refused."""

    def read() -> Recipe:
        if isinstance(data, dict):
            return Recipe.parse(data, "mine.yaml")
        return Recipe.load(data, settings)

    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_described(name: str) -> None:
    recipe = Recipe.load(name)
    check_recipe(recipe)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source
    again = Recipe.parse(recipe.model_dump(mode="json"), "again")
    assert again == recipe
    assert again.digest == recipe.digest
    assert recipe.research == name.startswith("crossquant-paper")


# First part of a preset's name -> kinds of transforms it must have, kinds it may have.
TRANSFORMS: dict[str, tuple[set[str], set[str]]] = {
    "rtn": (set(), set()),
    "gptq": (set(), set()),
    "awq": ({"awq_scale"}, set()),
    "smoothquant": ({"smooth"}, set()),
    "crossquant": (set(), {"cross_fold", "awq_scale"}),
    "cbq": (set(), {"cross_fold", "cfp"}),
    "omniquant": (set(), {"let"}),
    "duquant": ({"smooth", "duquant"}, set()),
    "quarot": ({"rotate"}, set()),
    "prefixquant": ({"rotate"}, set()),
    "w4a4kv4": ({"rotate", "cross_fold"}, set()),
    "w8a8kv8": ({"cross_fold"}, set()),
    "best": (set(), {"rotate", "cross_fold", "duquant", "awq_scale"}),
}
TRAINED = {"cbq", "omniquant", "duquant", "prefixquant", "best"}
ONLINE = {"duquant", "quarot", "prefixquant", "w4a4kv4", "w8a8kv8"}


@pytest.mark.parametrize("name", preset_names())
def test_presets_do_what_their_names_say(name: str) -> None:
    recipe = Recipe.load(name)
    parts = name.split("-")
    for part in parts:
        match = re.fullmatch(r"w(\d)a(\d+)(?:kv(\d))?", part)
        if match:
            weights, activations, cache = match.groups()
            assert recipe.weights.bits == int(weights)
            bits = 16 if recipe.activations is None else recipe.activations.bits
            assert bits == int(activations)
            assert (None if recipe.cache is None else recipe.cache.bits) == (
                None if cache is None else int(cache)
            )
        elif part.startswith("g") and part[1:].isdecimal():
            assert recipe.weights.group == int(part[1:])
        elif part == "channel":
            assert recipe.weights.group == "channel"
    kinds = {t.kind for t in recipe.transforms}
    must, may = TRANSFORMS[parts[0]]
    assert must <= kinds <= must | may
    folded = recipe.activations is not None and recipe.activations.kind == "cross_folded"
    assert ("cross_fold" in kinds) == folded
    if parts[0] == "crossquant":
        assert folded != recipe.research
    if "awq" in parts:
        assert "awq_scale" in kinds
    if "gptq" in parts:
        assert isinstance(recipe.solver, Gptq)
    assert recipe.trains == (parts[0] in TRAINED)
    if parts[0] == "cbq":
        assert ("cfp" in kinds) == ("paper" in parts)
    if parts[0] in ONLINE:
        assert recipe.kind == "online"
    elif parts[0] != "best":
        assert recipe.kind in ("plain", "research")
    if "plain" in parts:
        assert recipe.kind == "plain"
    signed = recipe.weights.symmetric and recipe.weights.bits <= 4 and "paper" not in parts
    # Kernels that multiply 4-bit weights with 8-bit inputs read group scales as unsigned.
    for_kernels = recipe.kind == "plain" and "w4a8" in parts
    signed &= not (recipe.weights.group == 64 and for_kernels)
    assert recipe.weights.grid(64).signed == signed
    if parts[0] == "rtn":
        assert isinstance(recipe.solver, Rtn)


def test_the_recipes_of_the_plan_are_there() -> None:
    wanted = {
        "rtn-w8a8",
        "rtn-w4a16",
        "smoothquant-w8a8",
        "gptq-w4a16",
        "awq-w4a16",
        "crossquant-w8a8",
        "crossquant-awq-w4a8-g64",
        "crossquant-w4a8-g64",
        "crossquant-w4a4",
    }
    assert wanted <= set(preset_names())
    assert any(name.startswith("crossquant-paper-") for name in preset_names())


def test_no_two_presets_are_the_same() -> None:
    contents = [
        Recipe.load(name).model_dump_json(exclude={"name", "summary", "source"})
        for name in preset_names()
    ]
    assert len(set(contents)) == len(contents)


def test_unknown_preset_names_the_nearest() -> None:
    message = refused("crossquant-w8a9")
    assert "did you mean 'crossquant-w8a8'" in message
    assert "crossbit recipes" in message
    with pytest.raises(InputError, match="no preset"):
        preset_text("zzz")
    assert yaml.safe_load(preset_text("rtn-w8a8"))["weights"]["bits"] == 8


# -- reading --------------------------------------------------------------------------------------


def test_file_gives_its_own_name_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {bits: 3, group: 64}\nsolver: {kind: gptq, damp: 0.1}\n")
    recipe = Recipe.load(path)
    assert recipe.name == "mine"
    assert recipe.weights == WeightGrid(bits=3, group=64)
    assert recipe.solver == Gptq(damp=0.1)
    assert recipe.activations is None
    assert recipe.embedding == WeightGrid(bits=8, group="channel")
    assert Recipe.load(str(path)) == recipe


def test_file_without_suffix_and_folder_of_a_presets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtn-w8a8").mkdir()
    assert Recipe.load("rtn-w8a8").weights.bits == 8
    (tmp_path / "plain").write_text("weights: {bits: 5}")
    assert Recipe.load("plain").weights.bits == 5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a mapping"),
        (b"- a\n- b\n", "not a mapping"),
        (b"just text", "not a mapping"),
        (b"weights: {bits: 4\nsolver: x", "not valid YAML at line"),
        (b"weights:\n\t- bits", "not valid YAML"),
        (b"name: \xff\xfe", "cannot be read"),
        (b"name: a\x00b", "not valid YAML"),
        (b"1: 2", "1"),
        (b"weights: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    for settings in ((), ("weights.bits=4",)):  # with settings the content is touched earlier
        message = refused(path, *settings)
        assert expected in message
        assert "broken" in message


def test_missing_file(tmp_path: Path) -> None:
    message = refused(tmp_path / "none.yaml")
    assert "none.yaml" in message
    assert "check the path" in message


# -- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "place", "suggestion"),
    [
        ({"weigths": {"bits": 4}}, "'weigths'", "'weights'"),
        ({"weights": {"bitz": 4}}, "'weights.bitz'", "'bits'"),
        ({"embedding": {"symetric": True}}, "'embedding.symetric'", "'symmetric'"),
        ({"head": {"scale_type": "float16"}}, "'head.scale_type'", "'scale_dtype'"),
        ({"activations": {"knd": "per_token"}}, "'activations.knd'", "'kind'"),
        ({"calibration": {"sample": 4}}, "'calibration.sample'", "'samples'"),
        ({"evaluation": {"window": 4}}, "'evaluation.window'", "'windows'"),
        ({"solver": {"kind": "gptq", "actorder": True}}, "'solver.gptq.actorder'", "'act_order'"),
        ({"solver": {"kind": "rtn", "clipping": "mse"}}, "'solver.rtn.clipping'", "'clip'"),
        ({"transforms": [{"kind": "cross_fold", "alhpa": 1}]}, "cross_fold.alhpa'", "'alpha'"),
        ({"transforms": [{"kind": "smooth", "strenth": 1}]}, "smooth.strenth'", "'strength'"),
        ({"transforms": [{"kind": "awq_scale", "point": 1}]}, "awq_scale.point'", "'points'"),
        ({"overrides": [{"match": "q_proj", "weight": 1}]}, "'overrides.0.weight'", "'weights'"),
        (
            {"overrides": [{"match": "q_proj", "weights": {"grup": 8}}]},
            "'overrides.0.weights.grup'",
            "'group'",
        ),
        (
            {"overrides": [{"match": "q_proj", "activations": {"bit": 8}}]},
            "activations.Activations.bit'",
            "'bits'",
        ),
        (
            {"overrides": [{"match": "q_proj", "solver": {"kind": "gptq", "dampp": 8}}]},
            "solver.gptq.dampp'",
            "'damp'",
        ),
    ],
)
def test_unknown_keys_name_the_nearest(data: dict[str, Any], place: str, suggestion: str) -> None:
    message = refused(data)
    assert message.startswith("recipe mine.yaml: unknown key")
    assert place in message
    assert f"did you mean {suggestion}?" in message
    assert suggestion.strip("'") in message.partition("valid keys: ")[2].split(", ")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"weights": {"bits": 9}}, ("weights.bits", "8", "9")),
        ({"weights": {"bits": 1}}, ("weights.bits", "2")),
        ({"weights": {"bits": "four"}}, ("weights.bits", "integer", "'four'")),
        ({"weights": {"group": "row"}}, ("weights.group", "channel", "tensor", "auto", "'row'")),
        ({"weights": {"group": -1}}, ("weights.group", "-1")),
        ({"weights": {"scale_dtype": "fp16"}}, ("scale_dtype", "'float16'", "'fp16'")),
        ({"weights": {"divisor": 0}}, ("weights.divisor", "0")),
        ({"weights": {"divisor": float("inf")}}, ("weights.divisor", "finite")),
        ({"weights": {"divisor": float("nan")}}, ("weights.divisor",)),
        ({"weights": None}, ("weights",)),
        ({"activations": {"kind": "per_tokens"}}, ("activations.kind", "'per_token'")),
        ({"activations": {"alpha": 1.5}}, ("activations.alpha", "1.5")),
        ({"activations": {"percentile": 50}}, ("activations.percentile", "50")),
        ({"solver": {"kind": "gtpq"}}, ("solver", "'gptq'", "'gtpq'")),
        ({"solver": {}}, ("solver", "kind")),
        ({"transforms": [{"kind": "turn"}]}, ("transforms.0", "'turn'", "'cross_fold'")),
        ({"transforms": {"kind": "smooth"}}, ("transforms",)),
        ({"overrides": [{"weights": {"bits": 8}}]}, ("overrides.0.match", "required")),
        ({"ignore": "lm_head"}, ("ignore", "'lm_head'")),
        ({"calibration": {"holdout": 1.0}}, ("calibration.holdout", "1.0")),
        ({"calibration": {"samples": 1.5}}, ("calibration.samples", "1.5")),
        ({"name": "x\ny", "bits": 4}, ("'bits'",)),
        ({"a\nb": 4}, (r"a\nb",)),
    ],
)
def test_bad_values_say_where_and_what(data: dict[str, Any], expected: tuple[str, ...]) -> None:
    message = refused(data)
    for part in expected:
        assert part in message


def test_recipes_do_not_change() -> None:
    recipe = Recipe.load("rtn-w8a8")
    with pytest.raises(Exception, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_digest_is_of_the_content() -> None:
    a = Recipe.parse({"name": "x", "weights": {"bits": 4, "group": 64}}, "a")
    b = Recipe.parse({"weights": {"group": 64, "bits": 4}, "name": "x", "ignore": []}, "b")
    assert a.digest == b.digest
    assert a.digest != Recipe.load(a, ["weights.bits=3"]).digest


# -- --set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "path", "value"),
    [
        (["weights.bits=3"], "weights.bits", 3),
        (["weights.group=auto"], "weights.group", "auto"),
        (["weights.symmetric=false"], "weights.symmetric", False),
        (["weights={bits: 5, group: 32}"], "weights.bits", 5),
        (["embedding=null"], "embedding", None),
        (["embedding="], "embedding", None),
        (["activations.kind=per_token"], "activations.kind", "per_token"),
        (["calibration.text=a=b.txt"], "calibration.text", "a=b.txt"),
        (["transforms.0.alpha=0.5"], "transforms.0.alpha", 0.5),
        (["transforms.0.alpha=1e-1"], "transforms.0.alpha", 0.1),
        (["transforms.0.alphas=[0.2, 0.4]"], "transforms.0.alphas.1", 0.4),
        (["transforms.0.alphas.1=0.33"], "transforms.0.alphas.1", 0.33),
        (["transforms=[{kind: smooth, strength: 0.7}]"], "transforms.0.strength", 0.7),
        (["transforms.0={kind: awq_scale}"], "transforms.0.points", 20),
        (["ignore=[lm_head, q_proj]"], "ignore.1", "q_proj"),
        (["ignore=[a, b]", "ignore.0=c"], "ignore.0", "c"),
        (["overrides=[{match: down_proj, weights: {bits: 8}}]"], "overrides.0.weights.bits", 8),
        (["weights.bits=3", "weights.bits=6"], "weights.bits", 6),
        (["summary=two words"], "summary", "two words"),
    ],
)
def test_settings(tmp_path: Path, settings: list[str], path: str, value: Any) -> None:
    file = tmp_path / "base.yaml"
    file.write_text(
        "weights: {bits: 4}\ntransforms: [{kind: cross_fold, alphas: [0.1, 0.2, 0.3]}]\n"
    )
    base = Recipe.load(file)
    for recipe in (Recipe.load(file, settings), Recipe.load(base, settings)):
        node: Any = recipe
        for part in path.split("."):
            node = node[int(part)] if part.isdecimal() else getattr(node, part)
        assert node == value
    assert base == Recipe.load(file)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("weights.bits", "expected key=value"),
        ("=4", "expected key=value"),
        ("", "expected key=value"),
        ("weights.bits=[", "not valid YAML"),
        ("weights.bits=99", "weights.bits"),
        ("weigths.bits=4", "did you mean 'weights'"),
        ("weights.bit=4", "did you mean 'bits'"),
        ("weights..bits=4", "unknown key"),
        ("weights.bits.x=4", "weights.bits"),
        ("transforms.7.alpha=1", "'7' is no index below 1"),
        ("transforms.x.alpha=1", "'x' is no index below 1"),
        ("transforms.-1.alpha=1", "'-1' is no index below 1"),
        ("transforms.²=1", "is no index"),
        ("transforms.².alpha=1", "is no index"),
        ("transforms.1={kind: smooth}", "'1' is no index below 1"),
        ("ignore.0.x=1", "item 0 is a value"),
        ("name=[1]", "name"),
    ],
)
def test_bad_settings(tmp_path: Path, setting: str, expected: str) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("transforms: [{kind: cross_fold}]\nignore: [lm_head]\n")
    assert expected in refused(file, setting)


# -- grids ----------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from(["channel", "tensor", "auto", 16, 32]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    columns=st.sampled_from([64, 96, 576, 1536]),
)
def test_weight_grids(bits: int, symmetric: bool, group: Any, dtype: Any, columns: int) -> None:
    grid = WeightGrid(bits=bits, symmetric=symmetric, group=group, scale_dtype=dtype).grid(columns)
    assert (grid.bits, grid.symmetric) == (bits, symmetric)
    assert grid.scale_dtype == getattr(torch, dtype)
    assert grid.signed == (symmetric and bits <= 4)
    said = WeightGrid(bits=bits, group=group, signed=not grid.signed)
    assert said.grid(columns).signed != grid.signed
    expected = {"auto": {64: 64, 96: 96, 576: 96, 1536: 128}[columns]}.get(group, group)
    if isinstance(expected, int):
        assert (grid.strategy, grid.group_size) == ("group", expected)
    else:
        assert (grid.strategy, grid.group_size) == (expected, None)


def test_auto_group_of_several_widths_divides_all() -> None:
    assert WeightGrid(group="auto").grid(256, 96).group_size == 32
    with pytest.raises(InputError, match="does not divide 576"):
        WeightGrid(group=128).grid(576)


def test_activation_grids() -> None:
    folded = Activations(bits=4, kind="cross_folded", alpha=0.3).grid()
    assert (folded.kind, folded.alpha, folded.research) == ("per_token", 1.0, False)
    dynamic = Activations(bits=8, kind="cross_dynamic", alpha=0.3, divisor=127).grid()
    assert (dynamic.kind, dynamic.alpha, dynamic.effective_divisor) == ("cross_dynamic", 0.3, 127)
    assert dynamic.research


def test_kinds_choose_the_type() -> None:
    recipe = Recipe.parse(
        {"transforms": [{"kind": "smooth", "strength": "search"}, {"kind": "cross_fold"}]}, "x"
    )
    assert recipe.transforms == (Smooth(strength="search"), CrossFold())


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("bitss", ["bits", "group"]) == "; did you mean 'bits'?"
    assert nearest("qqqqq", ["bits", "group"]) == ""
