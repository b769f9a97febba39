"""What happens at run time beside the layers themselves, and only crossbit does.

A transform of a layer's input is a forward pre-hook. One that belongs to the place in the block is
taken over by whatever replaces the layer there (``carry``); one that belongs to the layer itself,
whose weight was made for it, is not. Whatever watches the layer's input sees what the layer reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from crossbit.activations.kv import KVGrid
from crossbit.errors import InputError
from crossbit.models.shell import Shell
from crossbit.models.structure import BlockStructure
from crossbit.rotations.hadamard import apply_hadamard, order_parts
from crossbit.runtime.attention import AttentionChange, attach

_MARK = "_crossbit_input"

InputTransform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HadamardInput:
    """x [..., K] -> x H / sqrt(size), blocks of ``size`` channels."""

    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """The rotated input, in the dtype of x."""
        return apply_hadamard(x, block=self.size)


@dataclass(frozen=True)
class Online:
    """The run-time operations of a model.

    Attributes:
        hadamard: path of a linear layer -> channels of the Hadamard transform of its input.
        rotations: names in the file of layers whose input has a rotation that is stored with them.
        keys: queries and keys are rotated, head by head, after RoPE.
        cache: grid of keys and values, None for floating point.
    """

    hadamard: Mapping[str, int] = field(default_factory=dict)
    rotations: tuple[str, ...] = ()
    keys: bool = False
    cache: KVGrid | None = None

    def __bool__(self) -> bool:
        return bool(self.hadamard) or bool(self.rotations) or self.attention

    @property
    def attention(self) -> bool:
        """True if something happens inside attention: ``attn`` then is ``IMPLEMENTATION``."""
        return self.keys or self.cache is not None

    def dress(self, shell: Shell) -> None:
        """Let every block that the shell loads from now on have what leaves its function alone."""
        if not self.hadamard and not self.keys:
            return

        def dress(index: int, block: nn.Module) -> None:
            structure = shell.structure.blocks[index]
            for name in structure.linears:
                size = self.hadamard.get(f"{structure.name}.{name}")
                if size is not None:
                    turn_input(block.get_submodule(name), HadamardInput(size))
            self._attach(structure, block, None)

        shell.dress = dress

    def check(self, shell: Shell) -> None:
        """Try it on an empty block.

        Raises:
            InputError: the heads have a size that no Hadamard matrix has, or keys do not stand
                alone before RoPE in this architecture.
        """
        if not self.attention:
            return
        structure = shell.structure.blocks[0]
        block = copy.deepcopy(shell.block(0))
        self._attach(structure, block, self.cache)
        if self.keys:
            width = int(getattr(attention_of(structure, block), "head_dim", 0) or 0)
            if width:
                order_parts(width)

    def quantize(self, structure: BlockStructure, block: nn.Module) -> None:
        """Let a block that is quantized, or in training, round its keys and values too."""
        if self.cache is not None:
            self._attach(structure, block, self.cache)

    def _attach(self, structure: BlockStructure, block: nn.Module, grid: KVGrid | None) -> None:
        if not self.attention:
            return
        change = AttentionChange(
            key=grid,
            value=None if grid is None else replace(grid, before_rope=False),
            rotation=_rotate_head if self.keys else None,
        )
        attach(attention_of(structure, block), change)

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        cache = None if self.cache is None else asdict(self.cache)
        return {
            "hadamard": dict(self.hadamard),
            "rotations": list(self.rotations),
            "keys": self.keys,
            "cache": cache,
        }

    @classmethod
    def of_json(cls, data: Any) -> Online:
        """What ``to_json`` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            cache, rotations = data["cache"], data["rotations"]
            if not isinstance(rotations, list):
                raise TypeError
            return cls(
                {str(k): int(v) for k, v in data["hadamard"].items()},
                tuple(map(str, rotations)),
                bool(data["keys"]),
                None if cache is None else KVGrid(**cache),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("config.json: damaged crossbit_online; quantize again") from None


def attention_of(structure: BlockStructure, block: nn.Module) -> nn.Module:
    """The attention module of a block: what holds the projection of its output."""
    name = next(n for n, info in structure.linears.items() if info.role == "o_proj")
    return block.get_submodule(name.rpartition(".")[0])


def _rotate_head(x: Tensor) -> Tensor:
    """x [..., D] -> x H / sqrt(D)."""
    return apply_hadamard(x)


def turn_input(module: nn.Module, transform: InputTransform, *, own: bool = False) -> None:
    """Apply ``transform`` to what the module reads, after what is applied already.

    Args:
        module: the layer.
        transform: of its input.
        own: it belongs to this layer, and not to what will take its place.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transform(args[0]), *args[1:])

    if not own:
        setattr(module, _MARK, transform)
    module.register_forward_pre_hook(hook)


def is_turned(module: nn.Module) -> bool:
    """True if what stands in the module's place reads a transformed input."""
    return getattr(module, _MARK, None) is not None


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give the module that takes another's place the transform of its input."""
    transform = getattr(old, _MARK, None)
    if transform is not None:
        turn_input(new, transform)
