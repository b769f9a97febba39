"""What block reconstruction minimises: distances between hidden states, and between logits.

The distance is CBQ's (arXiv 2312.07950): E(t, o) = ||t - o||^2 + KL(softmax(t) || softmax(o)), the
softmax over the hidden dimension, with what the paper leaves open as options. Its homologous form
adds the distance to a second target, made from the input that the quantized window gets.

Targets are constants: only ``output`` gets a gradient. Arithmetic is float32 whatever the dtypes.
Gradients are written out rather than traced, because tracing would keep several float32 copies of
every tensor. Tokens pass in chunks: float32 exists for one of them at a time, in backward too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossbit.errors import InputError

Norm = Literal["sum", "mean", "token", "bounded"]

# Elements of a float32 chunk: 8 MiB, a few of which are alive at a time.
CHUNK_ELEMENTS = 1 << 21
# Under this fraction of the median squared length, a target has no meaningful relative error.
NEGLIGIBLE = 1e-4


def reconstruction_loss(
    output: Tensor,
    target: Tensor,
    *,
    norm: Norm = "bounded",
    kl: float = 0.0,
    temperature: float = 1.0,
    metric: Tensor | None = None,
) -> Tensor:
    """Distance of hidden states from their target, averaged over tokens.

    Args:
        output: [..., T, D], floating point; gets the gradient, in its own dtype.
        target: same shape, any floating dtype; a constant.
        norm: the squared error of a token. "sum": ||o - t||^2, as CBQ writes it. "mean": that over
            D, so the loss is the mean over all elements. "token": ||o - t||^2 / ||t||^2, so that
            the few tokens with massive activations do not decide the sum. A target (nearly) zero
            has no relative error: below 1 % of the median token's length, the median divides.
            "bounded": e / (1 + e) of that relative error e, the share that the error has in the
            token's power. It is e where e is small and never above 1: what reads a token normalises
            it, so one that is lost is lost, however far off. Without the bound a single token whose
            massive activation comes or goes outweighs thousands.
        kl: weight of KL(softmax(t / temperature) || softmax(o / temperature)) over D, times
            temperature^2, which keeps its gradient of one size when the temperature changes.
        temperature: above 0.
        metric: float32 [D, D], symmetric and positive, M of the squared error e^T M e of every
            norm; None is the identity. The size of a target is its length all the same.

    Returns:
        float32 scalar; non-finite input gives a non-finite loss. Backward needs no more than
        ``output`` and ``target`` themselves, which it keeps alive, and the gradient it returns.

    Raises:
        InputError: unknown norm, negative ``kl``, temperature not above 0.
        ValueError: shapes that differ, or no token.
    """
    if norm not in get_args(Norm):
        raise InputError(f"objective norm: {norm!r} is unknown; use {', '.join(get_args(Norm))}")
    if not kl >= 0:
        raise InputError(f"objective kl: {kl} is not a weight; use 0 (none) or a positive number")
    _check(output, target, temperature)
    loss: Tensor = _Reconstruction.apply(  # type: ignore[no-untyped-call]
        output, target.detach(), norm, kl, temperature, metric
    )
    return loss


def terms_ahead(weights: Sequence[float], left: int) -> tuple[float, ...]:
    """Weights of the look-ahead terms where only ``left`` blocks follow the window.

    Term j is the error after j more blocks (Cross-layer Learning, arXiv 2407.15508). Terms beyond
    the last block fall on it, so that no window is left without a loss; those at the end without
    a weight are dropped.

    Args:
        weights: lambda_0, lambda_1, ..., at least one above 0.
        left: 0 or more.

    Raises:
        InputError: a negative weight, or none above 0.
    """
    if not weights or min(weights) < 0 or max(weights) == 0:
        raise InputError(
            f"objective ahead: {list(weights)} has no weight above 0, or one below; "
            "[1] is the window itself, [1, 0, 1] looks two blocks ahead"
        )
    found = list(weights[: left + 1])
    found[-1] += sum(weights[left + 1 :])
    while not found[-1]:
        found.pop()
    return tuple(found)


def sequences_ahead(share: float, batch: int, step: int) -> int:
    """How many sequences of a step's batch look ahead, so that ``share`` of all of them do.

    Of a batch of one it is one at some steps and none at the others, evenly spread.

    Args:
        share: above 0, at most 1.
        batch: sequences a step.
        step: from 0.
    """
    # A share such as 0.1 is a little above or below what it says; ten times it is one.
    first, last = (math.floor(n * share * batch + 1e-6) for n in (step, step + 1))
    return last - first


def homologous(
    output: Tensor,
    target: Tensor,
    homologous_target: Tensor,
    *,
    weight: float = 1.0,
    norm: Norm = "bounded",
    kl: float = 0.0,
    temperature: float = 1.0,
    metric: Tensor | None = None,
) -> Tensor:
    """E(target) + weight * E(homologous target), E being ``reconstruction_loss``.

    Args:
        output: [..., T, D], what the quantized window makes of the quantized input.
        target: same shape, what the original window makes of the original input.
        homologous_target: same shape, what the original window makes of the quantized input.
        weight: 0 or more; 1 is CBQ's sum, at 0 ``homologous_target`` is not looked at.
        norm, kl, temperature, metric: see ``reconstruction_loss``, as for what is raised.

    Returns:
        float32 scalar.
    """
    if not weight >= 0:
        raise InputError(f"homologous weight: {weight} is not a weight; use 0 (none) or more")
    options: dict[str, Any] = {"norm": norm, "kl": kl, "temperature": temperature, "metric": metric}
    loss = reconstruction_loss(output, target, **options)
    if weight == 0:
        return loss
    return loss + weight * reconstruction_loss(output, homologous_target, **options)


def logit_kl(
    output_logits: Tensor,
    target_logits: Tensor,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher || student) over the vocabulary.

    The gradient, softmax(student) - softmax(teacher), is computed with the loss and kept in the
    dtype of ``output_logits``; neither logits nor anything float32 of their size stays alive.

    Args:
        output_logits: the student's, [..., T, V], floating point; gets the gradient.
        target_logits: the teacher's, same shape, any floating dtype; a constant.
        temperature: above 0; both logits are divided by it. The loss is not multiplied by its
            square: do that where gradients of several temperatures are to be of one size.
        chunk_tokens: tokens in float32 at a time; None means about 8 MiB of them. It changes
            memory and speed, not the result.

    Returns:
        float32 scalar, at least 0; non-finite input gives a non-finite loss.

    Raises:
        InputError: temperature not above 0.
        ValueError: shapes that differ, no token, or ``chunk_tokens`` below 1.
    """
    _check(output_logits, target_logits, temperature)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens} is not a positive number")
    # Inside the function grad mode is off, and whether a gradient is wanted can no longer be told.
    wanted = torch.is_grad_enabled() and output_logits.requires_grad
    loss: Tensor = _LogitKL.apply(  # type: ignore[no-untyped-call]
        output_logits, target_logits.detach(), temperature, chunk_tokens, wanted
    )
    return loss


class _Reconstruction(torch.autograd.Function):
    """loss = mean over tokens of w |o - t|^2 + kl T^2 KL(t || o), with a weight w a token.

    |e|^2 = e^T M e with a metric M, else ||e||^2.

    The bounded norm has the gradient of such a loss too, its weights those at the output.

    Keeps references to its inputs and w [N]; backward recomputes the rest chunk by chunk, which
    costs far less than the window's own backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        target: Tensor,
        norm: Norm,
        kl: float,
        temperature: float,
        metric: Tensor | None,
    ) -> Tensor:
        o, t = _rows(output), _rows(target)
        error = torch.empty(len(o), dtype=torch.float32, device=o.device)
        length = torch.empty_like(error) if norm in ("token", "bounded") else None
        divergence = torch.empty_like(error) if kl else None
        for part in _chunks(o):
            o32, t32 = o[part].float(), t[part].float()
            e = o32 - t32
            error[part] = (e.square_() if metric is None else e.mul_(e @ metric)).sum(-1)
            if length is not None:
                length[part] = t32.square().sum(-1)
            if divergence is not None:
                divergence[part] = _divergence(o32, t32, temperature)[0]
        if length is not None:
            weight = _token_weight(length)
        else:
            weight = torch.full_like(error, 1.0 if norm == "sum" else 1.0 / o.shape[-1])
        relative = weight * error
        if norm == "bounded":
            weight = weight / (1 + relative).square()
            relative = relative / (1 + relative)
        loss = relative.mean()
        if divergence is not None:
            loss = loss + kl * temperature**2 * divergence.mean()
        ctx.save_for_backward(output, target, weight)
        ctx.kl, ctx.temperature, ctx.metric = kl, temperature, metric
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        output, target, weight = ctx.saved_tensors
        o, t = _rows(output), _rows(target)
        result = torch.empty_like(o)
        scale = weight * (2.0 / len(o)) * grad
        for part in _chunks(o):
            o32, t32 = o[part].float(), t[part].float()
            step = (o32 - t32).mul_(scale[part].unsqueeze(-1))
            if ctx.metric is not None:
                step = step @ ctx.metric
            if ctx.kl:
                # T^2 from the definition, 1 / T from the softmax's argument.
                pull = torch.softmax(o32 / ctx.temperature, -1)
                pull -= torch.softmax(t32 / ctx.temperature, -1)
                step += pull.mul_(ctx.kl * ctx.temperature / len(o) * grad)
            result[part] = step
        return result.view(output.shape), None, None, None, None, None


class _LogitKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        target: Tensor,
        temperature: float,
        chunk_tokens: int | None,
        wanted: bool,
    ) -> Tensor:
        o, t = _rows(output), _rows(target)
        divergence = torch.empty(len(o), dtype=torch.float32, device=o.device)
        pull = torch.empty_like(o) if wanted else None
        for part in _chunks(o, chunk_tokens):
            divergence[part], step = _divergence(o[part].float(), t[part].float(), temperature)
            if pull is not None:
                pull[part] = step
        if pull is not None:
            # Without the factor 1 / (N T): in float16 its product with a small difference is zero.
            ctx.save_for_backward(pull)
        ctx.shape, ctx.factor, ctx.chunk_tokens = output.shape, 1.0 / temperature, chunk_tokens
        return divergence.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pull,) = ctx.saved_tensors
        # Not in place: a graph that is retained runs backward again.
        result = torch.empty_like(pull)
        scale = grad * (ctx.factor / len(pull))
        for part in _chunks(pull, ctx.chunk_tokens):
            result[part] = pull[part].float() * scale
        return result.view(ctx.shape), None, None, None, None


def _token_weight(length: Tensor) -> Tensor:
    """1 / ||t||^2 from the squared lengths [N], the median's for tokens too short to have one.

    A median, since a massive token would lift a mean above every other token. The step at the
    threshold does no harm, for targets are constants.
    """
    # Reciprocals of numbers below the normal ones overflow. Where none is left, nothing divides.
    counted = torch.where(length >= torch.finfo(length.dtype).tiny, length, torch.nan)
    median = counted.nanmedian().nan_to_num(nan=1.0)
    return torch.where(length > NEGLIGIBLE * median, length, median).reciprocal()


def _divergence(output: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(target || output) [n], at least 0, of float32 logits [n, D].

    With it softmax(output) - softmax(target) [n, D], the gradient times the temperature.
    """
    p = torch.log_softmax(target / temperature, -1)
    q = torch.log_softmax(output / temperature, -1)
    terms = p - q
    p, q = p.exp_(), q.exp_()
    # A logit that both mask with -inf adds nothing; it would be 0 * NaN.
    terms.mul_(p).masked_fill_(p == 0, 0.0)
    pull = q.sub_(p)
    # The sum of q - p is 0 but for rounding of the normalisers. Adding it takes that, some 1e-7,
    # out of the terms: it would be a visible part of the KL of a nearly lossless quantization.
    return (terms.sum(-1) + pull.sum(-1)).clamp_(min=0.0), pull


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [N, D] (no copy if contiguous)."""
    return x.reshape(-1, x.shape[-1])


def _chunks(rows: Tensor, size: int | None = None) -> list[slice]:
    """Slices over the tokens of [N, D], ``size`` tokens each or as many as CHUNK_ELEMENTS hold."""
    size = size or max(1, CHUNK_ELEMENTS // rows.shape[-1])
    return [slice(i, i + size) for i in range(0, len(rows), size)]


def _check(output: Tensor, target: Tensor, temperature: float) -> None:
    # Broadcasting would make a number of shapes that have nothing to do with each other.
    if output.shape != target.shape:
        raise ValueError(f"output {list(output.shape)} and target {list(target.shape)} differ")
    if output.dim() == 0 or output.numel() == 0:
        raise ValueError(f"no token in {list(output.shape)}")
    if not 0 < temperature < float("inf"):
        raise InputError(f"objective temperature: {temperature} is not above 0; 1 is the default")
