"""A quantized folder as a dense one.

compressed-tensors folders are decompressed module by module with that library's own compressors,
straight from the checkpoint: transformers' loader takes one scheme for the whole model (its
``dequantize=True`` fails on mixed config groups) and no packed embeddings. Other methods go
through transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from crossbit.errors import CrossbitError, InputError
from crossbit.models.built import build_once
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.dense import ShardWriter, copy_companions
from crossbit.models.fingerprint import folder_fingerprint
from crossbit.models.quiet import quiet_transformers
from crossbit.models.validate import weight_layout

_FORMAT = 1

# Tensors of a quantized module that are its weight, by the end of their names.
_WEIGHT_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "weight",
)
# Statistics of activations and caches: nothing of them is left in dense weights.
_ACTIVATION_PARTS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
    "k_zero_point",
    "v_zero_point",
)


def dequantize_folder(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[Path, str]:
    """Return a dense copy of a quantized folder, made on the first call, and a note on it.

    Args:
        folder: a model folder whose config.json has a ``quantization_config``.
        config: its parsed config.json.
        dtype: dtype of the dense weights; by default the one the config states, else bfloat16.

    Raises:
        InputError: a method or scheme that cannot be made dense here.
    """
    method = str(config["quantization_config"].get("quant_method", "unknown"))
    chosen = dtype or _stated_dtype(config)
    identity = folder_fingerprint(folder, weight_layout(folder).files)
    name = str(chosen).removeprefix("torch.")
    key = f"dense-{folder.resolve().name[:60]}-{identity[:16]}-{name}-v{_FORMAT}"
    make = _decompress if method == "compressed-tensors" else _through_transformers
    build: Callable[[Path], None] = lambda target: make(folder, target, config, chosen)  # noqa: E731
    return build_once(key, build), f"dequantized from {method}: weights stand on its grid already"


def _stated_dtype(config: dict[str, Any]) -> torch.dtype:
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    found = getattr(torch, stated.removeprefix("torch."), torch.bfloat16)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _decompress(source: Path, target: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    schemes = _Schemes(config["quantization_config"], str(source))
    with Checkpoint(source) as checkpoint:
        modules: dict[str, list[str]] = {}
        plain: list[str] = []
        for name in checkpoint.names:
            prefix, _, part = name.rpartition(".")
            if part in _WEIGHT_PARTS and f"{prefix}.weight_scale" in checkpoint:
                modules.setdefault(prefix, []).append(name)
            elif part not in _ACTIVATION_PARTS:
                plain.append(name)
        if not modules:
            raise InputError(
                f"{source}: quantization_config without any quantized tensor; "
                "remove it from config.json if the weights are dense"
            )
        file_of = {name: file for file, names in checkpoint.by_file().items() for name in names}
        writer = ShardWriter(target, len(checkpoint.files))
        for file in checkpoint.files:
            shard: dict[str, Tensor] = {}
            for name in plain:
                if file_of[name] == file:
                    value = checkpoint.tensor(name)
                    shard[name] = value.to(dtype) if value.is_floating_point() else value
            for prefix, names in modules.items():
                # A module's parts can lie in two shards; its weight goes where the first is.
                if file_of[names[0]] == file:
                    parts = {n.rpartition(".")[2]: checkpoint.tensor(n) for n in names}
                    shard[f"{prefix}.weight"] = schemes.dense(prefix, parts).to(dtype)
            writer.write(shard)
        writer.finish()
    copy_companions(source, target, _dense_config(config, dtype))


class _Schemes:
    """Which compressed-tensors scheme applies to a module, and the dense weight it stands for."""

    def __init__(self, quantization_config: dict[str, Any], where: str) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        self.where = where
        # Weights in a rotated basis need operations that a dense model does not run.
        if (quantization_config.get("transform_config") or {}).get("config_groups"):
            raise InputError(
                f"{where}: quantized in a transformed basis (transform_config), which dense "
                "weights cannot express; use the original model"
            )
        sparsity = quantization_config.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise InputError(
                f"{where}: sparse compression ({sparsity['format']}) is not supported; "
                "use the original model"
            )
        known = {
            key: value
            for key, value in quantization_config.items()
            if key not in ("transform_config", "sparsity_config")
        }
        try:
            self.config = QuantizationConfig.model_validate(known)
        except ValueError as error:
            raise InputError(
                f"{where}: compressed-tensors cannot read quantization_config "
                f"({' '.join(str(error).split())[:160]})"
            ) from error

    def dense(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The weight [N, K] of module ``name``, in the dtype of its scales."""
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(name)
        form = scheme.format or self.config.format
        form = str(getattr(form, "value", form))
        if form in ("mixed-precision", "dense"):
            form = "pack-quantized" if "weight_packed" in parts else "naive-quantized"
        try:
            compressor = BaseCompressor.get_value_from_registry(form)
            weight: Tensor = compressor.decompress(parts, scheme)["weight"]
        except Exception as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
            raise InputError(
                f"{self.where}: {name} ({form}) cannot be dequantized ({reason}); "
                "use the original model"
            ) from error
        return weight

    def _scheme(self, name: str) -> Any:
        from compressed_tensors.utils.match import is_match

        # Experts are modules of their own in the checkpoint and fused in the model, so the class
        # is told from the name.
        kind = nn.Embedding if "embed" in name.rpartition(".")[2] else nn.Linear
        module = kind(1, 1, device="meta")
        for scheme in self.config.config_groups.values():
            if is_match(name, module, scheme.targets):
                return scheme
        raise InputError(
            f"{self.where}: {name} has quantized tensors but no config group targets it; "
            "the config does not belong to these weights"
        )


def _through_transformers(
    source: Path, target: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    method = config["quantization_config"].get("quant_method", "unknown")
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(source),
                dtype=dtype,
                device_map="cpu",
                local_files_only=True,
                trust_remote_code=False,
            )
            model = model.dequantize()
            model.hf_quantizer = None
            model.is_quantized = False
            with contextlib.suppress(AttributeError):
                del model.config.quantization_config
            model.to(dtype).save_pretrained(target)
    except CrossbitError:
        raise
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise InputError(
            f"{source}: transformers cannot dequantize {method} here ({reason}); "
            "use the original model"
        ) from error
    kept = {key for key in ("quantization_config",) if key in model.config.to_dict()}
    if kept:
        raise InputError(f"{source}: transformers left {method} weights quantized")
    for written in target.glob("*.safetensors"):
        written.chmod(0o644)
    copy_companions(source, target, _dense_config(config, dtype))


def _dense_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config of the dense model: no quantization, and its dtype stated."""
    dense = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    return {**dense, "dtype": str(dtype).removeprefix("torch.")}
