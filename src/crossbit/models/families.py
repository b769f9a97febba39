"""Families: declarative tables of what the blocks of an architecture look like.

A family says, with names relative to one block, which linear layers there are (and the role of
each), which of them read the same input, and where the inverse of a column factor of that input can
be put so that the block's function stays the same. `{e}` in a name stands for every expert of the
block. A rule whose modules do not exist in a block (the dense rule in a block of experts, and the
other way round) is passed over there; `structure.py` makes sure that no linear layer is left
without a rule.

Adding an architecture means adding a row to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from crossbit.errors import InputError

# How the output rows of a source linear map to the input channels of its consumer.
#   same         row j -> channel j
#   second_half  [gate; up] fused: channel j -> row j + rows / 2
#   kv_heads     v_proj with grouped heads: channel (head, d) -> row (head // heads per kv head, d)
#   qkv_stacked  [q; k; v] fused, the v part as in kv_heads
#   qkv_per_head [q0; k0; v0; q1; k1; v1; ...] fused, one triple a head
Layout = Literal["same", "second_half", "kv_heads", "qkv_stacked", "qkv_per_head"]


@dataclass(frozen=True)
class Requirement:
    """A config attribute that must have one of `values` for a fold to be exact; else `reason`."""

    attribute: str
    values: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class NormRule:
    """The group's input is the output of this norm, and nothing else reads that output."""

    module: str
    requires: Requirement | None = None


@dataclass(frozen=True)
class RowRule:
    """Channel j of the group's input is linear in one output row of this linear layer."""

    linear: str
    layout: Layout
    requires: Requirement | None = None


SourceRule = NormRule | RowRule


@dataclass(frozen=True)
class QueryKeyRule:
    """Which linear layers make queries and keys, and where in their rows."""

    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    layout: Literal["kv_heads", "qkv_stacked", "qkv_per_head"] = "kv_heads"


@dataclass(frozen=True)
class GroupRule:
    """Linear layers (`consumers`) and other weights (`readers`) that read the same tensor."""

    name: str
    consumers: tuple[str, ...]
    source: SourceRule
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `config.model_type` of transformers.
        blocks: path of the block list in the causal-LM module.
        roles: relative name of each linear layer of a block -> its role.
        groups: the input groups of a block.
        gain_offset: 1 where a norm multiplies by (1 + weight), else 0.
        experts: relative name of the fused experts module, if the family has one.
        checkpoint_names: (regular expression on our tensor name, replacement) pairs that give the
        name
            in checkpoint files, where it differs.
        outside: linear layers outside the blocks, besides the head.
        query_key: where queries and keys are.
    """

    model_type: str
    roles: dict[str, str]
    groups: tuple[GroupRule, ...]
    blocks: str = "model.layers"
    gain_offset: int = 0
    experts: str | None = None
    checkpoint_names: tuple[tuple[str, str], ...] = ()
    outside: tuple[str, ...] = ()
    query_key: QueryKeyRule = QueryKeyRule()


_ATTENTION_ROLES = {f"self_attn.{n}": n for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
_MLP_ROLES = {f"mlp.{n}": n for n in ("gate_proj", "up_proj", "down_proj")}
_EXPERT_ROLES = {f"mlp.experts.{{e}}.{n}": n for n in ("gate_proj", "up_proj", "down_proj")}

_QKV = GroupRule(
    "qkv",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    NormRule("input_layernorm"),
)
_O = GroupRule("o", ("self_attn.o_proj",), RowRule("self_attn.v_proj", "kv_heads"))
_DOWN = GroupRule("down", ("mlp.down_proj",), RowRule("mlp.up_proj", "same"))


def _gate_up(norm: str) -> GroupRule:
    return GroupRule("gate_up", ("mlp.gate_proj", "mlp.up_proj"), NormRule(norm))


_LLAMA = Family(
    model_type="llama",
    roles={**_ATTENTION_ROLES, **_MLP_ROLES},
    groups=(_QKV, _O, _gate_up("post_attention_layernorm"), _DOWN),
)

# Gemma-2 and Gemma-3 have norms after o_proj and down_proj too; those read outputs, which no fold
# of an input changes, so only the name of the norm before the MLP differs.
_GEMMA = replace(
    _LLAMA,
    groups=(_QKV, _O, _gate_up("pre_feedforward_layernorm"), _DOWN),
    gain_offset=1,
)

_EXPERT_GROUPS = (
    GroupRule(
        "experts_gate_up",
        ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
        NormRule("post_attention_layernorm"),
        readers=("mlp.gate",),
    ),
    GroupRule(
        "experts.{e}.down",
        ("mlp.experts.{e}.down_proj",),
        RowRule("mlp.experts.{e}.up_proj", "same"),
    ),
)

_MIXTRAL = Family(
    model_type="mixtral",
    roles={**_ATTENTION_ROLES, **_EXPERT_ROLES},
    groups=(_QKV, _O, *_EXPERT_GROUPS),
    experts="mlp.experts",
    checkpoint_names=(
        (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
        (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
        (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
        (r"\.mlp\.gate\.", r".block_sparse_moe.gate."),
    ),
)

_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    roles={**_ATTENTION_ROLES, **_MLP_ROLES, **_EXPERT_ROLES},
    groups=(_QKV, _O, _gate_up("post_attention_layernorm"), _DOWN, *_EXPERT_GROUPS),
    experts="mlp.experts",
)

_SHARED = "mlp.shared_expert."
_QWEN2_MOE = replace(
    _QWEN3_MOE,
    model_type="qwen2_moe",
    roles={
        **_QWEN3_MOE.roles,
        **{f"{_SHARED}{n}": n for n in ("gate_proj", "up_proj", "down_proj")},
    },
    groups=(
        _QKV,
        _O,
        _gate_up("post_attention_layernorm"),
        _DOWN,
        GroupRule(
            "experts_gate_up",
            (
                "mlp.experts.{e}.gate_proj",
                "mlp.experts.{e}.up_proj",
                f"{_SHARED}gate_proj",
                f"{_SHARED}up_proj",
            ),
            NormRule("post_attention_layernorm"),
            readers=("mlp.gate", "mlp.shared_expert_gate"),
        ),
        _EXPERT_GROUPS[1],
        GroupRule(
            "shared_expert.down", (f"{_SHARED}down_proj",), RowRule(f"{_SHARED}up_proj", "same")
        ),
    ),
)

_PHI3 = Family(
    model_type="phi3",
    roles={
        "self_attn.qkv_proj": "qkv_proj",
        "self_attn.o_proj": "o_proj",
        "mlp.gate_up_proj": "gate_up_proj",
        "mlp.down_proj": "down_proj",
    },
    groups=(
        GroupRule("qkv", ("self_attn.qkv_proj",), NormRule("input_layernorm")),
        GroupRule("o", ("self_attn.o_proj",), RowRule("self_attn.qkv_proj", "qkv_stacked")),
        GroupRule("gate_up", ("mlp.gate_up_proj",), NormRule("post_attention_layernorm")),
        GroupRule("down", ("mlp.down_proj",), RowRule("mlp.gate_up_proj", "second_half")),
    ),
    query_key=QueryKeyRule("self_attn.qkv_proj", "self_attn.qkv_proj", "qkv_stacked"),
)

# relu(x / f) = relu(x) / f for f > 0 only; every other activation needs an online multiply.
_POST_NORM = Requirement(
    "do_layer_norm_before",
    (True,),
    "the norm comes after the residual addition, so its output is not this input alone",
)
_OPT = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    roles={
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.out_proj": "o_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    groups=(
        GroupRule("qkv", _QKV.consumers, NormRule("self_attn_layer_norm", _POST_NORM)),
        GroupRule("o", ("self_attn.out_proj",), RowRule("self_attn.v_proj", "kv_heads")),
        GroupRule("fc1", ("fc1",), NormRule("final_layer_norm", _POST_NORM)),
        GroupRule(
            "fc2",
            ("fc2",),
            RowRule(
                "fc1",
                "same",
                Requirement(
                    "activation_function",
                    ("relu",),
                    "the activation before it is not positively homogeneous (only ReLU is)",
                ),
            ),
        ),
    ),
    outside=("model.decoder.project_in", "model.decoder.project_out"),
)

_GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    roles={
        "attention.query_key_value": "qkv_proj",
        "attention.dense": "o_proj",
        "mlp.dense_h_to_4h": "fc1",
        "mlp.dense_4h_to_h": "fc2",
    },
    groups=(
        # With parallel residual both norms read the block's input, each feeds one group: still
        # exact.
        GroupRule("qkv", ("attention.query_key_value",), NormRule("input_layernorm")),
        GroupRule("o", ("attention.dense",), RowRule("attention.query_key_value", "qkv_per_head")),
        GroupRule("fc1", ("mlp.dense_h_to_4h",), NormRule("post_attention_layernorm")),
        GroupRule(
            "fc2",
            ("mlp.dense_4h_to_h",),
            RowRule(
                "mlp.dense_h_to_4h",
                "same",
                Requirement(
                    "hidden_act",
                    ("relu",),
                    "the activation before it is not positively homogeneous (only ReLU is)",
                ),
            ),
        ),
    ),
    checkpoint_names=((r"^lm_head\.", "embed_out."),),
    query_key=QueryKeyRule(
        "attention.query_key_value", "attention.query_key_value", "qkv_per_head"
    ),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        replace(_LLAMA, model_type="mistral"),
        replace(_LLAMA, model_type="qwen2"),
        replace(_LLAMA, model_type="qwen3"),
        replace(_GEMMA, model_type="gemma2"),
        replace(_GEMMA, model_type="gemma3_text"),
        _OPT,
        _PHI3,
        _GPT_NEOX,
        _MIXTRAL,
        _QWEN3_MOE,
        _QWEN2_MOE,
    )
}


def family_of(config: object) -> Family:
    """The family of a transformers config.

    Raises:
        InputError: the config has no `model_type`, or one that no family describes.
    """
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise InputError(
            "config.json has no model_type: crossbit cannot tell the architecture; "
            "add it or use a model saved by transformers"
        )
    if model_type not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r}: no family table says which linear layers its "
            f"blocks have and what they read; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def needs_bos(config: object, prefix: Sequence[int] = ()) -> bool:
    """True for architectures that were trained with a BOS token before every text and fail
    without it (Gemma), unless the tokens of ``prefix`` stand there and end with it: in training
    there was one."""
    if ends_with_bos(config, prefix):
        return False
    return str(getattr(config, "model_type", "")).startswith("gemma")


def ends_with_bos(config: object, prefix: Sequence[int]) -> bool:
    """True if the tokens of a prefix end with BOS: a text comes after it without another."""
    return bool(prefix) and prefix[-1] == getattr(config, "bos_token_id", None)
