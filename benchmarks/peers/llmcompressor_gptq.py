"""Quantize a local Hugging Face folder with llm-compressor, the peer of the GPTQ comparison.

Runs inside an environment of its own (requirements-llmcompressor.txt) and imports nothing of
crossbit. Fixed from outside, so that both sides solve the same problem: bits, group size,
symmetry, ignored layers, and the calibration token ids. Everything else is llm-compressor's
default; the defaults that matter are written into the JSON result under "recipe".

    python llmcompressor_gptq.py --model FOLDER --ids IDS.safetensors --scheme W4A16 \
        --group-size 64 --out DIR --json RESULT.json

--ids holds one int64 tensor "input_ids" [samples, length]. --group-size 0 means one scale per
output channel. Activations below 16 bits are quantized per token at run time, which is what
llm-compressor's own W8A8 preset does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

# The model is a local folder: nothing may be looked up while the clock runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGES = (
    "llmcompressor",
    "compressed-tensors",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "numpy",
)


def parse_scheme(text: str) -> tuple[int, int]:
    """Weight bits and activation bits of a name such as W4A16; ValueError for another form."""
    match = re.fullmatch(r"W(\d+)A(\d+)", text.upper())
    if match is None:
        raise ValueError(f"scheme {text!r}: expected W<bits>A<bits>, for example W4A16")
    return int(match[1]), int(match[2])


def config_group(
    weight_bits: int, activation_bits: int, group_size: int, symmetric: bool
) -> dict[str, Any]:
    """One compressed-tensors config group for every Linear; group_size 0 is per channel."""
    weights: dict[str, Any] = {
        "num_bits": weight_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "dynamic": False,
    }
    if group_size:
        weights["group_size"] = group_size
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if activation_bits < 16:
        group["input_activations"] = {
            "num_bits": activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return group


def modifiers(
    method: str, group: dict[str, Any], ignore: list[str], smoothquant: float | None
) -> list[Any]:
    """The llm-compressor recipe: an optional SmoothQuant, then GPTQ or round-to-nearest."""
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]
        QuantizationModifier,
    )
    from llmcompressor.modifiers.transform.smoothquant import (  # type: ignore[import-not-found]
        SmoothQuantModifier,
    )

    recipe: list[Any] = []
    if smoothquant is not None:
        recipe.append(SmoothQuantModifier(smoothing_strength=smoothquant))
    solver = GPTQModifier if method == "gptq" else QuantizationModifier
    recipe.append(solver(config_groups={"group_0": group}, ignore=ignore))
    return recipe


def process_status(key: str) -> int:
    """A kB figure of /proc/self/status in bytes (VmHWM: highest resident size so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def quantized_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of the Linear layers that carry a scheme, and of those that do not."""
    import torch

    done: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            (done if hasattr(module, "quantization_scheme") else left).append(name)
    return done, left


def plain(value: Any) -> Any:
    """JSON form of a modifier's settings: enums and dtypes become their text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if hasattr(value, "value"):
        return plain(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize with llm-compressor, and measure it.")
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face folder")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors with input_ids")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--json", type=Path, required=True, help="file for the measurements")
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--scheme", default="W4A16", help="W<bits>A<bits>")
    parser.add_argument("--bits", type=int, help="weight bits; must agree with --scheme")
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale a channel")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ignore", action="append", help="layer left alone (default: lm_head)")
    parser.add_argument("--smoothquant", type=float, metavar="STRENGTH", help="smooth first")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a forward pass")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    arguments = parser.parse_args()
    try:
        weight_bits, activation_bits = parse_scheme(arguments.scheme)
    except ValueError as error:
        parser.error(str(error))
    if arguments.bits is not None and arguments.bits != weight_bits:
        parser.error(f"--bits {arguments.bits} contradicts --scheme {arguments.scheme}")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model}: no config.json; pass a Hugging Face folder")
    if not arguments.ids.is_file():
        parser.error(f"{arguments.ids}: no such file")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out}: not empty; pass a new folder")
    arguments.weight_bits, arguments.activation_bits = weight_bits, activation_bits
    arguments.ignore = arguments.ignore or ["lm_head"]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    imports_began = time.perf_counter()
    import psutil
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from loguru import logger  # type: ignore[import-not-found,unused-ignore]
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A fallback to round-to-nearest, for one, is only told in the log. The library also logs
    # its figures at a level of its own above WARNING: hence the second look at the name.
    warnings: list[str] = []
    logger.add(
        lambda message: warnings.append(message.record["message"]),
        level="WARNING",
        filter=lambda record: record["level"].name in {"WARNING", "ERROR", "CRITICAL"},
    )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    import_seconds = time.perf_counter() - imports_began

    ids = load_file(arguments.ids)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        sys.exit(f"{arguments.ids}: input_ids must be int64 [samples, length], is {ids.dtype}")
    recipe = modifiers(
        arguments.method,
        config_group(
            arguments.weight_bits,
            arguments.activation_bits,
            arguments.group_size,
            arguments.symmetric,
        ),
        arguments.ignore,
        arguments.smoothquant,
    )

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    load_seconds = time.perf_counter() - began
    loaded_rss = process_status("VmHWM")

    needs_data = arguments.method == "gptq" or arguments.smoothquant is not None
    calibration: dict[str, Any] = {}
    if needs_data:
        calibration = {
            "dataset": Dataset.from_dict({"input_ids": ids.tolist()}),
            "max_seq_length": ids.shape[1],
            "num_calibration_samples": ids.shape[0],
            "batch_size": arguments.batch_size,
            # The default shuffles without a seed; the order changes only rounding.
            "shuffle_calibration_samples": False,
        }
    began = time.perf_counter()
    oneshot(model=model, processor=tokenizer, recipe=recipe, **calibration)
    quantize_seconds = time.perf_counter() - began
    quantized_rss = process_status("VmHWM")
    done, left = quantized_layers(model)
    if not done:
        sys.exit(f"{arguments.model}: llm-compressor quantized no Linear layer")

    began = time.perf_counter()
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)
    save_seconds = time.perf_counter() - began

    result = {
        "peer": "llm-compressor",
        "method": arguments.method,
        "scheme": arguments.scheme.upper(),
        "settings": {
            "bits": arguments.weight_bits,
            "activation_bits": arguments.activation_bits,
            "group_size": arguments.group_size,
            "symmetric": arguments.symmetric,
            "ignore": arguments.ignore,
            "smoothquant_strength": arguments.smoothquant,
            "batch_size": arguments.batch_size,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "recipe": [{type(item).__name__: plain(item)} for item in recipe],
        "calibration": {
            "samples": ids.shape[0] if needs_data else 0,
            "length": ids.shape[1] if needs_data else 0,
            "sha256": hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest(),
        },
        "layers": {"quantized": len(done), "left": left},
        "seconds": {
            "import": import_seconds,
            "load": load_seconds,
            "quantize": quantize_seconds,
            "save": save_seconds,
            "process": time.time() - psutil.Process().create_time(),
        },
        "peak_rss_bytes": process_status("VmHWM"),
        "peak_rss_bytes_after": {"load": loaded_rss, "quantize": quantized_rss},
        "out_bytes": sum(file.stat().st_size for file in arguments.out.rglob("*.safetensors")),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "warnings": list(dict.fromkeys(warnings)),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
