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
from crossbit.engine.stream import Stream
from crossbit.engine.workdir import WorkDir, part_name
from crossbit.errors import WorkError
from crossbit.models.checkpoint import Checkpoint, check_finite
from crossbit.models.shell import Shell
from crossbit.recipe import Activations, CrossFold, Gptq, Recipe, Rtn
from crossbit.runtime.install import QuantizedLayer, install
from crossbit.transforms.column_fit import MIN_TOKENS

TOKENS_AT_ONCE = 1024  # a batch of sequences through a block
SAMPLE_TOKENS = 4096  # held-out tokens kept a layer input, before massive ones are dropped
FITTING_TOKENS = 16384  # the same of the fitting sequences, for fits; more for very wide layers

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
    first = work.next_block(streams=job.ids is not None)
    entering = None
    if job.ids is not None and first < total:
        entering = _entering(job, work, first)
    job.shell.free_outside()
    release_memory()
    if first:
        reporter.say(f"resuming at block {first} of {total}")
    for index in reporter.track(range(first, total), "quantizing blocks", total - first):
        entering = _one_block(job, work, index, entering)


def _entering(job: Job, work: WorkDir, block: int) -> Stream:
    """Activations that enter ``block``: kept ones, or the embedding's."""
    kept = work.stream(block)
    if kept is not None:
        return kept
    if block:
        raise WorkError(f"{work.path}: the activations entering block {block} are missing")
    assert job.ids is not None
    count, length = job.ids.shape
    batch = batch_of(length)
    first = job.shell.embed(job.ids[:batch])
    with work.new_stream(0, (count, *first.shape[1:]), first.dtype) as writer:
        writer.append(first)
        for start in range(batch, count, batch):
            writer.append(job.shell.embed(job.ids[start : start + batch]))
        return writer.commit()


def _holdout(job: Job) -> int:
    """Number of sequences at the end that are kept out of column maxima."""
    assert job.ids is not None
    count = job.ids.shape[0]
    return min(count - 1, max(1, round(count * job.recipe.calibration.holdout)))


@torch.no_grad()
def _one_block(job: Job, work: WorkDir, index: int, entering: Stream | None) -> Stream | None:
    started = time.monotonic()
    plan = job.plan.blocks[index]
    block = job.shell.load_block(index, job.checkpoint, torch.float32)
    job.checkpoint.close()  # or the pages of all blocks would stay mapped
    _check_finite(block, plan.structure.name)
    states: list[GroupState] = []
    target: Stream | None = None
    if entering is not None:
        states = _empty_states(job, plan)
        target = _observe(job, work, index, block, states, entering)
        release_memory()
    folds = apply_transforms(block, plan, states, job.recipe.transforms, job.dtype)
    solved = solve_block(block, plan, states)
    layers = _layers(plan, solved, states)
    points = [p for s in states for p in s.points]
    massive = max((p.statistics.massive_tokens for p in points), default=0)
    del states, points
    release_memory()
    tensors = job.write(index, block, layers)
    error = leaving = None
    if entering is not None and target is not None:
        install(block, plan.structure, layers, job.dtype)
        block.to(job.dtype)
        # The stream first: a block counts as finished only when its successor can start.
        error, leaving = _advance(job, work, index, entering, target)
    record = {
        "block": index,
        "relative_error": error,
        "folds": folds,
        "layers": [_row(plan, name, s) for name, s in solved.items()],
        "massive_tokens": massive,
        "seconds": round(time.monotonic() - started, 3),
    }
    work.save_part(part_name(index), tensors, record)
    # What entered this block stays until the next is done: killed before that, a run needs it.
    work.drop_stream(index - 1)
    job.shell.free_block(index)
    release_memory()
    return leaving


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


def _wants_fitting(job: Job) -> bool:
    """Column factors are fitted on activations of the fitting sequences."""
    return any(
        isinstance(t, CrossFold) and t.fit and t.alpha == "search" for t in job.recipe.transforms
    )


def _observe(
    job: Job,
    work: WorkDir,
    index: int,
    block: nn.Module,
    states: list[GroupState],
    entering: Stream,
) -> Stream:
    """Run the float block over the stream; returns its output on the held-out sequences."""
    (count, length), held = entering.shape[:2], _holdout(job)
    stride = max(1, held * length // SAMPLE_TOKENS)
    sampling, fits = _wants_sample(job), _wants_fitting(job)
    seen = (count - held) * length

    def fitting(stats: InputStatistics, x: Tensor) -> None:
        stats.add(x)
        if fits:
            wanted = max(FITTING_TOKENS, MIN_TOKENS * stats.columns)
            stats.add_fitting(x.reshape(-1, x.shape[-1])[:: max(1, -(-seen // wanted))])

    def holding(stats: InputStatistics, x: Tensor) -> None:
        stats.add_hessian_only(x)
        if sampling:
            stats.add_sample(x.reshape(-1, x.shape[-1])[::stride])

    runner = copy.deepcopy(block).to(job.dtype)
    kwargs = job.shell.block_kwargs(length, job.dtype)[index]
    with work.new_target((held, *entering.shape[1:]), entering.dtype) as writer:
        for start, stop, take in _split(count, held, batch_of(length), fitting, holding):
            handles = attach(runner, states, take)
            out = runner(entering.read(start, stop, job.shell.device), **kwargs)
            for handle in handles:
                handle.remove()
            if take is holding:
                writer.append(out[0] if isinstance(out, tuple) else out)
        return writer.commit()


def _split(
    count: int, held: int, batch: int, fitting: Any, holding: Any
) -> Iterator[tuple[int, int, Any]]:
    """Batches of the fitting sequences, then of the held-out ones."""
    for low, high, take in ((0, count - held, fitting), (count - held, count, holding)):
        for start in range(low, high, batch):
            yield start, min(high, start + batch), take


def batch_of(length: int) -> int:
    """Sequences of ``length`` tokens a batch."""
    return max(1, TOKENS_AT_ONCE // length)


def _advance(
    job: Job, work: WorkDir, index: int, entering: Stream, target: Stream
) -> tuple[float, Stream]:
    """The stream through the quantized block: error on the target's sequences, what leaves it."""
    count, length = entering.shape[:2]
    batch = batch_of(length)
    kwargs = job.shell.block_kwargs(length, job.dtype)[index]
    held = count - target.shape[0]
    errors = []
    with work.new_stream(index + 1, entering.shape, entering.dtype) as writer:
        for start in range(0, count, batch):
            part = entering.read(start, start + batch, job.shell.device)
            out = job.shell.run_block(index, part, kwargs)
            if not bool(torch.isfinite(out.sum())):
                raise WorkError(
                    f"block {index}: the quantized block's output is not finite; use more bits, "
                    "or --dtype float32"
                )
            writer.append(out)
            ahead = max(0, held - start)
            if ahead < out.shape[0]:
                first, last = start + ahead - held, start + out.shape[0] - held
                wanted = target.read(first, last, out.device)
                errors.append(_relative_errors(out[ahead:], wanted).flatten())
        return float(torch.cat(errors).mean().sqrt()), writer.commit()


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


def _relative_errors(out: Tensor, target: Tensor) -> Tensor:
    """||out - target||^2 / ||target||^2 of every token: none outweighs another."""
    difference = (out.float() - target.float()).square().sum(-1)
    power = target.float().square().sum(-1).clamp(min=1e-30)
    return difference / power
