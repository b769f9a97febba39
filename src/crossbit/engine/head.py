"""What the head reads: second moments of the final norm's output, after all quantized blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from crossbit.engine.job import Job, batch_of
from crossbit.engine.workdir import WorkDir
from crossbit.errors import WorkError
from crossbit.recipe import Gptq, first_solver
from crossbit.solvers.hessian import HessianAccumulator


def wants_head_hessian(job: Job) -> bool:
    """Whether GPTQ is to solve the head, on calibration text."""
    gptq = isinstance(first_solver(job.recipe.solver), Gptq)
    return job.ids is not None and job.plan.head is not None and gptq


@torch.no_grad()
def head_hessian(job: Job, work: WorkDir) -> Tensor | None:
    """Mean of x x^T [D, D] float32 over the calibration tokens; None if GPTQ is not to solve it.

    Raises:
        WorkError: the activations that leave the last block are missing or damaged.
    """
    if not wants_head_hessian(job):
        return None
    leaving = work.stream(job.shell.num_blocks)
    if leaving is None:
        raise WorkError(f"{work.path}: the activations leaving the last block are missing")
    accumulator: HessianAccumulator | None = None
    batch = batch_of(leaving.shape[1])
    for start in range(0, leaving.shape[0], batch):
        x = job.shell.head_input(leaving.read(start, start + batch, job.shell.device))
        if accumulator is None:
            accumulator = HessianAccumulator(x.shape[-1], x.device)
        accumulator.add(x)
    assert accumulator is not None
    return accumulator.finish()
