"""From solved layers to the tensors and the config of the folder that is written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossbit.engine.plan import BlockPlan, LayerPlan, ModelPlan
from crossbit.export.compressed_tensors import module_tensors, quantization_config
from crossbit.export.research import CLIP, COLUMNS, ROTATION
from crossbit.export.scheme import QuantScheme
from crossbit.grid import Grid, QTensor
from crossbit.models.experts import checkpoint_name, is_expert
from crossbit.models.families import Family
from crossbit.models.shell import Shell
from crossbit.models.structure import BlockStructure, ModelStructure
from crossbit.recipe import Gptq
from crossbit.runtime.install import QuantizedLayer
from crossbit.solvers.gptq import gptq
from crossbit.solvers.rtn import rtn

ROWS = 4096  # of an embedding or head that are rounded or solved at a time


def stored_name(family: Family, module: str) -> str:
    """Name in the file of a module's tensors, without the last part."""
    return checkpoint_name(family, f"{module}.weight").removesuffix(".weight")


def target_name(family: Family, module: str) -> str:
    """Name by which the config speaks of a module.

    Readers match module paths, except for experts, which exist only in the file.
    """
    return stored_name(family, module) if is_expert(module) else module


def layer_scheme(name: str, plan: LayerPlan) -> QuantScheme:
    """How a linear layer of a block is stored; research activations are kept elsewhere."""
    activations = plan.activations
    if activations is not None and activations.research:
        activations = None
    return QuantScheme(plan.weights, activations, "expert" if is_expert(name) else "linear")


def outside_schemes(structure: ModelStructure, plan: ModelPlan) -> dict[str, QuantScheme]:
    """Schemes of embedding and head, by module name."""
    schemes = {}
    if plan.embedding is not None:
        schemes[structure.embedding] = QuantScheme(plan.embedding, None, "embedding")
    if plan.head is not None:
        role = "embedding" if structure.tied else "linear"
        schemes[structure.head] = QuantScheme(plan.head, None, role)  # type: ignore[arg-type]
    return schemes


def round_embedding(shell: Shell, plan: ModelPlan) -> None:
    """Let the shell go on with the embedding rounded to its grid, if it has one."""
    if plan.embedding is None:
        return
    weight = shell.model.get_submodule(shell.structure.embedding).weight.data
    for part in torch.split(weight, ROWS):  # views: written in place
        part.copy_(_round_rows(part, plan.embedding).dequantize())


def quantize_outside(
    shell: Shell,
    plan: ModelPlan,
    dtype: torch.dtype,
    hessian: Tensor | None = None,
    solver: Gptq | None = None,
) -> dict[str, Tensor]:
    """Tensors of everything outside the blocks in their exported form.

    Args:
        shell: embedding, norms and head loaded.
        plan: grids of embedding and head.
        dtype: of the tensors that stay floating point.
        hessian: mean of x x^T over what the head reads, for ``solver``; None rounds to nearest.
        solver: GPTQ's settings.
    """
    structure = shell.structure
    schemes = outside_schemes(structure, plan)
    tensors: dict[str, Tensor] = {}
    prefix = f"{structure.family.blocks}."
    solved: dict[str, QTensor] = {}
    for module, scheme in schemes.items():
        tied = module == structure.head and structure.tied
        if not tied:
            weight = shell.model.get_submodule(module).weight
            head = module == structure.head or structure.tied
            if head and hessian is not None and solver is not None:
                solved[module] = _solve_rows(weight.detach(), scheme.weights, hessian, solver)
            else:
                solved[module] = _round_rows(weight.detach(), scheme.weights)
        qtensor = solved[structure.embedding if tied else module]
        # Under the module's own name, by which the config speaks of it (GPT-NeoX's file calls the
        # unquantized head embed_out).
        tensors.update(module_tensors(module, qtensor, scheme, tied=tied))
    for name, parameter in shell.model.named_parameters():
        module = name.removesuffix(".weight")
        if name.startswith(prefix) or module in schemes:
            continue
        tensors[checkpoint_name(structure.family, name)] = parameter.detach().to(dtype)
    return tensors


def _round_rows(weight: Tensor, grid: Grid) -> QTensor:
    """Round to nearest a few rows at a time: a vocabulary in float32 would dwarf the blocks.

    The grid has one scale a row (the compatibility table allows no other), so rows are apart.
    """
    return _joined([rtn(part.float(), grid, clip="mse") for part in torch.split(weight, ROWS)])


def _solve_rows(weight: Tensor, grid: Grid, hessian: Tensor, solver: Gptq) -> QTensor:
    """The same with GPTQ, for the head: its logits are what the model is judged by."""
    parts = [
        gptq(part.float(), hessian, grid, **solver.options).qtensor
        for part in torch.split(weight, ROWS)
    ]
    return _joined(parts)


def _joined(parts: list[QTensor]) -> QTensor:
    codes = torch.cat([part.codes for part in parts])
    return QTensor(codes, torch.cat([part.scale for part in parts]), None, parts[0].grid)


def block_tensors(
    family: Family,
    plan: BlockPlan,
    block: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Tensors of one finished block in their exported form.

    Args:
        family: names in files.
        plan: of the block.
        block: its module, with all folds applied.
        layers: its quantized layers by relative name.
        dtype: of the tensors that stay floating point.
    """
    tensors: dict[str, Tensor] = {}
    name, keepers = plan.structure.name, _keepers(plan.structure)
    for relative, layer in layers.items():
        stored = stored_name(family, f"{name}.{relative}")
        scheme = layer_scheme(f"{name}.{relative}", plan.layers[relative])
        tensors.update(
            module_tensors(stored, layer.qtensor, scheme, static_scale=layer.static_scale)
        )
        if layer.columns is not None:
            tensors[f"{stored}.{COLUMNS}"] = layer.columns.float()
        if layer.rotation is not None and keepers[relative] == relative:
            for key, tensor in layer.rotation.tensors().items():
                tensors[f"{stored}.{ROTATION}{key}"] = tensor.clone()
        if layer.clip is not None:  # a copy: layers of one input may have one, files share none
            tensors[f"{stored}.{CLIP}"] = layer.clip.float().reshape(1).clone()
    quantized = {f"{relative}.weight" for relative in layers}
    for key, parameter in block.named_parameters():
        if key not in quantized:
            tensors[checkpoint_name(family, f"{name}.{key}")] = parameter.detach().to(dtype)
    return tensors


def _keepers(structure: BlockStructure) -> dict[str, str]:
    """Layer -> the first of those that read the same input, which its rotation is stored with.

    An input is rotated for all layers that read it, or for none.
    """
    return {name: group.consumers[0] for group in structure.groups for name in group.consumers}


def rotated(family: Family, plan: ModelPlan, stored: Container[str]) -> dict[str, str]:
    """Module whose input is rotated -> the one whose tensors hold the rotation.

    Args:
        family: names in files, which the result speaks in.
        plan: of the model.
        stored: names of all tensors.
    """
    found = {}
    for block in plan.blocks:
        for pair in _keepers(block.structure).items():
            module, keeper = (stored_name(family, f"{block.structure.name}.{n}") for n in pair)
            if f"{keeper}.{ROTATION}first" in stored:
                found[module] = keeper
    return found


def folder_config(structure: ModelStructure, plan: ModelPlan) -> dict[str, Any]:
    """The ``quantization_config`` of the whole model."""
    schemes = outside_schemes(structure, plan)
    dense: list[str] = [n for n in structure.outside if n not in schemes]
    for block in plan.blocks:
        for relative in block.structure.linears:
            name = f"{block.structure.name}.{relative}"
            if relative in block.layers:
                schemes[name] = layer_scheme(name, block.layers[relative])
            else:
                dense.append(name)
        dense += _readers(block.structure.name, block.structure.groups)
    return quantization_config(
        {target_name(structure.family, n): s for n, s in schemes.items()},
        [target_name(structure.family, n) for n in dense],
    )


def _readers(block: str, groups: Iterable[Any]) -> list[str]:
    return sorted({f"{block}.{reader}" for group in groups for reader in group.readers})
