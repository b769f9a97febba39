"""Tables of what things cost: time, memory, and how well both are predicted."""

from __future__ import annotations

from typing import Any

from benchmarks.plan_accuracy import rows


def cqe_cost(results: dict[str, dict[str, Any]]) -> list[str]:
    """What CQE+ costs a training step."""
    found = results.get("cqe-cost")
    if found is None:
        return []
    lines = [
        "### Cost of CQE+",
        "",
        "SmolLM2-135M-Instruct, 4 x 1024 tokens, two blocks in training (one with the look-ahead),",
        f"median of paired rounds (`{found['conditions']['command']}`).",
        "",
        "| part | s | against a step without it, or the dense product of 1024 tokens |",
        "|---|---|---|",
    ]
    for name in (k for k in found if k != "conditions"):
        row = found[name]
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else f"{row['layers']} layers, once"
        lines.append(f"| {name} | {row['seconds']:.3f} | {ratio} |")
    return [*lines, ""]


def training_step(results: dict[str, dict[str, Any]]) -> list[str]:
    """Time of an optimiser step."""
    found = results.get("train-step")
    if found is None:
        return []
    lines = [
        "### Time of an optimiser step against the bare bf16 forward and backward",
        "",
        "Two blocks of SmolLM2-135M-Instruct, 4 x 1024 tokens, median of paired rounds",
        f"(`{found['conditions']['command']}`).",
        "",
        "MB are what is trained and what Adam keeps of it, of both blocks.",
        "",
        "| rounding | bare s | step s | ratio | MB |",
        "|---|---|---|---|---|",
    ]
    for name in (k for k in found if k != "conditions"):
        row = found[name]
        figures = f"{row['bare_seconds']:.3f} | {row['step_seconds']:.3f} | {row['ratio']:.2f}"
        lines.append(f"| {name} | {figures} | {row['trained_bytes'] / 1e6:.1f} |")
    return [*lines, ""]


def products(results: dict[str, dict[str, Any]]) -> list[str]:
    """16-bit products where the processor has no instructions for them."""
    kinds = [row for name, row in sorted(results.items()) if name.startswith("products-")]
    if not kinds:
        return []
    lines = [
        "### 16-bit products on processors without instructions for them",
        "",
        "SmolLM2-135M-Instruct in bf16, 512 tokens through a layer and the head, a training step",
        "of one block with 2 x 512; median of paired rounds",
        f"(`{kinds[0]['conditions']['command']}`).",
        "",
        "| processor | what | torch's own way, s | by way of float32, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for found in kinds:
        for name in (k for k, row in found.items() if "ratio" in row and k != "conditions"):
            row = found[name]
            figures = f"{row['own_seconds']:.3f} | {row['seconds']:.3f} | {row['ratio']:.2f}"
            lines.append(f"| {found['processor']} | {name} | {figures} |")
    return [*lines, ""]


def cost(results: dict[str, dict[str, Any]]) -> list[str]:
    """Fake-quant cost."""
    found = results.get("fake-quant-cost")
    if found is None:
        return []
    lines = [
        "### Time of a W8A8 evaluation against the bare bf16 forward",
        "",
        f"SmolLM2-135M-Instruct, the blocks alone, {found['windows']} x {found['length']} tokens,",
        f"median of paired rounds (`{found['conditions']['command']}`).",
        "",
    ]
    lines += ["| execution | bf16 s | W8A8 s | ratio |", "|---|---|---|---|"]
    for execution in ("integer", "fake"):
        row = found[execution]
        lines.append(
            f"| {execution} | {row['bare_seconds']:.2f} | {row['quantized_seconds']:.2f} | "
            f"{row['ratio']:.2f} |"
        )
    return [*lines, ""]


def scaling(results: dict[str, dict[str, Any]]) -> list[str]:
    """Time against blocks and tokens."""
    found = [r for name, r in results.items() if name.startswith("scaling-")]
    if not found:
        return []
    lines = [
        "### Time of cbq-w4a16 against blocks and tokens",
        "",
        "SmolLM2-135M-Instruct, its first blocks alone where there are fewer than 30; blocks and",
        "what is read and written for them, without evaluation (`python -m benchmarks.scaling`).",
        "Tokens of the embedded text.",
        "",
        "| blocks | tokens | s | s a block and 1000 tokens | peak MB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda r: (-r["blocks"], -r["samples"])):
        share = row["seconds"] / row["blocks"] / (row["samples"] * row["length"] / 1000)
        lines.append(
            f"| {row['blocks']} | {row['samples']} x {row['length']} | {row['seconds']:.1f} | "
            f"{share:.3f} | {row['peak_rss'] / 1e6:.0f} |"
        )
    return [*lines, ""]


def plan(results: dict[str, dict[str, Any]]) -> list[str]:
    """Predictions against what was measured."""
    found = {name: r for name, r in results.items() if name.startswith("plan-")}
    if not found:
        return []
    lines = [
        "### What crossbit plan predicts, and what a run takes",
        "",
        "16 x 512 tokens of the embedded text; predicted / measured, of the whole command with",
        "evaluation and verification of the exported integers. 1b is random weights in the shape",
        "of TinyLlama-1.1B, of as many blocks as its name says (all 22 where it says none), one",
        "epoch of training (`python -m benchmarks.plan_accuracy`). Memory is RssAnon + RssShmem.",
        "Disk is predicted for training that helps, whose best state is then saved: on random",
        "weights and so little text that is training from round to nearest (`1b-from-rtn`), not",
        "from GPTQ's codes, where nothing is saved.",
        "",
        "| model | recipe | memory MB | disk MB | time s |",
        "|---|---|---|---|---|",
    ]
    for name, result in found.items():
        label = name.removeprefix("plan-").removesuffix(f"-{result['recipe']}")
        cells = {
            what: f"{predicted:.0f} / {measured:.0f} ({predicted / measured:.2f})"
            for what, _, predicted, measured in rows(result)[:4]
        }
        lines.append(
            f"| {label} | {result['recipe']} | {cells['memory']} | {cells['disk']} | "
            f"{cells['time']} |"
        )
    return [*lines, ""]
