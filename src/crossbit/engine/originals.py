"""The original model on the calibration text, a block at a time, from one file to the next."""

from __future__ import annotations

import torch

from crossbit.engine.job import Job, batch_of
from crossbit.engine.stream import Stream
from crossbit.engine.workdir import WorkDir


@torch.no_grad()
def embedded(job: Job, work: WorkDir, name: str, sequences: int | None = None) -> Stream:
    """The calibration text's hidden states before the first block, into the file ``name``.

    Args:
        job: the run.
        work: where the file is.
        name: of the stream.
        sequences: only so many, from the first on.
    """
    assert job.ids is not None
    ids = job.ids[:sequences]
    count, length = ids.shape
    batch = batch_of(length)
    first = job.shell.embed(ids[:batch])
    with work.writer(name, (count, *first.shape[1:]), first.dtype) as writer:
        writer.append(first)
        for start in range(batch, count, batch):
            writer.append(job.shell.embed(ids[start : start + batch]))
        return writer.commit()


@torch.no_grad()
def through_original(
    job: Job, work: WorkDir, index: int, entering: Stream, name: str, *, held: bool = False
) -> Stream:
    """A stream through an original block, into the file ``name``.

    Args:
        job: the run.
        work: where the file is.
        index: of the block. Whatever stands in its place in the shell is put aside.
        entering: activations that enter it.
        name: of the new stream.
        held: only the held-out sequences.
    """
    job.shell.load_block(index, job.checkpoint, job.dtype)
    job.checkpoint.close()
    count, length = entering.shape[:2]
    first = count - job.held_out if held else 0
    kwargs = job.shell.block_kwargs(length, job.dtype)[index]
    batch = batch_of(length)
    with work.writer(name, (count - first, *entering.shape[1:]), entering.dtype) as writer:
        for start in range(first, count, batch):
            part = entering.read(start, start + batch, job.shell.device)
            writer.append(job.shell.run_block(index, part, kwargs))
        job.shell.free_block(index)
        return writer.commit()
