"""Structure: which linear layers a model has, which read the same input, where a factor folds.

Everything is found from the built module (parameters may be on the meta device) and the family's
table, and checked against it: every `nn.Linear` of the model is matched by a rule of a block, or is
a known layer outside the blocks, or an unquantized reader (a router); anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crossbit.errors import InputError
from crossbit.models.families import (
    Family,
    GroupRule,
    Layout,
    NormRule,
    RowRule,
    family_of,
)
from crossbit.models.scores import QueryKey, query_key, rotary_width


@dataclass(frozen=True)
class LinearInfo:
    """One linear layer of a block: weight [out_features, in_features]."""

    name: str
    role: str
    in_features: int
    out_features: int
    has_bias: bool


@dataclass(frozen=True)
class NormSource:
    """The factor divides a norm: gain (`gain_offset` + weight) and bias, if any, each [K]."""

    module: str
    gain_offset: int
    has_bias: bool


@dataclass(frozen=True)
class RowSource:
    """The factor divides output rows (and bias) of a linear layer.

    `rows`: int64 [K]; consumer input channel j is linear in output row rows[j] of `linear`. Several
    channels may share a row (grouped heads); they then must share one factor.
    """

    linear: str
    rows: Tensor = field(compare=False)


@dataclass(frozen=True)
class InputGroup:
    """Weights of one block that read the same input tensor [..., width].

    `consumers` are its linear layers; `readers` are modules that are not quantized but have a
    weight [*, width] on the same input (a router): a fold must compensate them. `source` is None
    where no exact fold exists, and `reason` says why.
    """

    name: str
    consumers: tuple[str, ...]
    width: int
    source: NormSource | RowSource | None
    readers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class BlockStructure:
    """One block: its linear layers by relative name, its input groups, its queries and keys.

    `query_key` is the reason where no factor of queries and keys is exact.
    """

    name: str
    linears: dict[str, LinearInfo]
    groups: list[InputGroup]
    query_key: QueryKey | str = "they are not known"

    def group_of(self, linear: str) -> InputGroup:
        """The input group that the linear layer (relative name) reads."""
        return next(g for g in self.groups if linear in g.consumers)


@dataclass(frozen=True)
class ModelStructure:
    """A whole model. Names are paths in the causal-LM module, without `.weight`.

    `outside` are the linear layers outside the blocks (the head first).
    """

    family: Family
    block_names: list[str]
    blocks: list[BlockStructure]
    embedding: str
    head: str
    tied: bool
    outside: list[str]

    @property
    def linear_count(self) -> int:
        """Linear layers in all blocks."""
        return sum(len(b.linears) for b in self.blocks)


def discover(model: nn.Module) -> ModelStructure:
    """Find the structure of a transformers causal LM whose experts are unfused.

    Raises:
        InputError: unknown architecture, a linear layer or weight matrix that no rule matches, or a
            layer that the family's table names and the model does not have.
    """
    config = model.config
    family = family_of(config)
    try:
        block_list = model.get_submodule(family.blocks)
    except AttributeError:
        raise InputError(
            f"{family.model_type}: no {family.blocks!r} in the model; not a causal language model?"
        ) from None
    paths = {module: name for name, module in model.named_modules()}
    embedding_module = model.get_input_embeddings()  # type: ignore[operator]
    head_module = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head_module, nn.Linear):
        raise InputError(f"{family.model_type}: the model has no linear head over the vocabulary")

    names, blocks = [], []
    rotary = rotary_width(model)
    for index, block in enumerate(block_list.children()):
        name = f"{family.blocks}.{index}"
        names.append(name)
        blocks.append(_block_structure(block, name, family, config, rotary))
    if not blocks:
        raise InputError(f"{family.model_type}: {family.blocks!r} is empty; nothing to quantize")

    head = paths[head_module]
    outside = [head]
    prefix = f"{family.blocks}."
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith(prefix) or name == head:
            continue
        if name not in family.outside:
            raise InputError(f"linear layer {name} is matched by no rule of {family.model_type}")
        outside.append(name)
    return ModelStructure(
        family=family,
        block_names=names,
        blocks=blocks,
        embedding=paths[embedding_module],
        head=head,
        tied=head_module.weight is embedding_module.weight,
        outside=outside,
    )


def _block_structure(
    block: nn.Module, name: str, family: Family, config: object, rotary: int | None
) -> BlockStructure:
    modules = dict(block.named_modules())
    linears = {
        n: LinearInfo(n, "", m.in_features, m.out_features, m.bias is not None)
        for n, m in modules.items()
        if isinstance(m, nn.Linear)
    }
    experts = _expert_indices(linears, family)
    if not experts and hasattr(modules.get(family.experts or ""), "gate_up_proj"):
        raise InputError(f"{name}.{family.experts} is fused into 3-D weights: unfuse it first")

    groups: list[InputGroup] = []
    for rule in family.groups:
        per_expert = "{e}" in rule.name
        for e in experts if per_expert else [None]:
            group = _group(rule, e, experts, modules, linears, family, config, name)
            if group is not None:
                groups.append(group)

    roles = {
        n: role
        for pattern, role in family.roles.items()
        for n in _expand([pattern], experts)
        if n in linears
    }
    consumed = [c for g in groups for c in g.consumers]
    readers = {r for g in groups for r in g.readers}
    for n in linears:
        if n in readers:
            continue
        if n not in roles or consumed.count(n) != 1:
            raise InputError(
                f"linear layer {name}.{n} is matched by no rule of {family.model_type}"
            )
    # A weight matrix outside any known module (experts left fused, an adapter) would stay
    # unquantized in silence: refuse it.
    for n, parameter in block.named_parameters():
        owner = n.rpartition(".")[0]
        if parameter.ndim >= 2 and owner not in roles and owner not in readers:
            raise InputError(
                f"weight {name}.{n} is in no linear layer that {family.model_type}'s rules know"
            )
    kept = {
        n: LinearInfo(n, roles[n], i.in_features, i.out_features, i.has_bias)
        for n, i in linears.items()
        if n in roles
    }
    pairs = query_key(family.query_key, modules, config, rotary)
    return BlockStructure(name, kept, groups, pairs)


def _expert_indices(linears: Iterable[str], family: Family) -> list[int]:
    if family.experts is None:
        return []
    pattern = re.compile(re.escape(family.experts) + r"\.(\d+)\.")
    return sorted({int(m.group(1)) for n in linears if (m := pattern.match(n))})


def _expand(patterns: Iterable[str], experts: list[int]) -> list[str]:
    """Names with `{e}` replaced by each expert's index."""
    return [
        n
        for p in patterns
        for n in ([p.replace("{e}", str(e)) for e in experts] if "{e}" in p else [p])
    ]


def _group(
    rule: GroupRule,
    expert: int | None,
    experts: list[int],
    modules: dict[str, nn.Module],
    linears: dict[str, LinearInfo],
    family: Family,
    config: object,
    block_name: str,
) -> InputGroup | None:
    """The rule's group in this block; None if the block has none of its consumers."""
    chosen = experts if expert is None else [expert]
    consumers = tuple(_expand(rule.consumers, chosen))
    present = tuple(c for c in consumers if c in linears)
    if not present:
        return None
    missing = [n for n in (*consumers, *rule.readers) if n not in modules]
    if missing:
        raise InputError(
            f"{block_name} has {present[0]} but no {missing[0]}: not a {family.model_type} block"
        )
    width = linears[present[0]].in_features
    for n in present:
        if linears[n].in_features != width:
            raise InputError(
                f"{block_name}: {n} reads {linears[n].in_features} channels, "
                f"{present[0]} reads {width}, though both should read the same input"
            )
    name = rule.name if expert is None else rule.name.replace("{e}", str(expert))
    source: NormSource | RowSource | None = None
    reason = ""
    match rule.source:
        case NormRule(module=norm, requires=requires):
            module = modules.get(norm)
            if module is None:
                raise InputError(
                    f"{block_name} has no norm {norm}, not a {family.model_type} block"
                )
            weight = getattr(module, "weight", None)
            if requires and getattr(config, requires.attribute, None) not in requires.values:
                reason = requires.reason
            elif weight is None:
                reason = f"the norm {norm} before it has no gain"
            elif tuple(weight.shape) != (width,):
                raise InputError(
                    f"{block_name}.{norm} has a gain of shape {tuple(weight.shape)}, "
                    f"its readers have {width} input channels"
                )
            else:
                has_bias = getattr(module, "bias", None) is not None
                source = NormSource(norm, family.gain_offset, has_bias)
        case RowRule(linear=pattern, layout=layout, requires=requires):
            linear = pattern if expert is None else pattern.replace("{e}", str(expert))
            if linear not in linears:
                raise InputError(f"{block_name} has no {linear}, not a {family.model_type} block")
            if requires and getattr(config, requires.attribute, None) not in requires.values:
                reason = requires.reason
            else:
                rows = source_rows(layout, width, linears[linear].out_features, config)
                source = RowSource(linear, rows)
    return InputGroup(name, present, width, source, tuple(rule.readers), reason)


def source_rows(layout: Layout, width: int, out_features: int, config: object) -> Tensor:
    """Output row of the source linear that each input channel of the consumer is linear in.

    Args:
        layout: how the source's rows are laid out (`families.Layout`).
        width: K, input channels of the consumer.
        out_features: output rows of the source.
        config: has `num_attention_heads` where the layout is one of attention's.

    Returns:
        int64 [K].

    Raises:
        InputError: the sizes do not fit the layout.
    """
    channels = torch.arange(width)
    if layout == "same":
        fits, rows = out_features == width, channels
    elif layout == "second_half":
        fits, rows = out_features == 2 * width, channels + width
    else:
        heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
        head_dim = width // heads
        head, d = channels // head_dim, channels % head_dim
        fits = heads * head_dim == width
        if layout == "qkv_per_head":
            fits = fits and out_features == 3 * width
            rows = head * 3 * head_dim + 2 * head_dim + d
        else:
            offset = 0
            kv_width = out_features
            if layout == "qkv_stacked":
                kv_width = (out_features - width) // 2
                fits = fits and width + 2 * kv_width == out_features
                offset = width + kv_width
            kv_heads = kv_width // head_dim
            fits = fits and kv_heads * head_dim == kv_width and kv_heads > 0
            fits = fits and heads % kv_heads == 0
            rows = offset + head // (heads // max(kv_heads, 1)) * head_dim + d
    if not fits:
        raise InputError(
            f"a source of {out_features} rows does not fit {width} channels in layout {layout!r}"
        )
    return rows
