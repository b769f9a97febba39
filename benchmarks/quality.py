"""Quality of recipes on WikiText-2: quantize, verify, evaluate the exported integers.

    python benchmarks/quality.py --text wikitext2-test.txt --work DIR [--only w8a8,w4]

Perplexity over the first windows of 2048 tokens of the WikiText-2 raw test split; calibration on
the embedded Wikipedia text; strengths are chosen on the embedded evaluation text. Every model is
an exported folder unless its row says fake-quant.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.store import once
from crossbit.evaluation.statistics import paired_loss, perplexity

W8A8_WINDOWS, WINDOWS, GEMMA_WINDOWS, CHOICE_WINDOWS = 40, 20, 8, 4
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)

FLOAT_HEAD = ("embedding=null", "head=null")

SETS: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "w8a8": [
        ("rtn-w8a8", "rtn-w8a8", ()),
        ("crossquant-w8a8", "crossquant-w8a8", ()),
        ("crossquant-w8a8-float-head", "crossquant-w8a8", FLOAT_HEAD),
        ("rtn-w8a8-float-head", "rtn-w8a8", FLOAT_HEAD),
        ("crossquant-w8a8-pydoc", "crossquant-w8a8", ("calibration.text=pydoc",)),
    ],
    "w4": [
        ("rtn-w4a16-g64", "rtn-w4a16-g64", ()),
        ("gptq-paper-w4a16-g64", "gptq-paper-w4a16-g64", ()),
        ("gptq-w4a16-g64", "gptq-w4a16-g64", ()),
        ("awq-w4a16-g64", "awq-w4a16-g64", ()),
        ("awq-gptq-w4a16-g64", "awq-gptq-w4a16-g64", ()),
    ],
    "low": [
        ("gptq-w8a8", "gptq-w8a8", ()),
        ("rtn-w4a8-g64", "rtn-w4a8-g64", ()),
        ("crossquant-w4a8-g64", "crossquant-w4a8-g64", ()),
        ("crossquant-awq-w4a8-g64", "crossquant-awq-w4a8-g64", ()),
        ("rtn-w4a4", "rtn-w4a4", ()),
        ("crossquant-w4a4", "crossquant-w4a4", ()),
        ("crossquant-paper-w8a8", "crossquant-paper-w8a8", ()),
        ("crossquant-paper-w4a4", "crossquant-paper-w4a4", ()),
    ],
}
GEMMA = ("rtn-w8a8", "crossquant-w8a8", "rtn-w4a16-g64", "gptq-w4a16-g64")


def pydoc_text(work: Path) -> Path:
    """Calibration text of another domain: Python's own reference manual."""
    path = work / "pydoc.txt"
    if not path.exists():
        topics = pydoc_data.topics.topics
        path.write_text("\n\n".join(topics[name] for name in sorted(topics)), "utf8")
    return path


def folder(work: Path, model: str, name: str, recipe: str, settings: tuple[str, ...]) -> Path:
    """The quantized folder, made if it is not there."""
    out = work / f"{model}-{name}"
    if not (out / "crossbit.json").exists():
        changed = [s.replace("=pydoc", f"={pydoc_text(work)}") for s in settings]
        crossbit.quantize(
            model,
            recipe,
            out=out,
            settings=[*changed, "evaluation.windows=0"],
            overwrite=True,
            quiet=False,
        )
    return out


def losses(model: str, text: str | None, windows: int) -> dict[str, Any]:
    """Per-window losses of a model."""
    result = crossbit.evaluate(model, text=text, windows=windows, quiet=False)
    return {"losses": result["perplexity"]["losses"], "perplexity": result["perplexity"]}


def row(
    args: argparse.Namespace, model: str, name: str, recipe: str, settings: Any, n: int
) -> None:
    """Measure one recipe and print it against the original."""
    original = once(
        f"{model}-original-{n}",
        f"crossbit evaluate {model} --text {Path(args.text).name} --windows {n}",
        lambda: losses(model, args.text, n),
    )

    def measure() -> dict[str, Any]:
        out = folder(args.work, model, name, recipe, settings)
        import json

        made = json.loads((out / "crossbit.json").read_text("utf8"))
        found = {
            **losses(str(out), args.text, n),
            "kind": made["kind"],
            "size": made["size"],
            "seconds": made["time"],
            "memory": made["memory"],
            "verified": made["verify"].get("passed"),
            "alpha": made.get("alpha"),
            "calibration": made.get("calibration"),
        }
        if not args.keep:
            shutil.rmtree(out)
        return found

    command = f"python benchmarks/quality.py --only ...  ({recipe} {' '.join(settings)})"
    result = once(f"{model}-{name}", command, measure)
    paired = paired_loss(result["losses"], original["losses"][: len(result["losses"])])
    value = perplexity(result["losses"]).value
    loss = f"{100 * paired.value:+.3f} % +- {100 * paired.stderr:.3f}"
    print(f"{model} {name}: {value:.3f}, loss {loss}", flush=True)


def smoothquant(args: argparse.Namespace) -> None:
    """SmoothQuant at its best strength, chosen on the embedded evaluation text."""
    scores = {}
    for strength in STRENGTHS:
        name = f"smoothquant-{strength}"
        settings = (f"transforms.0.strength={strength}", "calibration.samples=16")

        def measure(name: str = name, settings: tuple[str, ...] = settings) -> dict[str, Any]:
            out = folder(args.work, "demo", f"{name}-choice", "smoothquant-w8a8", settings)
            return losses(str(out), None, CHOICE_WINDOWS)

        found = once(f"demo-{name}-choice", "python benchmarks/quality.py --only w8a8", measure)
        scores[strength] = perplexity(found["losses"]).value
    best = min(scores, key=lambda s: scores[s])
    print("strengths on the embedded text:", scores, "best", best)
    chosen = (f"transforms.0.strength={best}",)
    row(args, "demo", f"smoothquant-{best}", "smoothquant-w8a8", chosen, W8A8_WINDOWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, help="WikiText-2 raw test, as a file or wikitext2")
    parser.add_argument("--work", type=Path, required=True, help="folder for quantized models")
    parser.add_argument("--only", default="w8a8,w4,low,gemma")
    parser.add_argument("--keep", action="store_true", help="keep the quantized folders")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.only.split(","):
        if part == "gemma":
            for recipe in GEMMA:
                row(args, "demo-gemma", recipe, recipe, (), GEMMA_WINDOWS)
            continue
        for name, recipe, settings in SETS[part]:
            row(args, "demo", name, recipe, settings, W8A8_WINDOWS if part == "w8a8" else WINDOWS)
        if part == "w8a8":
            smoothquant(args)


if __name__ == "__main__":
    main()
