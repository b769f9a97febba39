"""Close a block: install what it has become -> write -> advance -> free."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from crossbit.engine.job import Job, batch_of
from crossbit.engine.opening import OpenBlock
from crossbit.engine.progress import release_memory
from crossbit.engine.stream import Stream
from crossbit.engine.workdir import WorkDir, part_name
from crossbit.errors import WorkError
from crossbit.runtime.install import install


@torch.no_grad()
def close_block(
    job: Job, work: WorkDir, index: int, opened: OpenBlock, entering: Stream | None
) -> Stream | None:
    """Write a block and send the activations through it.

    Args:
        job: the run.
        work: where its parts go.
        index: of the block.
        opened: the block; its module is used up.
        entering: activations that enter it, None if nothing needs them.

    Returns:
        The activations that leave it, None without ``entering``.

    Raises:
        WorkError: its output is not finite.
    """
    started = time.monotonic()
    block, layers = opened.module, opened.layers
    tensors = job.write(index, block, layers)
    error = leaving = None
    if entering is not None and opened.target is not None:
        structure = job.plan.blocks[index].structure
        install(block, structure, layers, job.dtype)
        block.to(job.dtype)
        job.online.quantize(structure, index, block)
        # The stream first: a block counts as finished only when its successor can start.
        error, leaving = _advance(job, work, index, entering, opened.target)
    seconds = opened.record.pop("seconds") + time.monotonic() - started
    record = {**opened.record, "relative_error": error, "seconds": round(seconds, 3)}
    work.save_part(part_name(index), tensors, record)
    job.shell.free_block(index)
    release_memory()
    return leaving


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
            if not bool(torch.isfinite(out).all()):
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


def _relative_errors(out: Tensor, target: Tensor) -> Tensor:
    """||out - target||^2 / ||target||^2 of every token: none outweighs another."""
    difference = (out.float() - target.float()).square().sum(-1)
    power = target.float().square().sum(-1).clamp(min=1e-30)
    return difference / power
