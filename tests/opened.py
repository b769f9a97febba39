"""Blocks of tiny models, opened for training without a run."""

from __future__ import annotations

from typing import Any

import torch
from tests.pipelines import custom
from tests.tiny import DictCheckpoint, sample_ids, tiny_model
from torch import Tensor, nn

from crossbit.engine.job import Job
from crossbit.engine.opening import OpenBlock
from crossbit.engine.plan import make_plan
from crossbit.engine.trained import TrainedBlock, make_trainable
from crossbit.models.shell import Shell
from crossbit.runtime.install import QuantizedLayer
from crossbit.solvers.rtn import rtn


class Held(DictCheckpoint):
    """A checkpoint in memory that can be closed, as those in files."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor(name).nbytes for name in self.names)

    def close(self) -> None:
        """Nothing is open."""


def tiny_job(
    family: str, *, dtype: torch.dtype = torch.float32, length: int = 16, **data: Any
) -> Job:
    """A job on a tiny model whose recipe trains, 8 bits in groups of 16, float32 scales."""
    model = tiny_model(family, dtype=dtype)
    shell = Shell(model.config)
    checkpoint = Held(dict(model.state_dict()))
    shell.load_outside(checkpoint, dtype)
    weights = {"bits": 8, "group": 16, "scale_dtype": "float32"}
    recipe = custom(**{"weights": weights, "solver": {"kind": "rounding"}, **data})
    plan = make_plan(shell.structure, recipe, 64)
    ids = sample_ids(4, length)

    def write(*_: Any) -> dict[str, Tensor]:
        return {}

    return Job(shell, checkpoint, plan, recipe, ids, dtype, write, lambda: None)


def float_block(job: Job, index: int, dtype: torch.dtype | None = None) -> nn.Module:
    """A block of the original, by itself."""
    block = job.shell.load_block(index, job.checkpoint, dtype or job.dtype)
    job.shell.free_block(index)
    return block


def open_rounded(job: Job, index: int) -> OpenBlock:
    """A block in float32 with layers rounded to nearest."""
    block = float_block(job, index, torch.float32)
    layers, starts = {}, {}
    for name, layer in job.plan.blocks[index].layers.items():
        weight = block.get_submodule(name).get_parameter("weight").detach()
        layers[name] = QuantizedLayer(rtn(weight, layer.weights), layer.activations)
        if layer.rounding is not None:
            starts[name] = weight
    return OpenBlock(block, layers, starts)


def open_trained(job: Job, index: int = 0) -> TrainedBlock:
    """A block in training, its factors at 1."""
    kwargs = kwargs_of(job, index)
    opened, plan = open_rounded(job, index), job.plan.blocks[index]
    return make_trainable(index, opened, plan, kwargs, job.dtype, 0, let=job.recipe.let)


def kwargs_of(job: Job, index: int) -> dict[str, Any]:
    """What the block's forward takes beside the hidden state."""
    assert job.ids is not None
    return job.shell.block_kwargs(job.ids.shape[1], job.dtype)[index]


def entering(job: Job) -> Tensor:
    """What enters the first block; the massive token is in it."""
    assert job.ids is not None
    return job.shell.embed(job.ids)


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Hidden state [B, L, D] through a block of transformers."""
    out = block(hidden, **kwargs)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@torch.no_grad()
def token_error(found: Tensor, wanted: Tensor) -> float:
    """Largest error of a token's vector, relative to it."""
    difference = (found.double() - wanted.double()).norm(dim=-1)
    return float((difference / wanted.double().norm(dim=-1)).max())
