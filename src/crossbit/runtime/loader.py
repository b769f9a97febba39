"""Open a folder, original or quantized, as a model that loads block by block.

Quantized folders are executed by crossbit's own layers from the stored integers, not by the
library that ``verify`` compares with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from crossbit.engine.progress import release_memory
from crossbit.errors import InputError
from crossbit.export.reader import QuantizedCheckpoint, is_quantized
from crossbit.export.research import is_research, model_config, online_content
from crossbit.grid import QTensor
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.experts import checkpoint_name
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.validate import read_config
from crossbit.runtime.attention import IMPLEMENTATION, register, start_after
from crossbit.runtime.install import QuantizedLayer, install
from crossbit.runtime.linear import Execution
from crossbit.runtime.online import Online


class BlockSource:
    """A model whose blocks are loaded on demand.

    Attributes:
        shell: the model; embedding, final norm and head are loaded.
        dtype: of computation.
        quantized: the integer checkpoint, or None for a plain model.
        online: what happens at run time beside the layers.
    """

    def __init__(
        self,
        shell: Shell,
        checkpoint: Checkpoint | QuantizedCheckpoint,
        dtype: torch.dtype,
        *,
        quantized: QuantizedCheckpoint | None = None,
        execution: Execution = "auto",
        divisor: float | None = None,
        online: Online | None = None,
    ) -> None:
        self.shell = shell
        self.online = online or Online()
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.quantized = quantized
        self.execution = execution
        self.divisor = divisor
        stored = checkpoint if isinstance(checkpoint, Checkpoint) else checkpoint.stored
        self.files: Checkpoint = stored
        shell.load_outside(checkpoint, dtype)

    def load(self, index: int) -> nn.Module:
        """Materialise block ``index``, with quantized layers installed."""
        block = self.shell.load_block(index, self.checkpoint, self.dtype)
        self.files.close()  # or the pages of all blocks would stay mapped
        if self.quantized is not None:
            structure = self.shell.structure.blocks[index]
            layers = {}
            for name in structure.linears:
                layer = self._layer(f"{structure.name}.{name}")
                if layer is not None:
                    layers[name] = layer
            install(block, structure, layers, self.dtype, self.execution)
            self.online.quantize(structure, index, block)
        return block

    def _layer(self, name: str) -> QuantizedLayer | None:
        assert self.quantized is not None
        stored = checkpoint_name(self.shell.structure.family, f"{name}.weight")
        stored = stored.removesuffix(".weight")
        layer = self.quantized.layer(stored)
        if layer is None or layer.activations is None or self.divisor is None:
            return layer
        return replace(layer, activations=replace(layer.activations, divisor=self.divisor))

    def qtensor(self, name: str) -> QTensor | None:
        """The stored integers of a layer (path in the model), None if it is not quantized."""
        layer = self._layer(name) if self.quantized is not None else None
        return None if layer is None else layer.qtensor

    @torch.no_grad()
    def hidden(self, ids: Tensor, *, batch: int, order: Iterable[int] | None = None) -> Tensor:
        """Token ids int64 [B, T] -> what leaves the last block [B, T, D].

        All sequences go through block 0, then through block 1: one block is in memory at a time.

        Args:
            ids: see above.
            batch: sequences at once.
            order: the numbers of the blocks, for who shows how far it is.
        """
        shell = self.shell
        hidden = torch.cat([shell.embed(part) for part in torch.split(ids, batch)])
        kwargs = shell.block_kwargs(ids.shape[1], self.dtype)
        for index in range(shell.num_blocks) if order is None else order:
            self.load(index)
            for start in range(0, hidden.shape[0], batch):
                part = slice(start, start + batch)
                hidden[part] = shell.run_block(index, hidden[part], kwargs[index])
            self.free(index)
            release_memory()  # pieces of freed blocks add up
        return hidden

    def free(self, index: int) -> None:
        """Drop block ``index``."""
        self.shell.free_block(index)


def open_blocks(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    attn: str = "sdpa",
    device: str = "cpu",
    execution: Execution = "auto",
    divisor: float | None = None,
) -> BlockSource:
    """Open a local folder, original or quantized.

    Args:
        folder: config.json and safetensors.
        dtype: of computation; None is the model's own.
        attn: "sdpa" or "eager"; crossbit's own where the folder changes attention.
        device: "cpu" or "cuda".
        execution: how quantized layers run (see ``QuantLinear``).
        divisor: overrides the divisor of the activation grids (127 is what vLLM's kernels use).

    Raises:
        InputError: a damaged or unknown folder.
    """
    config: Any = folder_config(folder)
    dtype = dtype or own_dtype(config)
    content = online_content(folder)
    quantized = QuantizedCheckpoint(folder) if is_quantized(folder) else None
    online = Online()
    if content and quantized is not None:
        blocks = int(config.num_hidden_layers)
        try:
            online = Online.of_json(content, quantized.stored, blocks)
        except InputError as error:
            raise InputError(f"{folder / 'config.json'}: {error}") from None
    if online.attention:
        register()
        attn = IMPLEMENTATION
    shell = Shell(config, attn=attn, device=device)
    if quantized is not None:
        try:
            online.dress(shell)
        except InputError as error:
            raise InputError(f"{folder / 'config.json'}: {error}") from None
        return BlockSource(
            shell,
            quantized,
            dtype,
            quantized=quantized,
            execution=execution,
            divisor=divisor,
            online=online,
        )
    return BlockSource(shell, Checkpoint(folder), dtype)


def folder_prefix(folder: Path) -> list[int]:
    """Tokens that a folder puts before every text; none for a plain one."""
    found = online_content(folder).get("prefix")
    return found if isinstance(found, list) else []


def folder_config(folder: Path) -> Any:
    """The transformers config of a folder; that of the model inside where only crossbit runs it."""
    if not is_research(read_config(folder)):
        return open_config(folder)
    inner = dict(model_config(folder))
    return AutoConfig.for_model(inner.pop("model_type"), **inner)


def own_dtype(config: Any) -> torch.dtype:
    """The dtype that config.json names, float32 if it names none."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    attn: str = "sdpa",
    device: str = "cpu",
    execution: Execution = "auto",
) -> nn.Module:
    """The whole model in memory: a transformers causal LM with crossbit's layers inside."""
    source = open_blocks(folder, dtype=dtype, attn=attn, device=device, execution=execution)
    for index in range(source.shell.num_blocks):
        source.load(index)
    model: nn.Module = source.shell.model
    if source.online.prefix is not None:
        start_after(model, source.online.prefix.ids.numel())
    return model
