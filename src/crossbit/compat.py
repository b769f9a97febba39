"""Which choices on the axes go together: one table, checked before anything loads.

Every rule says when a recipe breaks it and what would be valid instead. ``check_recipe`` needs the
recipe alone; ``check_model`` the architecture too. Warnings name what works but surprises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crossbit.errors import InputError
from crossbit.grid import signed_by_default
from crossbit.models.structure import ModelStructure
from crossbit.recipe import (
    Activations,
    Cfp,
    CrossFold,
    DuQuant,
    Gptq,
    Let,
    Objective,
    Recipe,
    Rotate,
    Smooth,
    Solver,
    TrainedRounding,
    Training,
    WeightGrid,
    first_solver,
    matches,
)
from crossbit.windows import Window, schedule


def _grids(recipe: Recipe) -> Iterable[WeightGrid]:
    return [recipe.weights, *(o.weights for o in recipe.overrides if o.weights)]


def _combinations(
    recipe: Recipe,
) -> Iterable[tuple[WeightGrid, Activations | None, Solver]]:
    """What layers without an override get, and what each override makes of it."""
    combinations: list[tuple[WeightGrid, Activations | None, Solver]] = [
        (recipe.weights, recipe.activations, recipe.solver)
    ]
    for override in recipe.overrides:
        chosen = override.activations
        if chosen is None:
            chosen = recipe.activations
        activations = chosen if isinstance(chosen, Activations) else None
        combinations.append(
            (override.weights or recipe.weights, activations, override.solver or recipe.solver)
        )
    return combinations


def _has(recipe: Recipe, kind: type) -> bool:
    return any(isinstance(t, kind) for t in recipe.transforms)


def _negative_in_groups(grid: WeightGrid, activations: Activations | None) -> bool:
    """True for W4A8 with a scale a group that may be negative."""
    default = signed_by_default(grid.bits, grid.symmetric)
    signed = default if grid.signed is None else grid.signed
    in_groups = grid.group not in ("channel", "tensor")
    return signed and in_groups and activations is not None and activations.bits == 8


def _not_per_token(activations: Activations) -> bool:
    return not activations.grid().kind.startswith("per_token")


def _decides(recipe: Recipe) -> bool:
    return any(
        isinstance(s, TrainedRounding) and (s.mode == "sigmoid" or s.base == "zero")
        for _, _, s in _combinations(recipe)
    )


def _default_divisor(activations: Activations) -> bool:
    return activations.divisor in (None, ((1 << activations.bits) - 1) / 2)


def _one_packed_scheme(recipe: Recipe) -> bool:
    weights = recipe.weights
    return (
        weights.group not in ("auto", "tensor")
        and recipe.embedding is None
        and recipe.head is None
        and not any(o.weights or o.activations for o in recipe.overrides)
    )


@dataclass(frozen=True)
class Rule:
    """A combination that does not work: when it is present, why, and what is valid."""

    broken: Callable[[Recipe], bool]
    why: str
    valid: str


RULES: tuple[Rule, ...] = (
    Rule(
        lambda r: (
            any(a.kind == "cross_folded" for a in r.all_activations) and not _has(r, CrossFold)
        ),
        "activations.kind cross_folded without the transform that folds",
        "add `transforms: [{kind: cross_fold}]`, or use kind per_token",
    ),
    Rule(
        lambda r: (
            _has(r, CrossFold) and any(a.grid().kind.startswith("cross") for a in r.all_activations)
        ),
        "cross_fold together with an unfolded CrossQuant mode would apply the column factor twice",
        "activations.kind cross_folded, per_token or per_token_clip with cross_fold; "
        "cross_dynamic, cross_static or cross_static_clip without it",
    ),
    Rule(
        lambda r: not list(r.all_activations) and (_has(r, CrossFold) or _has(r, Smooth)),
        "cross_fold and smooth exist for quantized activations, and this recipe has none",
        "set activations, or use awq_scale (or no transform) for weight-only recipes",
    ),
    Rule(
        lambda r: any(
            a.kind == "cross_folded" and a.alpha != Activations().alpha for a in r.all_activations
        ),
        "activations.alpha has no effect on cross_folded",
        "set the transform's alpha: transforms: [{kind: cross_fold, alpha: ...}]",
    ),
    Rule(
        lambda r: any(not a.grid().research and not _default_divisor(a) for a in r.all_activations),
        "a divisor of its own on activations that are exported: readers use (2^bits - 1) / 2",
        "leave activations.divisor out, use a research kind (per_token_clip, cross_dynamic, "
        "cross_static, cross_static_clip), or measure another reader with "
        "`crossbit evaluate --divisor`",
    ),
    Rule(
        lambda r: (
            not r.online
            and any(a.kind == "per_tensor_static" and a.bits != 8 for a in r.all_activations)
        ),
        "static per-tensor activations below 8 bits: no other runtime executes them",
        "bits: 8 with per_tensor_static, kind per_token, or an online recipe (prefix, cache, a "
        "rotation at run time)",
    ),
    Rule(
        lambda r: any(
            isinstance(first_solver(solver), Gptq) and grid.group == "tensor"
            for grid, _, solver in _combinations(r)
        ),
        "GPTQ rounds column by column and cannot share one scale over the whole matrix",
        "weights.group channel, auto or a number with gptq; tensor with rtn",
    ),
    Rule(
        lambda r: any(
            g is not None and (g.bits != 8 or g.group != "channel" or not g.symmetric)
            for g in (r.embedding, r.head)
        ),
        "embedding and head on a grid that transformers does not load "
        "(it reloads symmetric INT8 per row, or floats)",
        "embedding/head: {bits: 8, group: channel}, or null to leave them in floating point",
    ),
    Rule(
        lambda r: any(
            a is not None and a.bits < 8 and g.bits > 4 and a.bits < g.bits
            for g, a, _ in _combinations(r)
        ),
        "activations with fewer bits than the weights: no kernel multiplies them",
        "W8A8, W4A8 or W4A4 (an override that gives both: weights and activations in one)",
    ),
    Rule(
        lambda r: (
            any(
                not g.symmetric and (a is None or a.grid().research) for g, a, _ in _combinations(r)
            )
            and not _one_packed_scheme(r)
        ),
        "asymmetric weights without quantized activations: transformers reloads their packed zero "
        "points only if the whole model has that one scheme",
        "weights {symmetric: false, group: channel or a number} with "
        "embedding: null, head: null and no overrides; symmetric weights; or quantized activations",
    ),
    Rule(
        lambda r: (
            not list(r.all_activations)
            and any(isinstance(t, Cfp) and t.activations for t in r.transforms)
        ),
        "cfp scales outlier channels of quantized activations, and this recipe has none",
        "{kind: cfp, activations: false} to truncate weights only, or set activations",
    ),
    Rule(
        lambda r: any(
            isinstance(t, Cfp) and not t.activations and not t.weights for t in r.transforms
        ),
        "cfp with activations and weights both false does nothing",
        "activations: true, weights: true, or no cfp",
    ),
    Rule(
        lambda r: any(
            g is not None and g.signed and not g.symmetric
            for g in (*_grids(r), r.embedding, r.head)
        ),
        "signed scales on an asymmetric grid, whose zero point does their work",
        "weights.signed null or false, or weights.symmetric true",
    ),
    Rule(
        lambda r: any(
            a is not None and a.kind == "per_token_clip" and not isinstance(solver, TrainedRounding)
            for _, a, solver in _combinations(r)
        ),
        "the clip factor of per_token_clip is learned with the rounding, and these layers are not "
        "trained: it would stay 1, which is per_token",
        "solver {kind: rounding} with per_token_clip, or kind per_token",
    ),
    Rule(
        lambda r: any(isinstance(t, Rotate) for t in r.transforms[1:]),
        "a rotation after other transforms: it is made of the whole model, before any block",
        "one rotation, first in the list of transforms",
    ),
    Rule(
        lambda r: any(isinstance(t, DuQuant) for t in r.transforms[:-1]),
        "duquant before other transforms: its rotation mixes the channels that they scale",
        "one duquant, last in the list of transforms",
    ),
    Rule(
        lambda r: (
            r.duquant is not None
            and bool(r.all_activations)
            and all(_not_per_token(a) for a in r.all_activations)
        ),
        "duquant rotates inputs that are quantized per token, and none of this recipe's is",
        "activations.kind per_token, per_token_clip or cross_folded with duquant, or none",
    ),
    Rule(
        lambda r: r.let is not None and not r.trains,
        "let trains factors with the rounding, and nothing in this recipe is trained",
        "solver {kind: rounding} with let, or {kind: smooth} in its place",
    ),
    Rule(
        lambda r: (
            r.let is not None and (r.duquant is not None or not isinstance(r.transforms[-1], Let))
        ),
        "let before another transform, which would change what its factors are of",
        "one let, last in the list of transforms",
    ),
    Rule(
        lambda r: r.let is not None and any(_not_per_token(a) for a in r.all_activations),
        "let with activations whose scales are calibrated before its factors are trained",
        "activations.kind per_token, per_token_clip or cross_folded with let",
    ),
    Rule(
        lambda r: r.let is not None and _decides(r),
        "let moves the weights, whose integers mode sigmoid and base zero take from where they are",
        "solver {mode: straight_through, base: frac} with let",
    ),
    Rule(
        lambda r: (
            r.cache is not None
            and r.cache.before_rope
            and r.rotation is not None
            and r.rotation.keys
        ),
        "keys are rotated after RoPE, and quantized before it",
        "cache.before_rope: false, or a rotation with keys: false",
    ),
    Rule(
        lambda r: (
            r.rotation is not None
            and not any((r.rotation.residual, r.rotation.heads, r.rotation.down, r.rotation.keys))
        ),
        "a rotation of nothing",
        "residual: true, heads: true, down: true or keys: true, or no rotate",
    ),
    Rule(
        lambda r: any(
            isinstance(s, TrainedRounding)
            and s.parameter == "none"
            and s.expansion is None
            and not s.steps
            for _, _, s in _combinations(r)
        ),
        "a rounding with parameter none, steps false and no expansion has nothing to train",
        "parameter full or low_rank, steps true, an expansion, or the solver under `start` alone",
    ),
    Rule(
        lambda r: bool(r.objective.homologous) and not r.objective.ahead[0],
        "objective.homologous is a second target of the window's own output, on which ahead puts "
        "no weight",
        "a first weight above 0 in objective.ahead, or homologous: 0",
    ),
    Rule(
        lambda r: r.norms and not r.trains,
        "norms are trained with the rounding, and nothing in this recipe is trained",
        "solver {kind: rounding} with norms, or norms: false",
    ),
    Rule(
        lambda r: r.norms and r.let is not None,
        "norms and let both train the gains of the same norms",
        "one of them: norms: false, or no let among the transforms",
    ),
    Rule(
        lambda r: r.norms and any(_not_per_token(a) for a in r.all_activations),
        "norms with activations whose scales are calibrated before the norms are trained",
        "activations.kind per_token, per_token_clip or cross_folded with norms",
    ),
    Rule(
        lambda r: (
            r.end_to_end is not None
            and r.end_to_end.hold
            and r.trains
            and not r.norms
            and not any(a.grid().factored for a in r.all_activations)
            and not any(isinstance(s, TrainedRounding) and s.steps for _, _, s in _combinations(r))
        ),
        "end_to_end.hold keeps the codes, and no steps, norms or clip factors are there to train",
        "solver {kind: rounding, steps: true}, norms: true, or end_to_end.hold: false",
    ),
    Rule(
        lambda r: r.let is not None and r.end_to_end is not None and r.end_to_end.hold,
        "end_to_end.hold keeps the codes, which the factors of let would change",
        "end_to_end.hold: false with let",
    ),
    Rule(
        lambda r: r.objective.ahead_share < 1 and not r.objective.ahead[0],
        "objective.ahead_share leaves sequences without an error, for ahead puts no weight on the "
        "window's own",
        "a first weight above 0 in objective.ahead, or ahead_share: 1",
    ),
)


def check_recipe(recipe: Recipe) -> None:
    """Refuse combinations of the table.

    Raises:
        InputError: the first broken rule, with what is valid.
    """
    for rule in RULES:
        if rule.broken(recipe):
            raise InputError(f"recipe {recipe.name}: {rule.why}; valid: {rule.valid}")


def check_model(recipe: Recipe, structure: ModelStructure) -> None:
    """Refuse what an architecture cannot take.

    Raises:
        InputError: tied embedding and head on different grids; experts on different schemes or
            asymmetric (readers fuse them and apply one scheme without saying so); windows that the
            model has no blocks for.
    """
    if recipe.trains:
        windows_of(recipe, len(structure.blocks))
    embedding_names = (structure.embedding, "embedding")
    head_names = (structure.head, "head", "lm_head")
    embedding = None if recipe.ignores(*embedding_names) else recipe.embedding
    head = None if recipe.ignores(*head_names) else recipe.head
    if structure.tied and embedding != head:
        raise InputError(
            f"recipe {recipe.name}: embedding and head are one tied matrix in this model but have "
            "different grids; valid: the same value for both (embedding: null and head: null "
            "leave it in floating point)"
        )
    _check_outside_overrides(recipe, structure, embedding_names, head_names)
    if structure.family.experts is None:
        return
    schemes = set()
    for block in structure.blocks:
        for info in block.linears.values():
            if f".{structure.family.experts.rpartition('.')[2]}." not in f".{info.name}.":
                continue
            full = f"{block.name}.{info.name}"
            if recipe.ignores(full, info.role):
                schemes.add("float")
                continue
            weights, activations, _ = recipe.for_layer(full, info.role)
            if not weights.symmetric:
                raise InputError(
                    f"recipe {recipe.name}: asymmetric experts do not reload in transformers; "
                    "valid: weights.symmetric true"
                )
            schemes.add(f"{weights!r} {activations!r}")
    if len(schemes) > 1 or schemes == {"float"}:
        raise InputError(
            f"recipe {recipe.name}: the experts of a mixture must all be quantized on one scheme "
            "(readers fuse them and apply the first scheme to all); valid: no override or ignore "
            "that names only some experts or projections of them"
        )


def windows_of(recipe: Recipe, blocks: int) -> list[Window]:
    """The windows in which a recipe that trains goes through a model of ``blocks`` blocks.

    Raises:
        InputError: the model has no such windows.
    """
    objective = recipe.objective
    try:
        return schedule(
            blocks,
            objective.window,
            objective.overlap,
            expand=objective.expand,
            largest=objective.largest,
        )
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: objective: {error}") from None


def _check_outside_overrides(
    recipe: Recipe,
    structure: ModelStructure,
    embedding_names: Iterable[str],
    head_names: Iterable[str],
) -> None:
    """Refuse overrides that name embedding or head, which are not layers of a block."""
    layers = [
        name
        for block in structure.blocks
        for info in block.linears.values()
        for name in (f"{block.name}.{info.name}", info.role, block.name)
    ]
    for override in recipe.overrides:
        if any(matches(override.match, name) for name in layers):
            continue
        for key, names in (("embedding", embedding_names), ("head", head_names)):
            if any(matches(override.match, name) for name in names):
                raise InputError(
                    f"recipe {recipe.name}: overrides.match {override.match!r} names the "
                    f"{key}, which has a grid of its own; use the key `{key}:` of the recipe"
                )


def warnings(recipe: Recipe, structure: ModelStructure) -> list[str]:
    """What the user should know before the run; also kept in the report."""
    notes = []
    trained = (recipe.objective, recipe.training, recipe.end_to_end)
    if not recipe.trains and trained != (Objective(), Training(), None):
        notes.append(
            "objective, training and end_to_end change nothing: no layer has a solver of kind "
            "rounding"
        )
    if recipe.objective.metric == "fisher" and recipe.objective.norm in ("sum", "mean"):
        notes.append(
            "metric fisher is that of relative errors, which norm sum and mean do not measure; "
            "use norm bounded or token with it"
        )
    if any(
        isinstance(s, TrainedRounding) and s.limits == "range" and isinstance(s.start, Gptq)
        for _, _, s in _combinations(recipe)
    ):
        notes.append(
            "limits range begins at the range of each group, where GPTQ's codes are lost; start "
            "{kind: rtn} comes to the same in less time"
        )
    if any(g.bits not in (4, 8) for g in _grids(recipe)):
        notes.append(
            "weights of 2, 3, 5, 6 or 7 bits need compressed-tensors 0.20 or newer to load, and "
            "few GPU kernels run them"
        )
    if any(not g.symmetric for g in _grids(recipe)):
        notes.append(
            "asymmetric weights: with quantized activations they are stored a byte each "
            "(int-quantized); weight-only they are packed, and transformers loads packed zero "
            "points only with CompressedTensorsConfig(dequantize=True)"
        )
    if recipe.kind == "plain" and any(
        _negative_in_groups(g, a) for g, a, _ in _combinations(recipe)
    ):
        notes.append(
            "scales may be negative: vLLM's Marlin kernel for 8-bit inputs reads scales of groups "
            "as positive (vLLM issue 48905); give --set weights.signed=false for it"
        )
    if recipe.embedding is not None and recipe.kind == "plain":
        notes.append(
            "the INT8 embedding loads in transformers; vLLM has no loader for it: give "
            "--set embedding=null --set head=null for vLLM"
        )
    if structure.family.experts is not None and list(recipe.all_activations):
        notes.append(
            "the experts keep float activations (transformers fuses them, and fused experts are "
            "no linear layers): of them only the weights are quantized"
        )
    if structure.family.model_type == "opt" and list(recipe.all_activations):
        notes.append(
            "transformers gives fc1 and fc2 of OPT two-dimensional inputs, on which "
            "compressed-tensors takes one scale for all tokens; crossbit and vLLM scale per token"
        )
    if recipe.online:
        notes.append(
            "online recipe: crossbit's own loader does a part of the work at run time; the result "
            "is not a file that other runtimes execute"
        )
    if recipe.research:
        notes.append(
            "research recipe: its activation mode exists in crossbit's evaluation only; the "
            "result is not a file that other runtimes execute"
        )
    return notes
