"""Round-to-nearest export of a tiny folder through the real writer, for tests of the export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from crossbit.activations.grid import ActivationGrid
from crossbit.export.compressed_tensors import module_tensors, quantization_config
from crossbit.export.scheme import QuantScheme
from crossbit.export.shards import ShardWriter
from crossbit.grid import Grid, QTensor, as_read, fit_minmax, quantize
from crossbit.models.experts import checkpoint_name, is_expert
from crossbit.models.families import family_of
from crossbit.verification import VerifyRecord, file_digests, own_logits, sketch_logits

CHANNEL8 = Grid(8, True, "channel")
CHANNEL4 = Grid(4, True, "channel")
GROUP4 = Grid(4, True, "group", 32)
SIGNED4 = replace(GROUP4, signed=True)
TOKEN8 = ActivationGrid(8)
TOKEN4 = ActivationGrid(4)
STATIC8 = ActivationGrid(8, "per_tensor_static")


@dataclass(frozen=True)
class Exported:
    """A written folder, and what went into it."""

    folder: Path
    qtensors: dict[str, QTensor]
    schemes: dict[str, QuantScheme]
    static: dict[str, Tensor]


Choose = Callable[[str], QuantScheme | None]


def everywhere(
    weights: Grid, activations: ActivationGrid | None = None, *, head: bool = False
) -> Choose:
    """One scheme for all linear layers; experts weight-only with float32 scales; head dense."""

    def choose(name: str) -> QuantScheme | None:
        if is_expert(name):
            return QuantScheme(replace(weights, scale_dtype=torch.float32), None, "expert")
        if _is_head(name):
            return QuantScheme(as_read(weights)) if head else None
        return QuantScheme(as_read(weights, float_inputs=activations is None), activations)

    return choose


def _is_head(name: str) -> bool:
    return name in ("lm_head", "embed_out")


def round_to_nearest(weight: Tensor, grid: Grid) -> QTensor:
    scale, zero = fit_minmax(weight, grid)
    return QTensor(quantize(weight, scale, zero, grid), scale, zero, grid)


def linear_names(model: Any, stored: dict[str, Tensor]) -> dict[str, str]:
    """Module name -> name of its weight in the file, of all linear layers, experts one by one."""
    family = family_of(model.config)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    found = {n: checkpoint_name(family, f"{n}.weight") for n in names}
    experts = {n.removesuffix(".weight"): n for n in stored if is_expert(n)}
    return {n: w for n, w in found.items() if w in stored} | experts


def input_scale(name: str) -> Tensor:
    """A static step; layers that read the same input share it, as they do after calibration."""
    block = int(re.findall(r"\.(\d+)\.", name)[0])
    later = name.endswith(("o_proj", "down_proj"))
    return torch.tensor(0.02 + 0.003 * block + (0.01 if later else 0.0))


def export_folder(
    source: Path,
    out: Path,
    model: Any,
    choose: Choose,
    *,
    embedding: Grid | None = None,
    max_shard_bytes: int = 1 << 40,
    dense_dtype: torch.dtype | None = None,
    record: list[int] | None = None,
) -> Exported:
    """Write ``out`` from the tiny model saved in ``source``.

    Args:
        choose: scheme of a linear layer by its name in the file, None for dense.
        embedding: grid of the embedding (and of a tied head).
        dense_dtype: dtype of the tensors that are not quantized.
        record: token ids for crossbit.json; None writes none.
    """
    stored = load_file(source / "model.safetensors")
    out.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" or path.suffix == ".jinja":
            shutil.copy(path, out / path.name)
    writer = ShardWriter(out, max_shard_bytes)
    schemes: dict[str, QuantScheme] = {}
    qtensors: dict[str, QTensor] = {}
    static: dict[str, Tensor] = {}
    dense: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, stored_name in linear_names(model, stored).items():
        scheme = choose(name)
        if scheme is None:
            dense.append(name)
            continue
        schemes[name] = scheme
        qtensors[name] = round_to_nearest(stored.pop(stored_name), scheme.weights)
        if scheme.activations is not None and scheme.activations.kind != "per_token":
            static[name] = input_scale(name)
        tensors |= module_tensors(name, qtensors[name], scheme, static_scale=static.get(name))
    if embedding is not None:
        table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        scheme = QuantScheme(embedding, None, "embedding")
        qtensors[table] = round_to_nearest(stored.pop(f"{table}.weight"), embedding)
        schemes[table] = scheme
        tensors |= module_tensors(table, qtensors[table], scheme)
        if model.config.tie_word_embeddings:
            head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
            schemes[head] = scheme
            qtensors[head] = qtensors[table]
            tensors |= module_tensors(head, qtensors[table], scheme, tied=True)
    elif model.config.tie_word_embeddings:
        dense.append(
            next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        )
    for name, tensor in stored.items():
        tensors[name] = tensor if dense_dtype is None else tensor.to(dense_dtype)
    for name in sorted(tensors):
        writer.add(name, tensors[name])
    writer.close()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(schemes, dense)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    if record is not None:
        logits = own_logits(out, torch.tensor([record]), "cpu")
        made = VerifyRecord(
            writer.digests, record, file_digests(out, ["config.json"]), sketch_logits(logits)
        )
        (out / "crossbit.json").write_text(json.dumps({"verify": made.to_dict()}))
    return Exported(out, qtensors, schemes, static)
