"""The transform axis of a recipe: rewrites of the model before its weights are rounded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from crossbit.recipe_training import Strict

DEFAULT_ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)


class CrossFold(Strict):
    """CrossQuant's column factor c_j^(1-alpha), folded into the layer before."""

    kind: Literal["cross_fold"] = "cross_fold"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    weight_term: bool = True
    fit: bool = True
    percentile: float = Field(100.0, gt=50, le=100)
    skip_massive: bool = True


class Smooth(Strict):
    """SmoothQuant (arXiv 2211.10438): f_j = max|X_j|^s / max|W_j|^(1-s)."""

    kind: Literal["smooth"] = "smooth"
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5
    targets: Literal["norms", "all"] = "norms"


class AwqScale(Strict):
    """AWQ's scale search (arXiv 2306.00978): f_j = mean|X_j|^r, r searched on the output error."""

    kind: Literal["awq_scale"] = "awq_scale"
    points: int = Field(20, ge=1, le=100)
    weight_term: bool = True


class Cfp(Strict):
    """CBQ's coarse-to-fine preprocessing (arXiv 2312.07950): outliers scaled, or truncated.

    ``activations`` folds factors of outlier channels, ``weights`` truncates outlier weights; with
    ``judge`` each only where it lowers the layer's output error.
    """

    kind: Literal["cfp"] = "cfp"
    activations: bool = True
    weights: bool = True
    fence: float = Field(1.5, ge=0)
    spread: float = Field(1.0, ge=0)
    power: float = Field(0.5, ge=0, le=1)
    gap: bool = True
    per_channel: bool = False
    judge: bool = True


class Rotate(Strict):
    """Hadamard rotations (QuaRot, arXiv 2404.00456). See ``crossbit.transforms.rotation``.

    ``residual`` and ``heads`` fold into the weights. ``down`` (input of down_proj) and ``keys``
    (queries and keys, for a quantized cache) happen at run time, which only crossbit does.
    """

    kind: Literal["rotate"] = "rotate"
    residual: bool = True
    heads: bool = True
    down: bool = False
    keys: bool = False
    seed: int = Field(0, ge=0, lt=1 << 63)


class DuQuant(Strict):
    """DuQuant's rotations of layer inputs at run time. See ``crossbit.rotations.duquant``.

    Made of the calibration text block by block, after the folds.
    """

    kind: Literal["duquant"] = "duquant"
    block: int = Field(128, ge=2)
    steps: int = Field(256, ge=1)
    permute: bool = True
    shared: bool = True
    seed: int = Field(0, ge=0, lt=1 << 63)


class Let(Strict):
    """LET of OmniQuant: factors and shifts that are trained. See ``crossbit.engine.equivalent``.

    ``start`` is the strength of the SmoothQuant factors to begin with; with ``down`` the input of
    down_proj has factors too, which OmniQuant leaves out.

    ``shift`` moves inputs that are quantized, where biases take it up; OmniQuant has none either
    where inputs stay as they are. ``qk`` has factors of queries and keys where keys are quantized
    (``cache``), or a weight that makes them has one scale in all: a row with scales of its own
    that follow it (``limits: range``) rounds alike whatever its factor.
    """

    kind: Literal["let"] = "let"
    start: float = Field(0.5, ge=0, le=1)
    down: bool = False
    shift: bool = True
    qk: bool = True


Fold = CrossFold | Smooth | AwqScale | Cfp | Let
Transform = Annotated[Fold | Rotate | DuQuant, Field(discriminator="kind")]
