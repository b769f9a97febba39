"""What a run knows when its blocks are done: the hand-over from the loop to the finishing steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crossbit.engine.plan import ModelPlan
from crossbit.models.source import ModelFolder
from crossbit.models.structure import ModelStructure
from crossbit.positions import free_positions
from crossbit.recipe import Kind, Recipe
from crossbit.runtime.online import Online

VERIFY_TOKENS = 512  # of text that verification compares logits on


@dataclass(frozen=True)
class Run:
    """What the run knows when its blocks are done; ``kind`` says who executes the result."""

    folder: ModelFolder
    recipe: Recipe
    kind: Kind
    config: Any
    tokenizer: Any
    structure: ModelStructure
    plan: ModelPlan
    online: Online
    dtype: torch.dtype
    device: str
    manifest: dict[str, Any]
    calibration: dict[str, Any] | None
    notes: list[str]
    stages: dict[str, float]
    peak: dict[str, int]
    started: float

    @property
    def prefix(self) -> list[int]:
        """Tokens before every text."""
        return [] if self.online.prefix is None else self.online.prefix.ids.tolist()


def evaluation_length(config: Any, wanted: int, prefix: int = 0) -> int:
    """Tokens of an evaluation window: ``wanted``, or the positions that a prefix leaves."""
    free = free_positions(config, prefix)
    return wanted if free is None else min(wanted, free)
