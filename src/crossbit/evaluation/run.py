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
from crossbit.models.families import needs_bos
from crossbit.positions import check_length
from crossbit.runtime.linear import Execution
from crossbit.runtime.loader import open_blocks


def losses_of(
    folder: Path,
    ids: Tensor,
    *,
    start: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    execution: Execution = "auto",
    divisor: float | None = None,
    reporter: Reporter | None = None,
    title: str = "evaluating",
) -> list[float]:
    """Mean negative log-likelihood (nats) of every window under a local folder.

    Args:
        folder: the model, original or quantized.
        ids: int64 [W, L].
        start: the BOS token, if the windows come without it because another model that is compared
            on them has a prefix that ends with it. A model that needs it then gets it before each
            window, and predicts the same tokens as the other: not the first after it.
        dtype: of computation; None is the model's own.
        device: "cpu" or "cuda".
        execution: how quantized layers run (see ``QuantLinear``).
        divisor: overrides the divisor of activation grids.
        reporter: progress.
        title: shown with it.

    Raises:
        InputError: the windows do not fit the model. WorkError: a loss that is not finite.
    """
    source = open_blocks(folder, dtype=dtype, device=device, execution=execution, divisor=divisor)
    config = source.shell.config
    prefix = [] if source.online.prefix is None else source.online.prefix.ids.tolist()
    lead = int(start is not None and needs_bos(config, prefix))
    if start is not None and lead:
        ids = torch.cat((torch.full((len(ids), 1), start), ids), dim=1)
    check_length(config, ids.shape[1], len(prefix))
    found = window_losses(source, ids, reporter or Reporter(quiet=True), title, lead=lead)
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
