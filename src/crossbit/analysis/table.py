"""The analysis on a terminal: a few tables, no more than fit a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WORST = 5


def print_analysis(result: Mapping[str, Any], console: Console) -> None:
    """Print kernels by layer type, modes, the removal curve and the worst outliers."""
    console.print(_kernels(result["kernel"]))
    if result.get("modes"):
        console.print(_modes(result))
    if result.get("remove_kernel"):
        removal = result["remove_kernel"]
        console.print(_removal(removal))
        console.print(_threshold(removal), highlight=False)
    console.print(_outliers(result["outliers"]))
    for line in result.get("warnings", []):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text, the others numbers."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _kernels(kernel: Mapping[str, Any]) -> Table:
    """Rows: layer types; columns: per token and CrossQuant at the smallest alpha, each width."""
    model = kernel["model"]
    widths = sorted({k["bits"] for k in model["kernel"]}, reverse=True)
    crossed = [k["alpha"] for k in model["kernel"] if k["alpha"] != 1]
    alphas = [1.0, *([min(crossed)] if crossed else [])]
    heads = [
        f"A{b} " + ("per token" if a == 1 else f"CrossQuant {a:g}") for b in widths for a in alphas
    ]
    table = _table("Activations rounded to zero (quantization kernel)", "layer type", *heads)
    named = [*kernel["types"].items(), ("all inputs", model)]
    if "model_by_layer" in kernel:
        named.append(("all layers (q, k, v each)", kernel["model_by_layer"]))
    for name, counts in named:
        shares = {
            (k["bits"], k["alpha"]): k["proportion"] for k in counts["kernel"] if not k["rescaled"]
        }
        table.add_row(name, *(_percent(shares.get((b, a))) for b in widths for a in alphas))
    return table


def _modes(result: Mapping[str, Any]) -> Table:
    found = result.get("evaluation", {})
    conditions = ", ".join(
        str(part)
        for part in (
            found.get("text"),
            f"{found.get('windows')} x {found.get('length')} tokens",
            found.get("dtype"),
        )
        if part
    )
    table = _table(
        f"Accuracy: {conditions}",
        "activations",
        "causal",
        "kernel",
        "perplexity",
        "loss",
        left=2,
    )
    for row in result["modes"]:
        table.add_row(
            row["name"],
            "yes" if row["causal"] else "no",
            _percent(row["kernel"]),
            _spread(row["perplexity"], row["stderr"], "{:.4g}"),
            "" if row["mode"] == "none" and not row["loss"] else _loss(row),
        )
    return table


def _removal(removal: Mapping[str, Any]) -> Table:
    table = _table("Kernel removed, weights in INT8", "set to zero", "perplexity", "loss", left=0)
    for point in removal["points"]:
        perplexity = _spread(point["perplexity"], point["stderr"], "{:.4g}")
        table.add_row(_percent(point["proportion"]), perplexity, _loss(point))
    return table


def _threshold(removal: Mapping[str, Any]) -> str:
    limit = f"{100 * removal['tolerance']:g} %"
    if removal["threshold"] is None:
        return f"The loss stays within {limit}."
    return f"The loss passes {limit} at {_percent(removal['threshold'])} of the elements."


def _outliers(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        f"Worst outliers of {len(rows)} inputs: largest channel maximum / median one",
        "input",
        "ratio",
        "without massive tokens",
        "largest",
        "kurtosis",
    )
    known = [r for r in rows if r["ratio"] is not None]
    for row in sorted(known, key=lambda r: -float(r["ratio"]))[:_WORST]:
        numbers = (row[k] for k in ("ratio", "ratio_without_massive", "absmax", "kurtosis"))
        table.add_row(row["name"], *("" if n is None else f"{n:.4g}" for n in numbers))
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _spread(value: float, stderr: float | None, pattern: str) -> str:
    shown = pattern.format(value)
    return shown if stderr is None else f"{shown} ± {stderr:.2g}"


def _loss(row: Mapping[str, Any]) -> str:
    loss = f"{100 * row['loss']:+.2f}"
    error = row.get("loss_stderr")
    return f"{loss} %" if error is None else f"{loss} ± {100 * error:.2g} %"
