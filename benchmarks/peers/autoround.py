"""Quantize a local Hugging Face folder with AutoRound, and save the integers that it found.

Runs inside the peer's environment and imports nothing of crossbit. Fixed from outside: bits, group
size, symmetry, activation bits, the calibration token ids, iterations and batch size. Everything
else is AutoRound's default; the resolved settings are written into the JSON result.

    python autoround.py --model FOLDER --ids IDS.safetensors --bits 4 --group 64 \
        --act-bits 16 --out DIR --json RESULT.json

AutoRound's own exporters do not take every grid used here (it offers integer activations below 8
bits only as "fake" models), so the folder is written by this script: compressed-tensors
``int-quantized``, codes int8, scales float32 (AutoRound's are float16: exact). It is weight-only
even where activations were quantized; ``activations.json`` beside it says how, because AutoRound's
activation grid is not the one that compressed-tensors describes: the row's largest element takes
the code -2^(b-1) with a signed step. Every layer is compared with the weight that AutoRound left
in the model, and must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from common import (
    add_files,
    check_files,
    digest,
    load_ids,
    plain,
    process_status,
    versions,
)

# The model is a local folder: nothing may be looked up while the clock runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def integers(layer: Any) -> tuple[Any, Any, Any]:
    """Signed codes int8 [N, K], scale float32 [N, G], zero point int8 [N, G] or None.

    Raises:
        ValueError: they do not give back the weight that AutoRound left in the layer.
    """
    import torch

    weight = layer.weight.data
    rows, columns = weight.shape
    scale = layer.scale.float()
    scale = scale.reshape(rows, -1)
    size = columns // scale.shape[1]
    wide = scale.repeat_interleave(size, dim=1)
    half = 1 << (layer.bits - 1)
    steps = torch.round(weight.float() / wide)  # code - zero point, whatever the symmetry
    zero = None
    if layer.sym:
        codes = steps
    else:
        # AutoRound counts codes from 0, compressed-tensors from -2^(b-1).
        zero = layer.zp.float().reshape(rows, -1) - half
        codes = steps + zero.repeat_interleave(size, dim=1)
    inside = bool(((codes >= -half) & (codes < half)).all())
    if not inside or not torch.equal((wide * steps).to(weight.dtype), weight):
        raise ValueError("the integers do not reproduce AutoRound's weight")
    return codes.to(torch.int8), scale, None if zero is None else zero.to(torch.int8)


def described(bits: int, group: int, symmetric: bool, targets: list[str]) -> dict[str, Any]:
    """The quantization_config of a weight-only int-quantized folder."""
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": targets,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def save(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[str]:
    """Write the folder; returns the names of the quantized layers."""
    import torch
    from safetensors.torch import save_file

    tied = bool(model.config.tie_word_embeddings)
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        inner = getattr(module, "orig_layer", module)  # the wrapper of quantized activations
        if isinstance(inner, torch.nn.Linear) and getattr(inner, "scale", None) is not None:
            layers[name.removesuffix(".orig_layer")] = inner
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        plain_name = name.replace(".orig_layer.", ".")
        module = plain_name.removesuffix(".weight")
        if module in layers or (tied and plain_name == "lm_head.weight"):
            continue
        if any(plain_name.startswith(f"{layer}.") for layer in layers) and (
            not plain_name.endswith(".bias")
        ):
            continue
        tensors[plain_name] = value.detach().contiguous()
    for name, layer in layers.items():
        codes, scale, zero = integers(layer)
        tensors[f"{name}.weight"] = codes.contiguous()
        tensors[f"{name}.weight_scale"] = scale.contiguous()
        if zero is not None:
            tensors[f"{name}.weight_zero_point"] = zero.contiguous()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(arguments.out / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((arguments.model / "config.json").read_text("utf8"))
    config["quantization_config"] = described(
        arguments.bits, arguments.group, arguments.symmetric, sorted(layers)
    )
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf8")
    if arguments.act_bits < 16:
        acts = {"bits": arguments.act_bits, "kind": "signed_full_range"}
        (arguments.out / "activations.json").write_text(json.dumps(acts) + "\n", "utf8")
    tokenizer.save_pretrained(arguments.out)
    return sorted(layers)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize with AutoRound, and measure it.")
    add_files(parser)
    parser.add_argument("--bits", type=int, default=4, help="weight bits")
    parser.add_argument("--group", type=int, default=64, help="0 or -1: one scale a channel")
    parser.add_argument("--act-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile of the quantizers (default: AutoRound's choice)",
    )
    arguments = parser.parse_args()
    check_files(parser, arguments)
    if arguments.iters < 1:
        parser.error("--iters: give at least 1 (AutoRound turns 0 into round to nearest)")
    arguments.group = max(0, arguments.group)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    imports_began = time.perf_counter()
    import psutil
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    import_seconds = time.perf_counter() - imports_began
    ids = load_ids(arguments.ids)

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    load_seconds = time.perf_counter() - began
    # AutoRound masks every pad token out of attention and loss; ids of real text hold none.
    padding = getattr(tokenizer, "pad_token_id", None)
    padded = 0 if padding is None else int((ids == padding).sum())

    activations: dict[str, Any] = {}
    if arguments.act_bits < 16:
        activations = {
            "act_bits": arguments.act_bits,
            "act_group_size": -1,  # a scale a token
            "act_sym": True,
            "act_dynamic": True,
            "act_data_type": "int",
        }
    began = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",  # a name is required; every field that matters is set below
        bits=arguments.bits,
        group_size=arguments.group or -1,
        sym=arguments.symmetric,
        iters=arguments.iters,
        batch_size=arguments.batch,
        # Sequences shorter than seqlen are dropped without a word, so it is the length of ours.
        seqlen=ids.shape[1],
        nsamples=ids.shape[0],
        dataset=list(ids.split(arguments.batch)),
        device_map="cpu",
        enable_torch_compile=arguments.compile,
        **activations,
    )
    model, _ = rounder.quantize()
    quantize_seconds = time.perf_counter() - began
    quantized_rss = process_status("VmHWM")

    began = time.perf_counter()
    done = save(model, tokenizer, arguments)
    if not done:
        sys.exit(f"{arguments.model}: AutoRound quantized no Linear layer")
    left = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    left = [n for n in left if n.removesuffix(".orig_layer") not in done]
    save_seconds = time.perf_counter() - began

    quantizer = rounder.alg_composer.block_quantizer
    result = {
        "peer": "AutoRound",
        "method": "autoround",
        "scheme": f"W{arguments.bits}A{arguments.act_bits}",
        "settings": {
            "bits": arguments.bits,
            "activation_bits": arguments.act_bits,
            "group_size": arguments.group,
            "symmetric": arguments.symmetric,
            "batch_size": arguments.batch,
            "iters": arguments.iters,
            "torch_compile": bool(rounder.enable_torch_compile),
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "scale_bits": 16,
            "pad_tokens": padded,
            "threads": torch.get_num_threads(),
        },
        "recipe": plain(vars(quantizer.config)),
        "calibration": {"samples": ids.shape[0], "length": ids.shape[1], "sha256": digest(ids)},
        "layers": {"quantized": len(done), "left": left},
        "seconds": {
            "import": import_seconds,
            "load": load_seconds,
            "quantize": quantize_seconds,
            "save": save_seconds,
            "process": time.time() - psutil.Process().create_time(),
        },
        "peak_rss_bytes": process_status("VmHWM"),
        "peak_rss_bytes_after": {"quantize": quantized_rss},
        "versions": versions(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
