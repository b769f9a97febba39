"""Schemes, targets and the config: what is written must resolve to what was meant."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.exporting import CHANNEL4, CHANNEL8, GROUP4, TOKEN4, TOKEN8, round_to_nearest

from crossbit.activations.grid import ActivationGrid
from crossbit.errors import InputError
from crossbit.export.compressed_tensors import module_tensors, quantization_config
from crossbit.export.scheme import INT, PACKED, QuantScheme
from crossbit.export.targets import compact, matches, resolve
from crossbit.grid import Grid, as_read

LAYERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"]
NAMES = [f"model.layers.{i}.{leaf}" for i in (0, 1, 10) for leaf in LAYERS]
OPTIONS: list[QuantScheme | None] = [
    None,
    QuantScheme(GROUP4),
    QuantScheme(CHANNEL4, TOKEN4),
    QuantScheme(CHANNEL8, TOKEN8),
    QuantScheme(CHANNEL8),
]


def skeleton(names: list[str]) -> torch.nn.Module:
    """A module tree with linear layers (and one embedding) of these names."""
    root = torch.nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        parent: Any = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        made = torch.nn.Embedding(2, 2) if leaf == "embed_tokens" else torch.nn.Linear(2, 2)
        parent.add_module(leaf, made)
    return root


def library_schemes(config: dict[str, Any], names: list[str]) -> dict[str, QuantizationScheme]:
    """Which scheme compressed-tensors itself gives each module (its loading code, in short)."""
    parsed = QuantizationConfig.model_validate(config)
    by_target = {t: s for s in parsed.config_groups.values() for t in s.targets}
    found = match_named_modules(skeleton(names), by_target, parsed.ignore)
    return {n: by_target[match_targets(n, m, by_target)[0]] for n, m in found}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(OPTIONS))), min_size=12, max_size=12), st.booleans())
def test_library_resolves_every_module_to_its_scheme(picks: list[int], embedding: bool) -> None:
    chosen = dict(zip(NAMES, (OPTIONS[i] for i in picks), strict=True))
    schemes = {n: s for n, s in chosen.items() if s is not None}
    dense = ["lm_head", *(n for n, s in chosen.items() if s is None)]
    table = "model.embed_tokens"
    if embedding:
        schemes[table] = QuantScheme(CHANNEL8, None, "embedding")
    if not schemes:
        with pytest.raises(InputError):
            quantization_config(schemes, dense)
        return
    config = quantization_config(schemes, dense)
    found = library_schemes(config, [*NAMES, "lm_head", table])
    assert set(found) == set(schemes)
    for name, scheme in schemes.items():
        theirs = found[name]
        assert theirs.format == scheme.format
        assert theirs.weights.num_bits == scheme.weights.bits
        assert theirs.weights.strategy == scheme.weights.strategy
        assert theirs.weights.group_size == scheme.weights.group_size
        inputs = theirs.input_activations
        assert (inputs is None) == (scheme.activations is None)
        if inputs is not None and scheme.activations is not None:
            assert inputs.num_bits == scheme.activations.bits
            assert inputs.dynamic is True
            assert inputs.strategy == "token"


def test_one_scheme_needs_one_class_target() -> None:
    config = quantization_config(dict.fromkeys(NAMES, QuantScheme(GROUP4)), ["lm_head"])
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == PACKED
    assert config["kv_cache_scheme"] is None


def test_override_of_a_layer_kind_is_one_expression() -> None:
    schemes = {
        n: QuantScheme(CHANNEL8, TOKEN8) if "down" in n else QuantScheme(GROUP4, TOKEN8)
        for n in NAMES
    }
    config = quantization_config(schemes, ["lm_head"])
    groups = list(config["config_groups"].values())
    assert groups[0]["targets"] == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    assert groups[1]["targets"] == ["Linear"]
    assert [g["format"] for g in groups] == [INT, PACKED]
    assert config["format"] == "mixed-precision"


def test_part_of_a_layer_kind_stays_exact_names() -> None:
    assert compact(NAMES[:1], NAMES) == NAMES[:1]
    assert compact(NAMES[::4], NAMES) == [r"re:model\.layers\.\d+\.self_attn\.q_proj$"]
    assert compact([], NAMES) == []


def test_ignore_beats_targets_and_exact_names_beat_expressions() -> None:
    groups = {"a": ["Linear"], "b": ["re:.*q_proj$"], "c": ["model.layers.0.self_attn.q_proj"]}
    assert resolve(groups, [], "model.layers.0.self_attn.q_proj", "Linear") == "c"
    assert resolve(groups, [], "model.layers.1.self_attn.q_proj", "Linear") == "b"
    assert resolve(groups, [], "model.layers.1.mlp.up_proj", "Linear") == "a"
    assert resolve(groups, ["re:.*mlp.*"], "model.layers.1.mlp.up_proj", "Linear") is None
    assert resolve(groups, [], "model.embed_tokens", "Embedding") is None
    assert not matches("re:layers", "model.layers.1", "Linear")  # from the name's start


def test_experts_are_all_alike_or_refused() -> None:
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("up", "down")]
    fp32 = Grid(4, True, "group", 32, torch.float32)
    expert = QuantScheme(fp32, None, "expert")
    attention = {"model.layers.0.self_attn.q_proj": QuantScheme(CHANNEL8, TOKEN8)}
    schemes = {**dict.fromkeys(names, expert), **attention}
    config = quantization_config(schemes, ["lm_head", "model.layers.0.mlp.gate"])
    groups = {g: c["targets"] for g, c in config["config_groups"].items()}
    assert {resolve(groups, [], n, "Linear") for n in names} == {"group_1"} or {
        resolve(groups, [], n, "Linear") for n in names
    } == {"group_0"}
    other = QuantScheme(Grid(8, True, "channel", None, torch.float32), None, "expert")
    with pytest.raises(InputError, match="different grids"):
        quantization_config({**schemes, names[0]: other})
    with pytest.raises(InputError, match="dense experts"):
        quantization_config(attention, names)
    with pytest.raises(InputError, match="role"):
        quantization_config({names[0]: QuantScheme(fp32)})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: QuantScheme(CHANNEL8, ActivationGrid(8, divisor=127)), "divisor"),
        (lambda: QuantScheme(CHANNEL8, ActivationGrid(8, "cross_dynamic")), "cross_dynamic"),
        (lambda: QuantScheme(CHANNEL8, TOKEN8, "embedding"), "embedding"),
        (lambda: QuantScheme(CHANNEL8, TOKEN8, "expert"), "experts"),
        (lambda: QuantScheme(CHANNEL8, None, "expert"), "float32"),
        (lambda: QuantScheme(Grid(4, False, "channel")), "rounds its values"),
        (lambda: QuantScheme(replace(CHANNEL8, rounded=True), TOKEN8), "does not round"),
        (lambda: QuantScheme(Grid(4, False, "channel"), None, "expert"), "symmetric"),
    ],
)
def test_what_no_reader_executes_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make()


def test_packed_zero_points_stand_alone() -> None:
    asymmetric = QuantScheme(as_read(Grid(4, False, "group", 32)))
    assert asymmetric.format == PACKED
    quantization_config({"a": asymmetric, "b": asymmetric})
    with pytest.raises(InputError, match="asymmetric"):
        quantization_config({"a": asymmetric, "b": QuantScheme(GROUP4)})


def test_quantized_and_dense_at_once_is_refused() -> None:
    with pytest.raises(InputError, match="dense"):
        quantization_config({"a": QuantScheme(GROUP4)}, ["a"])


GRIDS = [
    Grid(bits, symmetric, strategy, 16 if strategy == "group" else None, dtype)  # type: ignore[arg-type]
    for bits, symmetric, strategy, dtype in itertools.product(
        (3, 4, 8), (True, False), ("channel", "group"), (torch.float32, torch.bfloat16)
    )
]
GRIDS += [replace(grid, signed=True) for grid in GRIDS if grid.symmetric]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.describe()} {g.scale_dtype} {g.signed}")
@pytest.mark.parametrize("inputs", [None, TOKEN8], ids=["A16", "A8"])
def test_library_decompresses_to_codes_times_scale(
    grid: Grid, inputs: ActivationGrid | None
) -> None:
    """The library's own decompression of our tensors, against float64 arithmetic."""
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(3))
    grid = as_read(grid, float_inputs=inputs is None)
    q = round_to_nearest(weight, grid)
    assert bool((q.scale < 0).any()) == grid.signed
    scheme = QuantScheme(grid, inputs)
    stored = module_tensors("m", q, scheme)
    config = quantization_config({"m": scheme})
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    local = {n.removeprefix("m."): t.clone() for n, t in stored.items()}
    if not grid.rounded:
        # On loading, scales are cast to the dtype of the model, here float32.
        local["weight_scale"] = local["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found = compressor.decompress(local, group)["weight"]
    zero = (
        0
        if q.zero_point is None
        else q.zero_point.double().repeat_interleave(48 // q.zero_point.shape[1], dim=1)
    )
    scale = q.scale.double().repeat_interleave(48 // q.scale.shape[1], dim=1)
    values = (q.codes.double() - zero) * scale
    assert torch.equal(found, values.to(local["weight_scale"].dtype))
    assert torch.equal(found.float(), q.dequantize())


def test_tied_head_stores_its_scale_only(tmp_path: Path) -> None:
    grid = Grid(8, True, "channel", None, torch.bfloat16)
    q = round_to_nearest(torch.randn(10, 8), grid)
    scheme = QuantScheme(grid, None, "embedding")
    head, table = (
        module_tensors("lm_head", q, scheme, tied=True),
        module_tensors("embed", q, scheme),
    )
    assert set(head) == {"lm_head.weight_scale"}
    assert set(table) == {"embed.weight", "embed.weight_scale"}
    save_file({**head, **table}, tmp_path / "both.safetensors")  # refuses shared memory


def test_module_tensors_checks_grid_and_static_scale() -> None:
    q = round_to_nearest(torch.randn(4, 32), CHANNEL8)
    with pytest.raises(InputError, match="scheme says"):
        module_tensors("m", q, QuantScheme(CHANNEL4))
    with pytest.raises(InputError, match="static"):
        module_tensors("m", q, QuantScheme(CHANNEL8, TOKEN8), static_scale=torch.tensor(1.0))
    static = QuantScheme(CHANNEL8, ActivationGrid(8, "per_tensor_static"))
    with pytest.raises(InputError, match="static"):
        module_tensors("m", q, static)
    stored = module_tensors("m", q, static, static_scale=torch.tensor(0.5))
    assert stored["m.input_scale"].shape == (1,)


def test_per_tensor_scale_is_a_vector_of_one() -> None:
    grid = Grid(8, True, "tensor")
    q = round_to_nearest(torch.randn(4, 32), grid)
    assert module_tensors("m", q, QuantScheme(grid, TOKEN8))["m.weight_scale"].shape == (1,)
