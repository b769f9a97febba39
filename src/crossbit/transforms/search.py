"""The error that every scale search minimises: the layer's output after real rounding.

For candidate column factors f of a group of linear layers with a common input X [S, K]:

    error(f) = sum over layers ||X W^T - Q_x(X / f) Q_w(W f)^T||^2 / ||X W^T||^2

with the weights on the exported grid. This is what a deployed model pays, migration included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.quantize import fake_quantize_activation
from crossbit.grid import Grid, dequantize, fit_minmax, quantize
from crossbit.products import fast_products


@dataclass(frozen=True)
class FoldProblem:
    """One group of linear layers whose common input may be rescaled per column.

    Attributes:
        weights: float32 [N_l, K] of each layer, current folds applied.
        grids: the weight grid of each layer; None for a layer that stays in float.
        activations: the grid of the common input, or None (weight-only).
        column_maximum: c_j float32 [K] over the fitting sequences.
        column_mean: mean |X_j| float32 [K].
        sample: held-out activations [S, K] float32.
        fitting: activations [T, K] of fitting tokens, or None if none were kept.
        shared: index [K] of the factor that channel j must use (grouped heads share a value row),
            or None when every channel has its own.
    """

    weights: Sequence[Tensor]
    grids: Sequence[Grid | None]
    activations: ActivationGrid | None
    column_maximum: Tensor
    column_mean: Tensor
    sample: Tensor
    shared: Tensor | None = None
    fitting: Tensor | None = None

    def tie(self, factor: Tensor) -> Tensor:
        """Make channels that share a source row agree: each takes the group's largest factor."""
        if self.shared is None:
            return factor
        size = int(self.shared.max()) + 1
        largest = torch.zeros(size, dtype=factor.dtype).scatter_reduce(
            0, self.shared, factor, "amax", include_self=False
        )
        return largest[self.shared]


@dataclass(frozen=True)
class FoldChoice:
    """A column factor and how it was found.

    ``parameter`` is the chosen alpha, strength or ratio, ``label`` the chosen candidate's name,
    ``losses`` maps the label of each candidate to its error; ``detail`` is what else a transform
    puts on record.
    """

    factor: Tensor
    parameter: float
    label: str
    losses: dict[str, float]
    detail: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A column factor [K] to try; ``kind`` says what it is besides a power of column maxima."""

    parameter: float
    factor: Tensor
    kind: str = ""

    @property
    def label(self) -> str:
        """How reports name it."""
        return " ".join([f"{self.parameter:g}", *([self.kind] if self.kind else [])])


def round_trip(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest on the grid and back, float32 [N, K]."""
    scale, zero = fit_minmax(weight, grid)
    return dequantize(quantize(weight, scale, zero, grid), scale, zero, grid)


def output_error(problem: FoldProblem, factor: Tensor, reference: Sequence[Tensor]) -> float:
    """Relative squared output error of ``factor`` on the sample; see the module's formula.

    Args:
        problem: the group.
        factor: f [K].
        reference: X W^T [S, N_l] of each layer.
    """
    x = problem.sample / factor
    if problem.activations is not None:
        columns = problem.column_maximum / factor
        x = fake_quantize_activation(
            x,
            problem.activations,
            static_scale=columns.amax() / problem.activations.effective_divisor,
            columns=columns,
        )
    error = power = 0.0
    for weight, grid, target in zip(problem.weights, problem.grids, reference, strict=True):
        scaled = weight * factor
        rounded = scaled if grid is None else round_trip(scaled, grid)
        error += float((x @ rounded.t() - target).square().sum(dtype=torch.float64))
        power += float(target.square().sum(dtype=torch.float64))
    return error / max(power, 1e-30)


def search(problem: FoldProblem, candidates: Sequence[Candidate]) -> FoldChoice:
    """The candidate factor with the smallest output error; the earliest wins a tie."""
    tied = [problem.tie(candidate.factor) for candidate in candidates]
    # Candidates differ by far more than the products' rounding, the same for all of them.
    with fast_products(problem.sample.device):
        reference = [problem.sample @ w.t() for w in problem.weights]
        losses = [output_error(problem, factor, reference) for factor in tied]
    best = losses.index(min(losses))
    chosen = candidates[best]
    labelled = {c.label: loss for c, loss in zip(candidates, losses, strict=True)}
    return FoldChoice(tied[best], chosen.parameter, chosen.label, labelled)


def normalised(factor: Tensor) -> Tensor:
    """Scale f so that sqrt(max f * min f) = 1: the grid does not care, storage ranges do."""
    return factor / (factor.max() * factor.min()).sqrt()
