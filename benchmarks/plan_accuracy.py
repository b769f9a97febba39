"""What ``crossbit plan`` predicts against what ``crossbit quantize`` takes, stage by stage.

    python -m benchmarks.plan_accuracy --work DIR [--only demo] [--blocks 3] [--again]

Models: the embedded demo, and random weights in the shape of TinyLlama-1.1B, written shard by shard
into DIR with the demo's tokenizer; ``1b-from-rtn`` is the same with training that starts from round
to nearest, where it helps on random weights too, so that its best state is saved. Both commands run
as processes of their own, one after the other; nothing else may run. Memory is RssAnon + RssShmem,
every 50 ms. Which stage a sample belongs to is read from the files of the work folder, so the run
is not touched. ``--blocks`` gives the 1.1B model its first blocks only, for a quick look;
``--again`` measures anew what is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import read_status
from benchmarks.store import RESULTS, once
from crossbit.export.shards import ShardWriter
from crossbit.models.source import resolve_model
from crossbit.output import companions

INTERVAL = 0.05
SHARD_BYTES = 500_000_000
CALIBRATION = ("--samples", "16", "--length", "512")
RECIPES = (
    *("rtn-w4a16-g64", "gptq-w4a16-g64", "crossquant-w8a8"),
    *("cbq-w4a16", "omniquant-w4a4+sde+cl", "best-w4a4"),
)
TINYLLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    # TinyLlama's are 32 000; the demo's tokenizer gives ids up to this.
    "vocab_size": 49152,
}
# The 1.1B model's labels, and the settings of each.
BILLION = {
    "1b": ("training.epochs=1",),
    "1b-from-rtn": ("training.epochs=1", "solver.start={kind: rtn}"),
}
# What the run's stages are called in a prediction.
PREDICTED = {
    "prepare": ("prepare",),
    "blocks": ("open", "solve", "close"),
    "train": ("sensitivity", "train"),
    "head": ("head",),
    "assemble": ("assemble",),
    "evaluate": ("evaluate",),
    "verify": ("verify",),
}


# -- the model ------------------------------------------------------------------------------------


def model_folder(
    folder: Path, config: Mapping[str, Any], write: Callable[[ShardWriter], None]
) -> Path:
    """A checkpoint of the tensors that ``write`` adds, with the demo's tokenizer; made once."""
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, SHARD_BYTES)
    write(writer)
    writer.close()
    for path in companions(resolve_model("demo").path):
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1), "utf8")
    return folder


def synthetic(folder: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint of random weights."""
    generator = torch.Generator().manual_seed(0)
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]

    def write(writer: ShardWriter) -> None:
        def matrix(name: str, rows: int, columns: int) -> None:
            values = torch.randn(rows, columns, generator=generator) * columns**-0.5
            writer.add(name, values.to(torch.bfloat16))

        def gain(name: str) -> None:
            writer.add(name, torch.ones(width, dtype=torch.bfloat16))

        matrix("model.embed_tokens.weight", config["vocab_size"], width)
        for index in range(config["num_hidden_layers"]):
            block = f"model.layers.{index}"
            for name, rows, columns in (
                ("self_attn.q_proj", width, width),
                ("self_attn.k_proj", narrow, width),
                ("self_attn.v_proj", narrow, width),
                ("self_attn.o_proj", width, width),
                ("mlp.gate_proj", inner, width),
                ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):
                matrix(f"{block}.{name}.weight", rows, columns)
            gain(f"{block}.input_layernorm.weight")
            gain(f"{block}.post_attention_layernorm.weight")
        gain("model.norm.weight")
        matrix("lm_head.weight", config["vocab_size"], width)

    return model_folder(folder, config, write)


# -- running --------------------------------------------------------------------------------------


def stage_of(work: Path, blocks: int) -> str:
    """The stage that a run is in, by what its work folder holds."""
    staged = work / "staged"
    if (staged / "config.json").exists():
        return "evaluate"
    if staged.exists():
        return "assemble"
    if not (work / "manifest.json").exists():
        return "prepare"
    if any(work.glob("best-*.safetensors")) or any(work.glob("sensitivity-*.safetensors")):
        return "train"
    if (work / f"block-{blocks - 1:05d}.safetensors").exists():
        return "head"
    return "blocks"


def size_of(*folders: Path) -> int:
    """Bytes of all files below the folders, as far as they stay long enough to be counted."""
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(root, name)).st_size
                except OSError:
                    continue
    return total


def sampled(command: list[str], work: Path, out: Path, blocks: int) -> dict[str, Any]:
    """Run a command; its exit code, its wall time, its memory and disk over time."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    samples: list[tuple[float, str, int]] = []
    disk, stage, result = 0, "prepare", 0
    try:
        while process.poll() is None:
            status = read_status(process.pid)
            held = status.get("RssAnon", 0) + status.get("RssShmem", 0)
            arriving = list(out.parent.glob(f".{out.name}.*"))
            # Once the result is in place its work folder goes.
            stage = "verify" if out.exists() else stage_of(work, blocks)
            samples.append((time.monotonic() - began, stage, held))
            disk = max(disk, size_of(work, out, *arriving))
            result = max(result, size_of(out))
            # A shard is put together in a moment, in which the disk is fullest.
            time.sleep(INTERVAL / 10 if stage == "assemble" else INTERVAL)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "wall": time.monotonic() - began,
        "samples": samples,
        "disk": disk,
        "output": size_of(out),
    }


def by_stage(run: dict[str, Any], stages: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of every stage.

    Evaluation and verification leave no file that tells them apart: ``stages`` of crossbit.json
    says how long the former took.
    """
    starts = [moment for moment, stage, _ in run["samples"] if stage == "evaluate"]
    verifying = starts[0] + stages.get("evaluate", 0.0) if starts else run["wall"]
    found: dict[str, dict[str, float]] = {}
    moments = [moment for moment, _, _ in run["samples"]] + [run["wall"]]
    for (moment, stage, held), following in zip(run["samples"], moments[1:], strict=True):
        name = "verify" if stage == "evaluate" and moment >= verifying else stage
        row = found.setdefault(name, {"seconds": 0.0, "memory": 0.0})
        row["seconds"] += following - moment
        row["memory"] = max(row["memory"], held)
    return found


def measure(
    model: str, recipe: str, settings: list[str], place: Path, blocks: int
) -> dict[str, Any]:
    """Predict, run, compare."""
    out, work = place / "out", place / "out.crossbit-work"
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    crossbit = [sys.executable, "-m", "crossbit"]
    options = [model, "--recipe", recipe, "--out", str(out), *CALIBRATION, *settings]
    planned = place / "plan.json"
    subprocess.run([*crossbit, "plan", *options, "--json", str(planned)], check=True)
    plan = json.loads(planned.read_text("utf8"))
    run = sampled([*crossbit, "quantize", *options], work, out, blocks)
    result = json.loads((out / "crossbit.json").read_text("utf8"))
    shutil.rmtree(out)
    samples = run.pop("samples")
    measured = by_stage({**run, "samples": samples}, result["time"]["stages"])
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "settings": settings,
        "predicted": {k: plan[k] for k in ("stages", "memory", "disk", "seconds")},
        "operations": plan["operations"],
        "rates": plan["rates"],
        "measured": {
            "stages": measured,
            "memory": max(held for _, _, held in samples),
            "disk": run["disk"],
            "output": run["output"],
            "seconds": run["wall"],
        },
    }


# -- the table ------------------------------------------------------------------------------------


def rows(result: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """(what, unit, predicted, measured) of a result."""
    predicted, measured = result["predicted"], result["measured"]
    stages = {row["stage"]: row for row in predicted["stages"]}
    found = [
        ("memory", "MB", predicted["memory"]["peak"] / 1e6, measured["memory"] / 1e6),
        ("disk", "MB", predicted["disk"]["work"] / 1e6, measured["disk"] / 1e6),
        ("result", "MB", predicted["disk"]["output"] / 1e6, measured["output"] / 1e6),
        ("time", "s", predicted["seconds"], measured["seconds"]),
    ]
    for name, parts in PREDICTED.items():
        if name not in measured["stages"]:
            continue
        own = [stages[part] for part in parts if part in stages]
        times = sum(part["seconds"] or 0.0 for part in own)
        peak = max((part["memory"] or 0.0 for part in own), default=0.0)
        row = measured["stages"][name]
        found.append((f"  {name}, memory", "MB", peak / 1e6, row["memory"] / 1e6))
        found.append((f"  {name}, time", "s", times, row["seconds"]))
    return found


def show(name: str, result: dict[str, Any]) -> None:
    """A table of predicted, measured and their ratio."""
    print(f"\n{name}: {result['model']}, {result['recipe']} {' '.join(result['settings'])}")
    print(f"{'':24} {'predicted':>11} {'measured':>11} {'ratio':>7}")
    for what, unit, predicted, measured in rows(result):
        ratio = predicted / measured if measured else float("nan")
        print(f"{what:24} {predicted:9.1f} {unit:2} {measured:8.1f} {unit:2} {ratio:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--only", default="demo,1b", help="models: demo, 1b, 1b-from-rtn")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--blocks", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--again", action="store_true", help="measure anew what is stored")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models: dict[str, tuple[str, int]] = {}
    for label in args.only.split(","):
        if label == "demo":
            config = json.loads((resolve_model("demo").path / "config.json").read_text("utf8"))
            models[label] = "demo", int(config["num_hidden_layers"])
        elif label in BILLION:
            config = {**TINYLLAMA, "num_hidden_layers": args.blocks}
            folder = synthetic(args.work / f"tinyllama-{args.blocks}", config)
            models[label] = str(folder), args.blocks
        else:
            parser.error(f"--only {label}: give demo, {', '.join(BILLION)}")
    for label, (model, blocks) in models.items():
        for recipe in args.recipes.split(","):
            settings = [word for setting in BILLION.get(label, ()) for word in ("--set", setting)]
            cut = f"-{blocks}-blocks" if blocks < TINYLLAMA["num_hidden_layers"] else ""
            cut = cut if label in BILLION else ""
            name = f"plan-{label}{cut}-{recipe}"
            if args.again:
                (RESULTS / f"{name}.json").unlink(missing_ok=True)
            options = " ".join([*CALIBRATION, *settings])
            result = once(
                name,
                f"crossbit quantize {label} --recipe {recipe} {options}",
                partial(measure, model, recipe, settings, args.work, blocks),
            )
            show(name, result)


if __name__ == "__main__":
    main()
