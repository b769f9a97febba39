"""What the page of ``crossbit analyze`` shows, from the analysis' JSON.

Keys read, all optional:

- ``model``, ``calibration``: as in crossbit.json.
- ``kernel``: ``{"layers": [{"name", "role", "block", ...}], "types": {role: {...}}, "model":
  {...}, "columns": where column maxima came from}``, where ``...`` is
  `crossbit.activations.kernel.KernelCounts.as_dict`.
- ``modes``: rows ``{"name", "bits", "causal", "deployable", "kernel", "perplexity", "stderr",
  "loss", "loss_stderr"}``; ``evaluation``: the conditions, as in crossbit.json.
- ``remove_kernel``: ``{"points": [{"proportion", "perplexity", "stderr", "loss"}], "original":
  {"perplexity", "stderr"}, "threshold", "tolerance", "weights"}``; proportions and losses are
  fractions, ``threshold`` None where the tolerance was never passed.
- ``outliers``: rows ``{"name", "role", "block"}`` with the fields of
  `crossbit.activations.outliers.OutlierSummary`.
- ``warnings``: lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from crossbit.report import plots, values
from crossbit.report.values import Result, finite, get, mapping, rows, text

Setting = tuple[int, float, bool]
Shown = tuple[str, Markup, str]


def analysis_view(result: Result) -> dict[str, Any]:
    """Everything the template needs."""
    layers = rows(result, "kernel.layers")
    model = mapping(result, "kernel.model")
    settings = list(_proportions(model)) or _settings_of(layers)
    settings.sort(key=lambda s: (-s[0], s[2], s[1]))
    principal = [s for width in _widths(settings) for s in _principal(settings, width)]
    types = _types(result)
    return {
        "title": text(result, "model.name") or "Model",
        "version": text(result, "crossbit"),
        "calibration": _windows(result),
        "tiles": _tiles(result),
        "warnings": values.lines(result, "warnings"),
        "types": [name for name, _ in types],
        "kernel": [
            (_label(s), [_proportions(c).get(s, (None, None))[0] for _, c in types])
            for s in settings
        ],
        "zeros": [finite(c, "zeros") for _, c in types],
        "columns": [_label(s) for s in principal],
        "layers": [
            (
                text(r, "name") or "?",
                text(r, "role"),
                text(r, "block"),
                [_proportions(r).get(s, (None, None))[0] for s in principal],
            )
            for r in layers
        ],
        "modes": rows(result, "modes"),
        "conditions": _conditions(result),
        "removal": rows(result, "remove_kernel.points"),
        "removal_weights": text(result, "remove_kernel.weights"),
        "kernel_plots": _kernel_plots(result, settings),
        "removal_plots": _removal_plot(result),
        "outlier_plots": _outlier_plot(result),
        "outliers": rows(result, "outliers"),
        "positions": _positions(result),
    }


def _proportions(counts: Result) -> dict[Setting, tuple[float, float | None]]:
    """(bits, alpha, rescaled) -> (proportion, proportion of the non-zero elements)."""
    found = {}
    for row in rows(counts, "kernel"):
        bits, alpha, share = finite(row, "bits"), finite(row, "alpha"), finite(row, "proportion")
        if bits is not None and alpha is not None and share is not None:
            key = (round(bits), alpha, get(row, "rescaled") is True)
            found[key] = (share, finite(row, "proportion_nonzero"))
    return found


def _settings_of(layers: Sequence[Result]) -> list[Setting]:
    return list(dict.fromkeys(s for r in layers for s in _proportions(r)))


def _label(setting: Setting, *, bits: bool = True) -> str:
    width, alpha, rescaled = setting
    name = "per token" if alpha == 1 else f"CrossQuant {alpha:g}" + (", folded" if rescaled else "")
    return f"A{width} {name}" if bits else name


def _widths(settings: Sequence[Setting]) -> list[int]:
    return sorted({s[0] for s in settings}, reverse=True)


def _principal(settings: Sequence[Setting], width: int) -> list[Setting]:
    """At one width: per token, the paper's CrossQuant and its folded form, as far as counted."""
    mine = [s for s in settings if s[0] == width]
    pair = _headline_pair(mine)
    if pair is None:
        return mine[:3]
    folded = (width, pair[1][1], True)
    return [*pair, *([folded] if folded in mine else [])]


def _headline_pair(settings: Sequence[Setting]) -> tuple[Setting, Setting] | None:
    """Per token, and the paper's CrossQuant (or the nearest counted), at the largest width."""
    for width in _widths(settings):
        plain = [s for s in settings if s[0] == width and s[1] == 1]
        cross = [s for s in settings if s[0] == width and s[1] != 1 and not s[2]]
        if plain and cross:
            return plain[0], min(cross, key=lambda s: abs(s[1] - 0.15))
    return None


def _tiles(result: Result) -> list[dict[str, str]]:
    model = mapping(result, "kernel.model")
    found = _proportions(model)
    pair = _headline_pair(list(found))
    tiles = []
    if pair is not None:
        for setting in pair:
            share, nonzero = found[setting]
            note = "of activation elements are rounded to zero"
            if nonzero is not None:
                note += f"; {values.percent(nonzero)} of those not zero before"
            tiles.append(_tile(_label(setting), values.percent(share), note))
    below = finite(model, "column_below_row")
    if below is not None:
        note = "elements where CrossQuant's step is the finer one: column maximum < row maximum"
        tiles.append(_tile("Finer step", values.percent(below, 1), note))
    if rows(result, "remove_kernel.points"):
        tolerance, threshold = (
            finite(result, f"remove_kernel.{k}") for k in ("tolerance", "threshold")
        )
        limit = f"{100 * tolerance:g} %" if tolerance is not None else "the tolerance"
        if threshold is not None:
            note = f"of elements can go before perplexity rises by {limit}"
            tiles.append(_tile("Removal threshold", values.percent(threshold, 1), note))
        else:
            tiles.append(_tile("Removal threshold", "not reached", f"loss stayed within {limit}"))
    return tiles


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "tone": "neutral"}


def _windows(result: Result) -> str | None:
    name = text(result, "calibration.name")
    samples, length = finite(result, "calibration.samples"), finite(result, "calibration.length")
    if name is None:
        return None
    return name + (f", {samples:.0f} windows of {length:.0f} tokens" if samples and length else "")


def _types(result: Result) -> list[tuple[str, Result]]:
    """Counts of each layer type, the whole model's last."""
    types = mapping(result, "kernel.types")
    found = [(str(name), mapping(types, str(name))) for name in types]
    model = mapping(result, "kernel.model")
    return [*found, ("whole model", model)] if model else found


def _kernel_plots(result: Result, settings: Sequence[Setting]) -> list[Shown]:
    layers, model = rows(result, "kernel.layers"), mapping(result, "kernel.model")
    columns = text(result, "kernel.columns") or "each window's own"
    shown: list[Shown] = []
    for width in _widths(settings):
        series = {str(s): _label(s, bits=False) for s in _principal(settings, width)}
        data = [
            {"role": text(r, "role"), "block": round(finite(r, "block") or 0)}
            | {str(s): p[0] for s, p in _proportions(r).items()}
            for r in layers
            if text(r, "role") and finite(r, "block") is not None
        ]
        if data:
            caption = f"One panel a layer type. Exact zeros count. Column maxima: {columns}."
            heading = f"Kernel by layer, {width}-bit activations"
            shown.append((heading, Markup(plots.kernel_by_layer(data, series)), caption))
    sweep: dict[str, list[tuple[float, float]]] = {}
    for (bits, alpha, rescaled), (share, _) in _proportions(model).items():
        sweep.setdefault(f"{bits} bits" + (", folded" if rescaled else ""), []).append(
            (alpha, share)
        )
    sweep = {k: v for k, v in sweep.items() if len(v) > 2}
    if sweep:
        caption = "Whole model, weighted by elements. alpha = 1 is the per-token quantizer."
        svg = Markup(plots.kernel_over_alpha(sweep))
        shown.append(("Kernel over alpha", svg, caption))
    return shown


def _removal_plot(result: Result) -> list[Shown]:
    points = [
        p
        for p in rows(result, "remove_kernel.points")
        if finite(p, "proportion") is not None and finite(p, "perplexity") is not None
    ]
    if not points:
        return []
    found = _proportions(mapping(result, "kernel.model"))
    pair = _headline_pair(list(found))
    svg = plots.remove_kernel_curve(
        [{k: finite(p, k) for k in ("proportion", "perplexity", "stderr")} for p in points],
        original=finite(result, "remove_kernel.original.perplexity"),
        threshold=finite(result, "remove_kernel.threshold"),
        tolerance=finite(result, "remove_kernel.tolerance"),
        marks={_label(s): found[s][0] for s in pair} if pair else None,
    )
    caption = (
        "Nothing is quantized but what is said above: the smallest elements of every linear "
        "layer's input are set to zero, chosen as per-token quantization with a wider zero bound "
        "would round them. Bars: one standard error over windows."
    )
    return [("Perplexity as the kernel is removed", Markup(svg), caption)]


def _outlier_plot(result: Result) -> list[Shown]:
    data = [
        {"block": round(finite(r, "block") or 0)}
        | {k: finite(r, k) for k in ("ratio", "ratio_without_massive")}
        for r in rows(result, "outliers")
        if finite(r, "block") is not None and finite(r, "ratio") is not None
    ]
    if not data:
        return []
    caption = (
        "One mark a layer: the largest channel maximum over the median one. A massive token is "
        "one whose largest element exceeds 64 times the median over its sequence."
    )
    svg = Markup(plots.outlier_ratios(data))
    return [("Outlier channels", svg, caption)]


def _positions(result: Result) -> list[tuple[int, int]]:
    """(position in the sequence, layers with a massive token there), most layers first."""
    seen: dict[int, int] = {}
    for row in rows(result, "outliers"):
        for position in mapping(row, "massive_positions"):
            if str(position).isdigit():
                seen[int(position)] = seen.get(int(position), 0) + 1
    return sorted(seen.items(), key=lambda p: (-p[1], p[0]))[:8]


def _conditions(result: Result) -> str:
    """Text, windows, length and arithmetic of the perplexities, in one line."""
    found = mapping(result, "evaluation")
    windows, length = finite(found, "windows"), finite(found, "length")
    parts = [text(found, "text")]
    if windows is not None and length is not None:
        parts.append(f"{windows:.0f} windows of {length:.0f} tokens")
    parts.append(text(found, "dtype"))
    return ", ".join(p for p in parts if p)
