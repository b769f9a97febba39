"""Write RESULTS.md, and the results part of README.md, from benchmarks/results/*.json.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.ablation import BASE as ABLATION_BASE
from benchmarks.ablation import ROWS as ABLATION
from benchmarks.cqe import ROWS as CQE
from benchmarks.second import MODEL as SECOND_MODEL
from benchmarks.second import ROWS as SECOND
from benchmarks.tables_cost import cost, cqe_cost, plan, products, scaling, training_step
from benchmarks.tables_cqe import plug_in, probes
from benchmarks.tables_low_bits import headline, low_bits
from crossbit.evaluation.statistics import Estimate, paired_loss, perplexity

HERE = Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def stored() -> dict[str, dict[str, Any]]:
    """Every result by name."""
    files = sorted((HERE / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text("utf8")) for path in files}


def quality(results: dict[str, dict[str, Any]], model: str, title: str) -> list[str]:
    """Perplexity, paired loss, size and cost of every recipe measured on a model."""
    made = [v for k, v in results.items() if k.startswith(f"{model}-") and "size" in v]
    if not made:
        return []
    counts = {len(row["losses"]) for row in made}
    originals = {
        name: results[name] for n in counts if (name := f"{model}-original-{n}") in results
    }
    lines = [
        f"### {title}",
        "",
        "| recipe | windows | perplexity | loss | +- | bytes a parameter | verified | quantize s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(originals, key=lambda k: int(k.rsplit("-", 1)[1])):
        losses = originals[name]["losses"]
        lines.append(f"| original | {len(losses)} | {perplexity(losses).value:.3f} | | | | | |")
    rows = []
    for name, result in results.items():
        if not name.startswith(f"{model}-") or "size" not in result:
            continue
        losses = result["losses"]
        original = originals[f"{model}-original-{len(losses)}"]["losses"]
        paired = paired_loss(losses, original)
        verified = {True: "yes", None: "fake-quant", False: "NO"}[result["verified"]]
        rows.append(
            (
                len(losses),
                paired.value,
                f"| {name.removeprefix(model + '-')} | {len(losses)} | "
                f"{perplexity(losses).value:.3f} | {100 * paired.value:+.3f} % | "
                f"{100 * paired.stderr:.3f} | {result['size']['bytes_per_parameter']:.3f} | "
                f"{verified} | {result['seconds']['stages']['quantize']:.0f} |",
            )
        )
    lines += [text for *_, text in sorted(rows)]
    return [*lines, ""]


def differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """Paired differences that the W8A8 claim rests on."""
    best = results.get("demo-crossquant-w8a8")
    if best is None:
        return []
    lines = ["### CrossQuant W8A8 against the others, paired over windows", ""]
    lines += ["| against | difference of loss | +- | standard errors |", "|---|---|---|---|"]
    for name, other in results.items():
        same = len(other.get("losses", [])) == len(best["losses"])
        if not same or "size" not in other or name == "demo-crossquant-w8a8":
            continue
        paired = paired_loss(best["losses"], other["losses"])
        lines.append(
            f"| {name.removeprefix('demo-')} | {100 * paired.value:+.3f} % | "
            f"{100 * paired.stderr:.3f} | {paired.value / paired.stderr:+.1f} |"
        )
    return [*lines, ""]


def peer(results: dict[str, dict[str, Any]]) -> list[str]:
    """GPTQ against llm-compressor."""
    cost, found = results.get("gptq-peer-cost"), results.get("gptq-peer-quality")
    if cost is None or found is None:
        return []
    ours, theirs = cost["ours"], cost["peer"]
    own = theirs["own"]["seconds"]
    base = found["original"]["losses"]
    lines = [
        "### GPTQ W4A16 g64 against llm-compressor",
        "",
        "SmolLM2-135M-Instruct; calibration on the same 64 x 1024 tokens of the embedded text,",
        "perplexity on windows of 2048 tokens of the WikiText-2 raw test, bf16, exported integers;",
        "one after the other (`python -m benchmarks.gptq_peer`). Ours is from before scales of",
        "either sign became the default; the row of the next table has them.",
        "",
        "| | perplexity (20 windows) | loss | quantize s | whole command s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    shown = {
        "ours": (
            ours["seconds"]["stages"]["quantize"],
            ours["process"]["wall_seconds"],
            ours["memory"]["stages"]["quantize"] / 1e6,
        ),
        "peer": (
            own["quantize"] + own["save"],
            theirs["process"]["wall_seconds"],
            theirs["process"]["peak_rss_bytes"] / 1e6,
        ),
    }
    for name, (quantize, whole, memory) in shown.items():
        losses = found[name]["losses"]
        paired = paired_loss(losses, base)
        lines.append(
            f"| {name} | {perplexity(losses).value:.3f} | {100 * paired.value:+.2f} % | "
            f"{quantize:.0f} | {whole:.0f} | {memory:.0f} |"
        )
    verify = ours["memory"]["stages"]["verify"] / 1e6
    lines += [
        "",
        "Memory of ours is that of the quantization; the whole command goes on to verify the file",
        f"in transformers, which the peer does not do, and peaks at {verify:.0f} MB there.",
    ]
    return [*lines, ""]


def parts(
    results: dict[str, dict[str, Any]],
    table: str,
    rows: Iterable[str],
    heading: list[str],
    model: str = "demo",
    base: str | None = None,
) -> list[str]:
    """A table of ``benchmarks.rows``: every seed that was run, the rows in their order.

    With ``base`` each row is compared to that one, seed by seed.
    """
    found = [r for name, r in results.items() if name.startswith(f"{table}-") and "row" in r]
    windows = len(found[0]["losses"]) if found else 0
    original = results.get(f"{model}-original-{windows}")
    if original is None:
        return []
    known: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        known.setdefault(row["row"], []).append(row)
    bases = {r["seed"]: r["losses"] for r in known.get(base or "", [])}
    against = f" against {base}, each seed | +- |" if base else ""
    lines = [
        *heading,
        "",
        f"| row | kind | loss, each seed | +- |{against} windows kept as they were | "
        "CPU s, each seed | peak MB, each seed |",
        "|---|---|---|---|---|---|---|" + ("---|---|" if base else ""),
    ]
    for name in [name for name in rows if name in known]:
        runs = sorted(known[name], key=lambda r: r["seed"])
        paired = [paired_loss(r["losses"], original["losses"]) for r in runs]
        # What was resumed took more before, of time and of memory.
        runs_whole = [r for r in runs if not r["resumed"]]
        peak = ", ".join(f"{r['peak_rss'] / 1e6:.0f}" for r in runs_whole)
        # Of the whole command; the seconds that pass are those of whatever else the machine does.
        cpu = ", ".join(
            f"{r['cpu_seconds']:.0f}{_threads(r)}" for r in runs_whole if "cpu_seconds" in r
        )
        kept = [sum(not w["after"] < w["before"] for w in r["windows"]) for r in runs]
        compared = ""
        if base:
            both = [r for r in runs if name != base and r["seed"] in bases]
            compared = f" {_paired([paired_loss(r['losses'], bases[r['seed']]) for r in both])} |"
        lines.append(
            f"| {name} | {runs[0].get('kind', 'plain')} | {_paired(paired)} |{compared} "
            f"{', '.join(map(str, kept))} | {cpu} | {peak} |"
        )
    return [*lines, ""]


def _threads(row: dict[str, Any]) -> str:
    """On how many threads a row ran, where it was not one."""
    count = str(row["conditions"]["machine"]).rsplit(", ", 1)[-1]
    return "" if count == "1 threads" else f" ({count})"


def _paired(values: list[Estimate]) -> str:
    """Values of the seeds, and the largest of their errors: two cells."""
    error = f"{100 * max(v.stderr for v in values):.2f}" if values else ""
    return f"{', '.join(f'{100 * v.value:+.2f} %' for v in values)} | {error}"


def ablation(results: dict[str, dict[str, Any]]) -> list[str]:
    """What each part of CBQ is worth."""
    heading = [
        "### Parts of CBQ",
        "",
        "SmolLM2-135M-Instruct, W4A16 in groups of 64, embedding and head in bf16, 32 x 512 tokens",
        "of the embedded text, 3 epochs, windows without overlap unless a row says otherwise;",
        "WikiText-2 raw test, 40 windows of 2048, exported integers (`python -m",
        "benchmarks.ablation`). A row that is not listed was not run. AdaRound and LoRA-Rounding",
        "start from round to nearest, as windows of 2, from rtn do; the other rows that train from",
        "GPTQ's codes. The full budget, 128 x 1024 tokens, is `ours-cbq` in the table above. +- is",
        "the error of the text's windows alone, the largest of the seeds. What another seed of",
        "calibration and training changes is not in it, and can be more: compare the rows that",
        "have two. CPU seconds are those of the whole command on one thread, verification",
        "included; neither they nor the resident memory, which counts mapped files, are shown of",
        "runs that were stopped and resumed. The machine was not equally fast on all days: compare",
        "seconds roughly, and the memory of what is trained by the table of an optimiser step.",
    ]
    return parts(results, "ablation", ABLATION, heading, base=ABLATION_BASE)


def cqe(results: dict[str, dict[str, Any]]) -> list[str]:
    """What CQE+ adds to its bases, and each of its parts."""
    heading = [
        "### What CQE+ adds",
        "",
        "SmolLM2-135M-Instruct, embedding and head in bf16, 64 x 512 tokens of the embedded text,",
        "4 epochs unless a row says otherwise; WikiText-2 raw test, 40 windows of 2048, stored",
        "integers (`python -m benchmarks.cqe`). Rows of kind online run in crossbit's own loader.",
        "A row that is not listed was not run. CPU seconds are those of the whole command,",
        "verification included, where they were taken; on one thread unless it says two. The",
        "machine was not equally fast on all days.",
    ]
    return parts(results, "cqe", CQE, heading)


def second(results: dict[str, dict[str, Any]]) -> list[str]:
    """The best recipes on the second model."""
    heading = [
        "### A second model",
        "",
        "Gemma-3-270M (dequantized from GGUF Q4_K_M), embedding and head in bf16, 64 x 512 tokens",
        "of the embedded text; WikiText-2 raw test, 16 windows of 2048, stored integers (`python",
        "-m benchmarks.second`). A row that is not listed was not run.",
    ]
    return parts(results, "second", SECOND, heading, SECOND_MODEL)


def verified(results: dict[str, dict[str, Any]]) -> list[str]:
    """What verification measured on every exported scheme, model by model."""
    found = {k: v for k, v in results.items() if "-verify-" in k}
    if not found:
        return []
    lines = [
        "### Exported schemes, reloaded in transformers and verified",
        "",
        "Quantized with 4 x 128 tokens of calibration (`python -m benchmarks.verify_schemes`); a",
        "scheme that is not listed was not run. Layer differences are relative, those of logits in",
        "standard deviations, on 512 tokens of the embedded text in float32.",
        "",
    ]
    lines += ["| model | scheme | passed | largest layer difference | logits | bound |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, result in found.items():
        model, _, case = name.partition("-verify-")
        checks = {c["name"]: c for c in result["verify"]["checks"]}
        layers, logits = checks.get("layers", {}), checks.get("logits", {})
        passed = "yes" if result["verify"]["passed"] else "NO"
        lines.append(
            f"| {model} | {case} | {passed} | {_small(layers.get('value'))} | "
            f"{_small(logits.get('value'))} | {_small(logits.get('bound'))} |"
        )
    return [*lines, ""]


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def findings(results: dict[str, dict[str, Any]], model: str, title: str) -> list[str]:
    """Modes and the removal curve of one analysis."""
    found = results.get(f"{model}-findings")
    if found is None:
        return []
    text = found["evaluation"]
    lines = [
        f"### {title}: activation modes and kernels",
        "",
        "Weights INT8 round to nearest, fake-quant unless the row says exported; perplexity on the",
        f"first {text['windows']} windows of {text['length']} tokens of {text['name']},",
        f"{text['dtype']} (`{found['conditions']['command']}`).",
        "",
    ]
    lines += [
        "| variant | kernel | perplexity | loss | +- |",
        "|---|---|---|---|---|",
    ]
    for mode in found.get("modes", []):
        cells = [
            mode.get("name"),
            _percent(mode.get("kernel")),
            _figure(mode.get("perplexity")),
            _percent(mode.get("loss")),
            _percent(mode.get("loss_stderr")),
        ]
        lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    lines += _folded(results, model, len(found["modes"][0]["losses"]))
    removal = found.get("remove_kernel", {})
    lines += ["", f"Remove-kernel curve (threshold {_percent(removal.get('threshold'))}):", ""]
    lines += ["| removed | perplexity |", "|---|---|"]
    for point in removal.get("points", []):
        lines.append(
            f"| {_percent(point.get('achieved', point.get('proportion')))} | "
            f"{_figure(point.get('perplexity'))} |"
        )
    return [*lines, ""]


def _folded(results: dict[str, dict[str, Any]], model: str, windows: int) -> list[str]:
    """CrossQuant folded and exported, on the same first windows, where it was measured."""
    lines = []
    for name, head in (("crossquant-w8a8-float-head", "float"), ("crossquant-w8a8", "INT8")):
        made = results.get(f"{model}-{name}")
        originals = [v for k, v in results.items() if k.startswith(f"{model}-original-")]
        if made is None or not originals:
            continue
        losses, original = made["losses"][:windows], originals[0]["losses"][:windows]
        paired = paired_loss(losses, original)
        value = f"{perplexity(losses).value:.3f}"
        cells = [value, _percent(paired.value), _percent(paired.stderr)]
        what = f"W8A8 CrossQuant folded, searched factors, GPTQ, {head} head, exported"
        lines.append(f"| {what} | | {' | '.join(map(str, cells))} |")
    return lines


def _percent(value: Any) -> str | None:
    return f"{100 * value:.2f} %" if isinstance(value, int | float) else None


def _figure(value: Any) -> str | None:
    return f"{value:.3f}" if isinstance(value, int | float) else None


def main() -> None:
    results = stored()
    smol = "SmolLM2-135M-Instruct (dequantized from GGUF Q4_1), WikiText-2 raw test, 2048 tokens"
    gemma = "Gemma-3-270M (dequantized from GGUF Q4_K_M), WikiText-2 raw test, 2048 tokens"
    common = [
        "Windows of 2048 tokens from the start of the test split; calibration on the embedded",
        "Wikipedia text (64 x 1024 tokens) unless the row says otherwise; bf16 computation; every",
        "row is the exported integers, reloaded and verified, unless it says fake-quant. The loss",
        "is perplexity / original - 1, paired over windows, with its standard error.",
        "",
    ]
    text = [
        *quality(results, "demo", smol),
        *differences(results),
        *quality(results, "demo-gemma", gemma),
        *peer(results),
        *low_bits(results),
        *ablation(results),
        *plug_in(results),
        *cqe(results),
        *probes(results),
        *second(results),
        *training_step(results),
        *cqe_cost(results),
        *products(results),
        *cost(results),
        *scaling(results),
        *plan(results),
    ]
    more = [
        *verified(results),
        *findings(results, "demo", "SmolLM2-135M-Instruct"),
        *findings(results, "demo-gemma", "Gemma-3-270M"),
    ]
    dates = {r["conditions"]["date"] for r in results.values()}
    head = [
        "# Results",
        "",
        f"Measured {', '.join(sorted(dates))}; commands in `results/*.json`.",
        "",
    ]
    (HERE / "RESULTS.md").write_text(
        "\n".join([*head, *common, *text, *more]).rstrip() + "\n", "utf8"
    )
    readme = HERE.parent / "README.md"
    page = readme.read_text("utf8")
    if BEGIN in page and END in page:
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        heading, *table = quality(results, "demo", smol)
        of_others = [*plug_in(results), *second(results)]
        short = [*headline(results), *of_others, heading, "", *common, *table[1:]]
        body = "\n".join(short).rstrip()
        readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", "utf8")


if __name__ == "__main__":
    main()
