"""The model card (README.md) of an exported model."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jinja2
import yaml

from crossbit.report import values
from crossbit.report.html import PREFIX_NOTE, activation_words, grid_words, prefix_words
from crossbit.report.values import Result, finite, get, mapping, number, rows, text

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LOCAL = ("/", "\\", ".", "~")


def model_card(result: dict[str, Any], *, licence: str | None, base_model: str) -> str:
    """README.md with YAML front matter, from the content of ``crossbit.json``.

    Args:
        result: absent keys take their lines with them.
        licence: the base model's licence identifier, such as apache-2.0; None if unknown. A name
            that is no identifier is given as ``license: other`` with that name.
        base_model: the hub's ``owner/name``, or another name. Only a hub name goes to the front
            matter; of a local path only the last part is shown.

    Returns:
        Markdown text ending in a newline. Text out of the result is escaped.
    """
    recipe = mapping(result, "recipe")
    scheme = values.scheme(recipe)
    hub = _HUB_NAME.fullmatch(base_model) is not None and not base_model.startswith(_LOCAL)
    name = base_model if hub else re.split(r"[/\\]", base_model.rstrip("/\\"))[-1] or "model"
    front: dict[str, Any] = {"base_model": name, "base_model_relation": "quantized"} if hub else {}
    research, online = (text(result, "kind") == kind for kind in ("research", "online"))
    own = research or online  # loads in crossbit only
    front["library_name"] = "crossbit" if own else "transformers"
    front["pipeline_tag"] = "text-generation"
    form = [] if own else ["compressed-tensors"]
    front["tags"] = ["crossbit", *form, "quantized", *([scheme] if scheme else [])]
    front |= _licence(licence)
    loss, error = values.loss(result)
    before, after, ratio = values.compression(result)
    view = {
        "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "name": name,
        "hub": hub,
        "scheme": scheme,
        "version": text(result, "crossbit"),
        "licence": licence,
        "research": research,
        "online": online,
        "own": own,
        "simulated": research or text(result, "evaluation.path") == "fake-quant",
        "larger": get(result, "size.larger_than_source") is True or (ratio or 1) < 1,
        "ratio": ratio,
        "before": values.size(before) if before else None,
        "after": values.size(after) if after else None,
        "per_parameter": finite(result, "size.bytes_per_parameter"),
        "done": _done(result),
        "models": [
            (
                label,
                number(result, f"evaluation.{k}.perplexity"),
                finite(result, f"evaluation.{k}.stderr"),
            )
            for k, label in (("original", "original"), ("quantized", "this model"))
            if number(result, f"evaluation.{k}.perplexity") is not None
        ],
        "loss": loss,
        "error": error,
        "conditions": _conditions(result),
        "verified": get(result, "verify.passed"),
        "checks": len(rows(result, "verify.checks")),
        "quantized_activations": finite(recipe, "activations.bits") is not None,
        "asymmetric": get(recipe, "weights.symmetric") is False,
        "warnings": values.lines(result, "warnings"),
    }
    return _template().render(view).strip() + "\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossbit", "report"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(md=_markdown, show=values.show, percent=values.percent)
    return environment.get_template("model_card.md.j2")


def _markdown(value: object) -> str:
    """One line of text with Markdown's and HTML's special characters escaped."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#{}~])", r"\\\1", line).replace("&", "&amp;")


def _licence(licence: str | None) -> dict[str, str]:
    name = " ".join((licence or "").split())
    if not name:
        return {}
    if _LICENCE.fullmatch(name.lower()):
        return {"license": name.lower()}
    return {"license": "other", "license_name": name}


def _done(result: Result) -> list[tuple[str, str]]:
    recipe = mapping(result, "recipe")
    facts: list[tuple[str, str | None]] = []
    if recipe:
        transforms = [text(t, "kind") or "?" for t in rows(recipe, "transforms")]
        facts = [
            ("Recipe", text(recipe, "name")),
            ("Weights", grid_words(mapping(recipe, "weights"))),
            ("Solver", text(recipe, "solver.kind")),
            ("Activations", activation_words(mapping(recipe, "activations"))),
            ("Prefix", prefix_words(result)),
            ("Transforms", ", ".join(transforms) or "none"),
            (
                "Embedding",
                text(result, "size.embedding") or grid_words(mapping(recipe, "embedding")),
            ),
            ("Output head", grid_words(mapping(recipe, "head"))),
        ]
    name = text(result, "calibration.name")
    samples, length = finite(result, "calibration.samples"), finite(result, "calibration.length")
    if name is not None and samples is not None and length is not None:
        name += f", {samples:.0f} sequences of {length:.0f} tokens"
    facts.append(("Calibration text", name))
    return [(n, v) for n, v in facts if v]


def _conditions(result: Result) -> str:
    found = mapping(result, "evaluation")
    windows, length = finite(found, "windows"), finite(found, "length")
    parts = [text(found, "text")]
    if windows is not None and length is not None:
        parts.append(f"{windows:.0f} windows of {length:.0f} tokens, not overlapping")
    if prefix_words(result):
        parts.append(f"prefix: {PREFIX_NOTE}")
    dtype, path = text(found, "dtype"), text(found, "path")
    parts += [f"computed in {dtype}" if dtype else None, f"what ran: {path}" if path else None]
    return "; ".join(p for p in parts if p)
