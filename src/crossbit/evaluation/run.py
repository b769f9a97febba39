"""Losses of a folder on given windows, and how two models compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossbit.engine.progress import Reporter, release_memory
from crossbit.evaluation.perplexity import window_losses
from crossbit.evaluation.statistics import Estimate, paired_loss, perplexity
from crossbit.positions import check_length
from crossbit.runtime.linear import Execution
from crossbit.runtime.loader import open_blocks


def losses_of(
    folder: Path,
    ids: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    execution: Execution = "auto",
    divisor: float | None = None,
    reporter: Reporter | None = None,
    title: str = "evaluating",
) -> list[float]:
    """Mean negative log-likelihood (nats) of every window int64 [W, L] under a local folder."""
    source = open_blocks(folder, dtype=dtype, device=device, execution=execution, divisor=divisor)
    prefix = 0 if source.online.prefix is None else source.online.prefix.ids.numel()
    check_length(source.shell.config, ids.shape[1], prefix)
    found = window_losses(source, ids, reporter or Reporter(quiet=True), title)
    del source
    release_memory()
    return found


def compare_losses(original: Sequence[float], quantized: Sequence[float]) -> dict[str, Any]:
    """Perplexities of both and their paired difference, as JSON values (NaN becomes null)."""
    paired = paired_loss(quantized, original)
    return {
        "original": estimate(perplexity(original), "perplexity"),
        "quantized": estimate(perplexity(quantized), "perplexity"),
        "paired": estimate(paired, "loss"),
    }


def estimate(value: Estimate, name: str) -> dict[str, Any]:
    """An estimate as JSON values under the given name."""
    return {name: value.value, "stderr": None if math.isnan(value.stderr) else value.stderr}
