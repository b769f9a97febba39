"""The compressed-tensors form of a quantized model: the config and the tensors of a module.

Facts that decide the form were measured on transformers 5.23 with compressed-tensors 0.20; the
integration tests repeat the measurements. Pure functions: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.export.scheme import INT, PACKED, QuantScheme
from crossbit.export.targets import (
    EMBEDDING,
    EXPERTS,
    LINEAR,
    compact,
    resolve,
)
from crossbit.grid import QTensor
from crossbit.models.experts import is_expert
from crossbit.packing import pack

METHOD = "compressed-tensors"


def quantization_config(
    schemes: Mapping[str, QuantScheme], dense: Iterable[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        schemes: name -> scheme of every quantized module: its path in the transformers model, or,
            for one matrix of an expert, its name in the file; a tied head is listed with the
            scheme of its embedding.
        dense: such names of the linear layers (head and routers included) that stay as they are.

    Returns:
        A dictionary of plain JSON values, validated by compressed-tensors. The scheme of most
        linear layers targets "Linear", the others exact names or expressions.

    Raises:
        InputError: nothing quantized, a module both quantized and dense, experts that are not all
            quantized alike, or a config that compressed-tensors refuses.
    """
    unquantized = set(dense)
    if not schemes:
        raise InputError("no quantized module to export")
    both = sorted(unquantized & set(schemes))
    if both:
        raise InputError(f"{both[0]}: listed as quantized and as dense")
    _check_experts(schemes, unquantized)
    _check_zero_points(schemes)
    plain = {n: s for n, s in schemes.items() if not is_expert(n)}
    universe = [*plain, *(n for n in unquantized if not is_expert(n))]
    members: dict[tuple[object, ...], list[str]] = {}
    for name in sorted(schemes):
        members.setdefault(schemes[name].key, []).append(name)
    default = _default_group(members, schemes)
    groups: list[dict[str, Any]] = []
    for key, names in members.items():
        targets = [EXPERTS] if any(is_expert(n) for n in names) else []
        own = [n for n in names if not is_expert(n)]
        if key == default:
            special = [n for n in own if schemes[n].role == "embedding"]
            targets += [*compact(special, universe), LINEAR]
        else:
            targets += compact(own, universe)
        groups.append({"targets": targets, **schemes[names[0]].config()})
    # The general group comes last: readers warn about targets that an earlier one covers.
    groups.sort(key=lambda g: (LINEAR in g["targets"], g["targets"]))
    formats = sorted({str(g["format"]) for g in groups})
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": version("compressed-tensors"),
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": compact(sorted(unquantized), universe),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    _check_resolution(config, schemes, unquantized)
    _validate(config)
    return config


def module_tensors(
    name: str,
    qtensor: QTensor,
    scheme: QuantScheme,
    *,
    static_scale: Tensor | None = None,
    tied: bool = False,
) -> dict[str, Tensor]:
    """The tensors that store one quantized module, by their name in the file.

    Args:
        name: the module's name, without ".weight".
        qtensor: codes int8 [N, K], scale [N', G], zero point or None.
        scheme: how it is stored; its weight grid is the tensor's.
        static_scale: step of the input, for ``per_tensor_static``.
        tied: the head of a tied embedding: its codes are the embedding's, so only the scale is
            written under its own name (readers need it there).

    Returns:
        int-quantized: weight int8 [N, K]; pack-quantized: weight_packed int32 [N, ceil(K b / 32)]
        and weight_shape int64 [2]; both: weight_scale [N', G] ([1] per tensor), and, asymmetric,
        weight_zero_point (int8 [N', G], packed: int32 [ceil(N b / 32), G]); input_scale [1].
    """
    if qtensor.grid != scheme.weights:
        raise InputError(
            f"{name}: the weight is {qtensor.grid.describe()}, its scheme says "
            f"{scheme.weights.describe()}"
        )
    per_tensor = qtensor.grid.strategy == "tensor"
    scale = qtensor.scale.reshape(1) if per_tensor else qtensor.scale
    if tied:
        scale = scale.clone()  # the embedding stores the same values, and files share no memory
    out: dict[str, Tensor] = {"weight_scale": scale}
    if not tied:
        if scheme.format == INT:
            out["weight"] = qtensor.codes
        else:
            out["weight_packed"] = pack(qtensor.codes, qtensor.grid.bits)
            out["weight_shape"] = torch.tensor(list(qtensor.codes.shape), dtype=torch.int64)
    if qtensor.zero_point is not None:
        zero = qtensor.zero_point.reshape(1) if per_tensor else qtensor.zero_point
        packed = scheme.format != INT and not per_tensor
        out["weight_zero_point"] = pack(zero, qtensor.grid.bits, dim=0) if packed else zero
    static = scheme.activations is not None and scheme.activations.kind == "per_tensor_static"
    if static != (static_scale is not None):
        raise InputError(f"{name}: a static input scale goes with static activations, and only so")
    if static_scale is not None:
        out["input_scale"] = static_scale.reshape(1)
    return {f"{name}.{suffix}": out[suffix].contiguous() for suffix in sorted(out)}


def _check_experts(schemes: Mapping[str, QuantScheme], dense: set[str]) -> None:
    experts = {n: s for n, s in schemes.items() if is_expert(n)}
    for name, scheme in schemes.items():
        if (scheme.role == "expert") != (name in experts):
            raise InputError(f"{name}: the role {scheme.role!r} does not go with this name")
    left = sorted(n for n in dense if is_expert(n))
    if left:
        raise InputError(
            f"{left[0]}: dense experts cannot be reloaded beside quantized layers; quantize all "
            "experts"
        )
    if len({s.key for s in experts.values()}) > 1:
        found = ", ".join(sorted({s.weights.describe() for s in experts.values()}))
        raise InputError(
            f"experts have different grids ({found}); readers give all of them the same, so use "
            "one group size that divides all their widths and no overrides inside experts"
        )


def _check_zero_points(schemes: Mapping[str, QuantScheme]) -> None:
    keys = {s.key for s in schemes.values()}
    packed = [n for n, s in schemes.items() if not s.weights.symmetric and s.format == PACKED]
    if packed and len(keys) > 1:
        raise InputError(
            f"{packed[0]}: asymmetric weight-only layers reload only if all layers have that "
            "scheme; use symmetric grids with overrides, a quantized embedding or head"
        )


def _default_group(
    members: Mapping[tuple[object, ...], list[str]], schemes: Mapping[str, QuantScheme]
) -> tuple[object, ...] | None:
    """The key whose group targets "Linear": the one with most linear layers outside experts."""
    counts = {
        key: sum(schemes[n].role == "linear" for n in names) for key, names in members.items()
    }
    best = max(counts, key=lambda key: (counts[key], str(key)))
    return best if counts[best] else None


def _check_resolution(
    config: Mapping[str, Any], schemes: Mapping[str, QuantScheme], dense: set[str]
) -> None:
    """The targets written must give every module back its own scheme."""
    groups = {g: c["targets"] for g, c in config["config_groups"].items()}
    for name, scheme in schemes.items():
        group = resolve(groups, config["ignore"], name, class_of(scheme))
        described = None if group is None else dict(config["config_groups"][group])
        if described is not None:
            described.pop("targets")
        if described != scheme.config():
            raise InputError(f"{name}: its scheme cannot be told apart from that of its neighbours")
    for name in dense:
        if resolve(groups, config["ignore"], name, LINEAR) is not None:
            raise InputError(f"{name}: cannot be left dense, its name matches a quantized group")


def class_of(scheme: QuantScheme) -> str:
    """The class name that readers match for a module of this scheme."""
    return EMBEDDING if scheme.role == "embedding" else LINEAR


def _validate(config: Mapping[str, Any]) -> None:
    # Only here: the library takes memory that a run does not need before it writes the config.
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(dict(config))
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"compressed-tensors refuses the export's config: {reason}") from error
