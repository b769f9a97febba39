"""The divergence between logits, as a loss of what leaves the last block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossbit.models.shell import Shell
from crossbit.objective import logit_kl

TOKENS = 512  # through the head at once: the logits of a batch would dwarf a block


class _ThroughHead(torch.autograd.Function):
    """Mean KL of logits; its gradient is made along with it, some tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, target: Tensor, shell: Shell, temperature: float
    ) -> Tensor:
        """The loss float32; see ``hidden_logit_kl``."""
        wants = ctx.needs_input_grad[0]
        gradient = torch.empty_like(output) if wants else None
        total, tokens = 0.0, output.shape[0] * output.shape[1]
        for row in range(output.shape[0]):
            for start in range(0, output.shape[1], TOKENS):
                part = (slice(row, row + 1), slice(start, start + TOKENS))
                hidden = output[part].detach().requires_grad_(wants)
                with torch.no_grad():
                    wanted = shell.logits(target[part])
                with torch.set_grad_enabled(wants):
                    share = hidden.shape[1] / tokens
                    loss = logit_kl(shell.logits(hidden), wanted, temperature) * share
                if gradient is not None:
                    loss.backward()  # type: ignore[no-untyped-call]
                    assert hidden.grad is not None
                    gradient[part] = hidden.grad
                total += float(loss.detach())
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.tensor(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Scales what was made in the forward pass."""
        (own,) = ctx.saved_tensors
        return own * gradient.to(own.dtype), None, None, None


def hidden_logit_kl(
    shell: Shell, output: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean over tokens of KL(softmax of target's logits || softmax of output's), float32 scalar.

    Args:
        shell: final norm and head loaded.
        output: hidden states after the last block [B, L, D]; gradients flow to them.
        target: the same of the original model.
        temperature: of both softmaxes.
    """
    found: Tensor = _ThroughHead.apply(  # type: ignore[no-untyped-call]
        output, target, shell, temperature
    )
    return found
