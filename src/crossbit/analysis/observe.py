"""Kernels, outliers and calibration of every layer input, from the original activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossbit.activations.kernel import KernelCounts, KernelSetting, KernelStats, RatioHistogram
from crossbit.activations.outliers import OutlierStats
from crossbit.analysis.inputs import LayerInput


@dataclass(frozen=True)
class Calibrated:
    """What calibration knows about one input; None where no token reached it.

    Attributes:
        columns: largest magnitude of each channel, float32 [K].
        ratios: distribution of |x_ij| / t_i, for the thresholds of the removal experiment.
    """

    columns: Tensor | None
    ratios: RatioHistogram | None


def kernel_settings(bits: Sequence[int], alphas: Sequence[float]) -> list[KernelSetting]:
    """Every quantizer whose kernel is counted: per token, and CrossQuant plain and rescaled."""
    exponents = sorted({*map(float, alphas), 1.0})
    return [
        KernelSetting(width, alpha, rescaled)
        for width in sorted(set(bits), reverse=True)
        for alpha in exponents
        for rescaled in ((False,) if alpha == 1 else (False, True))
    ]


class Observer:
    """Takes in sequences, one at a time, since the paper's column maxima are those of a sequence.

    Args:
        settings: quantizers whose kernel is counted.
    """

    def __init__(self, settings: Sequence[KernelSetting]) -> None:
        self._kernel = KernelStats(settings)
        self._outliers = OutlierStats()
        self._inputs: dict[str, LayerInput] = {}
        self._ratios: dict[str, RatioHistogram] = {}

    def take(self, point: LayerInput, x: Tensor) -> None:
        """Count one sequence's input [1, T, K] (an expert's: its routed tokens [T, K])."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        self._inputs.setdefault(point.name, point)
        self._kernel.update(point.name, rows)
        self._outliers.update(point.name, rows)
        self._ratios.setdefault(point.name, RatioHistogram()).update(rows)

    def calibrated(self, inputs: Sequence[LayerInput]) -> dict[str, Calibrated]:
        """By input name; drops the histograms of ``inputs``, which are read once.

        Column maxima are shared by the inputs of a group: experts read the same tensor.
        """
        shared: dict[str, Tensor] = {}
        for point in inputs:
            if point.name in self._inputs:
                columns = self._outliers.channel_absmax(point.name)
                known = shared.get(point.group)
                shared[point.group] = columns if known is None else torch.maximum(known, columns)
        return {
            p.name: Calibrated(shared.get(p.group), self._ratios.pop(p.name, None)) for p in inputs
        }

    def kernel(self) -> dict[str, Any]:
        """The ``kernel`` part of the analysis."""
        counts = self._kernel.layers
        roles = {name: point.role for name, point in self._inputs.items()}
        return {
            "columns": "each sequence's own (dynamic)",
            "divisors": {str(s.bits): 2 ** (s.bits - 1) - 1 for s in self._kernel.settings},
            "layers": [
                {
                    "name": name,
                    "role": roles[name],
                    "block": self._inputs[name].block,
                    "layers": self._inputs[name].full_names,
                    **counts[name].as_dict(),
                }
                for name in self._inputs
            ],
            "types": {r: c.as_dict() for r, c in self._kernel.by_type(roles).items()},
            "model": self._kernel.total().as_dict(),
            "model_by_layer": self._by_layer(counts).as_dict(),
        }

    def _by_layer(self, counts: Mapping[str, KernelCounts]) -> KernelCounts:
        """An input that three layers read counts three times."""
        merged = KernelCounts(self._kernel.settings)
        for name, point in self._inputs.items():
            for _ in point.layers:
                merged.add(counts[name])
        return merged

    def outliers(self) -> list[dict[str, Any]]:
        """The ``outliers`` part of the analysis."""
        rows = []
        for name, point in self._inputs.items():
            summary = dataclasses.asdict(self._outliers.summary(name))
            summary["top_channels"] = [list(pair) for pair in summary["top_channels"]]
            positions = summary["massive_positions"]
            summary["massive_positions"] = {str(k): n for k, n in positions.items()}
            if point.expert:  # its rows are routed tokens: their places in the text are not known
                summary |= {"ratio_without_first": None, "massive_positions": {}}
            rows.append({"name": name, "role": point.role, "block": point.block, **summary})
        return rows
