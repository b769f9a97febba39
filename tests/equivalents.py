"""Blocks with trained factors and shifts of inputs (LET), for their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossbit.engine.fit import Task
from crossbit.engine.job import Job
from crossbit.engine.trained import TrainedBlock, layers_of
from crossbit.solvers.rounding_state import moved_weight

LET: dict[str, Any] = {"transforms": [{"kind": "let"}]}
A8 = {"bits": 8, "kind": "per_token"}
# What is shifted is quantized, and so are keys that have factors.
WHOLE: dict[str, Any] = {**LET, "activations": A8, "cache": {"bits": 8}}
WEIGHTS = {"bits": 8, "group": 16, "scale_dtype": "float32"}
# Grouped heads with a bias of v, an offset of the gain, norms with a bias, fused matrices, experts.
FAMILIES = ("llama", "qwen2", "opt", "gemma3_text", "qwen3", "mixtral", "phi3", "gpt_neox")


def shaken(block: TrainedBlock, size: float = 1.0, seed: int = 0) -> None:
    """Any factors, between exp(-size) and exp(size), and shifts between -size and size."""
    rng = torch.Generator().manual_seed(seed)
    for factor in block.equivalents:
        for parameter in factor.parameters.values():
            parameter.copy_(size * (2 * torch.rand(parameter.shape, generator=rng) - 1))
        factor.apply()


def unrounded(block: TrainedBlock, dtype: torch.dtype) -> None:
    """Let the layers run with what would be rounded, weights and inputs."""
    for layer in block.layers.values():
        layer.activations = None
        layer.weight = moved_weight(layer.state).to(dtype)


def a_task(
    job: Job, blocks: list[TrainedBlock], hidden: Tensor, target: Tensor, **changed: Any
) -> Task:
    def loss(outputs: list[Tensor], targets: list[Tensor], _: float) -> Tensor:
        return (outputs[0] - targets[0]).square().mean()

    options: dict[str, Any] = {
        "blocks": blocks,
        "read": lambda numbers: (hidden[numbers], [target[numbers]]),
        "loss": loss,
        "fitting": torch.arange(3),
        "held": torch.arange(3, 4),
        "length": hidden.shape[1],
        "settings": job.recipe.training,
        "steps": {name: True for name, _ in layers_of(blocks)},
        "dtype": job.dtype,
        "seed": 0,
        **changed,
    }
    return Task(**options)
