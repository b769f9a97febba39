"""Descriptions of runs on tiny models, for estimates."""

from __future__ import annotations

import math
from typing import Any

import torch
from tests.tiny import tiny_config

from crossbit.engine.plan import make_plan
from crossbit.estimate.describe import describe
from crossbit.estimate.shapes import Description
from crossbit.estimate.verdict import Room
from crossbit.models.shell import Shell
from crossbit.recipe import Recipe
from crossbit.transforms.rotation import plan_rotation

MIB = 1 << 20
TRAINED: dict[str, Any] = {
    "weights": {"bits": 4, "group": 16},
    "solver": {"kind": "rounding"},
}
TUNED = ("end_to_end.epochs=1",)
# Weights that move along singular directions, of every kind of parameter.
MOVES: dict[str, tuple[str, ...]] = {
    "ranges": ("solver.limits=range", "solver.parameter=none"),
    "band": ("solver.expansion.kind=band", "solver.parameter=none"),
    "blocks": ("solver.expansion={kind: blocks, width: 24}", "solver.limits=range"),
    "square": ("solver.expansion={kind: square, width: 9}", "solver.parameter=low_rank"),
    "rank": ("solver.expansion={kind: full, rank: 7}",),
}
# Rotations of inputs that layers keep with them, one for all blocks of channels or one for each.
TURNS: dict[str, tuple[str, ...]] = {
    name: (
        "activations={bits: 8, kind: per_token}",
        f"transforms=[{{kind: duquant, block: 16, steps: 2, shared: {shared}}}]",
    )
    for name, shared in (("shared", "true"), ("each", "false"))
}
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2048}


def recipe_of(*settings: str, base: Any = TRAINED) -> Recipe:
    data = base if isinstance(base, str) else Recipe.parse(base, "custom")
    return Recipe.load(data, settings)


def description(recipe: Recipe, family: str = "llama", *, large: bool = True) -> Description:
    """Of a tiny model, or of one whose weights weigh something; nothing is loaded."""
    config = tiny_config(family, tied=False)
    if large:
        for key, value in {**LARGE, "num_hidden_layers": 6}.items():
            setattr(config, key, value)
    shell = Shell(config)
    width = shell.model.get_submodule(shell.structure.embedding).embedding_dim
    plan = make_plan(shell.structure, recipe, int(width))
    rotation = None if recipe.rotation is None else plan_rotation(shell, recipe.rotation)
    return describe(shell, plan, recipe, torch.float32, rotation=rotation)


def room(memory: float = math.inf, work: float = math.inf) -> Room:
    return Room(memory, work, None)
