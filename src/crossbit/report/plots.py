"""Figures as SVG text, from plain lists and dicts; the same data gives the same bytes.

Each function returns one ``<svg>`` element to be placed in a page: no fixed size, text as text,
ink as ``currentColor`` so that it follows the page's colours. Series differ in colour (Okabe and
Ito's palette, safe for colour-blind readers) and in marker. No global matplotlib state is used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

Row = Mapping[str, Any]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK = "#010203"  # replaced by currentColor; no palette has it
_GRID = "#8080804d"
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def kernel_by_layer(layers: Sequence[Row], series: Mapping[str, str]) -> str:
    """Kernel proportion over the blocks, one panel a layer type.

    Args:
        layers: rows with ``role``, ``block`` and a proportion (0 to 1) under each series' key.
        series: key in the rows -> label, such as {"per_token": "per token"}.
    """
    roles = list(dict.fromkeys(str(r["role"]) for r in layers))
    columns = min(4, max(1, len(roles)))
    lines = -(-max(1, len(roles)) // columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for panel, role in zip(axes, roles, strict=False):
            rows = sorted((r for r in layers if r["role"] == role), key=lambda r: int(r["block"]))
            for k, (key, label) in enumerate(series.items()):
                points = [(r["block"], 100 * r[key]) for r in rows if r.get(key) is not None]
                panel.plot(*_columns(points), label=label, **_look(k))
            panel.set_title(role, loc="left")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            panel.set_ylim(bottom=0)
        for panel in axes[len(roles) :]:
            panel.set_visible(False)
        for panel in axes[::columns]:
            panel.set_ylabel("rounded to zero (%)")
        for k in range(len(roles)):
            if k + columns >= len(roles):
                axes[k].set_xlabel("block")
                axes[k].tick_params(labelbottom=True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)

    title = "Share of activation elements rounded to zero, by block and layer type"
    return _svg("kernel_by_layer", title, draw, (2.6 * columns + 0.6, 2.0 * lines + 0.9))


def kernel_over_alpha(sweep: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Kernel proportion against alpha: label -> [(alpha, proportion 0 to 1)], one line each."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for k, (label, points) in enumerate(sweep.items()):
            shown = [(a, 100 * p) for a, p in sorted(points)]
            axes.plot(*_columns(shown), label=label, **_look(k))
        axes.set_xlabel("alpha (1 is per token)")
        axes.set_ylabel("rounded to zero (%)")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(bottom=0)
        _legend(figure, axes, len(sweep))

    title = "Share of activation elements rounded to zero, over alpha"
    return _svg("kernel_over_alpha", title, draw)


def remove_kernel_curve(
    points: Sequence[Row],
    *,
    original: float | None = None,
    threshold: float | None = None,
    tolerance: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Perplexity against the proportion of activation elements set to zero.

    Args:
        points: rows with ``proportion`` (0 to 1), ``perplexity`` and perhaps ``stderr``.
        original: the unchanged model's perplexity, a horizontal line.
        threshold: proportion where the loss passes ``tolerance`` (a fraction), a vertical line.
        tolerance: only for the threshold's label.
        marks: quantizer -> its kernel proportion, small marks on the horizontal axis.
    """
    rows = sorted(points, key=lambda r: float(r["proportion"]))
    values = [float(r["perplexity"]) for r in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shares = [100 * float(r["proportion"]) for r in rows]
        errors = [float(r.get("stderr") or 0) for r in rows]
        bars = errors if any(errors) else None
        axes.errorbar(shares, values, yerr=bars, capsize=2, label="elements removed", **_look(0))
        if original is not None:
            axes.axhline(original, color=_INK, lw=0.9, ls="--", label=f"original, {original:.4g}")
        if threshold is not None:
            passes = f"loss passes {100 * tolerance:g} %" if tolerance is not None else "threshold"
            label = f"{passes} at {100 * threshold:.3g} %"
            axes.axvline(100 * threshold, color=_COLOURS[1], lw=1.2, ls=":", label=label)
        for k, (label, share) in enumerate((marks or {}).items()):
            look = {**_look(k + 2), "ls": "none", "ms": 8}
            axes.plot(
                [100 * share],
                [0.02],
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                label=f"kernel of {label}, {100 * share:.3g} %",
                **look,
            )
        axes.set_xlabel("elements set to zero, smallest first (%)")
        axes.set_ylabel("perplexity")
        if values and max(values) > 4 * min(values) > 0:
            _log_axis(axes)
        _legend(figure, axes, 2, columns=2)

    return _svg("remove_kernel", "Perplexity when the smallest activations are removed", draw)


def alpha_histogram(chosen: Sequence[tuple[str, str]]) -> str:
    """How often each alpha, or a named factor, was chosen: [(layer type, choice)], stacked."""
    values = sorted({a for _, a in chosen}, key=lambda v: (not v[:1].isdigit(), v))
    roles = list(dict.fromkeys(r for r, _ in chosen))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        base = [0] * len(values)
        for k, role in enumerate(roles):
            counts = [sum(1 for r, a in chosen if r == role and a == v) for v in values]
            axes.bar(
                range(len(values)),
                counts,
                bottom=base,
                label=role,
                color=_COLOURS[k % len(_COLOURS)],
                hatch=("", "//", "..", "xx", "\\\\")[k % 5],
                edgecolor="#ffffff",
                linewidth=0.6,
            )
            base = [a + b for a, b in zip(base, counts, strict=True)]
        axes.set_xticks(range(len(values)), [v.replace(" ", "\n", 1) for v in values])
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("alpha (1 is per token)")
        axes.set_ylabel("folds")
        _legend(figure, axes, len(roles))

    return _svg("alpha_histogram", "Alpha chosen by the search", draw)


def alpha_losses(losses: Sequence[tuple[str, float]], label: str = "loss") -> str:
    """Bars of the loss at each fixed alpha and with the search: [(alpha or name, loss)]."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        fixed = [_COLOURS[0] if _is_number(n) else _COLOURS[1] for n, _ in losses]
        bars = axes.bar(range(len(losses)), [v for _, v in losses], color=fixed, width=0.6)
        axes.bar_label(bars, [f"{v:.3g}" for _, v in losses], padding=2, fontsize=9, color=_INK)
        axes.set_xticks(range(len(losses)), [n.replace(" ", "\n") for n, _ in losses])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("alpha (1 is per token)")
        axes.set_ylabel(label)
        axes.margins(y=0.15)

    return _svg("alpha_losses", "Loss at fixed alphas and with the searched ones", draw)


def block_errors(blocks: Sequence[Row]) -> str:
    """Relative error of each block's output: rows with ``block`` and ``relative_error``."""
    rows = sorted(blocks, key=lambda r: int(r["block"]))
    values = [100 * float(r["relative_error"]) for r in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([int(r["block"]) for r in rows], values, **_look(0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("relative error of the output (%)")
        if values and min(values) > 0 and max(values) > 30 * min(values):
            _log_axis(axes)
        else:
            axes.set_ylim(bottom=0)

    return _svg("block_errors", "Relative error after each block", draw)


def window_losses(windows: Sequence[Row]) -> str:
    """Held-out loss of each trained window: rows with ``window``, ``before`` and ``after``."""
    rows = sorted(windows, key=lambda r: int(r["window"]))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (key, label) in enumerate((("before", "before"), ("after", "after"))):
            points = [float(r[key]) for r in rows]
            axes.plot([int(r["window"]) for r in rows], points, label=label, **_look(number))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("window")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _svg("window_losses", "Held-out loss before and after each window's training", draw)


def outlier_ratios(layers: Sequence[Row]) -> str:
    """Largest over median channel, per layer, with and without massive tokens.

    Args:
        layers: rows with ``block``, ``ratio`` and perhaps ``ratio_without_massive`` (numbers or
            None).
    """
    series = {"ratio": "all tokens", "ratio_without_massive": "without massive tokens"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for k, (key, label) in enumerate(series.items()):
            points = [(int(r["block"]), float(r[key])) for r in layers if r.get(key) is not None]
            if points:
                look = {**_look(k), "ls": "none", "alpha": 0.75}
                axes.plot(*_columns(points), label=label, **look)
        _log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("largest / median channel")
        _legend(figure, axes, 2)

    return _svg("outlier_ratios", "Outlier channels: largest over median channel maximum", draw)


def _look(k: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[k % len(_COLOURS)],
        "marker": _MARKERS[k % len(_MARKERS)],
        "markeredgewidth": 0,
    }


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _log_axis(axes: Any) -> None:
    """A logarithmic vertical axis with plain numbers, and at least a few of them."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (
        [1.0] if high > 50 * low else [1.0, 2.0, 5.0] if high > 4 * low else [1, 1.5, 2, 3, 5, 7]
    )
    decades = range(-12, 13)
    ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    axes.set_yticks(ticks)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylim(low, high)


def _legend(figure: Figure, axes: Any, entries: int, columns: int = 4) -> None:
    """The legend above the axes, where it hides nothing; none for a single unnamed series."""
    handles, labels = axes.get_legend_handles_labels()
    if entries > 1 or len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def _svg(name: str, title: str, draw: Any, size: tuple[float, float] = (6.4, 3.4)) -> str:
    """Draw on a fresh figure and return it as an element for a page; ``name`` salts the ids."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib's style rule would apply to the whole page; the element's own style inherits.
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    # Running numbers would collide between figures of one page, and nothing refers to them.
    text = re.sub(r' id="(?!C\d)[A-Za-z][A-Za-z0-9.]*_\d{1,4}"', "", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    view = re.search(r'viewBox="([^"]*)"', text)
    box = view.group(1) if view else "0 0 460 245"
    kind = "plot wide" if size[0] > 7 else "plot"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" viewBox="{box}" '
        f'role="img" aria-label={quoteattr(title)} style="max-width: {size[0] * 96:.0f}px; '
        'font-family: system-ui, sans-serif; stroke-linejoin: round">'
    )
    return head + f"\n <title>{title}</title>" + text[text.index(">") + 1 :]
