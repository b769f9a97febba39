"""Reading a result that may lack keys, and writing its numbers for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

Result = Mapping[str, Any]

NOT_FINITE = "not finite"
UNKNOWN = "\N{EN DASH}"


def get(result: Any, path: str) -> Any:
    """The value at a dotted path, or None where a key is absent or not a mapping."""
    node = result
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def number(result: Any, path: str) -> float | None:
    """The number at a dotted path (perhaps not finite), or None."""
    value = get(result, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def finite(result: Any, path: str) -> float | None:
    """The finite number at a dotted path, or None."""
    value = number(result, path)
    return value if value is not None and math.isfinite(value) else None


def text(result: Any, path: str) -> str | None:
    """The value at a dotted path as one line of text; None if absent, empty or a container."""
    value = get(result, path)
    if value is None or isinstance(value, Mapping | list | tuple):
        return None
    return " ".join(str(value).split()) or None


def rows(result: Any, path: str) -> list[Result]:
    """The mappings in the list at a dotted path; empty if there is no list."""
    value = get(result, path)
    if not isinstance(value, list | tuple):
        return []
    return [r for r in value if isinstance(r, Mapping)]


def lines(result: Any, path: str) -> list[str]:
    """The texts in the list at a dotted path, each as one line; empty if there is no list."""
    value = get(result, path)
    if not isinstance(value, list | tuple):
        return []
    return [" ".join(v.split()) for v in value if isinstance(v, str) and v.strip()]


def mapping(result: Any, path: str) -> Result:
    """The mapping at a dotted path; empty if there is none."""
    value = get(result, path)
    return value if isinstance(value, Mapping) else {}


def show(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` significant digits; an en dash for None."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if abs(value) >= 10 ** max(digits, 6) or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{round(value):,}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage with ``digits`` decimals, more where it would read as 0."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return NOT_FINITE
    shown = 100 * value
    if shown != 0 and abs(shown) < 0.5 * 10**-digits:
        return f"{shown:.1e} %"
    return f"{shown:,.{0 if abs(shown) >= 1000 else digits}f} %"


def size(value: float | None) -> str:
    """Bytes in MB or GB (decimal units)."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.0f} bytes"


def duration(value: float | None) -> str:
    """Seconds as s, min or h."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def plain_yaml(value: Any) -> str:
    """YAML text of any JSON-like value; what JSON does not know becomes text."""
    data = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100).strip()


def loss(result: Result) -> tuple[float | None, float | None]:
    """Relative loss of perplexity (quantized / original - 1) and its standard error.

    From ``evaluation.paired`` if it is there, else from the two perplexities, without an error.
    """
    paired = number(result, "evaluation.paired.loss")
    if paired is not None:
        return paired, finite(result, "evaluation.paired.stderr")
    before = finite(result, "evaluation.original.perplexity")
    after = number(result, "evaluation.quantized.perplexity")
    if before is None or after is None or before <= 0:
        return None, None
    return after / before - 1, None


def compression(result: Result) -> tuple[float | None, float | None, float | None]:
    """(bytes of the source, bytes of the export, source / export), each None if unknown."""
    after = finite(result, "size.file_bytes")
    before = finite(result, "size.source_bytes") or finite(result, "model.source_bytes")
    ratio = before / after if before and after else None
    return before, after, ratio


def scheme(recipe: Result) -> str | None:
    """The recipe's widths, as in W4A16 (A16: activations are not quantized); None if unknown."""
    weights = finite(recipe, "weights.bits")
    if weights is None:
        return None
    activations = finite(recipe, "activations.bits")
    return f"W{weights:.0f}A{16 if activations is None else activations:.0f}"
