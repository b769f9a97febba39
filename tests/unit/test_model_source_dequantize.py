"""--dequantize: dense weights against the codes times the scales in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_folders import save_folder
from transformers import AutoModelForCausalLM

from crossbit.errors import InputError
from crossbit.models.source import resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, K] signed codes -> [N, K * bits / 32] int32, offset by 2^(bits-1), low element first."""
    per = 32 // bits
    shifted = (codes.long() + (1 << (bits - 1))).reshape(codes.shape[0], -1, per)
    words = sum(shifted[:, :, i] << (bits * i) for i in range(per))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def group(bits: int, targets: list[str], form: str, size: int | None) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "format": form}


CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": group(4, ["re:.*(q|k|v|o|gate|up)_proj$"], "pack-quantized", 32),
        "group_1": group(8, ["re:.*down_proj$"], "int-quantized", None),
        "group_2": group(8, ["Embedding"], "pack-quantized", None),
    },
}


def quantize(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rewrite ``folder`` in compressed form; returns the dense weights it stands for, in fp64."""
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    dense: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, value in load_file(str(path)).items():
        stem = name.removesuffix(".weight")
        if value.ndim == 1:
            stored[name] = value.to(torch.bfloat16)
            dense[name] = stored[name].double()
            continue
        bits, size = (8, value.shape[1]) if "down" in stem or "embed" in stem else (4, 32)
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), value.shape, generator=generator)
        shape = (value.shape[0], value.shape[1] // size)
        scale = (torch.rand(shape, generator=generator) * 0.01 + 1e-3).to(torch.bfloat16)
        stored[f"{stem}.weight_scale"] = scale
        if "down" in stem:
            stored[name] = codes.to(torch.int8)
        else:
            stored[f"{stem}.weight_packed"] = pack(codes, bits)
            stored[f"{stem}.weight_shape"] = torch.tensor(value.shape)
        dense[name] = codes.double() * scale.double().repeat_interleave(size, dim=1)
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(stored, str(path), metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content |= {"quantization_config": config, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    return dense


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_mixed_groups_become_codes_times_scales(tmp_path: Path, dtype: torch.dtype | None) -> None:
    save_folder(tmp_path)
    expected = quantize(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)"):
        resolve_model(str(tmp_path))
    found = resolve_model(str(tmp_path), dequantize=True, dtype=dtype)
    assert found.note is not None
    assert "compressed-tensors" in found.note
    assert found.source_bytes == (tmp_path / "model.safetensors").stat().st_size
    stored = load_file(str(found.path / "model.safetensors"))
    assert stored.keys() == expected.keys()
    for name, value in stored.items():
        assert value.dtype == (dtype or torch.bfloat16)
        # The product is rounded once, to the scales' dtype, bfloat16.
        assert torch.equal(value.double(), expected[name].to(torch.bfloat16).double()), name
    config = json.loads((found.path / "config.json").read_text())
    assert "quantization_config" not in config
    model, info = AutoModelForCausalLM.from_pretrained(found.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert resolve_model(str(tmp_path), dequantize=True, dtype=dtype) == found


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve_model(str(folder), dequantize=True)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_rotated_basis_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path)
    quantize(tmp_path, CONFIG | {"transform_config": {"config_groups": {"u": {}}}})
    assert "transform_config" in refused(tmp_path)


def test_tensor_without_a_group_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path)
    groups = {k: v for k, v in CONFIG["config_groups"].items() if k != "group_1"}
    quantize(tmp_path, CONFIG | {"config_groups": groups})
    assert "down_proj has quantized tensors but no config group" in refused(tmp_path)


def test_config_that_belongs_to_dense_weights(tmp_path: Path) -> None:
    save_folder(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = CONFIG
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "without any quantized tensor" in refused(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "no-such-method"])
def test_method_that_transformers_cannot_run_here(tmp_path: Path, method: str) -> None:
    save_folder(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert f"cannot dequantize {method}" in refused(tmp_path)
