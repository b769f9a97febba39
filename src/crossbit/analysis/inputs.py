"""The distinct inputs of a block's linear layers, how to look at them and how to replace them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crossbit.models.experts import is_expert
from crossbit.models.structure import BlockStructure
from crossbit.runtime.linear import SharedInput

Replace = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerInput:
    """One tensor that linear layers of a block read: q, k and v share theirs.

    Attributes:
        name: the layer's path, or that of the parent and the roles, "...self_attn.q/k/v".
        role: layer type, such as "q/k/v", "o", "gate/up", "down", "expert down".
        block: index of the block.
        layers: the layers that read it, by path in the block.
        prefix: path of the block.
        group: the fold group; experts have one group and each an input of its own, since an
            expert sees only the tokens that were routed to it.
        expert: the rows are routed tokens, not a whole sequence.
    """

    name: str
    role: str
    block: int
    layers: tuple[str, ...]
    prefix: str
    group: str
    expert: bool

    @property
    def full_names(self) -> list[str]:
        """Paths of the layers in the model."""
        return [f"{self.prefix}.{name}" for name in self.layers]


def layer_inputs(structure: BlockStructure, index: int) -> list[LayerInput]:
    """The inputs of block ``index``, each once, in the order of the family's groups."""
    inputs = []
    for group in structure.groups:
        by_parent: dict[str, list[str]] = {}
        for name in group.consumers:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
        for parent, names in by_parent.items():
            roles = [structure.linears[n].role.removesuffix("_proj") for n in names]
            role = "/".join(dict.fromkeys(roles))
            path = names[0] if len(names) == 1 else f"{parent}.{role}"
            full = f"{structure.name}.{path}"
            expert = is_expert(full)
            inputs.append(
                LayerInput(
                    name=full,
                    role=f"expert {role}" if expert else role,
                    block=index,
                    layers=tuple(names),
                    prefix=structure.name,
                    group=f"{structure.name}.{group.name}",
                    expert=expert,
                )
            )
    return inputs


@contextmanager
def watching(
    block: nn.Module, inputs: Sequence[LayerInput], take: Callable[[LayerInput, Tensor], None]
) -> Iterator[None]:
    """While open, ``take(input, x)`` is called with every input [..., K], each once a forward."""

    def hook_for(point: LayerInput) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: take(point, args[0].detach())

    handles = [
        block.get_submodule(p.layers[0]).register_forward_pre_hook(hook_for(p)) for p in inputs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replacing(
    block: nn.Module, inputs: Sequence[LayerInput], replacements: Mapping[str, Replace]
) -> Iterator[None]:
    """While open, every input is replaced; layers that share one get the same replacement.

    Args:
        block: the block; it is left as it was.
        inputs: its inputs.
        replacements: input name -> function of x [..., K], called once a forward; inputs that
            are absent stay as they are.
    """

    def hook_for(memory: SharedInput, replace: Replace) -> Callable[..., tuple[Any, ...]]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            return (memory.get(x, None, lambda: replace(x)), *args[1:])

        return hook

    handles = []
    for point in inputs:
        if point.name in replacements:
            hook = hook_for(SharedInput(), replacements[point.name])
            handles += [
                block.get_submodule(n).register_forward_pre_hook(hook) for n in point.layers
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
