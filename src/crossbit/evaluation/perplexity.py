"""Per-window losses of a model that is loaded one block at a time.

All windows go through block 0, then through block 1, ...: memory holds one block and the hidden
states, whatever the size of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crossbit.engine.progress import Reporter
from crossbit.errors import WorkError
from crossbit.runtime.loader import BlockSource

TOKENS_AT_ONCE = 2048
LOGITS_AT_ONCE = 1 << 24  # float32 logits held at once (64 MiB)


@torch.no_grad()
def window_losses(
    source: BlockSource, ids: Tensor, reporter: Reporter, title: str, *, lead: int = 0
) -> list[float]:
    """Mean negative log-likelihood in nats of each window.

    Args:
        source: the model.
        ids: int64 [W, L]; position ``lead`` of each window and those before are context only.
        reporter: progress.
        title: shown with it.
        lead: see ``ids``.

    Raises:
        WorkError: a loss is not finite.
    """
    batch = max(1, TOKENS_AT_ONCE // ids.shape[1])
    blocks = source.shell.num_blocks
    order = reporter.track(range(blocks), title, blocks)
    hidden = source.hidden(ids, batch=batch, order=order)
    losses = [
        _window_loss(source, h, i) for h, i in zip(hidden[:, lead:], ids[:, lead:], strict=True)
    ]
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise WorkError(f"{title}: the loss is not finite; try --dtype float32")
    return losses


def _window_loss(source: BlockSource, hidden: Tensor, ids: Tensor) -> float:
    """Loss of one window: hidden [L, D] after the last block, ids [L]."""
    vocabulary = int(source.shell.config.vocab_size)
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    total = torch.zeros((), dtype=torch.float64)
    last = hidden.shape[0] - 1
    for start in range(0, last, chunk):
        stop = min(last, start + chunk)
        logits = source.shell.logits(hidden[None, start:stop])[0].float()
        total += (
            F.cross_entropy(logits, ids[start + 1 : stop + 1].to(logits.device), reduction="sum")
            .double()
            .cpu()
        )
    return float(total / last)
