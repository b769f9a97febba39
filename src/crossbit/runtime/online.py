"""What happens at run time beside the layers themselves, and only crossbit does.

A transform of a layer's input is a forward pre-hook: it belongs to the place in the block, not to
the layer, so whatever replaces the layer (a trained one, a quantized one) takes it over
(``carry``), and whatever watches the layer's input sees what the layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from crossbit.errors import InputError
from crossbit.hadamard import apply_hadamard, order_parts
from crossbit.models.shell import Shell

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
    """

    hadamard: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.hadamard)

    def dress(self, shell: Shell) -> None:
        """Let every block that the shell loads from now on have its operations.

        Raises:
            InputError: they are those of another model.
        """
        if not self:
            return
        self._check(shell)

        def dress(index: int, block: nn.Module) -> None:
            structure = shell.structure.blocks[index]
            for name in structure.linears:
                size = self.hadamard.get(f"{structure.name}.{name}")
                if size is not None:
                    turn_input(block.get_submodule(name), HadamardInput(size))

        shell.dress = dress

    def _check(self, shell: Shell) -> None:
        widths = {
            f"{block.name}.{name}": info.in_features
            for block in shell.structure.blocks
            for name, info in block.linears.items()
        }
        for name, size in self.hadamard.items():
            width = widths.get(name)
            if width is None:
                raise InputError(f"crossbit_online: the model has no linear layer {name}")
            if size < 1 or width % size:
                raise InputError(
                    f"crossbit_online: the input of {name} has {width} channels, which blocks of "
                    f"{size} do not divide"
                )
            order_parts(size)

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        return {"hadamard": dict(self.hadamard)}

    @classmethod
    def of_json(cls, data: Any) -> Online:
        """What ``to_json`` wrote.

        Raises:
            InputError: it is something else.
        """
        sizes = data.get("hadamard") if isinstance(data, dict) else None
        if not isinstance(sizes, dict) or not all(type(v) is int for v in sizes.values()):
            raise InputError("damaged crossbit_online; quantize again")
        return cls({str(k): v for k, v in sizes.items()})


def turn_input(module: nn.Module, transform: InputTransform) -> None:
    """Apply ``transform`` to what the module reads first."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transform(args[0]), *args[1:])

    setattr(module, _MARK, transform)
    module.register_forward_pre_hook(hook)


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give the module that takes another's place the transform of its input."""
    transform = getattr(old, _MARK, None)
    if transform is not None:
        turn_input(new, transform)
