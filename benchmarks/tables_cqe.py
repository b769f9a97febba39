"""The tables of what CQE+ adds: to each base, and of each of its parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.cqe import BUDGET, LAYERS, LOWER_RATES, PAIRS
from benchmarks.probe import BLOCKS
from benchmarks.probe import TABLE as PROBE
from benchmarks.rows import result_name
from crossbit.evaluation.statistics import Estimate, paired_loss

Results = dict[str, dict[str, Any]]
# What a base's loss has to fall by with both add-ons.
WANTED = 0.10


def reduction(base: list[float], other: list[float], original: list[float]) -> Estimate:
    """By which share ``other`` has less loss than ``base``, both against the original.

    Args:
        base, other, original: losses of the same windows.

    Returns:
        1 - loss(other) / loss(base), with the jackknife's standard error over windows.
    """

    def share(skip: int | None) -> float:
        kept = [n for n in range(len(base)) if n != skip]
        losses, reference = ([rows[n] for n in kept] for rows in (base, original))
        with_it = paired_loss([other[n] for n in kept], reference).value
        return 1 - with_it / paired_loss(losses, reference).value

    count = len(base)
    left_out = [share(n) for n in range(count)]
    mean = math.fsum(left_out) / count
    spread = math.fsum((value - mean) ** 2 for value in left_out)
    return Estimate(share(None), math.sqrt(spread * (count - 1) / count))


def _set(settings: Sequence[str]) -> str:
    return " ".join(f"--set {setting}" for setting in settings)


def plug_in(results: Results) -> list[str]:
    """What both add-ons take from the loss of each base, seed by seed."""
    original = results.get("demo-original-40")
    if original is None:
        return []
    lines = []
    for (base, row), seed in itertools.product(PAIRS, (0, 1)):
        without, with_both = (results.get(result_name("cqe", n, seed)) for n in (base, row))
        if without is None or with_both is None:
            continue
        found = reduction(without["losses"], with_both["losses"], original["losses"])
        losses = [
            paired_loss(made["losses"], original["losses"]).value for made in (without, with_both)
        ]
        reached = "yes" if found.value >= WANTED else "no"
        lines.append(
            f"| {row} | {without.get('kind', 'plain')} | {seed} | "
            f"{100 * losses[0]:+.2f} % | {100 * losses[1]:+.2f} % | "
            f"{100 * found.value:.1f} % | {100 * found.stderr:.1f} | {reached} |"
        )
    if not lines:
        return []
    return [
        "### Loss with both add-ons against each base alone",
        "",
        "SmolLM2-135M-Instruct, 64 x 512 tokens and 4 epochs unless a row says otherwise: rows of",
        "`benchmarks.cqe` in pairs, exported integers, WikiText-2 raw test, 40 windows of 2048.",
        "The error is the jackknife's over windows. Rows of kind online run in crossbit's loader.",
        "`half ahead` sends half of the sequences through the blocks after the window, `all ahead`",
        "all of them, the add-on four of five. `scales alone` trains the steps of PrefixQuant and",
        "no weight's rounding, which the preset trains as well. What a row is made with, beside",
        "its recipe, has rates for so few steps. They were chosen with 2-bit weights; those of",
        f"`lower rates` are {', '.join(f'`{setting}`' for setting in LOWER_RATES)}.",
        "The presets' own are for 20 epochs of more text and have rows for the first blocks alone",
        "(`original settings`).",
        "",
        "```text",
        f"--samples 64 --length 512 {_set(BUDGET[:3])} \\",
        f"{_set(BUDGET[3:])} {_set(('embedding=null', 'head=null'))}",
        "```",
        "",
        f"| row | kind | seed | base's loss | loss | less by | +- | {WANTED:.0%} reached |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def probes(results: Results) -> list[str]:
    """What was tried in the first blocks, seed by seed, the least loss of a base first."""
    found = results.get(PROBE.original)
    made = [result for name, result in results.items() if name.startswith("probe-")]
    if found is None or not made:
        return []
    rows = []
    for probe in made:
        paired = paired_loss(probe["losses"], found["losses"])
        base = probe["row"].split()[0].split("+")[0]
        text = f"| {probe['row']} | {probe['kind']} | {probe['seed']} | {100 * paired.value:+.2f} %"
        # What was resumed took more before.
        cpu = "" if probe.get("resumed", False) else f"{probe['cpu_seconds']:.0f}"
        text += f" | {100 * paired.stderr:.2f} | {cpu} |"
        rows.append((base, probe["seed"], paired.value, text))
    return [
        "### Tried in the first blocks",
        "",
        f"SmolLM2-135M-Instruct, the first {BLOCKS} of {LAYERS} blocks quantized, the others, "
        "embedding and",
        f"head in bf16; {PROBE.samples} x {PROBE.length} tokens of the embedded text and the "
        "budget of the",
        f"tables of CQE+; loss on {PROBE.windows} windows of 2048 of the embedded evaluation text, "
        "on which",
        "settings may be chosen;",
        "stored integers (`python -m benchmarks.probe`). CPU seconds are those of quantization and",
        "verification on one thread, of whole runs.",
        "",
        "| recipe and settings | kind | seed | loss | +- | CPU s |",
        "|---|---|---|---|---|---|",
        *(text for *_, text in sorted(rows)),
        "",
    ]
