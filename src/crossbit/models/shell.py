"""Shell: a transformers model whose blocks are empty until they are needed.

The model is built from its config with every parameter on the meta device; blocks are materialised
from a checkpoint one at a time, run, and freed. What surrounds the blocks (embedding, masks, rotary
tables, final norm, head, soft-capping) is always the model's own forward: the blocks are replaced
for the moment by recorders that pass the hidden state through, so no architecture's details are
written down twice and `embed -> run_block ... -> logits` computes what the model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from crossbit.errors import InputError, WorkError
from crossbit.models.experts import TensorReader, TensorSource, unfuse_experts
from crossbit.models.families import family_of
from crossbit.models.structure import ModelStructure, discover


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a recorder to end a forward pass once it has what it wanted."""


class _Recorder(nn.Module):
    """Stands in for a block (or, with `stop`, the head): records what it reads, then passes it on.

    What is passed on is the hidden state, or `emit` in its place.
    """

    def __init__(self, *, stop: bool = False, emit: Tensor | None = None) -> None:
        super().__init__()
        self.stop = stop
        self.emit = emit
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Record, then stop or pass on."""
        self.hidden = hidden_states
        self.kwargs = kwargs
        if self.stop:
            raise _Reached
        return hidden_states if self.emit is None else self.emit


class _Zeros(nn.Module):
    """Stands in for a linear layer while only shapes matter: zeros in the input's own dtype."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> zeros [..., out]."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def build_empty(config: Any, *, attn: str = "sdpa") -> nn.Module:
    """A causal LM of the config: parameters on meta, buffers real, experts unfused, eval mode.

    Args:
        config: a transformers config (not changed).
        attn: attention implementation; "sdpa" falls back to "eager" where the model's own code does
            not support it (Gemma-2's soft-capping).

    Raises:
        InputError: unknown architecture, or transformers cannot build it.
    """
    family = family_of(config)
    config = copy.deepcopy(config)
    config.use_cache = False
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise InputError(f"transformers has no causal language model for {family.model_type!r}")
    if attn == "sdpa" and not model_class._supports_sdpa:
        attn = "eager"
    try:
        # float32: buffers are computed as transformers computes them for a float32 model; they are
        # cast where they are used.
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class._from_config(config, dtype=torch.float32, attn_implementation=attn)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"transformers cannot build {family.model_type!r}: {text}") from error
    unfuse_experts(model, family)
    if getattr(config, "tie_word_embeddings", False):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.requires_grad_(False)
    return cast(nn.Module, model.eval())


class Shell:
    """A model that is run block by block.

    Attributes:
        model: the transformers causal LM.
        structure: its `ModelStructure`.
        attn: the attention implementation in use.
        device: where tensors are materialised.
        dress: called with the index and module of every block that is loaded, to add what it does
            at run time beside its layers; None adds nothing.
    """

    def __init__(
        self, config: Any, *, attn: str = "sdpa", device: str | torch.device = "cpu"
    ) -> None:
        """Build the empty model.

        Raises:
            InputError: unknown architecture or layers that no rule matches.
        """
        self.device = torch.device(device)
        self.model = cast(Any, build_empty(config, attn=attn))
        self.config: Any = self.model.config
        self.attn = str(self.config._attn_implementation)
        self.structure: ModelStructure = discover(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        parent, _, self._blocks_child = self.structure.family.blocks.rpartition(".")
        self._blocks_parent: nn.Module = self.model.get_submodule(parent)
        # Pristine meta blocks: what load_block starts from, whatever was done to the block before.
        self._empty: list[nn.Module] = list(self._blocks.children())
        self._kwargs: dict[tuple[int, torch.dtype], list[dict[str, Any]]] = {}
        self._outside_dtype: torch.dtype | None = None
        self.dress: Callable[[int, nn.Module], None] | None = None
        self._prefix: Tensor | None = None
        self._cut: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def _blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self._blocks_parent, self._blocks_child))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._empty)

    def block(self, index: int) -> nn.Module:
        """Block `index` as it is now (on meta unless loaded)."""
        return self._blocks[index]

    # -- weights ------------------------------------------------------------------------------

    def _reader(self, checkpoint: TensorSource) -> TensorReader:
        return TensorReader(self.structure.family, checkpoint, self.model.base_model_prefix)

    def _outside_names(self) -> list[str]:
        """Parameters outside the blocks; a tied head's weight is not among them."""
        prefix = f"{self.structure.family.blocks}."
        return [n for n, _ in self.model.named_parameters() if not n.startswith(prefix)]

    def check(self, checkpoint: TensorSource) -> None:
        """Compare all names and shapes of the checkpoint with the model, reading no tensor.

        Raises:
            InputError: a tensor is missing, has another shape, or belongs to a block but not to the
                model (a bias that the config does not know).
        """
        reader = self._reader(checkpoint)
        embedding, head = f"{self.structure.embedding}.weight", f"{self.structure.head}.weight"
        for name in self._outside_names():
            # A tied model may store its one matrix under the head's name only.
            stored = name
            if name == embedding and self.structure.tied and name not in reader:
                stored = head
            problem = _mismatch(reader, stored, self.model.get_parameter(name))
            if problem:
                raise InputError(problem)
        for index, block in enumerate(self._empty):
            for name, parameter in block.named_parameters():
                full = f"{self.structure.block_names[index]}.{name}"
                problem = _mismatch(reader, full, parameter)
                if problem:
                    raise InputError(problem)
        ignored = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
        blocks = self.structure.family.blocks
        bare = blocks.removeprefix(f"{self.model.base_model_prefix}.")
        for name in checkpoint.names:
            if not name.startswith((f"{blocks}.", f"{bare}.")) or name in reader.used:
                continue
            if not name.endswith(ignored):
                raise InputError(
                    f"the checkpoint has {name}, the model of its config does not: "
                    "config.json and weights do not belong together"
                )

    def load_outside(self, checkpoint: TensorSource, dtype: torch.dtype) -> None:
        """Load embedding, positions, final norm and head; a tied head shares the embedding.

        Raises:
            InputError: a tensor is missing or has another shape, or the config ties the head and
            the
                checkpoint has a different one.
        """
        reader = self._reader(checkpoint)
        embedding, head = f"{self.structure.embedding}.weight", f"{self.structure.head}.weight"
        for name in self._outside_names():
            stored = name
            if name == embedding and self.structure.tied and name not in reader:
                stored = head
            problem = _mismatch(reader, stored, self.model.get_parameter(name))
            if problem:
                raise InputError(problem)
            tensor = reader.tensor(stored)
            assert tensor is not None
            if stored == embedding and self.structure.tied and head in reader:
                other = reader.tensor(head)
                assert other is not None
                if other.shape != tensor.shape or not torch.equal(other, tensor):
                    raise InputError(
                        f"config.json ties the head to the embedding, but {head} differs from "
                        f"{embedding}: set tie_word_embeddings to false in config.json"
                    )
            # A copy: see load_block; the quantized values are written into it.
            _set_parameter(self.model, name, tensor.to(self.device, dtype, copy=True))
        if self.structure.tied:
            source = self.model.get_submodule(self.structure.embedding)
            self.model.get_submodule(self.structure.head).weight = source.weight
        self._outside_dtype = dtype
        self._kwargs.clear()

    def free_outside(self) -> None:
        """Drop embedding and head again; blocks can still run.

        Positions stay: OPT adds its own before the first block, where the blocks' keyword
        arguments are taken from.
        """
        large = {f"{self.structure.embedding}.weight", f"{self.structure.head}.weight"}
        for name in self._outside_names():
            if name not in large:
                continue
            parameter = self.model.get_parameter(name)
            _set_parameter(self.model, name, torch.empty_like(parameter, device="meta"))
        if self.structure.tied:
            source = self.model.get_submodule(self.structure.embedding)
            self.model.get_submodule(self.structure.head).weight = source.weight

    def load_block(self, index: int, checkpoint: TensorSource, dtype: torch.dtype) -> nn.Module:
        """Materialise block `index` from the checkpoint and put it in place.

        Raises:
            WorkError: a tensor is missing or has another shape.
        """
        # The config is shared between all modules of the model: keep it so.
        memo = {id(self.config): self.config}
        block = copy.deepcopy(self._empty[index], memo)
        reader = self._reader(checkpoint)
        for name, parameter in list(block.named_parameters()):
            full = f"{self.structure.block_names[index]}.{name}"
            problem = _mismatch(reader, full, parameter)
            if problem:
                raise WorkError(problem)
            tensor = reader.tensor(full)
            assert tensor is not None
            # A copy: a checkpoint may hand out views of its own memory, and folds work in place.
            _set_parameter(block, name, tensor.to(self.device, dtype, copy=True))
        if self.dress is not None:
            self.dress(index, block)
        self._blocks[index] = block
        return block

    def place_block(self, index: int, block: nn.Module) -> None:
        """Put a loaded block back in its place."""
        self._blocks[index] = block

    def free_block(self, index: int) -> None:
        """Put the empty block back; whatever was loaded or changed there is dropped."""
        self._blocks[index] = self._empty[index]

    def put_prefix(self, ids: Tensor, cut: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Let every text come after the tokens ``ids`` [P], which the blocks know of themselves.

        Args:
            ids: int64; they take the first P positions.
            cut: keyword arguments of a block for P + L tokens -> those for the last L of them.
        """
        self._prefix, self._cut = ids.to(self.device), cut
        self._kwargs.clear()

    # -- running ------------------------------------------------------------------------------

    @contextmanager
    def _recording(self, recorders: list[_Recorder]) -> Iterator[None]:
        blocks = self._blocks
        setattr(self._blocks_parent, self._blocks_child, nn.ModuleList(recorders))
        try:
            yield
        finally:
            setattr(self._blocks_parent, self._blocks_child, blocks)

    def _loaded_dtype(self) -> torch.dtype:
        if self._outside_dtype is None:
            raise WorkError("the embedding and head are not loaded: call load_outside first")
        return self._outside_dtype

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, L] -> hidden state before the first block [B, L, D]."""
        self._loaded_dtype()
        recorders = [_Recorder(stop=i == 0) for i in range(self.num_blocks)]
        ids = ids.to(self.device)
        first = 0
        if self._prefix is not None:  # positions may be added here already
            first = self._prefix.numel()
            ids = torch.cat((self._prefix.expand(ids.shape[0], -1), ids), dim=1)
        with self._recording(recorders), suppress(_Reached):
            self.model(input_ids=ids, use_cache=False)
        hidden = recorders[0].hidden
        assert hidden is not None
        return hidden[:, first:]

    @torch.no_grad()
    def block_kwargs(self, length: int, dtype: torch.dtype) -> list[dict[str, Any]]:
        """Keyword arguments that each block receives for unpadded sequences of `length` tokens.

        Captured once per length and dtype from the model's own forward, with batch size 1: they
        broadcast over any batch. Tensors are shared between blocks; do not write to them.

        Args:
            length: L, tokens a sequence.
            dtype: dtype of the hidden state that the blocks will run on.
        """
        self._loaded_dtype()
        key = (length, dtype)
        if key not in self._kwargs:
            last = self.num_blocks - 1
            recorders = [_Recorder(stop=i == last) for i in range(self.num_blocks)]
            embedding = self.model.get_submodule(self.structure.embedding)
            total = length + (0 if self._prefix is None else self._prefix.numel())
            inputs = torch.zeros(1, total, embedding.embedding_dim, dtype=dtype, device=self.device)
            # Projections before the blocks (OPT) must not object to a dtype other than their own.
            before = {n: self.model.get_submodule(n) for n in self.structure.outside[1:]}
            stubbed = self._replaced({n: _Zeros(m.out_features) for n, m in before.items()})
            with self._recording(recorders), stubbed, suppress(_Reached):
                self.model(inputs_embeds=inputs, use_cache=False)
            found = [r.kwargs for r in recorders]
            self._kwargs[key] = found if self._cut is None else [self._cut(k) for k in found]
        return self._kwargs[key]

    @contextmanager
    def _replaced(self, stand_ins: dict[str, nn.Module]) -> Iterator[None]:
        """Other modules in the places of the named ones, for the moment."""
        originals = {name: self.model.get_submodule(name) for name in stand_ins}
        for name, stand_in in stand_ins.items():
            self.model.set_submodule(name, stand_in)
        try:
            yield
        finally:
            for name, original in originals.items():
                self.model.set_submodule(name, original)

    def run_block(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden state [B, L, D] through block `index`; gradients flow if enabled."""
        out = self._blocks[index](hidden, **kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden state after the last block [B, L, D] -> logits [B, L, V].

        The hidden state is cast to the dtype of final norm and head. Gradients flow to it.
        """
        return cast(Tensor, self._after_blocks(hidden).logits)

    def _after_blocks(self, hidden: Tensor) -> Any:
        """The model's output where ``hidden`` [B, L, D] leaves its last block."""
        dtype = self._loaded_dtype()
        recorders = [_Recorder() for _ in range(self.num_blocks)]
        recorders[-1].emit = hidden.to(self.device, dtype)
        embedding = self.model.get_submodule(self.structure.embedding)
        inputs = torch.zeros(1, 1, embedding.embedding_dim, dtype=dtype, device=self.device)
        with self._recording(recorders):
            return self.model(inputs_embeds=inputs, use_cache=False)

    @torch.no_grad()
    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden state after the last block [B, L, D] -> what the head reads [B, L, D'].

        Works without the embedding and the head themselves (``free_outside``).
        """
        reader = _Recorder(stop=True)
        with self._replaced({self.structure.head: reader}), suppress(_Reached):
            self._after_blocks(hidden)
        assert reader.hidden is not None
        return reader.hidden


def _set_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))


def _mismatch(reader: TensorReader, name: str, parameter: Tensor) -> str:
    """One line about a missing or misshapen tensor; empty if it fits."""
    shape = reader.shape(name)
    if shape is None:
        return f"the checkpoint has no tensor {name}: incomplete download or another model's config"
    if tuple(shape) != tuple(parameter.shape):
        return (
            f"tensor {name} has shape {tuple(shape)} in the checkpoint and "
            f"{tuple(parameter.shape)} by config.json: they do not belong together"
        )
    return ""
