"""Reading a quantized folder back, independently of the library that other readers use.

``QuantizedCheckpoint`` shows a folder in two ways: as integers (``layer``), and as the plain
checkpoint it stands for (``names``, ``shape``, ``tensor``), where a quantized module has one
"weight" with the dequantized values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossbit.errors import InputError
from crossbit.export.research import (
    CLIP,
    COLUMNS,
    ROTATION,
    activation_grids,
    model_config,
    online_content,
)
from crossbit.export.scheme import INT, PACKED, QuantScheme, Role, scheme_from_config
from crossbit.export.targets import EMBEDDING, LINEAR, resolve
from crossbit.grid import QTensor
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.experts import is_expert
from crossbit.packing import unpack, words_per_row
from crossbit.rotations.duquant import PARTS, DuRotation
from crossbit.runtime.install import QuantizedLayer

METHOD = "compressed-tensors"
QUANTIZED_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "input_scale",
)


def is_quantized(folder: Path) -> bool:
    """True if the folder's config names the format that crossbit writes.

    Raises:
        InputError: no readable config.json.
    """
    described = model_config(folder).get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == METHOD


@dataclass(frozen=True)
class _Entry:
    """One quantized module: how it is stored, and where its codes are (a tied head borrows)."""

    scheme: QuantScheme
    storage: str
    codes: str
    shape: tuple[int, int]


class QuantizedCheckpoint:
    """A folder written by the exporter.

    Headers and shapes are checked when it is opened; values are read when they are asked for.

    Args:
        folder: config.json and safetensors.

    Attributes:
        stored: the tensors as they are in the file.

    Raises:
        InputError: not a folder of this format, truncated files, tensors of a module that are
            missing, or whose shapes or dtypes contradict the config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = model_config(folder).get("quantization_config")
        if not isinstance(described, dict) or described.get("quant_method") != METHOD:
            raise InputError(f"{folder}: not a {METHOD} checkpoint (see quantization_config)")
        self.config: dict[str, Any] = described
        self._groups = _config_groups(folder, described)
        self._ignore = [str(entry) for entry in described.get("ignore") or []]
        self.stored = Checkpoint(folder)
        self._research = activation_grids(folder)
        rotated = online_content(folder).get("rotations")
        # A damaged config is told by whoever runs the model; the integers can be read without.
        self._rotated: dict[str, str] | None = rotated if isinstance(rotated, dict) else None
        modules = _modules(self.stored.names)
        self._modules: dict[str, _Entry] = {}
        for name in sorted(m for m, parts in modules.items() if "weight_scale" in parts):
            self._modules[name] = self._entry(name, modules[name])
        self._check_leftovers(modules)
        hidden = {f"{m}.{part}" for m in self._modules for part in QUANTIZED_PARTS}
        dense = [n for n in self.stored.names if n not in hidden]
        self._names = tuple(sorted({*dense, *(f"{m}.weight" for m in self._modules)}))

    # -- integers -----------------------------------------------------------------------------

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the quantized modules, sorted."""
        return tuple(self._modules)

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """Scheme of every quantized module."""
        return {name: entry.scheme for name, entry in self._modules.items()}

    def storage(self, name: str) -> str:
        """Storage format of a quantized module."""
        return self._modules[name].storage

    def layer(self, name: str) -> QuantizedLayer | None:
        """Integers and input grid of a module; None if it is not quantized."""
        entry = self._modules.get(name)
        if entry is None:
            return None
        static, columns = f"{name}.input_scale", f"{name}.{COLUMNS}"
        return QuantizedLayer(
            qtensor=self._qtensor(name, entry),
            activations=self._research.get(name, entry.scheme.activations),
            columns=self.stored.tensor(columns).float() if columns in self.stored else None,
            static_scale=(
                self.stored.tensor(static).float().reshape(()) if static in self.stored else None
            ),
            clip=self._clip(name),
            rotation=self._rotation(name),
        )

    def _rotation(self, name: str) -> DuRotation | None:
        """What turns a module's input at run time, if anything does."""
        keeper = (self._rotated or {}).get(name)
        if keeper is None:
            return None
        parts = {key: self.stored.tensor(f"{keeper}.{ROTATION}{key}") for key in PARTS}
        try:
            return DuRotation.from_tensors(parts)
        except InputError as error:
            raise InputError(f"{self.folder}: {keeper}: {error}") from None

    def _clip(self, name: str) -> Tensor | None:
        """The clip factor of a module's input, if it has one."""
        if not self._clips(name):
            return None
        clip = self.stored.tensor(f"{name}.{CLIP}").float().reshape(())
        if not 0.0 < float(clip) <= 1.0:
            raise InputError(
                f"{self.folder}: {name}.{CLIP} is {float(clip):g}, outside (0, 1]; the file is "
                "damaged"
            )
        return clip

    def _clips(self, name: str) -> bool:
        grid = self._research.get(name)
        return grid is not None and grid.kind == "per_token_clip"

    def _qtensor(self, name: str, entry: _Entry) -> QTensor:
        grid, (rows, columns) = entry.scheme.weights, entry.shape
        if entry.storage == INT:
            codes = self.stored.tensor(f"{entry.codes}.weight")
        else:
            words = self.stored.tensor(f"{entry.codes}.weight_packed")
            codes = unpack(words, grid.bits, columns)
        scale = self.stored.tensor(f"{name}.weight_scale")
        zero: Tensor | None = None
        if not grid.symmetric:
            zero = self.stored.tensor(f"{entry.codes}.weight_zero_point")
            if zero.dtype == torch.int32:
                zero = unpack(zero, grid.bits, rows, dim=0)
        if grid.strategy == "tensor":
            scale = scale.reshape(1, 1)
            zero = None if zero is None else zero.reshape(1, 1)
        low = int(codes.min()) if codes.numel() else 0
        high = int(codes.max()) if codes.numel() else 0
        if low < grid.qmin or high > grid.qmax:
            raise InputError(
                f"{self.folder}: codes of {name} span {low}..{high}, outside {grid.bits} bits; "
                "the file is damaged"
            )
        return QTensor(codes, scale, zero, grid)

    # -- the plain checkpoint it stands for ---------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of the dequantized checkpoint, sorted."""
        return self._names

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            self._quantized_weight(name) is not None
            or (name in self.stored and name in self._names)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the dequantized checkpoint."""
        entry = self._quantized_weight(name)
        return self.stored.shape(name) if entry is None else entry.shape

    def tensor(self, name: str) -> Tensor:
        """A tensor of the dequantized checkpoint; quantized weights come as float32."""
        entry = self._quantized_weight(name)
        if entry is None:
            return self.stored.tensor(name)
        return self._qtensor(name.removesuffix(".weight"), entry).dequantize()

    def _quantized_weight(self, name: str) -> _Entry | None:
        return self._modules.get(name[: -len(".weight")]) if name.endswith(".weight") else None

    # -- checks -------------------------------------------------------------------------------

    def _entry(self, name: str, parts: set[str]) -> _Entry:
        group = self._group_of(name, parts)
        scale_dtype = self.stored.dtype(f"{name}.weight_scale")
        described = self._groups[group]
        default = str(self.config.get("format"))
        role: Role = "expert" if is_expert(name) else "linear"
        stored_as = str(described.get("format") or default)
        if role == "linear" and stored_as == INT and described.get("input_activations") is None:
            role = "embedding"
        try:
            scheme, storage = scheme_from_config(described, default, scale_dtype, role)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder}: {name} ({group}): {error}") from error
        codes = name
        if not parts & {"weight", "weight_packed"}:
            codes = self._tied_partner(name, group)
        shape = self._codes_shape(name, codes, storage, scheme.weights.bits)
        self._check_shapes(name, codes, scheme, shape)
        return _Entry(scheme, storage, codes, shape)

    def _group_of(self, name: str, parts: set[str]) -> str:
        targets = {g: [str(t) for t in c["targets"]] for g, c in self._groups.items()}
        group = resolve(targets, self._ignore, name, LINEAR)
        if group is None and "weight" in parts:
            group = resolve(targets, self._ignore, name, EMBEDDING)
        if group is None:
            raise InputError(
                f"{self.folder}: {name} has a weight_scale but no config group targets it"
            )
        return group

    def _tied_partner(self, name: str, group: str) -> str:
        """The embedding whose codes a head without codes of its own uses."""
        targets = [str(t) for t in self._groups[group]["targets"]]
        partners = [
            t for t in targets if t != name and f"{t}.weight" in self.stored and name in targets
        ]
        if len(partners) != 1:
            raise InputError(
                f"{self.folder}: {name} has a weight_scale but no codes (weight or weight_packed); "
                "the checkpoint is incomplete"
            )
        return partners[0]

    def _codes_shape(self, name: str, codes: str, storage: str, bits: int) -> tuple[int, int]:
        kind, dtype = ("weight", torch.int8) if storage == INT else ("weight_packed", torch.int32)
        stored = f"{codes}.{kind}"
        if stored not in self.stored:
            raise InputError(f"{self.folder}: {stored} is missing ({storage}); incomplete export")
        if self.stored.dtype(stored) != dtype or len(self.stored.shape(stored)) != 2:
            raise InputError(
                f"{self.folder}: {stored} is {self.stored.dtype(stored)} of shape "
                f"{list(self.stored.shape(stored))}, {storage} needs a {dtype} matrix"
            )
        rows, width = self.stored.shape(stored)
        if storage != PACKED:
            return rows, width
        if f"{codes}.weight_shape" not in self.stored:
            raise InputError(f"{self.folder}: {codes}.weight_shape is missing; incomplete export")
        shape = [int(n) for n in self.stored.tensor(f"{codes}.weight_shape").reshape(-1)]
        if len(shape) != 2 or shape[0] != rows or words_per_row(shape[1], bits) != width:
            raise InputError(
                f"{self.folder}: {name}: weight_shape {shape} does not go with {bits}-bit words of "
                f"shape {[rows, width]}; the file is damaged"
            )
        return shape[0], shape[1]

    def _check_shapes(
        self, name: str, codes: str, scheme: QuantScheme, shape: tuple[int, int]
    ) -> None:
        grid, (rows, columns) = scheme.weights, shape
        try:
            count = grid.groups(columns)
        except InputError as error:
            raise InputError(f"{self.folder}: {name}: {error}") from error
        scale = (1,) if grid.strategy == "tensor" else (rows, count)
        self._expect(f"{name}.weight_scale", scale)
        zero = f"{codes}.weight_zero_point"
        if grid.symmetric:
            if zero in self.stored:
                raise InputError(f"{self.folder}: {zero} contradicts the symmetric grid")
        elif zero in self.stored and self.stored.dtype(zero) == torch.int32:
            self._expect(zero, (words_per_row(rows, grid.bits), count))
        else:
            self._expect(zero, scale)
        static = scheme.activations is not None and scheme.activations.kind != "per_token"
        if static:
            self._expect(f"{name}.input_scale", (1,))
        elif f"{name}.input_scale" in self.stored:
            raise InputError(f"{self.folder}: {name}.input_scale contradicts the config")
        if self._clips(name):
            self._expect(f"{name}.{CLIP}", (1,))
        elif f"{name}.{CLIP}" in self.stored:
            raise InputError(f"{self.folder}: {name}.{CLIP} contradicts the config")

        self._check_rotation(name, columns)

    def _check_rotation(self, name: str, columns: int) -> None:
        if self._rotated is None:
            return
        keeper = self._rotated.get(name)
        if keeper != name:
            for tensor in (f"{name}.{ROTATION}{key}" for key in PARTS):
                if tensor in self.stored:
                    raise InputError(f"{self.folder}: {tensor} contradicts the config")
        if keeper is None:
            return
        stored = {key: f"{keeper}.{ROTATION}{key}" for key in PARTS}
        self._expect(stored["permutation"], (columns,))
        for key in ("first", "second"):
            self._expect_present(stored[key])
            shape = self.stored.shape(stored[key])
            n = shape[-1] if shape else 0
            if n == 0 or columns % n or shape not in ((n, n), (columns // n, n, n)):
                raise InputError(
                    f"{self.folder}: {stored[key]} has shape {list(shape)}, which is no rotation "
                    f"of {columns} channels; the file does not match its config"
                )

    def _expect(self, stored: str, shape: tuple[int, ...]) -> None:
        self._expect_present(stored)
        if self.stored.shape(stored) != shape:
            raise InputError(
                f"{self.folder}: {stored} has shape {list(self.stored.shape(stored))}, "
                f"{list(shape)} expected; the file does not match its config"
            )

    def _expect_present(self, stored: str) -> None:
        if stored not in self.stored:
            raise InputError(f"{self.folder}: {stored} is missing; incomplete export")

    def _check_leftovers(self, modules: dict[str, set[str]]) -> None:
        """Codes without a scale, and modules named by the config that hold none."""
        for name, parts in modules.items():
            if name in self._modules:
                continue
            left = sorted(parts & set(QUANTIZED_PARTS))
            int8 = "weight" in parts and self.stored.dtype(f"{name}.weight") == torch.int8
            if left or int8:
                raise InputError(
                    f"{self.folder}: {name}.weight_scale is missing; incomplete export"
                )
        for name in sorted(set(self._rotated or ()) - set(self._modules)):
            raise InputError(
                f"{self.folder}: config.json names {name} as rotated, which is not quantized in "
                "the file"
            )
        for group, described in self._groups.items():
            for target in described["targets"]:
                exact = not str(target).startswith("re:") and "." in str(target)
                if exact and target not in self._modules:
                    raise InputError(
                        f"{self.folder}: {group} targets {target}, which is not quantized in the "
                        "file"
                    )


def _config_groups(folder: Path, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{folder}: quantization_config has no config_groups")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise InputError(f"{folder}: {name} of quantization_config has no list of targets")
    return groups


def _modules(names: tuple[str, ...]) -> dict[str, set[str]]:
    """Module name -> the parts of it that are stored."""
    found: dict[str, set[str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part in QUANTIZED_PARTS or part == "weight":
            found.setdefault(module, set()).add(part)
    return found
