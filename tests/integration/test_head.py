"""The head under GPTQ: solved for what the final norm hands it, tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines import EVALUATION, write_text
from tests.tiny import VARIANTS, tiny_folder, tiny_model
from torch import Tensor

import crossbit
from crossbit.engine.plan import make_plan
from crossbit.export.artifact import quantize_outside
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.packing import unpack
from crossbit.recipe import Gptq, Recipe
from crossbit.solvers.hessian import HessianAccumulator

GPTQ = Recipe.parse({"weights": {"bits": 8}, "solver": {"kind": "gptq"}}, "gptq")


def loaded(folder: Path) -> tuple[Shell, Checkpoint]:
    checkpoint, shell = Checkpoint(folder), Shell(open_config(folder))
    shell.load_outside(checkpoint, torch.float32)
    return shell, checkpoint


def outliers(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    x[..., 5] *= 40
    x[..., 6] = x[..., 5] + 0.1 * x[..., 6]
    return x


@torch.no_grad()
@pytest.mark.parametrize("family", VARIANTS)
def test_head_input_is_what_the_head_reads(family: str, tmp_path: Path) -> None:
    shell, _ = loaded(tiny_folder(tmp_path / "m", family))
    hidden = outliers(2, 7, tiny_model(family).config.hidden_size)
    seen: list[Tensor] = []
    head = shell.model.get_submodule(shell.structure.head)
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shell.logits(hidden)
    handle.remove()
    shell.free_outside()
    assert torch.equal(shell.head_input(hidden), seen[0])
    assert shell.model.get_submodule(shell.structure.head) is head


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_solved_head_errs_less_than_the_rounded_one(tied: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama", tied=tied)
    errors, embeddings = {}, {}
    for name in ("rounded", "solved"):
        shell, _ = loaded(folder)
        plan = make_plan(shell.structure, GPTQ, shell.config.hidden_size)
        hidden = outliers(8, 32, shell.config.hidden_size)
        exact = shell.logits(hidden)
        hessian = None
        if name == "solved":
            accumulator = HessianAccumulator(shell.config.hidden_size)
            accumulator.add(shell.head_input(hidden))
            hessian = accumulator.finish()
        tensors = quantize_outside(shell, plan, torch.float32, hessian, Gptq())
        embeddings[name] = tensors["model.embed_tokens.weight"]
        head = shell.model.get_submodule(shell.structure.head).weight
        codes = (
            embeddings[name] if tied else unpack(tensors["lm_head.weight_packed"], 8, head.shape[1])
        )
        head.copy_(codes * tensors["lm_head.weight_scale"].float())
        errors[name] = float((shell.logits(hidden) - exact).square().mean())
    assert errors["solved"] < 0.7 * errors["rounded"]
    # The input side of an untied model is rounded either way.
    assert torch.equal(embeddings["solved"], embeddings["rounded"]) != tied


def test_the_run_says_how_the_head_was_solved(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama", tied=True)
    text = write_text(tmp_path / "text.txt", 1)
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    codes = {}
    for recipe, solver in (("gptq-w8a8", "gptq"), ("rtn-w8a8", "rtn")):
        out = tmp_path / recipe
        made = crossbit.quantize(str(folder), recipe, out=out, settings=EVALUATION, **options)
        assert made["head"] == {"solver": solver}
        assert made["verify"]["passed"]
        codes[solver] = made["verify"]["tensors"]["model.embed_tokens.weight"]
    assert codes["gptq"] != codes["rtn"]
    made = crossbit.quantize(
        str(folder), "gptq-w8a8", out=tmp_path / "float",
        settings=(*EVALUATION, "embedding=null", "head=null"), **options,
    )  # fmt: skip
    assert made["head"] is None
