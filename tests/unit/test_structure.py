"""Structure discovery: every linear layer is counted, groups read what the forward pass reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    MASSIVE_UNIT,
    VARIANTS,
    DictCheckpoint,
    logits_float64,
    sample_ids,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn

from crossbit.errors import InputError
from crossbit.models.experts import (
    ExpertList,
    TensorReader,
    checkpoint_name,
    unfuse_experts,
)
from crossbit.models.families import FAMILIES as KNOWN
from crossbit.models.families import family_of
from crossbit.models.shell import build_empty
from crossbit.models.structure import ModelStructure, NormSource, RowSource, discover, source_rows

# Linear layers of all blocks, counted by hand from the configs in tests/tiny.py.
DENSE = 4 + 3
COUNTS = {
    "llama": BLOCKS * DENSE,
    "mistral": BLOCKS * DENSE,
    "qwen2": BLOCKS * DENSE,
    "qwen3": BLOCKS * DENSE,
    "gemma2": BLOCKS * DENSE,
    "gemma3_text": BLOCKS * DENSE,
    "opt": BLOCKS * (4 + 2),
    "opt_post_norm": BLOCKS * (4 + 2),
    "phi3": BLOCKS * (2 + 2),
    "gpt_neox": BLOCKS * (2 + 2),
    "gpt_neox_serial": BLOCKS * (2 + 2),
    "mixtral": BLOCKS * (4 + 4 * 3),
    "qwen3_moe": 2 * (4 + 6 * 3) + DENSE,
    "qwen2_moe": 2 * (4 + 6 * 3 + 3) + DENSE,
}
GATED = {"qkv", "o", "gate_up", "down"}
NO_SOURCE = {
    "gpt_neox": {"fc2"},
    "gpt_neox_serial": {"fc2"},
    "opt_post_norm": {"qkv", "fc1"},
}


def structure_of(model: Any) -> ModelStructure:
    unfuse_experts(model, family_of(model.config))
    return discover(model)


def test_tiny_families_cover_the_table() -> None:
    assert set(FAMILIES) == set(KNOWN)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", VARIANTS)
def test_every_linear_is_counted(family: str, tied: bool) -> None:
    model = build_empty(tiny_config(family, tied=tied))
    assert all(p.is_meta for p in model.parameters())
    structure = discover(model)
    assert structure.linear_count == COUNTS[family]
    assert structure.tied is tied
    assert len(structure.blocks) == len(structure.block_names) == BLOCKS
    # Independent count: all linear layers = those in blocks + outside + unquantized readers.
    readers = {
        f"{b.name}.{r}"
        for b in structure.blocks
        for g in b.groups
        for r in g.readers
        if isinstance(model.get_submodule(f"{b.name}.{r}"), nn.Linear)
    }
    total = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert total == structure.linear_count + len(structure.outside) + len(readers)
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        for name, info in block.linears.items():
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            assert (info.out_features, info.in_features) == tuple(linear.weight.shape)
            assert info.has_bias is (linear.bias is not None)
            assert block.group_of(name).width == info.in_features


@pytest.mark.parametrize("family", VARIANTS)
def test_sources_and_reasons(family: str) -> None:
    for block in discover(build_empty(tiny_config(family, tied=False))).blocks:
        without = {g.name for g in block.groups if g.source is None}
        assert without == NO_SOURCE.get(family, set())
        for group in block.groups:
            assert bool(group.reason) is (group.source is None)
            if isinstance(group.source, NormSource):
                assert group.source.gain_offset == int(family.startswith("gemma"))
                assert group.source.has_bias is family.startswith(("opt", "gpt_neox"))


@pytest.mark.parametrize("family", VARIANTS)
def test_group_members_read_one_tensor_and_nothing_else_does(family: str) -> None:
    """Recorded inputs of all linear layers and readers: equal inside a group, not across groups."""
    model = tiny_model(family)
    structure = structure_of(model)
    inputs: dict[str, Tensor] = {}
    hooks = []
    for block in structure.blocks:
        for group in block.groups:
            for name in (*group.consumers, *group.readers):
                full = f"{block.name}.{name}"
                hooks.append(
                    model.get_submodule(full).register_forward_pre_hook(
                        lambda _, args, full=full: inputs.__setitem__(full, args[0])
                    )
                )
    logits_float64(model, sample_ids(1, 12))
    for hook in hooks:
        hook.remove()
    for block in structure.blocks:
        firsts: list[Tensor] = []
        for group in block.groups:
            seen = [
                inputs[f"{block.name}.{n}"].reshape(-1, group.width)
                for n in (*group.readers, *group.consumers)
                if f"{block.name}.{n}" in inputs
            ]
            if not seen:  # an expert that no token chose
                continue
            rows = {tuple(r.tolist()) for r in seen[0]}
            for other in seen[1:]:
                if len(other) == len(seen[0]):
                    assert torch.equal(other, seen[0])
                else:  # an expert sees some of the group's rows
                    assert {tuple(r.tolist()) for r in other} <= rows
            assert not any(f.shape == seen[0].shape and torch.equal(f, seen[0]) for f in firsts)
            firsts.append(seen[0])


def test_tiny_models_are_hard() -> None:
    """The planted massive activation, outlier channel, gains and biases are really there."""
    for family in VARIANTS:
        model = tiny_model(family)
        structure = structure_of(model)
        block = structure.blocks[1]
        down = [n for n, i in block.linears.items() if i.role in ("down_proj", "fc2")]
        peaks: list[Tensor] = []
        for name in down:
            model.get_submodule(f"{block.name}.{name}").register_forward_pre_hook(
                lambda _, args, peaks=peaks: peaks.append(
                    args[0].abs().reshape(-1, args[0].shape[-1])
                )
            )
        logits_float64(model, sample_ids(2, 24))
        x = max(peaks, key=lambda t: float(t.max()))
        assert int(x.amax(0).argmax()) == MASSIVE_UNIT
        assert float(x.max()) > 100 * float(x.mean())
        norms = [p for n, p in model.named_parameters() if p.ndim == 1]
        assert all(float(p.std()) > 0.1 for p in norms)


@pytest.mark.parametrize(
    ("layout", "width", "rows", "expected"),
    [
        ("same", 4, 4, [0, 1, 2, 3]),
        ("second_half", 4, 8, [4, 5, 6, 7]),
        ("kv_heads", 8, 4, [0, 1, 0, 1, 2, 3, 2, 3]),
        ("kv_heads", 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("qkv_stacked", 8, 8 + 2 * 4, [12, 13, 12, 13, 14, 15, 14, 15]),
        ("qkv_per_head", 8, 24, [4, 5, 10, 11, 16, 17, 22, 23]),
    ],
)
def test_source_rows_by_hand(layout: Any, width: int, rows: int, expected: list[int]) -> None:
    class Config:
        num_attention_heads = 4

    assert source_rows(layout, width, rows, Config()).tolist() == expected


@pytest.mark.parametrize(
    ("layout", "rows"),
    [("same", 7), ("second_half", 8), ("kv_heads", 6), ("qkv_stacked", 13), ("qkv_per_head", 16)],
)
def test_source_rows_refuse_sizes_that_do_not_fit(layout: Any, rows: int) -> None:
    class Config:
        num_attention_heads = 4

    with pytest.raises(InputError, match="does not fit"):
        source_rows(layout, 8, rows, Config())


def test_opt_with_another_activation_does_not_fold_fc2() -> None:
    config = tiny_config("opt", tied=True)
    config.activation_function = "gelu"
    group = discover(build_empty(config)).blocks[0].group_of("fc2")
    assert group.source is None
    assert "ReLU" in group.reason


def test_neox_with_relu_folds_fc2() -> None:
    config = tiny_config("gpt_neox", tied=False)
    config.hidden_act = "relu"
    group = discover(build_empty(config)).blocks[0].group_of("mlp.dense_4h_to_h")
    assert isinstance(group.source, RowSource)


def test_norm_without_gain_has_no_source() -> None:
    config = tiny_config("opt", tied=True)
    config.layer_norm_elementwise_affine = False
    group = discover(build_empty(config)).blocks[0].group_of("fc1")
    assert group.source is None
    assert "no gain" in group.reason


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    config = tiny_config("llama", tied=False)
    config.model_type = "mamba"
    with pytest.raises(InputError, match=r"'mamba'.*known: llama, mistral"):
        build_empty(config)
    with pytest.raises(InputError, match="no model_type"):
        family_of(object())


def test_unmatched_linear_inside_and_outside_blocks_is_refused() -> None:
    model: Any = build_empty(tiny_config("llama", tied=False))
    model.model.layers[2].mlp.adapter = nn.Linear(4, 4, device="meta")
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.adapter is matched by no rule"):
        discover(model)
    model = build_empty(tiny_config("llama", tied=False))
    model.model.projector = nn.Linear(4, 4, device="meta")
    with pytest.raises(InputError, match=r"model\.projector is matched by no rule"):
        discover(model)


def test_fused_experts_left_in_place_are_refused() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts is fused"):
        discover(tiny_model("mixtral"))


def test_a_weight_matrix_of_no_linear_layer_is_refused() -> None:
    model: Any = build_empty(tiny_config("llama", tied=False))
    model.model.layers[1].mlp.lora_a = nn.Parameter(torch.zeros(2, 64))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.lora_a is in no linear layer"):
        discover(model)


def test_missing_layer_is_refused() -> None:
    model: Any = build_empty(tiny_config("llama", tied=False))
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(InputError, match=r"model\.layers\.1 has .* but no self_attn\.k_proj"):
        discover(model)


# -- experts ----------------------------------------------------------------------------------

MOE = ["mixtral", "qwen3_moe", "qwen2_moe"]


@pytest.mark.parametrize("family", MOE)
def test_unfused_experts_equal_fused(family: str) -> None:
    model = tiny_model(family)
    ids = sample_ids(3, 20)
    before = logits_float64(model, ids)
    unfuse_experts(model, family_of(model.config))
    after = logits_float64(model, ids)
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


def test_experts_without_tokens_are_not_called() -> None:
    model = tiny_model("mixtral")
    fused = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[2, 0]] * 5)
    weights = torch.tensor([[0.7, 0.3]] * 5, dtype=torch.float64)
    expected = fused(x, index, weights)
    unfuse_experts(model, family_of(model.config))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, ExpertList)
    called = set()
    for i, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda *_, i=i: called.add(i))
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-12, atol=1e-12)
    assert called == {0, 2}
    empty = experts(x[:0], index[:0], weights[:0])
    assert empty.shape == (0, 64)


def saved_names(model: Any, folder: Any) -> set[str]:
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("family", VARIANTS)
def test_checkpoint_names_are_those_transformers_writes(family: str, tmp_path: Any) -> None:
    model = tiny_model(family, dtype=torch.float32)
    written = saved_names(model, tmp_path)
    table = family_of(model.config)
    unfuse_experts(model, table)
    assert {checkpoint_name(table, n) for n, _ in model.named_parameters()} == written


@pytest.mark.parametrize("family", MOE)
def test_reader_takes_fused_and_per_expert_checkpoints(family: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = tiny_model(family, dtype=torch.float32)
    fused = DictCheckpoint(dict(model.state_dict()))
    model.save_pretrained(tmp_path)
    single = DictCheckpoint(load_file(tmp_path / "model.safetensors"))
    table = family_of(model.config)
    unfuse_experts(model, table)
    own = DictCheckpoint(dict(model.state_dict()))
    readers = [TensorReader(table, c) for c in (fused, single, own)]
    for name, parameter in model.named_parameters():
        for reader in readers:
            assert reader.shape(name) == tuple(parameter.shape)
            tensor = reader.tensor(name)
            assert tensor is not None
            assert torch.equal(tensor, parameter)
    missing = "model.layers.0.mlp.experts.99.gate_proj.weight"
    assert all(r.shape(missing) is None for r in readers)


# -- queries and keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS)
def test_queries_and_keys_share_factors_where_their_scores_stay(family: str) -> None:
    """q / s and k s, in the rows that are known, for random s: the logits are the same."""
    model = tiny_model(family)
    unfuse_experts(model, family_of(model.config))
    ids = sample_ids(2, 16)
    wanted = logits_float64(model, ids)
    structure = discover(model)
    rng = torch.Generator().manual_seed(0)
    for block in structure.blocks:
        found = block.query_key
        assert isinstance(found, str) == family.startswith(("qwen3", "gemma3"))
        if isinstance(found, str):
            assert "normed" in found
            continue
        assert sorted(set(found.key_factors.tolist())) == list(range(found.count))
        factor = torch.exp(torch.randn(found.count, generator=rng, dtype=torch.float64))
        for name, rows, values in (
            (found.queries, found.query_rows, 1 / factor[found.query_factors]),
            (found.keys, found.key_rows, factor[found.key_factors]),
        ):
            linear = model.get_submodule(f"{block.name}.{name}")
            linear.weight[rows] *= values[:, None]
            if linear.bias is not None:
                linear.bias[rows] *= values
    torch.testing.assert_close(logits_float64(model, ids), wanted, rtol=1e-10, atol=1e-10)


def test_an_unknown_rotary_embedding_has_no_factors() -> None:
    model = tiny_model("llama")
    del model.model.rotary_emb.inv_freq
    assert "rotary" in str(discover(model).blocks[0].query_key)
