"""How the time of ``cbq-w4a16`` grows with blocks and tokens: a quarter, a half, all of them.

    python -m benchmarks.scaling --work DIR

SmolLM2 with its first blocks alone, and with fewer calibration sequences of 512 tokens. The machine
must be idle. One result a run, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.measure import measure
from benchmarks.store import once
from crossbit.errors import WorkError
from crossbit.export.shards import ShardWriter
from crossbit.models.source import resolve_model
from crossbit.output import companions

BLOCKS, SAMPLES, LENGTH = 30, 32, 512
# Blocks and sequences: the whole, then a half and a quarter of each.
RUNS = ((30, 32), (30, 16), (30, 8), (15, 32), (8, 32))


def cut(folder: Path, blocks: int) -> Path:
    """The demo's first blocks as a model of their own; made once."""
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = resolve_model("demo").path
    writer = ShardWriter(folder, 1 << 40)
    with safe_open(str(source / "model.safetensors"), framework="pt") as file:
        for name in sorted(file.keys()):
            parts = name.split(".")
            if parts[1] != "layers" or int(parts[2]) < blocks:
                writer.add(name, file.get_tensor(name))
    writer.close()
    for path in companions(source):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text("utf8"))
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf8")
    return folder


def quantize(work: Path, blocks: int, samples: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    model = "demo" if blocks == BLOCKS else str(cut(work / f"demo-{blocks}", blocks))
    settings = ("embedding=null", "head=null", "evaluation.windows=0")
    command = f"--recipe cbq-w4a16 --samples {samples} --length {LENGTH} --seed 0".split()
    command += [word for setting in settings for word in ("--set", setting)]
    out, program = work / "scaling", str(Path(sys.executable).with_name("crossbit"))
    shutil.rmtree(out, ignore_errors=True)
    found = measure([program, "quantize", model, *command, "--out", str(out)])
    if found.exit_code:
        raise WorkError(f"quantize {model}: exit {found.exit_code}")
    made = json.loads((out / "crossbit.json").read_text("utf8"))
    shutil.rmtree(out)
    return {
        "command": f"crossbit quantize demo {' '.join(command)}",
        "blocks": blocks,
        "samples": samples,
        "length": LENGTH,
        "seconds": made["time"]["stages"]["quantize"],
        "training_seconds": sum(window["seconds"] for window in made["training"]),
        "peak_rss": made["memory"]["stages"]["quantize"],
        "load_before": found.load_before,
    }


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
