"""A quantized folder as transformers and compressed-tensors load it, to be compared with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from crossbit.export.comparison import Check, some
from crossbit.export.reader import QUANTIZED_PARTS, QuantizedCheckpoint
from crossbit.export.scheme import INT
from crossbit.models.quiet import quiet_transformers
from crossbit.models.shell import build_empty


def reload_model(
    folder: Path, checkpoint: QuantizedCheckpoint, device: str
) -> tuple[nn.Module | None, Check]:
    """The folder as transformers loads it (float32, eager), None if it does not."""
    options: dict[str, Any] = {}
    if _needs_dequantize(checkpoint):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    try:
        with quiet_transformers():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    except Exception as error:  # whatever another library raises is a failed check
        reason = " ".join(str(error).split())[:300]
        return None, Check(
            "reload",
            False,
            None,
            None,
            f"transformers cannot load it: {type(error).__name__}: {reason}",
        )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    wrong["missing_keys"] = _really_missing(model.config, wrong.get("missing_keys", []))
    detail = f"transformers {transformers.__version__}"
    if any(wrong.values()):
        detail = "; ".join(f"{key.replace('_', ' ')}: {some(v)}" for key, v in wrong.items() if v)
    count = sum(len(value) for value in wrong.values())
    return model.eval().to(device), Check("reload", count == 0, count, 0, detail)


@contextmanager
def dense_in_turn(model: nn.Module) -> Iterator[None]:
    """Let a packed model run with one dense layer in memory at a time.

    compressed-tensors makes the whole model dense when its first forward pass begins. Inside this
    context its own function does so for each layer as the pass reaches it, and the weight is
    dropped when the layer, and every forward hook that was put on it before, is through. For one
    pass: a layer that ran has no weight any more. A model that is dense already is left alone.
    """
    handles: list[Any] = []
    if hasattr(model, "ct_decompress_hook"):
        from compressed_tensors.compressors import decompress_module

        compressor: Any = model.hf_quantizer.compressor  # type: ignore[union-attr]
        compressor.remove_decompression_hook(model)
        # A tied embedding is read again as the head.
        tied = getattr(model.config, "tie_word_embeddings", False)
        for module in model.modules():
            if not hasattr(module, "quantization_scheme"):
                continue
            if tied and not isinstance(module, nn.Linear):
                decompress_module(module)
            else:
                handles.append(module.register_forward_pre_hook(_before(decompress_module)))
                handles.append(module.register_forward_hook(_drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(decompress: Callable[[nn.Module], None]) -> Callable[[nn.Module, Any], None]:
    return lambda module, _: decompress(module)


def _drop(module: nn.Module, *_: Any) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    empty = torch.empty_like(weight, device="meta")
    module.weight = nn.Parameter(empty, requires_grad=False)


def _really_missing(config: Any, missing: Sequence[str]) -> list[str]:
    """Missing keys, less the buffers that no checkpoint stores.

    compressed-tensors makes every buffer of a quantized module a stored one (``embed_scale`` of
    Gemma-3); transformers then reports it missing and computes it, as it does without
    quantization.
    """
    if not missing:
        return []
    stored = set(build_empty(config).state_dict())
    return [k for k in missing if k in stored or k.rpartition(".")[2] in QUANTIZED_PARTS]


def _needs_dequantize(checkpoint: QuantizedCheckpoint) -> bool:
    """True for packed asymmetric weights: transformers 5.23 reads their zero points only so."""
    packed = any(
        not scheme.weights.symmetric and checkpoint.storage(name) != INT
        for name, scheme in checkpoint.schemes.items()
    )
    alike = len({scheme.key for scheme in checkpoint.schemes.values()}) == 1
    return packed and alike and not rounds_inputs(checkpoint)


def rounds_inputs(checkpoint: QuantizedCheckpoint) -> bool:
    """True if any layer quantizes its input."""
    return any(scheme.activations is not None for scheme in checkpoint.schemes.values())
