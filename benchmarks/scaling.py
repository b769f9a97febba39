"""How the time of ``cbq-w4a16`` grows with blocks and tokens: a quarter, a half, all of them.

    python -m benchmarks.scaling --work DIR

SmolLM2 with its first blocks alone, and with fewer calibration sequences of 512 tokens. The machine
must be idle. One result a run, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.plan_accuracy import model_folder
from benchmarks.quantizing import quantized
from benchmarks.store import once
from crossbit.export.shards import ShardWriter
from crossbit.models.source import resolve_model

BLOCKS, LENGTH = 30, 512
# Blocks and sequences: the whole, then a half and a quarter of each.
RUNS = ((30, 32), (30, 16), (30, 8), (15, 32), (8, 32))


def cut(folder: Path, blocks: int) -> Path:
    """The demo's first blocks as a model of their own; made once."""
    source = resolve_model("demo").path
    config = json.loads((source / "config.json").read_text("utf8"))

    def write(writer: ShardWriter) -> None:
        with safe_open(str(source / "model.safetensors"), framework="pt") as file:
            for name in sorted(file.keys()):
                parts = name.split(".")
                if parts[1] != "layers" or int(parts[2]) < blocks:
                    writer.add(name, file.get_tensor(name))

    return model_folder(folder, {**config, "num_hidden_layers": blocks}, write)


def quantize(work: Path, blocks: int, samples: int) -> dict[str, Any]:
    """One run."""
    model = "demo" if blocks == BLOCKS else str(cut(work / f"demo-{blocks}", blocks))
    out = work / "scaling"
    shutil.rmtree(out, ignore_errors=True)
    took, _ = quantized(model, "cbq-w4a16", (), out, budget=(samples, LENGTH))
    shutil.rmtree(out)
    return {**took, "blocks": blocks, "samples": samples, "length": LENGTH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for blocks, samples in RUNS:
        found = once(
            f"scaling-{blocks}-blocks-{samples}x{LENGTH}",
            "python -m benchmarks.scaling",
            partial(quantize, args.work, blocks, samples),
        )
        print(f"{blocks} blocks, {samples} x {LENGTH} tokens: {found['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
