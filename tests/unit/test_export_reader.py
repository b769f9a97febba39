"""Reading a written folder back, and refusing a damaged one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.exporting import (
    CHANNEL8,
    GROUP4,
    SIGNED4,
    STATIC8,
    TOKEN8,
    Exported,
    everywhere,
    export_folder,
)
from tests.tiny import tiny_folder, tiny_model
from torch import Tensor

from crossbit.errors import InputError
from crossbit.export.reader import QuantizedCheckpoint, is_quantized
from crossbit.export.scheme import QuantScheme
from crossbit.grid import Grid

BF8 = Grid(8, True, "channel")


def mixed(name: str) -> QuantScheme | None:
    if name == "lm_head" or name.endswith("layers.1.self_attn.o_proj"):
        return None
    if name.endswith("down_proj"):
        return QuantScheme(CHANNEL8, STATIC8)
    if name.endswith("q_proj"):
        return QuantScheme(SIGNED4, TOKEN8)
    if name.endswith("layers.0.self_attn.o_proj"):
        return QuantScheme(Grid(8, True, "channel", signed=True), TOKEN8)
    if name.endswith("v_proj"):
        return QuantScheme(Grid(4, False, "group", 16, torch.float16), TOKEN8)
    if name.endswith("k_proj"):
        return QuantScheme(Grid(8, True, "tensor"), TOKEN8)
    return QuantScheme(GROUP4, TOKEN8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("reader") / "source"
    return tiny_folder(folder, "llama", tied=True), tiny_model("llama", tied=True)


@pytest.fixture(scope="module")
def exported(source: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("reader") / "out"
    return export_folder(*source[:1], out, source[1], mixed, embedding=BF8, max_shard_bytes=40_000)


def test_integers_come_back_bit_equal(exported: Exported) -> None:
    assert len(list(exported.folder.glob("*.safetensors"))) > 2
    checkpoint = QuantizedCheckpoint(exported.folder)
    assert set(checkpoint.quantized) == set(exported.qtensors)
    for name, q in exported.qtensors.items():
        layer = checkpoint.layer(name)
        assert layer is not None
        # The sign of a scale is the scale's: a grid that is read back does not tell.
        assert layer.qtensor.grid == replace(q.grid, signed=False)
        assert bool((q.scale < 0).any()) == q.grid.signed
        assert torch.equal(layer.qtensor.dequantize(), q.dequantize())
        assert torch.equal(layer.qtensor.codes, q.codes)
        assert torch.equal(layer.qtensor.scale, q.scale)
        assert layer.qtensor.scale.dtype == q.scale.dtype
        if q.zero_point is None:
            assert layer.qtensor.zero_point is None
        else:
            assert layer.qtensor.zero_point is not None
            assert torch.equal(layer.qtensor.zero_point, q.zero_point)
        assert layer.activations == exported.schemes[name].activations
        if name in exported.static:
            assert layer.static_scale is not None
            assert torch.equal(layer.static_scale, exported.static[name])
        else:
            assert layer.static_scale is None
    assert checkpoint.schemes == {
        name: replace(scheme, weights=replace(scheme.weights, signed=False))
        for name, scheme in exported.schemes.items()
    }
    assert checkpoint.layer("model.norm") is None


def test_it_reads_as_the_plain_checkpoint_it_stands_for(
    exported: Exported, source: tuple[Path, Any]
) -> None:
    checkpoint = QuantizedCheckpoint(exported.folder)
    plain = load_file(source[0] / "model.safetensors")
    # The tied head has a scale of its own in the file, so it shows up beside the embedding.
    assert set(checkpoint.names) == set(plain) | {"lm_head.weight"}
    for name in checkpoint.names:
        assert name in checkpoint
        tensor = checkpoint.tensor(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        q = exported.qtensors.get(name.removesuffix(".weight"))
        expected = plain[name] if q is None else q.dequantize()
        assert torch.equal(tensor, expected)
    assert "model.layers.0.mlp.up_proj.weight_packed" not in checkpoint
    assert "nothing" not in checkpoint


def test_is_quantized(exported: Exported, source: tuple[Path, Any]) -> None:
    assert is_quantized(exported.folder)
    assert not is_quantized(source[0])
    with pytest.raises(InputError, match="not a compressed-tensors"):
        QuantizedCheckpoint(source[0])


UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: to(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop(f"{UP}.weight_scale"), "weight_scale is missing"),
        (drop(f"{UP}.weight_shape"), "weight_shape is missing"),
        (drop(f"{UP}.weight_packed"), "no codes"),
        (drop(f"{DOWN}.input_scale"), "input_scale is missing"),
        (drop("model.layers.0.self_attn.v_proj.weight_zero_point"), "zero_point is missing"),
        (drop("model.embed_tokens.weight"), "no codes"),
        (change(f"{UP}.weight_scale", lambda t: t[:, :1]), "expected"),
        (change(f"{UP}.weight_packed", lambda t: t[:, 1:]), "weight_shape"),
        (change(f"{UP}.weight_packed", lambda t: t.long()), "int32"),
        (change(f"{UP}.weight_shape", lambda t: t + 1), "weight_shape"),
        (change(f"{DOWN}.weight", lambda t: t.float()), "int8"),
        (change(f"{UP}.weight_scale", lambda t: t.double()), "scale_dtype"),
    ],
)
def test_damage_is_one_line_at_open(
    exported: Exported, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    tensors: dict[str, Tensor] = {}
    for path in exported.folder.glob("*.safetensors"):
        tensors |= load_file(path)
    damage(tensors)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text((exported.folder / "config.json").read_text())
    with pytest.raises(InputError, match=reason) as caught:
        QuantizedCheckpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_codes_outside_the_grid_are_refused(exported: Exported, tmp_path: Path) -> None:
    """A 4-bit weight stored as int8 with a code of 100."""
    name = "m.proj"
    save_file(
        {
            f"{name}.weight": torch.tensor([[1, 100]], dtype=torch.int8),
            f"{name}.weight_scale": torch.ones(1, 1),
        },
        str(tmp_path / "model.safetensors"),
    )
    config = json.loads((exported.folder / "config.json").read_text())
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
    }
    config["quantization_config"] |= {"config_groups": {"group_0": group}, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = QuantizedCheckpoint(tmp_path)
    with pytest.raises(InputError, match="outside 4 bits"):
        checkpoint.layer(name)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda q: q.pop("config_groups"), "config_groups"),
        (lambda q: q["config_groups"]["group_0"].pop("targets"), "targets"),
        (lambda q: q["ignore"].append("Linear"), "no config group targets"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(type="float"), "integer"),
        (lambda q: q["config_groups"]["group_0"].update(format="marlin"), "marlin"),
        (lambda q: q["config_groups"]["group_0"]["targets"].append("model.lost"), "model.lost"),
    ],
)
def test_config_that_contradicts_the_file(
    exported: Exported, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    for path in exported.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=reason) as caught:
        QuantizedCheckpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_shard_is_refused(exported: Exported, tmp_path: Path) -> None:
    for path in exported.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(InputError, match=shard.name):
        QuantizedCheckpoint(tmp_path)


def test_whole_file_of_one_scheme_uses_no_more_than_its_bits(
    source: tuple[Path, Any], tmp_path: Path
) -> None:
    """4.5 bits a weight: 4-bit codes and a bfloat16 scale for 32 of them."""
    made = export_folder(source[0], tmp_path / "out", source[1], everywhere(GROUP4))
    checkpoint = QuantizedCheckpoint(made.folder)
    codes = sum(q.codes.numel() for q in made.qtensors.values())
    stored = sum(
        checkpoint.stored.tensor(n).nbytes
        for n in checkpoint.stored.names
        if n.endswith(("weight_packed", "weight_scale"))
    )
    assert stored * 8 == codes * 4.5
