"""The shell computes what the model computes, block by block, from every kind of checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import (
    BLOCKS,
    EOS,
    FAMILIES,
    SLIDING_WINDOW,
    VARIANTS,
    VOCAB,
    DictCheckpoint,
    exact_float64,
    logits_float64,
    sample_ids,
    tiny_config,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.experts import unfuse_experts
from crossbit.models.families import family_of
from crossbit.models.shell import Shell


def checkpoint_of(model: Any) -> DictCheckpoint:
    """As saved: a tied head is stored once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return DictCheckpoint(tensors)


@torch.no_grad()
def run_shell(shell: Shell, checkpoint: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    shell.check(checkpoint)
    shell.load_outside(checkpoint, dtype)
    hidden = shell.embed(ids)
    kwargs = shell.block_kwargs(ids.shape[1], dtype)
    for i in range(shell.num_blocks):
        shell.load_block(i, checkpoint, dtype)
        hidden = shell.run_block(i, hidden, kwargs[i])
        shell.free_block(i)
    return shell.logits(hidden)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", VARIANTS)
def test_shell_equals_the_model_bit_for_bit_in_float32(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied, dtype=torch.float32)
    unfuse_experts(model, family_of(model.config))
    checkpoint = checkpoint_of(model)
    for attn in ("sdpa", "eager"):
        shell = Shell(model.config, attn=attn)
        model.set_attn_implementation(shell.attn)
        for batch in (1, 3):
            ids = sample_ids(batch, 2 * SLIDING_WINDOW + 3, seed=batch)
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(run_shell(shell, checkpoint, ids, torch.float32), expected)
        # Freed blocks are on meta again.
        assert all(p.is_meta for i in range(BLOCKS) for p in shell.block(i).parameters())


@pytest.mark.parametrize("family", VARIANTS)
def test_shell_equals_the_original_model_in_float64(family: str) -> None:
    """Experts fused in the reference, read from the fused checkpoint."""
    model = tiny_model(family)
    ids = sample_ids(3, 20)
    expected = logits_float64(model, ids)
    shell = Shell(model.config, attn=model.config._attn_implementation)
    with exact_float64():
        actual = run_shell(shell, checkpoint_of(model), ids, torch.float64)
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shell_equals_from_pretrained_of_the_saved_folder(
    family: str, tied: bool, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "m", family, tied, dtype=torch.bfloat16)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(folder)
    shell = Shell(config)
    unfuse_experts(reference, family_of(config))
    ids = sample_ids(2, 20)
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(run_shell(shell, checkpoint, ids, torch.float32), expected)
    # Buffers (rotary tables, embedding scales) are those transformers computes.
    theirs = dict(reference.named_buffers())
    ours = dict(shell.model.named_buffers())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs)


def test_gemma2_falls_back_to_eager_where_sdpa_would_drop_softcapping() -> None:
    assert Shell(tiny_config("gemma2", tied=True), attn="sdpa").attn == "eager"
    assert Shell(tiny_config("gemma3_text", tied=True), attn="sdpa").attn == "sdpa"


def test_layers_of_gemma3_get_different_masks_and_rotary_tables() -> None:
    model = tiny_model("gemma3_text", dtype=torch.float32)
    shell = Shell(model.config)
    shell.load_outside(checkpoint_of(model), torch.float32)
    sliding, full, again = shell.block_kwargs(20, torch.float32)
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert torch.equal(sliding["position_embeddings"][0], again["position_embeddings"][0])
    assert sliding["attention_mask"] is not None
    assert full["attention_mask"] is None  # plain causal


def test_run_block_lets_gradients_through_and_logits_too() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    shell = Shell(model.config)
    checkpoint = checkpoint_of(model)
    shell.load_outside(checkpoint, torch.float32)
    shell.load_block(0, checkpoint, torch.float32)
    hidden = shell.embed(sample_ids(2, 8))
    assert not hidden.requires_grad
    kwargs = shell.block_kwargs(8, torch.float32)
    assert not shell.run_block(0, hidden, kwargs[0]).requires_grad
    weight = shell.block(0).get_parameter("mlp.up_proj.weight").requires_grad_(True)
    loss = shell.logits(shell.run_block(0, hidden, kwargs[0])).square().mean()
    torch.autograd.backward(loss)
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0


def test_load_block_starts_afresh_and_copies() -> None:
    """What was done to a loaded block (replaced layers, in-place folds) leaves no trace."""
    model = tiny_model("llama", dtype=torch.float32)
    checkpoint = checkpoint_of(model)
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    shell = Shell(model.config)
    block: Any = shell.load_block(1, checkpoint, torch.float32)
    assert block.self_attn.config is shell.config
    block.mlp.up_proj.weight.mul_(3)
    block.mlp.down_proj = torch.nn.Identity()
    shell.free_block(1)
    fresh = shell.load_block(1, checkpoint, torch.float32)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, kept[f"model.layers.1.{name}"])
        assert not parameter.requires_grad
    assert fresh is shell.block(1)
    assert not fresh.training


def test_block_kwargs_in_another_dtype_than_the_embedding() -> None:
    """OPT's projection before the blocks does not stand in the way."""
    model = tiny_model("opt_post_norm", dtype=torch.bfloat16)
    shell = Shell(model.config, attn="eager")
    shell.load_outside(checkpoint_of(model), torch.bfloat16)
    mask = shell.block_kwargs(6, torch.float32)[0]["attention_mask"]
    assert mask.dtype == torch.float32
    assert mask.shape[0] == 1
    assert isinstance(shell.model.model.decoder.project_in, torch.nn.Linear)


def test_base_model_checkpoint_without_prefix() -> None:
    model = tiny_model("qwen3", tied=True, dtype=torch.float32)
    ids = sample_ids(1, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    checkpoint = DictCheckpoint(dict(model.model.state_dict()))
    actual = run_shell(Shell(model.config), checkpoint, ids, torch.float32)
    assert torch.equal(actual, expected)


# -- refusals ---------------------------------------------------------------------------------


def changed(
    family: str, edits: dict[str, Tensor | None], tied: bool = False
) -> tuple[Any, DictCheckpoint]:
    model = tiny_model(family, tied=tied, dtype=torch.float32)
    tensors = dict(checkpoint_of(model)._tensors)
    for name, tensor in edits.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return model.config, DictCheckpoint(tensors)


Q = "model.layers.2.self_attn.q_proj.weight"


def test_missing_misshapen_and_unexpected_tensors() -> None:
    config, checkpoint = changed("qwen3", {Q: None})
    with pytest.raises(InputError, match=rf"no tensor {Q}"):
        Shell(config).check(checkpoint)
    with pytest.raises(WorkError, match=rf"no tensor {Q}"):
        Shell(config).load_block(2, checkpoint, torch.float32)
    config, checkpoint = changed("qwen3", {Q: torch.zeros(3, 4)})
    with pytest.raises(InputError, match=rf"{Q} has shape \(3, 4\)"):
        Shell(config).check(checkpoint)
    bias = Q.replace("weight", "bias")
    config, checkpoint = changed("qwen3", {bias: torch.zeros(64)})
    with pytest.raises(InputError, match=rf"the checkpoint has {bias}"):
        Shell(config).check(checkpoint)
    config, checkpoint = changed("qwen3", {"lm_head.weight": None})
    for method in ("check", "load_outside"):
        args = (checkpoint,) if method == "check" else (checkpoint, torch.float32)
        with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
            getattr(Shell(config), method)(*args)


def test_a_missing_expert_is_an_error() -> None:
    model = tiny_model("mixtral", dtype=torch.float32)
    unfuse_experts(model, family_of(model.config))
    tensors = dict(model.state_dict())
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(InputError, match=r"experts\.3\.up_proj"):
        Shell(model.config).check(DictCheckpoint(tensors))


def test_tied_heads_stored_twice_or_under_the_head_only() -> None:
    model = tiny_model("llama", tied=True, dtype=torch.float32)
    ids = sample_ids(1, 6)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    matrix = model.lm_head.weight
    twice = changed("llama", {"lm_head.weight": matrix}, tied=True)[1]
    head_only = changed(
        "llama", {"lm_head.weight": matrix, "model.embed_tokens.weight": None}, tied=True
    )[1]
    for checkpoint in (twice, head_only):
        shell = Shell(model.config)
        assert torch.equal(run_shell(shell, checkpoint, ids, torch.float32), expected)
        assert shell.model.lm_head.weight is shell.model.model.embed_tokens.weight
    different = changed("llama", {"lm_head.weight": matrix + 1}, tied=True)[1]
    with pytest.raises(InputError, match="tie_word_embeddings"):
        Shell(model.config).load_outside(different, torch.float32)


def test_running_before_loading_is_an_error_and_config_is_untouched() -> None:
    config = tiny_config("llama", tied=False)
    before = copy.deepcopy(config.to_dict())
    shell = Shell(config)
    for call in (
        lambda: shell.embed(sample_ids(1, 4)),
        lambda: shell.block_kwargs(4, torch.float32),
        lambda: shell.logits(torch.zeros(1, 4, 64)),
    ):
        with pytest.raises(WorkError, match="load_outside"):
            call()
    assert config.to_dict() == before


def test_unusable_config_is_one_line() -> None:
    config = tiny_config("llama", tied=False)
    config.num_attention_heads = 0
    with pytest.raises(InputError, match="cannot build 'llama'") as error:
        Shell(config)
    assert "\n" not in str(error.value)


def test_tokenizer_is_byte_level_and_reloads(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, 世界! \n\t~"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == EOS < VOCAB
