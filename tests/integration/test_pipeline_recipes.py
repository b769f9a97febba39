"""What recipes become on disk: config groups, dense layers, static scales, research folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipelines import custom, run
from tests.tiny import BLOCKS, tiny_folder
from transformers import AutoModelForCausalLM

import crossbit
from crossbit.verification import verify

pytestmark = pytest.mark.usefixtures("quick")


def groups_of(folder: Path) -> list[dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return list(config["quantization_config"]["config_groups"].values())


def test_overrides_become_config_groups(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = custom(
        overrides=[
            {"match": "down_proj", "weights": {"bits": 8, "group": "channel"}},
            {"match": "model.layers.1.self_attn.*", "weights": {"bits": 3, "group": 32}},
        ],
        ignore=["model.layers.0", "v_proj"],
        solver={"kind": "gptq"},
    )
    result = run(llama, text, tmp_path / "out", recipe)
    assert result["verify"]["passed"] is True
    ignored = 7 + (BLOCKS - 1)
    assert len(result["counts"]["ignored"]) == ignored
    assert result["counts"]["quantized"] == 7 * BLOCKS - ignored
    assert result["counts"]["linear_layers"] == 7 * BLOCKS
    found = {
        (g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups_of(tmp_path / "out")
    }
    assert found == {(4, 16), (8, None), (3, 32)}
    bits = {row["name"].removeprefix("model.layers."): row["bits"] for row in result["layers"]}
    assert bits["1.self_attn.q_proj"] == 3
    assert bits["2.self_attn.q_proj"] == 4
    assert bits["1.mlp.down_proj"] == 8
    assert not any(name.startswith("0.") or name.endswith("v_proj") for name in bits)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(llama / "model.safetensors")
    for name in result["counts"]["ignored"]:
        assert torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"])
    for name in bits:
        assert f"model.layers.{name}.weight" not in stored


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_can_stay_as_they_are(
    tied: bool, llama: Path, text: Path, tmp_path: Path
) -> None:
    model = tiny_folder(tmp_path / "tied", "llama", True) if tied else llama
    plain = run(model, text, tmp_path / "plain", custom(embedding=None, head=None))
    small = run(model, text, tmp_path / "small", custom())
    assert plain["verify"]["passed"] is True
    assert small["verify"]["passed"] is True
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    source = load_file(model / "model.safetensors")
    names = ["model.embed_tokens.weight"] + [] * tied + ["lm_head.weight"] * (not tied)
    for name in names:
        assert torch.equal(stored[name], source[name])
    dtypes = load_file(tmp_path / "small" / "model.safetensors")
    assert dtypes["model.embed_tokens.weight"].dtype == torch.int8
    assert len(groups_of(tmp_path / "plain")) == 1
    assert plain["size"]["file_bytes"] > small["size"]["file_bytes"]
    for result, name in ((plain, "plain"), (small, "small")):
        size = (tmp_path / name / "model.safetensors").stat().st_size
        parameters = sum(t.numel() for t in source.values())
        assert result["size"]["file_bytes"] == size
        assert result["size"]["bytes_per_parameter"] == pytest.approx(size / parameters)


def test_static_activations(llama: Path, text: Path, tmp_path: Path) -> None:
    result = run(llama, text, tmp_path / "out", "rtn-w8a8-static")
    assert result["verify"]["passed"] is True
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = {n: t for n, t in stored.items() if n.endswith("input_scale")}
    assert len(scales) == 7 * BLOCKS
    steps = [stored[f"model.layers.0.self_attn.{n}_proj.input_scale"] for n in "qkv"]
    assert steps[0].shape == (1,)
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("kind", ["cross_dynamic", "cross_static", "cross_static_clip"])
def test_research_folders_open_in_crossbit_only(
    kind: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = custom(activations={"kind": kind, "alpha": 0.15}, weights={"bits": 8})
    out = tmp_path / "out"
    result = run(llama, text, out, recipe)
    assert result["kind"] == "research"
    with pytest.raises(ValueError, match="crossbit"):
        AutoModelForCausalLM.from_pretrained(out)
    evaluated = crossbit.evaluate(
        str(out), text="embedded", length=32, windows=2, against=str(llama)
    )
    recorded = result["evaluation"]
    assert (evaluated["kind"], evaluated["against"]["kind"]) == ("research", None)
    assert evaluated["perplexity"]["value"] == pytest.approx(recorded["quantized"]["perplexity"])
    assert evaluated["paired"]["loss"] == pytest.approx(recorded["paired"]["loss"])
    assert recorded["path"] == "fake-quant"
    report = verify(out)
    assert report.passed
    assert "refused" in {check.name for check in report.checks}


def test_folding_nothing_is_per_token(llama: Path, text: Path, tmp_path: Path) -> None:
    """CrossQuant at alpha = 1 is the per-token grid, bit for bit."""
    solver = {"kind": "gptq"}
    fold = {"kind": "cross_fold", "alpha": 1.0}
    activations = {"kind": "cross_folded"}
    run(
        llama,
        text,
        tmp_path / "a",
        custom(transforms=[fold], activations=activations, solver=solver),
    )
    run(llama, text, tmp_path / "b", custom(activations={"kind": "per_token"}, solver=solver))
    run(
        llama,
        text,
        tmp_path / "c",
        custom(transforms=[{**fold, "alpha": 0.5}], activations=activations, solver=solver),
    )
    same = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert same == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert same != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_cfp_is_compared_with_the_float_model(llama: Path, text: Path, tmp_path: Path) -> None:
    """Truncation is in the student alone: 8 bits hide nothing of it in the blocks' errors."""
    weights = {"bits": 8, "group": "channel"}
    activations = {"kind": "per_token"}
    plain = run(llama, text, tmp_path / "a", custom(weights=weights, activations=activations))
    # Candidates from the third quartile on: up to a quarter of all weights goes.
    cfp = {"kind": "cfp", "fence": 0.0, "gap": False, "judge": False}
    result = run(
        llama,
        text,
        tmp_path / "b",
        custom(weights=weights, activations=activations, transforms=[cfp]),
    )
    assert result["verify"]["passed"] is True
    truncated = [row["truncated"] for row in result["layers"]]
    assert len(truncated) == 7 * BLOCKS
    assert max(truncated) > 0.05
    assert any(row["scaled"] for row in result["layers"])
    assert "truncated" not in plain["layers"][0]
    errors = [r["relative_error"] for r in result["blocks"]]
    assert min(errors) > 0.05
    assert result["size"]["file_bytes"] == plain["size"]["file_bytes"]
