"""The table of low-bit recipes: ours of every line of work, and the peers."""

from __future__ import annotations

import shlex
from typing import Any

from benchmarks.cqe import ALL, BUDGET, HALF, LOWER, SCALES
from benchmarks.cqe import ROWS as CQE
from benchmarks.low_bits import OURS, SETTINGS
from benchmarks.rows import result_name
from crossbit.evaluation.statistics import paired_loss
from crossbit.recipe import Recipe

LOW_BITS = {
    "w4a16": "W4A16",
    "w3a16": "W3A16 asymmetric",
    "w2a16": "W2A16 asymmetric",
    "w4a8": "W4A8",
    "w4a4-g64": "W4A4",
    "w4a4": "W4A4 per channel",
}
# The settings of the bases of benchmarks.cqe, whose budget and seed 0 are this table's too.
CQE_SETTINGS = {
    "omniquant-w2a16": "w2a16",
    "omniquant-w3a16": "w3a16",
    **{f"{base}-w4a4": "w4a4-g64" for base in ("omniquant", "duquant", "prefixquant")},
    **{f"{base}-w4a4-channel": "w4a4" for base in ("omniquant", "duquant", "prefixquant")},
}
# Rows that became presets, with their settings.
PRESETS = {
    ("w3a16", "ours-cbq-no-overlap-e2e-hold"): "cbq-w3a16-e2e",
    ("w3a16", "ours-best"): "best-w3a16",
    ("w2a16", "ours-cbq-e2e-hold"): "cbq-w2a16-e2e",
    ("w2a16", "ours-best"): "best-w2a16",
    ("w4a4-g64", "ours-best-e2e-hold"): "best-w4a4-e2e",
}
# Rows whose end-to-end stage held-out text refused: what is left is the result without it.
REFUSED = {("w4a8", "ours-best-e2e-gently"): "best-w4a8"}


def headline(results: dict[str, dict[str, Any]]) -> list[str]:
    """The least loss of ours and of the peers at each setting, from the same tokens."""
    original = results.get("demo-original-40")
    if original is None:
        return []
    found = [r for name, r in results.items() if name.startswith("low-bits-") and "loss" in r]
    of_cqe = _of_cqe(results, original["losses"])
    lines, most = [], 0
    for setting, shown in LOW_BITS.items():
        here = [r for r in found if r["setting"] == setting]
        nearest = [r for r in here if r["method"] == "ours-rtn"]
        # One budget; round to nearest takes no calibration.
        here = [r for r in here if (r["samples"], r["length"]) == (64, 512)]
        # Scales of either sign, where a row says so, are for comparison.
        ours = [
            r
            for r in here
            if r["method"].startswith("ours-") and not r["method"].endswith("-signed")
        ]
        ours += [r for r in of_cqe if r["setting"] == setting]
        peers = [r for r in here if not r["method"].startswith("ours-")]
        for kind in ("plain", "online"):
            of_kind = [r for r in ours if r.get("kind", "plain") == kind]
            if not of_kind:
                continue
            best = min(of_kind, key=lambda r: float(r["loss"]))
            most = max(most, len(of_kind))
            cells = [shown, _recipe(best), kind, _loss(best)]
            if peers:
                peer = min(peers, key=lambda r: float(r["loss"]))
                cells += [peer["method"], _loss(peer)]
            else:
                cells += ["", ""]
            cells.append(_percent(nearest[0]["loss"]) if nearest else "")
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "### In short",
        "",
        "SmolLM2-135M-Instruct, 64 x 512 calibration tokens of the embedded Wikipedia text, groups",
        "of 64 unless a row says per channel; 40 windows of 2048 tokens of the WikiText-2 raw",
        "test. Loss is perplexity / original - 1; exported integers on both sides, the same",
        "evaluator; embedding and head in bf16. Kind plain loads in transformers, kind online in",
        "crossbit alone. The least loss of each side, +- the error of the windows, one seed: of up",
        f"to {most} rows of ours in a line and three of the peers', all of which, with times and",
        "memory, are in [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
        "",
        "Ours are made with `crossbit quantize demo --samples 64 --length 512 --set embedding=null",
        "--set head=null`, `--recipe` and what stands here.",
        "",
        "| setting | crossbit | kind | loss | best peer | loss | round to nearest |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def _recipe(row: dict[str, Any]) -> str:
    """What to type for a row: preset and add-ons, and settings."""
    setting, method = row["setting"], row["method"]
    if (preset := (PRESETS | REFUSED).get((setting, method))) is not None:
        return f"`{preset}`"
    if (known := OURS[setting].get(method.removeprefix("ours-"))) is None:
        recipe, changes = CQE[method]
        changes = (*BUDGET, *changes)
    else:
        recipe, changes = known
        # The grid, where the preset has another.
        grid = SETTINGS[setting].overrides
        own, other = (Recipe.load(recipe, of).weights for of in ((), grid))
        changes = (*(grid if own != other else ()), *changes)
    return f"`{' --set '.join(map(shlex.quote, (recipe, *changes)))}`"


def _loss(row: dict[str, Any]) -> str:
    return f"{_percent(row['loss'])} +- {100 * row['loss_stderr']:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def low_bits(results: dict[str, dict[str, Any]]) -> list[str]:
    """Low-bit recipes and the peers at the same settings."""
    found = [r for name, r in results.items() if name.startswith("low-bits-")]
    original = results.get("demo-original-40")
    if not found or original is None:
        return []
    windows = ", ".join(str(n) for n in sorted({r["windows"] for r in found}))
    found += _of_cqe(results, original["losses"])
    lines = [
        "### Low bits against peers",
        "",
        "SmolLM2-135M-Instruct, the blocks' linear layers alone (embedding and head in bf16 on",
        f"every side); calibration on the embedded Wikipedia text; {windows} windows of 2048 of",
        "the WikiText-2 raw test (`python -m benchmarks.low_bits`, whole commands in the results);",
        "exported integers, read by crossbit's own loader alone in rows that say online; groups of",
        "64 unless the setting says per channel. Seconds are indicative: most rows ran on one",
        "thread beside another job; threads and load are in the results.",
        "Inputs are quantized per token. AutoRound's own input grid (signed step, row maximum on",
        "the code -2^(b-1)) is evaluated as it was tuned; in brackets the loss on the grid of",
        "compressed-tensors, which all the others use. Bits count codes, scales and zero points:",
        "rows of ours with asymmetric weights have scales of 32 or, measured later, of 16 bits.",
        "Epochs and rates of the end-to-end rows were chosen on the embedded text. At W3A16",
        "`cbq-no-overlap-e2e-hold`, at W2A16 `cbq-e2e-hold` is the preset `cbq-w3a16-e2e`,",
        "`cbq-w2a16-e2e`; `best` is the preset of that name and setting (`best-w4a4`, per channel",
        "`best-w4a4-channel`), `best-plain` the one that ends in `-plain`, `best-e2e-hold`",
        "`best-w4a4-e2e`. Scales of W4A8 have one sign, which kernels for other runtimes need, but",
        "for `best`, `best-e2e-gently` and rows that say signed. Held-out text refused the",
        "end-to-end stage of `cbq-e2e-hold` and `best-e2e-gently` at W4A8 and of",
        "`cbq-overlap-e2e-hold-cl` at W4A16: they are what their windows made. Rows of OmniQuant,",
        "DuQuant and PrefixQuant are those of seed 0 of the table of CQE+ below.",
        "",
        "| setting | method | tokens | perplexity | loss | +- | bits a weight | s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {setting: place for place, setting in enumerate(LOW_BITS)}
    for row in sorted(found, key=lambda r: (order[r["setting"]], r.get("loss", float("inf")))):
        budget = f"{row['samples']} x {row['length']}"
        online = " (online)" if row.get("kind") == "online" else ""
        head = f"| {LOW_BITS[row['setting']]} | {row['method']}{online} | {budget} |"
        if "failed" in row:
            message = row["failed"].replace("|", "/")
            lines.append(f"{head} failed: {message} | | | | | |")
            continue
        other = f" ({100 * row['per_token']['loss']:+.2f} %)" if "per_token" in row else ""
        whole = not row.get("resumed", False)
        cost = f"{row['seconds']:.0f} | {row['peak_rss'] / 1e6:.0f}" if whole else "| "
        lines.append(
            f"{head} {row['perplexity']:.3f} | {100 * row['loss']:+.2f} %{other} | "
            f"{100 * row['loss_stderr']:.2f} | {_bits(row)} | {cost} |"
        )
    return [*lines, ""]


def _of_cqe(results: dict[str, dict[str, Any]], original: list[float]) -> list[dict[str, Any]]:
    """The rows of presets and add-ons of benchmarks.cqe, in the form of this table's.

    With half or all of the sequences ahead, scales alone and lower rates too; no other changes.
    """
    found = []
    shown = {**HALF, **ALL, **SCALES, **LOWER}
    for row, (recipe, changes) in CQE.items():
        made = results.get(result_name("cqe", row, 0))
        setting = CQE_SETTINGS.get(recipe.partition("+")[0])
        if made is None or setting is None or (changes and row not in shown):
            continue
        loss = paired_loss(made["losses"], original)
        about = {"setting": setting, "method": row}
        found.append({**made, **about, "loss": loss.value, "loss_stderr": loss.stderr})
    return found


def _bits(row: dict[str, Any]) -> str:
    return f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else ""
