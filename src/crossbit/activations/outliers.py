"""Outliers of activations: channels that stand out, and massive tokens.

Activations come as whole sequences [tokens, channels]; memory does not grow with their number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from crossbit.activations.kernel import checked_columns, column_absmax, row_absmax, row_blocks
from crossbit.errors import WorkError


@dataclass
class _Moments:
    """Central moments of a stream, merged pairwise in fp64 (Pebay 2008, eq. 1.2-1.5)."""

    n: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    def add(self, x: Tensor) -> None:
        n, values = float(x.numel()), x.double()
        mean = float(values.mean())
        d = values - mean
        d2 = d * d
        m2, m3, m4 = float(d2.sum()), float((d2 * d).sum()), float((d2 * d2).sum())
        a, b, total, gap = self.n, n, self.n + n, mean - self.mean
        self.m4 += (
            m4
            + gap**4 * a * b * (a * a - a * b + b * b) / total**3
            + 6 * gap**2 * (a * a * m2 + b * b * self.m2) / total**2
            + 4 * gap * (a * m3 - b * self.m3) / total
        )
        self.m3 += (
            m3 + gap**3 * a * b * (a - b) / total**2 + 3 * gap * (a * m2 - b * self.m2) / total
        )
        self.m2 += m2 + gap**2 * a * b / total
        self.mean += gap * b / total
        self.n = total

    def kurtosis(self) -> float | None:
        return self.n * self.m4 / self.m2**2 if self.m2 > 0 else None


@dataclass
class OutlierSummary:
    """Outliers of one layer's input.

    Attributes:
        tokens: rows seen.
        absmax: largest magnitude.
        median: median over channels of the channels' largest magnitudes.
        ratio: absmax / median, over all rows; None where the median is 0.
        ratio_without_first: the same without each sequence's first token.
        ratio_without_massive: the same without massive tokens.
        kurtosis: Pearson's, over all elements (3 for a normal distribution).
        top_channels: the largest channels, (index, largest magnitude), largest first.
        massive_positions: position in the sequence -> number of massive tokens there.
    """

    tokens: int
    absmax: float
    median: float
    ratio: float | None
    ratio_without_first: float | None
    ratio_without_massive: float | None
    kurtosis: float | None
    top_channels: list[tuple[int, float]]
    massive_positions: dict[int, int]


class _LayerOutliers:
    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self.every, self.no_first, self.no_massive = (torch.zeros(channels) for _ in range(3))
        self.moments = _Moments()
        self.massive: Counter[int] = Counter()


class OutlierStats:
    """Outlier channels and massive tokens of each layer's input, from a stream of sequences.

    A token is massive when its row maximum exceeds ``massive_factor`` times the median row
    maximum of its sequence. Memory: three vectors [C] a layer and one counter a position.
    """

    def __init__(self, massive_factor: float = 64.0) -> None:
        self._factor = massive_factor
        self._layers: dict[str, _LayerOutliers] = {}

    def update(self, layer: str, x: Tensor) -> None:
        """Add one whole sequence ``x [T, C]``; row 0 is its first token.

        Raises:
            WorkError: ``x`` is not [T, C], its width changed, or it holds NaN or infinity.
        """
        if x.ndim == 2 and x.shape[0] == 0:
            return
        columns = checked_columns(x, None).cpu()
        state = self._layers.setdefault(layer, _LayerOutliers(x.shape[1]))
        if columns.shape != state.every.shape:
            raise WorkError(f"{layer}: {len(columns)} channels after {len(state.every)}")
        if not bool(columns.isfinite().all()):
            raise WorkError(f"{layer}: activations hold NaN or infinity; check the model's dtype")
        tops = row_absmax(x).flatten()
        massive = tops > self._factor * tops.quantile(0.5)
        state.tokens += x.shape[0]
        state.massive.update(torch.nonzero(massive).flatten().tolist())
        state.every = torch.maximum(state.every, columns)
        if x.shape[0] > 1:
            state.no_first = torch.maximum(state.no_first, column_absmax(x[1:]).cpu())
        if bool((~massive).any()):
            usual = column_absmax(x[~massive]).cpu() if bool(massive.any()) else columns
            state.no_massive = torch.maximum(state.no_massive, usual)
        for rows in row_blocks(x):
            state.moments.add(rows)

    def channel_absmax(self, layer: str) -> Tensor:
        """Largest magnitude of each channel over all rows: fp32 [C]."""
        return self._layers[layer].every.clone()

    def summary(self, layer: str) -> OutlierSummary:
        """The figures of one layer seen before; KeyError otherwise."""
        state = self._layers[layer]
        top = state.every.topk(min(5, len(state.every)))
        return OutlierSummary(
            tokens=state.tokens,
            absmax=float(state.every.max()),
            median=float(state.every.quantile(0.5)),
            ratio=_ratio(state.every),
            ratio_without_first=_ratio(state.no_first),
            ratio_without_massive=_ratio(state.no_massive),
            kurtosis=state.moments.kurtosis(),
            top_channels=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            massive_positions=dict(sorted(state.massive.items())),
        )

    def layers(self) -> list[str]:
        """Names of the layers seen, in order of first appearance."""
        return list(self._layers)


def _ratio(columns: Tensor) -> float | None:
    median = float(columns.quantile(0.5))
    return float(columns.max()) / median if median > 0 else None
