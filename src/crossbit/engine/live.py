"""Blocks in training, as tensors and a record: what a killed run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from crossbit.engine.job import Job
from crossbit.engine.let import biases_of, equivalents
from crossbit.engine.norms import trained_norms
from crossbit.engine.opening import OpenBlock
from crossbit.engine.trained import TrainedBlock, clips_of, layers_of, moving_of, with_states
from crossbit.grid import QTensor
from crossbit.rotations.duquant import DuRotation
from crossbit.runtime.install import QuantizedLayer
from crossbit.solvers.expansion import Basis, ExpansionChoice
from crossbit.solvers.rounding_state import Rounding, RoundingChoice


def parameters_of(blocks: Sequence[TrainedBlock]) -> dict[str, Tensor]:
    """What is trained, by unique name; the tensors are those in use."""
    return {
        **{
            f"{name}/{key}": parameter
            for name, layer in layers_of(blocks)
            for key, parameter in layer.state.parameters.items()
        },
        **clips_of(blocks),
        **{
            f"{name}/{key}": parameter
            for name, moving in moving_of(blocks).items()
            for key, parameter in moving.parameters.items()
        },
    }


def pack(blocks: Sequence[TrainedBlock]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that blocks in training are, and the part of it that is no tensor."""
    tensors = {f"parameter/{name}": p for name, p in parameters_of(blocks).items()}
    layers: dict[str, Any] = {}
    for name, layer in layers_of(blocks):
        found = {
            "weight": layer.state.weight,
            "scale": layer.first.scale,
            "codes": layer.first.codes,
            "zero": layer.first.zero_point,
            "static_scale": layer.static_scale,
            "columns": layer.columns,
        }
        if layer.rotation is not None:
            found |= {f"rotation_{k}": t for k, t in layer.rotation.tensors().items()}
        if layer.state.basis is not None:
            found |= {f"basis_{k}": t for k, t in vars(layer.state.basis).items()}
        tensors.update({f"layer/{name}/{k}": t for k, t in found.items() if t is not None})
        layers[name] = {
            "choice": asdict(layer.state.choice),
            "frozen": layer.frozen,
            "begun": layer.begun,
        }
    for name, moving in moving_of(blocks).items():
        tensors.update({f"{name}/{key}": t for key, t in moving.tensors().items()})
    for block in blocks:
        for key, parameter in block.module.named_parameters():
            tensors[f"module/{block.index}/{key}"] = parameter
        for name, bias in biases_of(block.equivalents).items():
            tensors[f"layer/{block.index}/{name}/bias"] = bias.own
    return tensors, {"layers": layers, "blocks": {str(b.index): b.record for b in blocks}}


def choice_from(record: dict[str, Any]) -> RoundingChoice:
    """The choice that ``dataclasses.asdict`` took apart."""
    expansion = record.get("expansion")
    found = None if expansion is None else ExpansionChoice(**expansion)
    return RoundingChoice(**{**record, "expansion": found})


def unpack(job: Job, tensors: dict[str, Tensor], record: dict[str, Any]) -> list[TrainedBlock]:
    """The blocks that ``pack`` took apart, in order."""
    return [
        _block(job, int(index), own, tensors, record["layers"])
        for index, own in sorted(record["blocks"].items(), key=lambda item: int(item[0]))
    ]


def _begun(tensors: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """What is trained beside layers, by its name below the prefix: its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for kept in (prefix, f"parameter/{prefix}"):
        for key, tensor in tensors.items():
            if key.startswith(kept):
                name, _, what = key.removeprefix(kept).rpartition("/")
                found.setdefault(name, {})[what] = tensor
    return found


def _rotation(get: Callable[[str], Tensor | None]) -> DuRotation | None:
    found = {k: get(f"rotation_{k}") for k in ("first", "permutation", "second")}
    kept = {k: t for k, t in found.items() if t is not None}
    return DuRotation.from_tensors(kept) if kept else None


def _block(
    job: Job, index: int, own: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, Any]
) -> TrainedBlock:
    plan = job.plan.blocks[index]
    module = job.shell.load_block(index, job.checkpoint, job.dtype)
    job.checkpoint.close()
    job.shell.free_block(index)  # the shell keeps an empty one: this one is in training
    layers, states = {}, {}
    for name, layer in plan.layers.items():

        def get(what: str, name: str = name) -> Tensor | None:
            return tensors.get(f"layer/{index}/{name}/{what}")

        codes, scale, weight = get("codes"), get("scale"), get("weight")
        assert codes is not None
        assert scale is not None
        assert weight is not None
        qtensor = QTensor(codes, scale, get("zero"), layer.weights)
        layers[name] = QuantizedLayer(
            qtensor,
            layer.activations,
            get("static_scale"),
            get("columns"),
            tensors.get(f"parameter/clips/{index}/{name}"),
            _rotation(get),
        )
        choice = choice_from(known[f"{index}/{name}"]["choice"])
        basis = {k: get(f"basis_{k}") for k in ("u", "vt", "s")}
        prefix = f"parameter/{index}/{name}/"
        states[name] = Rounding(
            weight,
            scale.float(),
            None if qtensor.zero_point is None else qtensor.zero_point.float(),
            layer.weights,
            choice,
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
            None if choice.expansion is None else Basis(**basis),  # type: ignore[arg-type]
        )
    length = 0 if job.ids is None else job.ids.shape[1]
    kwargs = job.shell.block_kwargs(length, job.dtype)[index]
    opened = OpenBlock(module, layers, record=own)
    block = with_states(index, opened, plan, kwargs, job.dtype, states)
    job.online.quantize(plan.structure, index, block.module)
    for name, trained in block.layers.items():
        trained.frozen = known[f"{index}/{name}"]["frozen"]
        trained.begun = known[f"{index}/{name}"]["begun"]
    with torch.no_grad():
        for key, parameter in block.module.named_parameters():
            parameter.copy_(tensors[f"module/{index}/{key}"])
    if job.recipe.let is not None:
        biases = {n: b for n in layers if (b := tensors.get(f"layer/{index}/{n}/bias")) is not None}
        block.equivalents = equivalents(
            block.module,
            plan,
            block.layers,
            job.recipe.let,
            known=_begun(tensors, f"factors/{index}/"),
            biases=biases,
        )
    if job.recipe.norms:
        block.norms = trained_norms(
            block.module,
            job.shell.structure.family.gain_offset,
            known=_begun(tensors, f"norms/{index}/"),
        )
    return block
