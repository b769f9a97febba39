"""GPTQ at W4A16 g64 against llm-compressor: same model, tokens, grid and evaluator, one run.

    python -m benchmarks.gptq_peer --text wikitext2-test.txt --work DIR --peer .venv-peer/bin/python

The machine must be idle. Memory is VmHWM: of the peer's whole process, and of ours at the end of
quantization (the command goes on to verify, in transformers, which the peer does not do).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import crossbit
from benchmarks.measure import Measurement, measure
from benchmarks.store import once
from crossbit.corpora import calibration_windows, load_text
from crossbit.evaluation.statistics import paired_loss, perplexity
from crossbit.models.opening import open_tokenizer
from crossbit.models.source import resolve_model

SAMPLES, LENGTH, WINDOWS = 64, 1024, 20


def _figures(found: Measurement) -> dict[str, Any]:
    """Without the command line, whose paths are those of one machine."""
    return {name: value for name, value in asdict(found).items() if name != "command"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="the peer's python")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = resolve_model("demo").path
    ours, theirs = args.work / "gptq-ours", args.work / "gptq-peer"

    def ids_file() -> Path:
        corpus, tokenizer = load_text(None, split="calibration"), open_tokenizer(source)
        ids = calibration_windows(
            corpus, tokenizer, samples=SAMPLES, length=LENGTH, seed=0, bos=False
        )
        path: Path = args.work / "ids.safetensors"
        save_file({"input_ids": ids}, str(path))
        return path

    def run() -> dict[str, Any]:
        for folder in (ours, theirs):
            shutil.rmtree(folder, ignore_errors=True)
        command = Path(sys.executable).with_name("crossbit")
        budget = f"--samples {SAMPLES} --length {LENGTH} --seed 0"
        plain = "--set embedding=null --set head=null --set evaluation.windows=0"
        own = measure(
            f"{command} quantize demo --recipe gptq-w4a16-g64 --out {ours} {budget} {plain}".split()
        )
        peer_json = args.work / "peer.json"
        grid = "--scheme W4A16 --group-size 64 --threads 2"
        files = f"--model {source} --ids {ids_file()} --out {theirs} --json {peer_json}"
        script = "benchmarks/peers/llmcompressor_gptq.py"
        peer = measure(f"{args.peer} {script} {grid} {files}".split())
        made = json.loads((ours / "crossbit.json").read_text("utf8"))
        return {
            "ours": {
                "process": _figures(own),
                "seconds": made["time"],
                "memory": made["memory"],
                "bytes": made["size"]["file_bytes"],
            },
            "peer": {"process": _figures(peer), "own": json.loads(peer_json.read_text("utf8"))},
        }

    cost = once("gptq-peer-cost", "python -m benchmarks.gptq_peer", run)

    def quality() -> dict[str, Any]:
        models = {"original": "demo", "ours": str(ours), "peer": str(theirs)}
        return {
            name: crossbit.evaluate(model, text=args.text, windows=WINDOWS)["perplexity"]
            for name, model in models.items()
        }

    found = once("gptq-peer-quality", "python -m benchmarks.gptq_peer", quality)
    for name in ("original", "ours", "peer"):
        paired = paired_loss(found[name]["losses"], found["original"]["losses"])
        value = perplexity(found[name]["losses"]).value
        print(f"{name}: {value:.3f}, loss {100 * paired.value:+.2f} % +- {100 * paired.stderr:.2f}")
    print("ours:", cost["ours"]["seconds"], cost["ours"]["memory"])
    print("peer:", cost["peer"]["own"]["seconds"], cost["peer"]["process"]["peak_rss_bytes"])


if __name__ == "__main__":
    main()
