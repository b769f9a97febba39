"""The accuracy table: which modes are run, and their rows.

All of them are fake quantization with unfolded column factors. CrossQuant's folded mode is an
ordinary per-token W8A8 model that ``crossbit quantize`` writes; its rows come from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crossbit.activations.grid import ActivationGrid, ActivationKind
from crossbit.analysis.streams import INT8_NAME, Change, Quantize, Tally
from crossbit.evaluation.run import estimate
from crossbit.evaluation.statistics import paired_loss, perplexity

_MODES: tuple[tuple[str, ActivationKind, bool, bool], ...] = (
    # name, kind, causal, deployable
    ("per token", "per_token", True, True),
    ("CrossQuant {alpha:g} dynamic", "cross_dynamic", False, False),
    ("CrossQuant {alpha:g} static, clipping", "cross_static_clip", True, False),
    ("CrossQuant {alpha:g} static, rescaled", "cross_static", True, False),
)


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Attributes:
        name: as shown.
        kind: kind of the activation grid, "none" for untouched activations.
        int8: weights in INT8, else as they are.
        grid: of the activations, or None.
        causal: no position depends on a later one.
        deployable: a plain runtime executes this very scheme.
    """

    name: str
    kind: str
    int8: bool
    grid: ActivationGrid | None
    causal: bool
    deployable: bool

    @property
    def change(self) -> Change | None:
        """What it does to the inputs of linear layers."""
        return None if self.grid is None else Quantize(self.grid)

    def row(
        self, losses: Sequence[float], original: Sequence[float], tally: Tally
    ) -> dict[str, Any]:
        """Perplexity, kernel and the paired loss against the original, as JSON values."""
        value = estimate(perplexity(losses), "perplexity")
        loss = estimate(paired_loss(losses, original), "loss")
        return {
            "name": self.name,
            "mode": self.kind,
            "bits": None if self.grid is None else self.grid.bits,
            "alpha": None if self.grid is None else self.grid.alpha,
            "divisor": None if self.grid is None else self.grid.effective_divisor,
            "weights": INT8_NAME if self.int8 else "original",
            "execution": "fake-quant" if self.int8 or self.grid else "float",
            "causal": self.causal,
            "deployable": self.deployable,
            "kernel": tally.kernel,
            **value,
            "loss": loss["loss"],
            "loss_stderr": loss["stderr"],
            "losses": list(losses),
        }


ORIGINAL = Mode("original", "none", False, None, True, True)
WEIGHTS_ONLY = Mode("W8, activations as they are, fake-quant", "none", True, None, True, True)


def accuracy_modes(bits: Sequence[int], alpha: float, *, int8: bool) -> list[Mode]:
    """The quantized rows, by width; the divisor is the paper's, 2^(bits-1) - 1."""
    modes = []
    for width in bits:
        for name, kind, causal, deployable in _MODES:
            grid = ActivationGrid(
                bits=width,
                kind=kind,
                divisor=2 ** (width - 1) - 1,
                alpha=1.0 if kind == "per_token" else alpha,
            )
            label = f"{'W8' if int8 else ''}A{width} {name.format(alpha=alpha)}, fake-quant"
            modes.append(Mode(label, kind, int8, grid, causal, deployable))
    return modes
