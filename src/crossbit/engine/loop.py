"""The loop: load -> observe -> transform -> solve -> write -> advance -> free, block by block."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.observe import GroupState, attach, make_states
from crossbit.engine.plan import BlockPlan, ModelPlan
from crossbit.engine.progress import Reporter, release_memory
from crossbit.engine.scale import apply_transforms
from crossbit.engine.solve import Solved, solve_block
from crossbit.engine.statistics import InputStatistics
from crossbit.engine.workdir import WorkDir, part_name
from crossbit.errors import WorkError
from crossbit.models.checkpoint import Checkpoint, check_finite
from crossbit.models.shell import Shell
from crossbit.recipe import Activations, CrossFold, Gptq, Recipe, Rtn
from crossbit.runtime.install import QuantizedLayer, install

TOKENS_AT_ONCE = 2048  # a batch of sequences through a block
SAMPLE_TOKENS = 4096  # held-out tokens kept a layer input, before massive ones are dropped

Write = Callable[[int, nn.Module, dict[str, QuantizedLayer]], dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """One run of the loop.

    Attributes:
        shell: the model; embedding and head are loaded (and already quantized).
        checkpoint: where blocks come from.
        plan: grids and solvers.
        recipe: transforms and calibration settings.
        ids: calibration windows int64 [S, L], or None if nothing needs calibration.
        dtype: of computation and of the unquantized tensors in the export.
        write: turns a finished block into the tensors that are exported.
    """

    shell: Shell
    checkpoint: Checkpoint
    plan: ModelPlan
    recipe: Recipe
    ids: Tensor | None
    dtype: torch.dtype
    write: Write


def needs_calibration(recipe: Recipe) -> bool:
    """True if some choice of the recipe looks at activations."""
    solvers = [recipe.solver, *(o.solver for o in recipe.overrides if o.solver)]
    activations = [recipe.activations, *(o.activations for o in recipe.overrides)]
    return (
        bool(recipe.transforms)
        or any(isinstance(s, Gptq) or (isinstance(s, Rtn) and s.clip == "awq") for s in solvers)
        or any(isinstance(a, Activations) and _calibrated(a) for a in activations)
    )


def _calibrated(activations: Activations) -> bool:
    return activations.kind in ("per_tensor_static", "cross_static", "cross_static_clip")


def run_blocks(job: Job, work: WorkDir, reporter: Reporter) -> None:
    """Quantize every block that the work folder does not hold yet."""
    total = job.shell.num_blocks
    streams = job.ids is not None
    first = work.next_block(streams=streams)
    hidden = _entering(job, work, first) if streams and first < total else None
    job.shell.free_outside()
    release_memory()
    if streams and first == 0 and hidden is not None:
        work.save_stream(0, hidden)
    if first:
        reporter.say(f"resuming at block {first} of {total}")
    for index in reporter.track(range(first, total), "quantizing blocks", total - first):
        hidden = _one_block(job, work, index, hidden)


def _entering(job: Job, work: WorkDir, block: int) -> Tensor:
    """Activations [S, L, D] that enter ``block``: kept ones, or the embedding's."""
    kept = work.load_stream(block)
    if kept is not None:
        return kept
    if block:
        raise WorkError(f"{work.path}: the activations entering block {block} are missing")
    assert job.ids is not None
    hidden: Tensor | None = None
    for start in range(0, job.ids.shape[0], _batch(job.ids)):
        part = job.shell.embed(job.ids[start : start + _batch(job.ids)])
        if hidden is None:  # filled in place: joining parts would hold all of them twice
            hidden = part.new_empty(job.ids.shape[0], *part.shape[1:])
        hidden[start : start + part.shape[0]] = part
    assert hidden is not None
    return hidden


def _batch(ids: Tensor) -> int:
    return max(1, TOKENS_AT_ONCE // ids.shape[1])


def _holdout(job: Job) -> int:
    """Number of sequences at the end that are kept out of column maxima."""
    assert job.ids is not None
    count = job.ids.shape[0]
    return min(count - 1, max(1, round(count * job.recipe.calibration.holdout)))


@torch.no_grad()
def _one_block(job: Job, work: WorkDir, index: int, hidden: Tensor | None) -> Tensor | None:
    started = time.monotonic()
    plan = job.plan.blocks[index]
    block = job.shell.load_block(index, job.checkpoint, torch.float32)
    job.checkpoint.close()  # or the pages of all blocks would stay mapped
    _check_finite(block, plan.structure.name)
    states: list[GroupState] = []
    target: Tensor | None = None
    if hidden is not None:
        states = _empty_states(job, plan)
        target = _observe(job, index, block, states, hidden)
    folds = apply_transforms(block, plan, states, job.recipe.transforms, job.dtype)
    solved = solve_block(block, plan, states)
    layers = _layers(plan, solved, states)
    tensors = job.write(index, block, layers)
    error = None
    if hidden is not None and target is not None:
        install(block, plan.structure, layers, job.dtype)
        block.to(job.dtype)
        hidden = _advance(job, index, hidden)
        error = _relative_error(hidden[-target.shape[0] :], target)
    points = [p for s in states for p in s.points]
    record = {
        "block": index,
        "relative_error": error,
        "folds": folds,
        "layers": [_row(plan, name, s) for name, s in solved.items()],
        "massive_tokens": max((p.statistics.massive_tokens for p in points), default=0),
        "seconds": round(time.monotonic() - started, 3),
    }
    if hidden is not None and index + 1 < job.shell.num_blocks:
        # The stream first: a block counts as finished only when its successor can start.
        work.save_stream(index + 1, hidden)
    work.save_part(part_name(index), tensors, record)
    job.shell.free_block(index)
    release_memory()
    return hidden


def _check_finite(block: nn.Module, name: str) -> None:
    for key, parameter in block.named_parameters():
        check_finite(f"{name}.{key}", parameter)


def _empty_states(job: Job, plan: BlockPlan) -> list[GroupState]:
    assert job.ids is not None
    percentile = 100.0
    for config in (*job.recipe.transforms, job.recipe.activations):
        if isinstance(config, CrossFold | Activations):
            percentile = min(percentile, config.percentile)
    fitting = (job.ids.shape[0] - _holdout(job)) * job.ids.shape[1]

    def hessian(name: str) -> bool:
        layer = plan.layers.get(name)
        return layer is not None and isinstance(layer.solver, Gptq)

    activations = [layer.activation_config for layer in plan.layers.values()]
    ranges = bool(job.recipe.transforms) or any(a and _calibrated(a) for a in activations)
    return make_states(
        plan.structure, percentile=percentile, tokens=fitting, ranges=ranges, hessian=hessian
    )


def _wants_sample(job: Job) -> bool:
    """Transforms and AWQ's clip search compare outputs on held-out activations."""
    solvers = [job.recipe.solver, *(o.solver for o in job.recipe.overrides)]
    return bool(job.recipe.transforms) or any(
        isinstance(s, Rtn) and s.clip == "awq" for s in solvers
    )


def _observe(
    job: Job, index: int, block: nn.Module, states: list[GroupState], hidden: Tensor
) -> Tensor:
    """Run the float block over the stream; returns its output on the held-out sequences."""
    count, held = hidden.shape[0], _holdout(job)
    stride = max(1, held * hidden.shape[1] // SAMPLE_TOKENS)
    sampling = _wants_sample(job)

    def fitting(stats: InputStatistics, x: Tensor) -> None:
        stats.add(x)

    def holding(stats: InputStatistics, x: Tensor) -> None:
        stats.add_hessian_only(x)
        if sampling:
            stats.add_sample(x.reshape(-1, x.shape[-1])[::stride])

    runner = copy.deepcopy(block).to(job.dtype)
    kwargs = job.shell.block_kwargs(hidden.shape[1], job.dtype)[index]
    outputs = []
    for start, stop, take in _split(count, held, _batch_of(hidden), fitting, holding):
        handles = attach(runner, states, take)
        out = runner(hidden[start:stop], **kwargs)
        for handle in handles:
            handle.remove()
        if take is holding:
            outputs.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(outputs)


def _split(
    count: int, held: int, batch: int, fitting: Any, holding: Any
) -> Iterator[tuple[int, int, Any]]:
    """Batches of the fitting sequences, then of the held-out ones."""
    for low, high, take in ((0, count - held, fitting), (count - held, count, holding)):
        for start in range(low, high, batch):
            yield start, min(high, start + batch), take


def _batch_of(hidden: Tensor) -> int:
    return max(1, TOKENS_AT_ONCE // hidden.shape[1])


def _advance(job: Job, index: int, hidden: Tensor) -> Tensor:
    """The stream through the quantized block, in place."""
    kwargs = job.shell.block_kwargs(hidden.shape[1], job.dtype)[index]
    batch = _batch_of(hidden)
    for start in range(0, hidden.shape[0], batch):
        part = slice(start, start + batch)
        out = job.shell.run_block(index, hidden[part], kwargs)
        if not bool(torch.isfinite(out.sum())):
            raise WorkError(
                f"block {index}: the quantized block's output is not finite; use more bits, or "
                "--dtype float32"
            )
        hidden[part] = out
    return hidden


def _layers(
    plan: BlockPlan, solved: dict[str, Solved], states: list[GroupState]
) -> dict[str, QuantizedLayer]:
    by_layer = {n: s for s in states for n in s.group.consumers}
    layers = {}
    for name, result in solved.items():
        layer = plan.layers[name]
        grid, config = layer.activations, layer.activation_config
        scale = columns = None
        if grid is not None and config is not None and name in by_layer:
            state = by_layer[name]
            if grid.kind == "per_tensor_static":
                largest = max(p.statistics.absolute_maximum for p in state.points)
                scale = torch.tensor(largest / grid.effective_divisor).clamp(min=1e-12)
                scale = scale.to(layer.weights.scale_dtype).float()
            elif grid.kind in ("cross_static", "cross_static_clip"):
                columns = state.column_maximum(skip_massive=config.skip_massive)
        layers[name] = QuantizedLayer(result.qtensor, grid, scale, columns)
    return layers


def _row(plan: BlockPlan, name: str, solved: Solved) -> dict[str, Any]:
    layer = plan.layers[name]
    return {
        "name": f"{plan.structure.name}.{name}",
        "role": layer.info.role,
        "group": plan.structure.group_of(name).name,
        "weights": layer.weights.describe(),
        "bits": layer.weights.bits,
        "group_size": layer.weights.group_size,
        "activations": None
        if layer.activation_config is None
        else f"{layer.activation_config.bits}-bit {layer.activation_config.kind}",
        "solver": solved.solver,
        "weight_error": solved.weight_error,
        "output_error": solved.output_error,
        "note": solved.note,
        "parameters": layer.info.in_features * layer.info.out_features,
    }


def _relative_error(out: Tensor, target: Tensor) -> float:
    """Root mean over tokens of ||out - target||^2 / ||target||^2: no token outweighs another."""
    difference = (out.float() - target.float()).square().sum(-1)
    power = target.float().square().sum(-1).clamp(min=1e-30)
    return float((difference / power).mean().sqrt())
