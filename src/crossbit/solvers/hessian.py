"""Second moments of a layer's inputs, and what the weight solvers need from them.

The output error of a linear layer y = W x over tokens x is a quadratic form of the weight error,

    mean over tokens of || (W - What) x ||^2 = trace((W - What) H (W - What)^T),  H = mean(x x^T)

so every search over weights needs only H [K, K], never the activations themselves.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.products import bf16_products, fast_products, has_exact_bf16_products

Damping = Literal["diagonal", "mean"]

# Tokens a product and column bands of the symmetric product, chosen by measurement: large enough
# to run at full speed, small enough that the float32 copy of a chunk stays small.
_CHUNK = 2048
_BANDS = 3
_MIN_BAND = 128


def _takes_bf16(original: Tensor, x: Tensor) -> bool:
    """Whether bfloat16 products of ``x``, the float32 copy of ``original``, are exact and fast."""
    if x.device.type != "cpu" or not has_exact_bf16_products():
        return False
    return original.dtype == torch.bfloat16 or torch.equal(x.to(torch.bfloat16).float(), x)


class HessianAccumulator:
    """Accumulates H = sum of x x^T over tokens, in float32.

    Inputs whose values are all bfloat16 numbers (whatever their dtype) take the bfloat16
    instructions where the machine has them: products are exact, sums are float32. Any other
    input takes plain float32 products. Only the blocks on and above the diagonal are computed.

    Args:
        columns: number K of input channels.
        device: where the sum lives.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        if columns < 1:
            raise InputError(f"columns: {columns} is not a positive number")
        self.columns = columns
        #: Upper triangle of the sum, float32 [K, K]; what lies below is not meaningful.
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        #: Number of tokens seen.
        self.count = 0
        self._finished = False

    def add(self, x: Tensor) -> None:
        """Adds tokens x [..., K] of any floating-point dtype; leading dimensions are flattened.

        Raises:
            InputError: the last dimension is not K.
        """
        if x.shape[-1] != self.columns:
            raise InputError(f"expected {self.columns} input channels, got {x.shape[-1]}")
        assert not self._finished
        tokens = x.detach().reshape(-1, self.columns)
        for chunk in torch.split(tokens, _CHUNK):
            self._add_chunk(chunk)
        self.count += tokens.shape[0]

    def _add_chunk(self, chunk: Tensor) -> None:
        x = chunk.to(device=self.sum.device, dtype=torch.float32)
        with bf16_products() if _takes_bf16(chunk, x) else fast_products(x.device):
            self._multiply(x)

    def _multiply(self, x: Tensor) -> None:
        band = max(_MIN_BAND, math.ceil(self.columns / _BANDS))
        for start in range(0, self.columns, band):
            stop = min(start + band, self.columns)
            self.sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def finish(self) -> Tensor:
        """The mean H = sum / count, float32 [K, K], exactly symmetric, in the sum's own memory.

        Nothing can be added any more.

        Raises:
            WorkError: no token was added, or the sum is not finite.
        """
        if self.count == 0:
            raise WorkError("no calibration token reached this layer: use more or other text")
        # In place and in bands: the matrices of wide layers are what memory goes into here.
        for start in range(0, self.columns, _MIN_BAND):
            stop = min(start + _MIN_BAND, self.columns)
            corner = torch.triu(self.sum[start:stop, start:stop])
            self.sum[start:stop, start:stop] = corner + torch.triu(corner, 1).T
            self.sum[stop:, start:stop] = self.sum[start:stop, stop:].T
        if not _is_finite(self.sum):
            raise WorkError("calibration activations are not finite: check the model's weights")
        self._finished = True
        return self.sum.div_(self.count)


def _is_finite(matrix: Tensor) -> bool:
    """Whether every element is finite; a float64 sum of finite float32 values cannot overflow."""
    return math.isfinite(float(matrix.sum(dtype=torch.float64)))


def row_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Output error of every row: mean over tokens of ((w - what) . x)^2.

    Args:
        weight: [N, K] float.
        approximation: [N, K] float.
        hessian: mean H [K, K].

    Returns:
        float32 [N], never negative.
    """
    difference = weight.float() - approximation.float()
    return (difference @ hessian.float()).mul_(difference).sum(-1).clamp_(min=0.0)


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """trace((W - What) H (W - What)^T): the squared output error of a mean token, all rows."""
    return float(row_error(weight, approximation, hessian).double().sum())


def condition(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric float32 copy of H whose dead columns are decoupled, and which those are.

    A column that no token activates (H_jj <= 0) says nothing about its weights: it gets a small
    diagonal of its own and no coupling, so a solver rounds it to nearest.

    Args:
        hessian: [K, K] float.

    Returns:
        H float32 [K, K] with a positive diagonal, and the dead columns' indices int64.

    Raises:
        InputError: H is not square.
        WorkError: H has a NaN or an infinity.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise InputError(f"the Hessian must be square, got {list(hessian.shape)}")
    work = hessian.to(torch.float32)
    if not _is_finite(work):
        raise WorkError("the Hessian is not finite: check the model's weights and activations")
    work = (work + work.T).mul_(0.5)
    diagonal = torch.diagonal(work)
    dead = (diagonal <= 0).nonzero().flatten()
    if dead.numel():
        live = diagonal[diagonal > 0]
        work[dead, :] = 0.0
        work[:, dead] = 0.0
        work[dead, dead] = 1e-3 * float(live.mean()) if live.numel() else 1.0
    return work, dead


def damped(hessian: Tensor, damp: float, damping: Damping) -> Tensor:
    """H with ``damp`` times its own diagonal ("diagonal") or its mean diagonal ("mean") added.

    "mean" is the rule of GPTQ; a few outlier channels inflate the mean, and then it drowns the
    correlations of all the others. "diagonal" (Levenberg-Marquardt) does not depend on the scale
    of any channel.
    """
    return _damp(hessian.clone(), damp, damping)


def _damp(hessian: Tensor, damp: float, damping: Damping) -> Tensor:
    """``damped`` in place."""
    diagonal = torch.diagonal(hessian)
    extra = diagonal * damp if damping == "diagonal" else diagonal.mean() * damp
    diagonal.add_(extra)
    return hessian


def inverse_factor(
    hessian: Tensor, damp: float, damping: Damping, order: Tensor | None = None
) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping)^-1; never fails on a finite H.

    With J the reversal of the order, J H J = L L^T gives U = J L^-1 J: one Cholesky factorisation
    and one triangular inverse instead of the usual two factorisations and a full inverse.

    Args:
        hessian: float32 [K, K], symmetric with a positive diagonal (``condition``).
        damp: first damping tried, >= 0; it grows tenfold until the factorisation succeeds.
        damping: see ``damped``.
        order: of rows and columns, int64 [K]; None is their own.

    Returns:
        U float32 [K, K], and the damping used: infinity when only the diagonal was kept, which
        makes a solver round to nearest.
    """
    columns = hessian.shape[0]
    if order is None:
        order = torch.arange(columns, device=hessian.device)
    backwards = order.flip(0)
    tried = damp
    for _ in range(8):
        lower, info = torch.linalg.cholesky_ex(
            _damp(hessian[backwards[:, None], backwards], tried, damping)
        )
        if int(info) == 0:
            # In the memory layout of LAPACK, so that the solution takes the identity's place.
            inverse = torch.eye(columns, dtype=hessian.dtype, device=hessian.device).T
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            if _is_finite(inverse):
                return inverse.flip(0, 1), tried
        tried = max(tried * 10.0, 1e-4)
    return torch.diag(torch.diagonal(hessian)[order].rsqrt()), math.inf
