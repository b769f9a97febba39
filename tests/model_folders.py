"""Small model folders on disk: a random LLaMA with a byte-level tokenizer, and as a GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with  2024 jugs", "a  2 b"]
BLOCKS, WIDTH, MLP, HEADS, KV_HEADS = 2, 64, 96, 4, 2


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 320 tokens, with <s> and </s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_llama(vocab: int, *, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A random LLaMA with norm gains that are not 1."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.1)
    return model.eval()


def save_folder(folder: Path, *, sharded: bool = False, tied: bool = True) -> LlamaForCausalLM:
    """Write model and tokenizer to ``folder``; returns the model."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), tied=tied)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    tokenizer.save_pretrained(folder)
    return model


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k in llama.cpp's rotary order (pairs next to each other)."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    extra: dict[str, np.ndarray] | None = None,
    drop: str | None = None,
    pre: str = "smollm",
    quantize: bool = True,
    architecture: str = "llama",
    **metadata: Any,
) -> None:
    """Write ``model`` as llama.cpp's converter does, linears as Q8_0 if ``quantize``."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocab])
    state = tokenizer.backend_tokenizer.to_str()
    merges = json.loads(state)["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {k: v.float().numpy() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if drop is not None:
        del tensors[drop]
    for key, value in tensors.items():
        stem = key.removesuffix(".weight")
        name = f"{names.get_name(stem)}.weight"
        if stem.endswith("q_proj"):
            value = _permuted(value, config.num_attention_heads)
        elif stem.endswith("k_proj"):
            value = _permuted(value, config.num_key_value_heads)
        if quantize and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
