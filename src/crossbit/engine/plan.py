"""Which layer gets which grid and solver: decided and checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from crossbit.activations.grid import ActivationGrid
from crossbit.errors import InputError
from crossbit.grid import Grid, as_read
from crossbit.models.experts import is_expert
from crossbit.models.structure import (
    BlockStructure,
    InputGroup,
    LinearInfo,
    ModelStructure,
    RowSource,
)
from crossbit.recipe import (
    Activations,
    Gptq,
    Recipe,
    Rtn,
    TrainedRounding,
    WeightGrid,
    first_solver,
    matches,
)
from crossbit.solvers.expansion import ExpansionChoice
from crossbit.solvers.rounding_state import RoundingChoice


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer of a block; with ``rounding`` it is trained afterwards."""

    info: LinearInfo
    weights: Grid
    activations: ActivationGrid | None
    activation_config: Activations | None
    solver: Rtn | Gptq
    rounding: TrainedRounding | None = None


@dataclass(frozen=True)
class BlockPlan:
    """One block: plans by relative layer name (ignored layers are absent).

    With ``keys`` its attention quantizes keys and values.
    """

    structure: BlockStructure
    layers: dict[str, LayerPlan]
    keys: bool = False

    def group_activations(self, group: InputGroup) -> ActivationGrid | None:
        """The grid of the group's input: that of its first quantized layer."""
        grids = [self.layers[n].activations for n in group.consumers if n in self.layers]
        return grids[0] if grids else None


@dataclass(frozen=True)
class ModelPlan:
    """Plans of all blocks, and of embedding and head (None: they stay as they are)."""

    blocks: list[BlockPlan]
    embedding: Grid | None
    head: Grid | None
    ignored: list[str]

    @property
    def quantized(self) -> int:
        """Number of linear layers in blocks that are quantized."""
        return sum(len(b.layers) for b in self.blocks)


def choice_of(rounding: TrainedRounding | None) -> RoundingChoice:
    """The parametrisation that a recipe asks for; the plainest for a layer that is not trained.

    Raises:
        InputError: its parts do not go together.
    """
    if rounding is None:
        return RoundingChoice()
    expansion = rounding.expansion
    return RoundingChoice(
        rounding.base,
        rounding.parameter,
        rounding.mode,
        rounding.rank,
        rounding.reach,
        rounding.limits,
        None if expansion is None else ExpansionChoice(**expansion.model_dump()),
    )


def make_plan(structure: ModelStructure, recipe: Recipe, width: int) -> ModelPlan:
    """Match every linear layer with the recipe.

    Args:
        structure: the model's layers.
        recipe: the recipe.
        width: columns of the embedding and head.

    Raises:
        InputError: a pattern of the recipe matches no layer, a grid or an expansion does not fit a
            layer, or no layer would be quantized.
    """
    blocks: list[BlockPlan] = []
    ignored: list[str] = []
    names: list[tuple[str, ...]] = []
    for block in structure.blocks:
        layers: dict[str, LayerPlan] = {}
        expert_widths = {i.in_features for i in block.linears.values() if is_expert(f".{i.name}")}
        for info in block.linears.values():
            full = f"{block.name}.{info.name}"
            names.append((full, info.role))
            if recipe.ignores(full, info.role):
                ignored.append(full)
                continue
            weights, activations, solver = recipe.for_layer(full, info.role)
            rounding = solver if isinstance(solver, TrainedRounding) else None
            try:
                grid = weights.grid(info.in_features, *(expert_widths if is_expert(full) else ()))
                expansion = choice_of(rounding).expansion
                if expansion is not None:
                    expansion.check_shape(info.out_features, info.in_features)
            except InputError as error:
                raise InputError(f"{full}: {error}") from None
            if is_expert(full):
                # Readers fuse experts: they give them float inputs, and round their weights to
                # the dtype of the stored scale. What is evaluated is what they will run.
                grid, activations = replace(grid, scale_dtype=torch.float32), None
            inputs = activations.grid() if activations else None
            float_inputs = inputs is None or inputs.research
            layers[info.name] = LayerPlan(
                info,
                as_read(grid, float_inputs=float_inputs),
                inputs,
                activations,
                first_solver(solver),
                rounding,
            )
        own = block if recipe.prefix is None else _prefix_fixed(block)
        blocks.append(BlockPlan(own, layers, recipe.cache is not None))
        _check_shared_inputs(block, layers)
    outside = (structure.embedding, structure.head, "embedding", "head", "lm_head")
    for pattern in (*recipe.ignore, *(o.match for o in recipe.overrides)):
        if not any(matches(pattern, n) for group in (*names, outside) for n in group):
            raise InputError(
                f"recipe {recipe.name}: {pattern!r} matches no linear layer; names look like "
                f"{names[0][0]!r}, roles like {names[0][1]!r}"
            )
    plan = ModelPlan(
        blocks,
        _outside_grid(recipe, recipe.embedding, width, structure.embedding, "embedding"),
        _outside_grid(recipe, recipe.head, width, structure.head, "head", "lm_head"),
        ignored,
    )
    if plan.quantized == 0:
        raise InputError(f"recipe {recipe.name}: every linear layer is ignored; nothing to do")
    return plan


def _prefix_fixed(block: BlockStructure) -> BlockStructure:
    """The block where no factor may be folded into keys and values: those of a prefix stay."""
    reason = "it is made of values, and those of the prefix do not take the factor"
    groups = [
        replace(group, source=None, reason=reason)
        if isinstance(group.source, RowSource)
        and any(block.linears[name].role == "o_proj" for name in group.consumers)
        else group
        for group in block.groups
    ]
    return replace(block, groups=groups, query_key="keys of the prefix do not take the factor")


def _outside_grid(
    recipe: Recipe, config: WeightGrid | None, width: int, *names: str
) -> Grid | None:
    if config is None or recipe.ignores(*names):
        return None
    return config.grid(width)


def _check_shared_inputs(block: BlockStructure, layers: dict[str, LayerPlan]) -> None:
    """Layers that read one tensor must quantize it alike, or the fold would serve two masters."""
    for group in block.groups:
        names = [n for n in group.consumers if n in layers and not is_expert(n)]
        grids = {layers[n].activations for n in names}
        if len(grids) > 1:
            raise InputError(
                f"{block.name}: {', '.join(group.consumers[:3])} read the same input but have "
                "different activation settings; give the override to all of them"
            )
