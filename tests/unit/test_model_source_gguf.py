"""GGUF files: the converted folder against the model the file was written from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.model_folders import BLOCKS, tiny_llama, tiny_tokenizer, write_gguf
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from crossbit.errors import InputError
from crossbit.models.built import models_cache
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.gguf_header import read_gguf_header
from crossbit.models.gguf_repair import rope_scaling, shortest_float32
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.source import ModelFolder, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="module")
def converted(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, ModelFolder]:
    """A Q8_0 file with a licence beside it, and what resolving it gave."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.Q8_0.gguf", model, tokenizer)
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "unrelated.txt").write_text("no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSBIT_CACHE", str(tmp_path_factory.mktemp("kept")))
        return folder, resolve_model(str(folder / "tiny.Q8_0.gguf"))


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Q8_0 by its definition: groups of 32, scale = max / 127 in fp16."""
    groups = weight.detach().double().reshape(-1, 32)
    exact = groups.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.where(exact > 0, groups / exact, 0).round()
    return (codes * exact.half().double()).reshape(weight.shape)


def test_weights_are_the_dequantized_ones(
    converted: tuple[Path, ModelFolder], model: LlamaForCausalLM
) -> None:
    with Checkpoint(converted[1].path) as checkpoint:
        expected = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        assert set(checkpoint.names) == set(expected)
        for name, value in expected.items():
            stored = checkpoint.tensor(name)
            assert stored.dtype == torch.bfloat16
            dense = q8_0(value) if value.ndim == 2 else value.double()
            # One rounding to bfloat16; a tie of the codes may have gone the other way.
            error = (stored.double() - dense).abs()
            rounded = error <= dense.abs() * 2**-8 + 1e-12
            assert rounded.double().mean() > 0.99, name
            step = value.abs().max().item() / 127 if value.ndim == 2 else 0.0
            assert (error[~rounded] <= 1.01 * step).all(), name


def test_function_is_that_of_the_model_written(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Float weights, so that rotary order, norms and epsilon show without quantization error."""
    write_gguf(tmp_path / "f.gguf", model, tokenizer, quantize=False)
    found = resolve_model(str(tmp_path / "f.gguf"), dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    ids = torch.randint(0, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert found.note is not None
    assert found.note.startswith("converted from GGUF")


def test_folder_is_complete(converted: tuple[Path, ModelFolder]) -> None:
    folder, found = converted
    names = {path.name for path in found.path.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "crossbit-source.json",
    } == names
    assert found.origin == "gguf"
    assert found.source_bytes == (folder / "tiny.Q8_0.gguf").stat().st_size
    assert found.note == (
        "dequantized from GGUF Q8_0: weights stand on an 8-bit grid already (15 x Q8_0, 5 x F32)"
    )
    source = json.loads((found.path / "crossbit-source.json").read_text())
    assert source["tensor_types"] == {"Q8_0": 15, "F32": 5}


def test_config_says_what_the_file_says(
    converted: tuple[Path, ModelFolder], model: LlamaForCausalLM
) -> None:
    config = open_config(converted[1].path)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
        "rope_parameters",
    ):
        assert getattr(config, key) == getattr(model.config, key), key
    written = json.loads((converted[1].path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in written
    assert "_model_name_or_path" not in written


def test_tokenizer_splits_digits_and_keeps_its_template(
    converted: tuple[Path, ModelFolder], tokenizer: PreTrainedTokenizerFast
) -> None:
    again = open_tokenizer(converted[1].path)
    assert len(again) == len(tokenizer)
    text = "pack  my box </s> a  2 b 2024\n\n 8"
    ids = again(text).input_ids
    assert again.decode(ids) == text
    # Two spaces before a digit are one piece where digits stand alone, two in GPT-2's split.
    pieces = [piece for piece, _ in again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  2")]
    assert pieces == ["a", "ĠĠ", "2"]
    assert (again.bos_token_id, again.eos_token_id) == (0, 1)
    assert tokenizer.eos_token_id in ids
    assert again.model_max_length == 128
    assert again.apply_chat_template([{"content": "fox"}], tokenize=False) == "fox"


def test_second_time_comes_from_the_cache(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    first = resolve_model(str(tmp_path / "a.gguf"))
    monkeypatch.setattr("crossbit.models.gguf._convert", lambda *_: pytest.fail("converted again"))
    assert resolve_model(str(tmp_path / "a.gguf")) == first
    shutil.copy(tmp_path / "a.gguf", tmp_path / "renamed.gguf")
    with pytest.raises(pytest.fail.Exception):
        resolve_model(str(tmp_path / "a.gguf"), dtype=torch.float32)


def test_conversion_prints_nothing(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    capfd.readouterr()
    resolve_model(str(tmp_path / "a.gguf"))
    assert capfd.readouterr() == ("", "")


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert list(models_cache().iterdir()) == []
    return message


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"hello")
    assert "not a GGUF file" in refused(path)
    path.write_bytes(b"")
    assert "not a GGUF file" in refused(path)


@pytest.mark.parametrize("keep", [4, 20, 300, 4000, -64])
def test_truncated(converted: tuple[Path, ModelFolder], tmp_path: Path, keep: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes((converted[0] / "tiny.Q8_0.gguf").read_bytes()[:keep])
    assert "truncated or corrupt GGUF" in refused(path)


def test_nan_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    broken = tiny_llama(len(tokenizer))
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    write_gguf(tmp_path / "nan.gguf", broken, tokenizer, quantize=False)
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in refused(tmp_path / "nan.gguf")


def test_missing_tensor(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, model, tokenizer, drop="model.layers.1.self_attn.v_proj.weight")
    assert "lacks 1 tensors" in refused(path)


def test_tensor_that_the_loader_would_pass_over(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    extra = {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}
    write_gguf(tmp_path / "b.gguf", model, tokenizer, extra=extra)
    assert "unsupported tensors" in refused(tmp_path / "b.gguf")


def test_unknown_architecture(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_gguf(tmp_path / "c.gguf", model, tokenizer, architecture="clip")
    assert "clip" in refused(tmp_path / "c.gguf")


def test_linear_rope_scaling_survives(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scaling: dict[str, Any] = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    write_gguf(tmp_path / "r.gguf", model, tokenizer, **scaling)
    config = open_config(resolve_model(str(tmp_path / "r.gguf")).path)
    assert config.rope_parameters == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 50000.0,
    }


def llama3_divisors(factor: float, base: float, dim: int) -> np.ndarray[Any, Any]:
    """Divisors as transformers computes its own Llama-3 frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(**parameters: object) -> torch.Tensor:
        config = LlamaConfig(
            hidden_size=4 * dim,
            num_attention_heads=4,
            max_position_embeddings=131072,
            rope_parameters={"rope_theta": base, **parameters},
        )
        kind = str(parameters["rope_type"])
        values: torch.Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
        return values

    plain = base ** -(torch.arange(0, dim, 2).float() / dim)
    scaled = frequencies(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_found_again(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, factor: float
) -> None:
    path = tmp_path / "l3.gguf"
    divisors = llama3_divisors(factor, 50000.0, 64)
    write_gguf(path, model, tokenizer, extra={"rope_freqs.weight": divisors})
    assert rope_scaling(read_gguf_header(path), "x") == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors[len(divisors) // 2 :] *= 1.5
    write_gguf(path, model, tokenizer, extra={"rope_freqs.weight": divisors})
    with pytest.raises(InputError, match="not Llama-3's"):
        rope_scaling(read_gguf_header(path), "x")


def test_rope_scaling_without_parameters_is_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_gguf(tmp_path / "y.gguf", model, tokenizer, rope__scaling__type="yarn")
    assert "rope scaling yarn" in refused(tmp_path / "y.gguf")


def test_token_that_only_the_loader_knows_is_taken_out(
    converted: tuple[Path, ModelFolder],
) -> None:
    again = open_tokenizer(converted[1].path)
    assert "<|endoftext|>" not in again.get_vocab()
    assert again.unk_token is None
    assert max(again("x <|endoftext|> y").input_ids) < len(again)


def test_split_file(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "s.gguf"
    write_gguf(path, model, tokenizer)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    tensor = reader.tensors[0]
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "llama-gguf-split --merge" in refused(tmp_path / "part.gguf")


@pytest.mark.parametrize("value", [1e-5, 1e-6, 1e-12, 0.1, 3.0])
def test_shortest_float32_recovers_the_decimal(value: float) -> None:
    stored = float(np.float32(value))
    assert shortest_float32(stored) == value
    assert np.float32(shortest_float32(stored)) == np.float32(value)


def test_header_counts(converted: tuple[Path, ModelFolder], model: LlamaForCausalLM) -> None:
    header = read_gguf_header(converted[0] / "tiny.Q8_0.gguf")
    assert header.architecture == "llama"
    assert header.get("block_count") == BLOCKS
    unique = {id(p): p.numel() for p in model.parameters()}
    assert sum(t.elements for t in header.tensors) == sum(unique.values())
