"""CFP in the engine: what it does to the blocks of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_folder
from torch import Tensor

from crossbit.engine.observe import attach, make_states
from crossbit.engine.plan import BlockPlan, make_plan
from crossbit.engine.scale import apply_transforms
from crossbit.engine.statistics import InputStatistics
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.recipe import Cfp, Recipe
from crossbit.transforms.cfp import detect, truncate


class Engine:
    """Block 0 of a tiny model as the loop has it before transforms: float32, observed."""

    def __init__(self, folder: Path, **data: Any) -> None:
        checkpoint = Checkpoint(folder)
        self.shell = Shell(open_config(folder))
        self.shell.load_outside(checkpoint, torch.float32)
        self.recipe = Recipe.parse({"weights": {"bits": 8}, **data}, "mine")
        self.plan: BlockPlan = make_plan(self.shell.structure, self.recipe, 64).blocks[0]
        self.block = self.shell.load_block(0, checkpoint, torch.float32)
        # An outlier for every layer; the hidden states have an outlier channel of their own.
        with torch.no_grad():
            for name in self.plan.structure.linears:
                weight = self.block.get_parameter(f"{name}.weight")
                weight[1, 2] = 40 * weight.abs().max()
        self.original = {n: p.clone() for n, p in self.block.named_parameters()}
        self.states = make_states(
            self.plan.structure, percentile=100.0, tokens=64, ranges=True, hessian=lambda _: False
        )

        def take(stats: InputStatistics, x: Tensor) -> None:
            stats.add(x)
            stats.add_sample(x)

        handles = attach(self.block, self.states, take)
        self.before = self.run()
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def run(self) -> Tensor:
        hidden = self.shell.embed(torch.arange(64).reshape(2, 32))
        return self.shell.run_block(0, hidden, self.shell.block_kwargs(32, torch.float32)[0])

    @torch.no_grad()
    def transform(self) -> list[dict[str, Any]]:
        transforms = self.recipe.folds
        return apply_transforms(self.block, self.plan, self.states, transforms, torch.float32)

    def changed(self) -> set[str]:
        return {n for n, p in self.block.named_parameters() if not torch.equal(p, self.original[n])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "m", "llama")


def test_weights_alone_are_truncated_in_every_planned_layer(folder: Path) -> None:
    engine = Engine(
        folder,
        transforms=[{"kind": "cfp", "activations": False, "judge": False}],
        ignore=["k_proj"],
    )
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    planned = {n for n in engine.plan.structure.linears if not n.endswith("k_proj")}
    assert engine.changed() == {f"{n}.weight" for n in planned}
    assert {r["layer"].removeprefix("model.layers.0.") for r in records} == planned
    for record in records:
        name = record["layer"].removeprefix("model.layers.0.")
        weight = engine.original[f"{name}.weight"]
        wanted = truncate(weight)
        assert torch.equal(engine.block.get_parameter(f"{name}.weight"), wanted.weight)
        assert record["truncated"] == wanted.fraction > 0
        assert record["weight_change"] == wanted.change > 0
        state = next(s for s in engine.states if name in s.group.consumers)
        x = state.sample(2048).double()
        moved = x @ (wanted.weight - weight).double().T
        output = moved.square().sum() / (x @ weight.double().T).square().sum()
        assert record["output_change"] == pytest.approx(float(output), rel=1e-3)


def test_weights_without_a_fold_are_truncated_too(tmp_path: Path) -> None:
    """fc2 of a block with GELU has no source."""
    engine = Engine(
        tiny_folder(tmp_path / "x", "gpt_neox"),
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp", "judge": False}],
    )
    assert any(g.source is None for g in engine.plan.structure.groups)
    records = engine.transform()
    assert any("skipped" in r for r in records)
    assert all(r["truncated"] > 0 for r in records if "layer" in r)
    assert sum("layer" in r for r in records) == len(engine.plan.layers)


def test_scaling_alone_leaves_the_block_unchanged(folder: Path) -> None:
    engine = Engine(
        folder,
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp", "weights": False, "judge": False}],
    )
    maxima = {s.group.name: s.column_maximum(skip_massive=False) for s in engine.states}
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    assert len(records) == len(engine.states)
    after = engine.run()
    assert float((after - engine.before).norm() / engine.before.norm()) < 1e-5
    assert sum(r["scaled"] for r in records) > 0
    for record, state in zip(records, engine.states, strict=True):
        found = detect(maxima[state.group.name])
        assert record["scaled"] >= found.outliers
        assert record["chosen"] == (0.5 if found.outliers else 0.0)
        left = state.column_maximum(skip_massive=False)
        assert float(left.max()) <= float(maxima[state.group.name].max())


def test_float_inputs_are_not_scaled(folder: Path) -> None:
    engine = Engine(
        folder,
        activations={"kind": "per_token"},
        transforms=[{"kind": "cfp", "weights": False}],
        overrides=[{"match": "down_proj", "activations": "none"}],
    )
    records = engine.transform()
    skipped = [r for r in records if "skipped" in r]
    assert [r["skipped"] for r in skipped] == ["its input is not quantized"]
    assert len(records) == len(engine.states)
    assert "mlp.down_proj.weight" not in engine.changed()


def test_weights_are_truncated_before_the_fold(folder: Path) -> None:
    """The fold makes columns of outlier channels large: those are no outliers of the weights."""
    cfp = {"kind": "cfp", "judge": False}
    engine = Engine(folder, activations={"kind": "per_token"}, transforms=[cfp])
    records = engine.transform()
    first = next(i for i, r in enumerate(records) if "chosen" in r)
    assert all("layer" in r for r in records[:first])
    assert not any("layer" in r for r in records[first:])
    for record in records[:first]:
        name = record["layer"].removeprefix("model.layers.0.")
        assert record["truncated"] == truncate(engine.original[f"{name}.weight"]).fraction


def test_judged_truncation_is_never_worse(folder: Path) -> None:
    engine = Engine(
        folder,
        weights={"bits": 8, "group": 16},
        transforms=[{"kind": "cfp", "activations": False}],
    )
    records = engine.transform()
    json.dumps(records, allow_nan=False)
    changed = engine.changed()
    for record in records:
        losses = record["losses"]
        name = record["layer"].removeprefix("model.layers.0.")
        assert (f"{name}.weight" in changed) == (losses["truncated"] < losses["kept"])
        assert (record["truncated"] > 0) == (f"{name}.weight" in changed)
    assert len(changed) < len(records)  # at 8 bits a weight 40 times the others is worth its range


def test_a_truncation_that_nothing_judges_is_not_made(folder: Path) -> None:
    engine = Engine(folder, transforms=[{"kind": "cfp", "activations": False}])
    engine.states = []
    records = engine.transform()
    assert not engine.changed()
    assert [r["truncated"] for r in records] == [0.0] * len(engine.plan.layers)


def test_recipe_reads_cfp() -> None:
    recipe = Recipe.parse({"transforms": [{"kind": "cfp", "power": 0.7, "spread": 2}]}, "mine")
    assert recipe.transforms == (Cfp(power=0.7, spread=2.0, judge=True),)
