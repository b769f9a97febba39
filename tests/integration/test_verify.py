"""verify must notice every change to a folder, and every way in which two readers can differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.exporting import CHANNEL8, GROUP4, TOKEN8, Exported, everywhere, export_folder
from tests.tiny import sample_ids, tiny_folder, tiny_model
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.errors import InputError
from crossbit.export.comparison import LayerComparison, relative
from crossbit.export.fingerprint import tensor_sha256
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.export.reload import dense_in_turn, reload_model
from crossbit.export.research import wrap
from crossbit.models.experts import is_expert
from crossbit.runtime.install import QuantizedLayer
from crossbit.runtime.loader import load_model
from crossbit.verification import (
    VerifyReport,
    check_logits,
    check_recorded,
    file_digests,
    own_logits,
    read_record,
    sketch_logits,
    verify,
)

IDS = sample_ids(1, 48, seed=2)[0].tolist()
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("verify")
    source = tiny_folder(folder / "source", "llama", tied=True)
    return export_folder(
        source,
        folder / "out",
        tiny_model("llama", tied=True),
        everywhere(GROUP4, TOKEN8),
        embedding=CHANNEL8,
        record=IDS,
    )


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    for path in exported.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def rows(report: VerifyReport) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def rewrite(folder: Path, edit: Callable[[Tensors], object], *, forge: bool = False) -> None:
    """Change tensors in the file, and, to forge, the record's digests with them."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if forge:
        content = json.loads((folder / "crossbit.json").read_text())
        content["verify"]["tensors"] = {n: tensor_sha256(n, t) for n, t in tensors.items()}
        (folder / "crossbit.json").write_text(json.dumps(content))


def code(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 2] ^= 1 << 8


def embedding_code(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][9, 9] += 1


def scale(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight_scale"][5, 1] *= 1.01


def head_scale(tensors: Tensors) -> None:
    tensors["lm_head.weight_scale"][0] *= 2


def gain(tensors: Tensors) -> None:
    tensors["model.norm.weight"][4] *= 1.001


def bias(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.v_proj.bias"][1] += 1e-3


def test_untouched_folder_passes(folder: Path) -> None:
    report = verify(folder)
    assert report.passed
    assert {c.name: c.value for c in report.checks}["weights"] == 0
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize("edit", [code, embedding_code, scale, head_scale, gain, bias])
def test_one_changed_value_fails(folder: Path, edit: Callable[[Tensors], object]) -> None:
    rewrite(folder, edit)
    report = verify(folder)
    assert not report.passed
    assert not rows(report)["tensors"]
    failed = next(c for c in report.checks if c.name == "tensors")
    assert failed.value == 1


def test_added_and_removed_tensors_fail(folder: Path) -> None:
    rewrite(folder, lambda t: t.update(extra=torch.zeros(2)))
    report = verify(folder)
    assert not rows(report)["tensors"]
    assert not rows(report)["reload"]  # transformers says "unexpected"


def test_a_change_that_breaks_the_model_is_still_a_report(folder: Path) -> None:
    rewrite(folder, head_scale)  # our own loader refuses a tied head that differs
    report = verify(folder)
    assert [c.name for c in report.checks if not c.passed] == ["tensors", "open"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t["model.norm.weight"].mul_(1.5),
        lambda t: t["model.layers.0.mlp.down_proj.weight_scale"].mul_(1.5),
        lambda t: t["model.layers.0.mlp.down_proj.weight_packed"].bitwise_not_(),
    ],
)
def test_forged_digests_are_found_by_the_recorded_logits(
    folder: Path, edit: Callable[[Tensors], object]
) -> None:
    rewrite(folder, edit, forge=True)
    found = rows(verify(folder))
    assert found["tensors"]
    assert found["logits"]  # both readers see the same wrong file
    assert not found["recorded"]


def test_changed_config_fails(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    found = rows(verify(folder))
    assert not found["files"]
    assert found["tensors"]
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        verify(folder)


@pytest.mark.parametrize("what", ["code", "scale", "activations"])
def test_a_reader_that_differs_is_found(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own reader misreads one layer: weights, layers and logits must say so."""
    honest = QuantizedCheckpoint.layer
    target = "model.layers.1.mlp.gate_proj"

    def misread(self: QuantizedCheckpoint, name: str) -> QuantizedLayer | None:
        layer = honest(self, name)
        if layer is None or name != target:
            return layer
        q = layer.qtensor
        if what == "activations":
            return replace(layer, activations=None)
        if what == "code":
            codes = q.codes.clone()
            codes[0, 0] = codes[0, 0] ^ 1
            return replace(layer, qtensor=replace(q, codes=codes))
        scales = q.scale.clone()
        scales[1, 1] *= 1.5
        return replace(layer, qtensor=replace(q, scale=scales))

    monkeypatch.setattr(QuantizedCheckpoint, "layer", misread)
    found = rows(verify(folder))
    assert found["weights"] == (what == "activations")
    assert not found["layers"]
    assert not found["logits"]


def test_layers_that_are_never_reached_fail(folder: Path) -> None:
    checkpoint = QuantizedCheckpoint(folder)
    comparison = LayerComparison(nn.Module(), checkpoint)
    with comparison:
        pass
    weights = comparison.rows()[0]
    assert not weights.passed
    assert weights.value == len(checkpoint.quantized)
    assert "not reached" in weights.detail


def test_changed_expert_fails_only_where_it_is(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "mixtral")
    made = export_folder(
        source, tmp_path / "out", tiny_model("mixtral"), everywhere(GROUP4), record=IDS
    )
    name = next(n for n in made.qtensors if is_expert(n))
    rewrite(made.folder, lambda t: t[f"{name}.weight_scale"].mul_(1.001))
    failed = next(c for c in verify(made.folder).checks if not c.passed)
    assert failed.name == "tensors"
    assert name in failed.detail


def test_plain_token_matrices_are_widened_and_said(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "opt")
    made = export_folder(
        source, tmp_path / "out", tiny_model("opt"), everywhere(CHANNEL8, TOKEN8), record=IDS
    )
    report = verify(made.folder)
    assert report.passed, report.to_dict()
    layers = next(c for c in report.checks if c.name == "layers")
    assert "6 get a matrix of tokens" in layers.detail  # fc1 and fc2 of three blocks


def test_a_folder_transformers_cannot_load_is_a_failed_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    report = verify(folder)
    failed = report.checks[-1]
    assert failed.name == "reload"
    assert not failed.passed
    assert "first line second line" in failed.detail


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no crossbit.json"),
        ("{", "no usable"),
        ('{"recipe": 1}', "no usable"),
        ('{"verify": {"tensors": {}, "token_ids": [1, 2]}}', "empty"),
        ('{"verify": {"tensors": {"a": "b"}, "token_ids": [1]}}', "empty"),
        ('{"verify": {"tensors": {"a": "b"}, "token_ids": ["x", 2]}}', "no usable"),
    ],
)
def test_bad_record_is_one_line(folder: Path, content: str | None, reason: str) -> None:
    (folder / "crossbit.json").unlink()
    if content is not None:
        (folder / "crossbit.json").write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_model_are_refused(folder: Path) -> None:
    content = json.loads((folder / "crossbit.json").read_text())
    content["verify"]["token_ids"][3] = 99999
    (folder / "crossbit.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="vocabulary"):
        verify(folder)


def test_no_folder_and_plain_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "absent")
    tiny_folder(tmp_path / "plain", "llama")
    with pytest.raises(InputError, match=r"crossbit\.json"):
        verify(tmp_path / "plain")


def test_record_survives_json(exported: Exported) -> None:
    record = read_record(exported.folder)
    assert record.token_ids == IDS
    assert set(record.files) == {"config.json"}


def test_bounds_of_the_comparisons() -> None:
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(40, 30, generator=rng)
    shifted = ours.clone()
    shifted[3, 4] += 0.9e-4 * ours.std()
    assert check_logits(shifted, ours).passed
    shifted[3, 4] += 0.3e-4 * ours.std()
    assert not check_logits(shifted, ours).passed
    broken = ours.clone()
    broken[7, 7] = float("nan")
    assert not check_logits(broken, ours).passed
    assert not check_logits(ours[:, :-1], ours).passed
    sketch = sketch_logits(ours)
    assert check_recorded(ours, sketch, False).passed
    assert not check_recorded(ours + 2e-4 * ours.std(), sketch, False).passed
    assert check_recorded(ours + 2e-4 * ours.std(), sketch, True).passed
    assert not check_recorded(ours[:5], sketch, True).passed
    assert not check_recorded(broken * float("nan"), sketch, True).passed
    assert relative(0.0, 0.0) == 0
    assert relative(1.0, 0.0) == float("inf")


def test_research_folder_is_compared_with_its_record_and_refused_elsewhere(folder: Path) -> None:
    names = QuantizedCheckpoint(folder).quantized
    inputs = ActivationGrid(8, "cross_dynamic", alpha=0.15)
    config = json.loads((folder / "config.json").read_text())
    wrapped = wrap(config, {n: inputs for n in names if ".layers." in n})
    (folder / "config.json").write_text(json.dumps(wrapped))
    logits = own_logits(folder, torch.tensor([IDS]), "cpu")
    content = json.loads((folder / "crossbit.json").read_text())
    content["verify"] |= {
        "logits": sketch_logits(logits),
        "files": file_digests(folder, ["config.json"]),
    }
    (folder / "crossbit.json").write_text(json.dumps(content))
    report = verify(folder)
    assert report.passed
    assert [c.name for c in report.checks] == ["tensors", "files", "refused", "recorded"]
    content["verify"]["logits"]["values"][0][0] += 20 * float(logits.std())
    (folder / "crossbit.json").write_text(json.dumps(content))
    assert not rows(verify(folder))["recorded"]


def test_large_layers_are_compared_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify(folder)
    monkeypatch.setattr("crossbit.export.comparison._AT_ONCE", 100)
    parts = verify(folder)
    assert parts.passed
    assert rows(parts) == rows(whole)
    checkpoint = QuantizedCheckpoint(folder)
    name = next(n for n in checkpoint.quantized if n.endswith("down_proj"))
    layer = checkpoint.layer(name)
    assert layer is not None
    dense = layer.qtensor.dequantize()
    comparison = LayerComparison(nn.Module(), checkpoint)
    comparison.compare_weight(name, dense, layer)
    assert comparison.unequal == []
    dense[-1, -1] += 1e-3
    comparison.compare_weight(name, dense, layer)
    assert comparison.unequal == [name]


@pytest.mark.parametrize("tied", [False, True])
def test_theirs_is_dense_one_layer_at_a_time(tmp_path: Path, tied: bool) -> None:
    source = tiny_folder(tmp_path / "source", "llama", tied=tied)
    exported = export_folder(
        source,
        tmp_path / "out",
        tiny_model("llama", tied=tied),
        everywhere(GROUP4, TOKEN8),
        embedding=CHANNEL8,
    )
    checkpoint = QuantizedCheckpoint(exported.folder)
    ids = torch.tensor([IDS])

    def load() -> nn.Module:
        model, reloaded = reload_model(exported.folder, checkpoint, "cpu")
        assert model is not None
        assert reloaded.passed
        return model

    model = load()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    packed = [m for m in layers if hasattr(m, "quantization_scheme")]
    counts = []

    def count(*_: object) -> None:
        counts.append(sum(_dense(m) for m in packed))

    for layer in packed:
        layer.register_forward_hook(count)
    with dense_in_turn(model), torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        wanted = load()(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert len(counts) == len(packed) > 7
    assert max(counts) == (2 if tied else 1), "a tied embedding stays"


def _dense(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point() and not weight.is_meta


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "mixtral"])
def test_our_logits_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    source = tiny_folder(tmp_path / "source", family)
    export_folder(source, tmp_path / "out", tiny_model(family), everywhere(GROUP4, TOKEN8))
    model: Any = load_model(tmp_path / "out", dtype=torch.float32, attn="eager", execution="fake")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(own_logits(tmp_path / "out", ids, "cpu"), wanted)
