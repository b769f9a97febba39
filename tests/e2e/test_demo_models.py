"""The embedded models: what came over from their GGUF files, against the files themselves."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path

import gguf
import pytest
import torch

from crossbit.models.checkpoint import Checkpoint, scan_finite
from crossbit.models.demo import EMBEDDED, assemble, find_embedded
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.source import ModelFolder, resolve_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def demo() -> ModelFolder:
    return resolve_model("demo")


def dequantized(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """float32 values by the gguf package's own dequantization."""
    dense = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    return dense.reshape([int(n) for n in reversed(tensor.shape)])


def test_demo_is_smollm2(demo: ModelFolder) -> None:
    config = open_config(demo.path)
    assert (demo.origin, demo.name) == ("demo", "demo")
    assert demo.source_bytes == 98_362_432
    assert demo.note is not None
    assert "Q4_1" in demo.note
    assert config.model_type == "llama"
    assert config.num_hidden_layers == 30
    assert config.hidden_size == 576
    assert config.intermediate_size == 1536
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.vocab_size == 49152
    assert config.tie_word_embeddings is True
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.max_position_embeddings == 8192
    with Checkpoint(demo.path) as checkpoint:
        assert len(checkpoint) == 272
        assert "lm_head.weight" not in checkpoint
        assert checkpoint.nbytes == 2 * 134_515_008
        scan_finite(checkpoint)


def test_demo_resolves_at_once_the_second_time(demo: ModelFolder) -> None:
    start = time.monotonic()
    assert resolve_model("demo") == demo
    assert time.monotonic() - start < 1.0


def test_demo_weights_are_the_file_s(demo: ModelFolder) -> None:
    reader = gguf.GGUFReader(str(find_embedded("demo").parts[0]))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.ffn_norm.weight": "model.layers.29.post_attention_layernorm.weight",
        "blk.7.attn_q.weight": "model.layers.7.self_attn.q_proj.weight",
        "blk.7.attn_k.weight": "model.layers.7.self_attn.k_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
    }
    with Checkpoint(demo.path) as checkpoint:
        for theirs, ours in names.items():
            dense = dequantized(stored[theirs])
            if "attn_q" in theirs or "attn_k" in theirs:
                # llama.cpp keeps the two halves of a rotary pair next to each other.
                dense = dense.reshape(-1, 32, 2, 576).transpose(1, 2).reshape(dense.shape)
            assert torch.equal(checkpoint.tensor(ours), dense.to(torch.bfloat16)), theirs


def test_demo_tokenizer(demo: ModelFolder) -> None:
    tokenizer = open_tokenizer(demo.path)
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "In  2024,\n\n  3 x 45.67%  and 'the' naïve\t99 日本"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[0] != tokenizer.bos_token_id  # the file says add_bos_token false
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["In", "ĠĠ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" in chat
    assert (demo.path / "LICENSE").read_text().lstrip().startswith("Apache License")


@pytest.mark.slow
def test_demo_gemma(tmp_path: Path) -> None:
    for package in EMBEDDED["demo-gemma"].packages:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    found = resolve_model("demo-gemma")
    config = open_config(found.path)
    assert found.source_bytes == 253_113_024
    assert config.model_type == "gemma3_text"
    assert config.num_hidden_layers == 18
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (640, 2048, 256)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)
    assert config.rms_norm_eps == 1e-6
    assert config.sliding_window == 512
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.query_pre_attn_scalar == 256
    assert config.tie_word_embeddings is True
    tokenizer = open_tokenizer(found.path)
    assert len(tokenizer) == 262144
    ids = tokenizer("Hello  world\n\n\n x").input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == "Hello  world\n\n\n x"
    assert (found.path / "GEMMA_TERMS.html").is_file()
    assemble(find_embedded("demo-gemma"), tmp_path / "gemma.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "gemma.gguf"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with Checkpoint(found.path) as checkpoint:
        # Gemma multiplies by 1 + gain; the GGUF holds the sum, the checkpoint the gain.
        norm = checkpoint.tensor("model.layers.3.post_feedforward_layernorm.weight")
        dense = dequantized(stored["blk.3.post_ffw_norm.weight"]) - 1
        assert torch.equal(norm, dense.to(torch.bfloat16))
        up = checkpoint.tensor("model.layers.17.mlp.up_proj.weight")
        dense = dequantized(stored["blk.17.ffn_up.weight"])
        assert torch.equal(up, dense.to(torch.bfloat16))
