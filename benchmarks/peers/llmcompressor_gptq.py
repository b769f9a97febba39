"""Quantize a local Hugging Face folder with llm-compressor: GPTQ, AWQ, SmoothQuant and rounding.

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
import json
import os
import re
import sys
import time
from typing import Any

from common import add_files, check_files, digest, load_ids, plain, process_status, versions

# The model is a local folder: nothing may be looked up while the clock runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

METHODS = ("gptq", "rtn", "awq", "smoothquant-gptq")
# Strength in the W8A8 recipes published with llm-compressor; the default of its class is 0.5.
SMOOTHQUANT = 0.8


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
    """The llm-compressor recipe: an optional transform, then GPTQ or round-to-nearest.

    ``awq`` and ``rtn`` end in the same rounding: AWQ is a transform that comes before it.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]
        QuantizationModifier,
    )
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.smoothquant import (  # type: ignore[import-not-found]
        SmoothQuantModifier,
    )

    recipe: list[Any] = []
    if smoothquant is not None:
        recipe.append(SmoothQuantModifier(smoothing_strength=smoothquant))
    if method == "awq":
        recipe.append(AWQModifier())
    solver = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    recipe.append(solver(config_groups={"group_0": group}, ignore=ignore))
    return recipe


def without_pinning() -> bool:
    """Let AWQ run without an accelerator; True if that needed a change.

    Its activation cache is pinned for the transfer to the accelerator whether there is one or
    not, and torch refuses that on a machine without. Pinning moves no value.
    """
    import torch
    from llmcompressor.pipelines.cache import (  # type: ignore[import-not-found]
        IntermediatesCache,
    )

    if torch.accelerator.is_available():
        return False
    IntermediatesCache.pin_memory = lambda *_: None
    return True


def quantized_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of the Linear layers that carry a scheme, and of those that do not."""
    import torch

    done: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            (done if hasattr(module, "quantization_scheme") else left).append(name)
    return done, left


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize with llm-compressor, and measure it.")
    add_files(parser)
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--scheme", default="W4A16", help="W<bits>A<bits>")
    parser.add_argument("--bits", type=int, help="weight bits; must agree with --scheme")
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale a channel")
    parser.add_argument("--ignore", action="append", help="layer left alone (default: lm_head)")
    parser.add_argument("--smoothquant", type=float, metavar="STRENGTH", help="smooth first")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a forward pass")
    arguments = parser.parse_args()
    try:
        weight_bits, activation_bits = parse_scheme(arguments.scheme)
    except ValueError as error:
        parser.error(str(error))
    if arguments.bits is not None and arguments.bits != weight_bits:
        parser.error(f"--bits {arguments.bits} contradicts --scheme {arguments.scheme}")
    check_files(parser, arguments)
    arguments.weight_bits, arguments.activation_bits = weight_bits, activation_bits
    arguments.ignore = arguments.ignore or ["lm_head"]
    if arguments.method == "smoothquant-gptq" and arguments.smoothquant is None:
        arguments.smoothquant = SMOOTHQUANT
    return arguments


def main() -> None:
    arguments = parse_arguments()
    imports_began = time.perf_counter()
    import psutil
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from loguru import logger  # type: ignore[import-not-found,unused-ignore]
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

    ids = load_ids(arguments.ids)
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

    unpinned = arguments.method == "awq" and without_pinning()
    needs_data = arguments.method != "rtn" or arguments.smoothquant is not None
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
            "scale_bits": model.dtype.itemsize * 8,
            "threads": torch.get_num_threads(),
        },
        "changes": ["activation cache not pinned: no accelerator"] if unpinned else [],
        "recipe": [{type(item).__name__: plain(item)} for item in recipe],
        "calibration": {
            "samples": ids.shape[0] if needs_data else 0,
            "length": ids.shape[1] if needs_data else 0,
            "sha256": digest(ids),
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
        "versions": versions(),
        "warnings": list(dict.fromkeys(warnings)),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
