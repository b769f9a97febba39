"""transformers reloads what we write, and computes what a hand-written reference computes.

The reference is the original model with every weight replaced by codes x scale (float64 arithmetic)
and every input quantized by the lines below, not by crossbit's or the library's code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.exporting import (
    CHANNEL4,
    CHANNEL8,
    GROUP4,
    SIGNED4,
    STATIC8,
    TOKEN4,
    TOKEN8,
    Choose,
    Exported,
    everywhere,
    export_folder,
)
from tests.tiny import sample_ids, tiny_folder, tiny_model
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.export.scheme import QuantScheme
from crossbit.grid import Grid, QTensor
from crossbit.models.experts import checkpoint_name, is_expert
from crossbit.models.families import family_of
from crossbit.verification import verify

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def dequantize64(q: QTensor) -> Tensor:
    width = q.codes.shape[1] // q.scale.shape[1]
    rows = q.codes.shape[0] // q.scale.shape[0]
    scale = q.scale.double().repeat_interleave(width, 1).repeat_interleave(rows, 0)
    zero: Any = 0
    if q.zero_point is not None:
        zero = q.zero_point.double().repeat_interleave(width, 1).repeat_interleave(rows, 0)
    values: Tensor = ((q.codes.double() - zero) * scale).float()
    return values


def quantized_input(x: Tensor, grid: ActivationGrid, static: Tensor | None) -> Tensor:
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    if static is None:
        step = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
        step = torch.where(step == 0, torch.ones_like(step), step)
    else:
        step = static
    y: Tensor = torch.clamp(torch.round(x / step), low, high) * step
    return y


class Reference(nn.Module):
    def __init__(self, linear: nn.Linear, grid: ActivationGrid, static: Tensor | None) -> None:
        super().__init__()
        self.linear, self.grid, self.static = linear, grid, static

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(quantized_input(x, self.grid, self.static))
        return y


def reference(model: Any, made: Exported) -> Any:
    family = family_of(model.config)
    if model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        if table in made.qtensors:
            head.weight.copy_(dequantize64(made.qtensors[table]))
    for name, module in list(model.named_modules()):
        q = made.qtensors.get(name)
        if q is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        module.weight.copy_(dequantize64(q))
        grid = made.schemes[name].activations
        if grid is not None:
            assert isinstance(module, nn.Linear)
            parent, _, child = name.rpartition(".")
            wrapped = Reference(module, grid, made.static.get(name))
            setattr(model.get_submodule(parent), child, wrapped)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3:
            continue
        block, _, part = name.rpartition(".")
        parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else ["down_proj"]
        for expert in range(len(parameter)):
            stored = [checkpoint_name(family, f"{block}.{expert}.{p}.weight") for p in parts]
            found = [made.qtensors.get(s.removesuffix(".weight")) for s in stored]
            if all(q is not None for q in found):
                parameter[expert] = torch.cat([dequantize64(q) for q in found if q is not None])
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def reload(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=FP32, attn_implementation="eager", output_loading_info=True
    )
    # Gemma-3's embedding has a buffer that quantization turns into a parameter; transformers
    # computes it, as the comparison of logits shows.
    missing = {k for k in info.pop("missing_keys") if not k.endswith("embed_tokens.embed_scale")}
    assert not missing
    assert not any(info.values()), info
    return model.eval()


def eager(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=FP32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def round_trip(
    tmp_path: Path, family: str, choose: Choose, *, tied: bool = False, **options: Any
) -> tuple[Exported, float]:
    """Export, reload, compare: the largest difference in standard deviations."""
    source = tiny_folder(tmp_path / "source", family, tied=tied)
    made = export_folder(source, tmp_path / "out", tiny_model(family, tied=tied), choose, **options)
    ids = sample_ids(2, 24)
    found, wanted = logits(reload(made.folder), ids), logits(reference(eager(source), made), ids)
    return made, float((found - wanted).abs().max() / wanted.std())


def overrides(name: str) -> QuantScheme | None:
    if name == "lm_head" or name.endswith("layers.1.mlp.gate_proj"):
        return None
    if name.endswith("down_proj"):
        return QuantScheme(CHANNEL8, TOKEN8)
    if name.endswith("layers.2.self_attn.o_proj"):
        return QuantScheme(GROUP4)
    return QuantScheme(CHANNEL4, TOKEN4)


def wide(grid: Grid) -> Grid:
    return replace(grid, scale_dtype=FP32)


SCHEMES: dict[str, Choose] = {
    "w8a8": everywhere(CHANNEL8, TOKEN8),
    "w8a8 fp32 scales": everywhere(wide(CHANNEL8), TOKEN8),
    "w8a8 per tensor": everywhere(Grid(8, True, "tensor"), TOKEN8),
    "w8a8 static": everywhere(CHANNEL8, STATIC8),
    "w8a16": everywhere(CHANNEL8),
    "w4a16": everywhere(GROUP4),
    "w4a16 fp32 scales": everywhere(wide(GROUP4)),
    "w4a16 fp16 scales": everywhere(replace(GROUP4, scale_dtype=FP16)),
    "w4a16 head too": everywhere(GROUP4, head=True),
    "w4a8": everywhere(GROUP4, TOKEN8),
    "w4a8 static": everywhere(GROUP4, STATIC8),
    "w4a4": everywhere(CHANNEL4, TOKEN4),
    "w3a16": everywhere(Grid(3, True, "group", 32)),
    "w6a6": everywhere(Grid(6, True, "channel"), ActivationGrid(6)),
    "w8a8 asymmetric": everywhere(Grid(8, False, "channel"), TOKEN8),
    "w4a8 asymmetric": everywhere(Grid(4, False, "group", 32), TOKEN8),
    "overrides": overrides,
    "signed w2a16": everywhere(Grid(2, True, "group", 32, signed=True)),
    "signed w3a16": everywhere(Grid(3, True, "channel", signed=True)),
    "signed w4a16": everywhere(SIGNED4),
    "signed w4a16 fp16 scales": everywhere(replace(SIGNED4, scale_dtype=FP16)),
    "signed w4a8": everywhere(SIGNED4, TOKEN8),
    "signed w4a4": everywhere(Grid(4, True, "channel", signed=True), TOKEN4),
    "signed w8a8": everywhere(Grid(8, True, "channel", signed=True), TOKEN8),
    "signed w8a8 per tensor": everywhere(Grid(8, True, "tensor", signed=True), TOKEN8),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_reloads_exactly(scheme: str, tmp_path: Path) -> None:
    made, difference = round_trip(tmp_path, "llama", SCHEMES[scheme])
    assert len(made.qtensors) > 15
    assert difference <= 1e-5
    negative = any(bool((q.scale < 0).any()) for q in made.qtensors.values())
    assert negative == scheme.startswith("signed")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_quantized_embedding_reloads(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    grid = Grid(8, True, "channel", None, dtype)
    made, difference = round_trip(
        tmp_path, "llama", everywhere(GROUP4, TOKEN8), tied=tied, embedding=grid
    )
    assert difference <= 1e-5
    model = reload(made.folder)
    logits(model, sample_ids(1, 3))
    table = model.get_input_embeddings().weight
    assert torch.equal(table, dequantize64(made.qtensors["model.embed_tokens"]))
    assert torch.equal(model.get_output_embeddings().weight, table) == tied


DENSE_FAMILIES = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "phi3", "gpt_neox"]


@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_family_reloads_exactly(family: str, tied: bool, tmp_path: Path) -> None:
    # OPT hands fc1 and fc2 a matrix of tokens, for which the library takes one scale: weights only.
    inputs = None if family == "opt" else TOKEN8
    _, difference = round_trip(
        tmp_path, family, everywhere(GROUP4, inputs), tied=tied, embedding=CHANNEL8
    )
    assert difference <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("inputs", [None, TOKEN8], ids=["A16", "attention A8"])
@pytest.mark.parametrize("grid", [GROUP4, SIGNED4], ids=["", "signed"])
def test_experts_reload_exactly(
    family: str, inputs: ActivationGrid | None, grid: Grid, tmp_path: Path
) -> None:
    made, difference = round_trip(tmp_path, family, everywhere(grid, inputs))
    assert sum(is_expert(name) for name in made.qtensors) >= 24
    assert difference <= 1e-5


IDS = sample_ids(1, 64, seed=5)[0].tolist()


@pytest.mark.parametrize(
    ("family", "tied", "choose", "embedding"),
    [
        ("llama", True, everywhere(CHANNEL8, TOKEN8), CHANNEL8),
        ("llama", False, overrides, None),
        ("llama", False, everywhere(Grid(4, False, "group", 32, FP32)), None),
        ("gpt_neox", False, everywhere(GROUP4, head=True), None),
        ("llama", True, everywhere(CHANNEL4, STATIC8), None),
        ("opt", True, everywhere(GROUP4, TOKEN8), CHANNEL8),
        ("gemma3_text", True, everywhere(GROUP4, TOKEN8), CHANNEL8),
        ("phi3", False, everywhere(CHANNEL8, TOKEN8), None),
        ("gpt_neox", False, everywhere(CHANNEL4, TOKEN4), CHANNEL8),
        ("mixtral", False, everywhere(GROUP4, TOKEN8), None),
        ("qwen3_moe", True, everywhere(CHANNEL8), CHANNEL8),
        ("llama", False, everywhere(SIGNED4, TOKEN8), None),
    ],
)
def test_verify_passes(
    family: str, tied: bool, choose: Choose, embedding: Grid | None, tmp_path: Path
) -> None:
    source = tiny_folder(tmp_path / "source", family, tied=tied)
    made = export_folder(
        source,
        tmp_path / "out",
        tiny_model(family, tied=tied),
        choose,
        embedding=embedding,
        max_shard_bytes=100_000,
        record=IDS,
    )
    report = verify(made.folder)
    assert report.passed, report.to_dict()
    assert [c.name for c in report.checks] == [
        "tensors",
        "files",
        "reload",
        "weights",
        "layers",
        "logits",
        "recorded",
    ]
