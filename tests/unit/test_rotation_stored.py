"""Rotations of the whole model: what is stored, and what is left to run time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.rotated import Folder, distance, logits_of, opened, original, stored, written_once
from tests.tiny import BOS, EOS, PAD, VOCAB, WIDTH, tiny_tokenizer
from torch import nn

from crossbit.engine.prepare import OpenModel
from crossbit.errors import InputError
from crossbit.models.experts import checkpoint_name
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.rotations.hadamard import hadamard_matrix, random_signs
from crossbit.runtime.online import HadamardInput, Online, carry, turn_input
from crossbit.transforms import rotation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Tiny models on disk."""
    return written_once(tmp_path_factory)


# -- vocabularies and what is stored ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_in_parts_is_the_same(
    dtype: torch.dtype, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(folder("llama", True, dtype))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    whole = [model.weights.tensor(n) for n in names]
    for rows in (1, 7, VOCAB - 1):
        monkeypatch.setattr(rotation, "CHUNK_ELEMENTS", rows * WIDTH + 3)
        assert all(
            torch.equal(model.weights.tensor(n), w) for n, w in zip(names, whole, strict=True)
        )


def test_only_embedding_and_head_keep_a_stored_dtype(tmp_path: Path) -> None:
    """Rotated weights are no numbers of 16 bits any more; those of a vocabulary are made so."""
    config = hf.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=96,  # gate and up in one matrix of 192 rows, six times its columns
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    hf.Phi3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = opened(tmp_path)
    rotate = torch.diag(random_signs(32, 0)) @ hadamard_matrix(32) / 32**0.5
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    name = "model.layers.0.mlp.gate_up_proj.weight"
    for known in (*outside, name):
        assert stored(model, known).dtype == torch.bfloat16
        found, exact = model.weights.tensor(known), stored(model, known).double() @ rotate
        assert found.dtype == (torch.bfloat16 if known in outside else torch.float32)
        if known in outside:
            exact = exact.bfloat16().double()
        assert distance(found.double(), exact) < 1e-6


def test_a_model_of_16_bits(folder: Folder) -> None:
    """What differs is that embedding and head are rounded to 16 bits again."""
    path = folder("qwen2", False, torch.bfloat16)
    model = opened(path, down=True)
    wanted = original(path)
    assert 1e-4 < distance(logits_of(model.shell, model.weights), wanted) < 2e-2
    heads = opened(path, residual=False, down=True)
    assert distance(logits_of(heads.shell, heads.weights), wanted) < 1e-5


def test_names_are_those_of_the_model(folder: Folder) -> None:
    """Whatever the files call them."""
    model = opened(folder("mixtral"))
    names = set(model.weights.names)
    assert names == {n for n, _ in model.shell.model.named_parameters()}
    family = model.shell.structure.family
    files = {checkpoint_name(family, n) for n in names}
    assert files != names
    assert files <= set(model.files.names)
    for name in ("model.layers.0.mlp.gate.bias", "model.embed_tokens.bias", 3):
        assert name not in model.weights


# -- at run time -----------------------------------------------------------------------------------


def test_what_takes_a_layers_place_takes_its_input_over() -> None:
    first, second, third = (nn.Linear(8, 8, bias=False) for _ in range(3))
    turn_input(first, HadamardInput(4))
    carry(first, second)
    carry(second, third)
    x = torch.randn(3, 8)
    matrix = torch.kron(torch.eye(2), hadamard_matrix(4).float() / 2)
    torch.testing.assert_close(third(x), x @ matrix @ third.weight.T)
    carry(nn.Linear(8, 8), first)
    torch.testing.assert_close(first(x), x @ matrix @ first.weight.T)


def test_a_turned_input_has_no_source_of_folds(folder: Folder) -> None:
    """A factor of a turned channel is none of the channel before."""
    model = opened(folder("llama"), down=True)
    plain = opened(folder("llama"))
    for shell, turned in ((model.shell, True), (plain.shell, False)):
        for block in shell.structure.blocks:
            group = block.group_of("mlp.down_proj")
            assert (group.source is None) is turned
            assert ("run time" in group.reason) is turned
            assert block.group_of("self_attn.o_proj").source is not None
    assert all(b.structure is s for b, s in zip(*_plans(model), strict=True))


def _plans(model: OpenModel) -> tuple[Any, Any]:
    return model.plan.blocks, model.shell.structure.blocks


def test_online_operations_survive_json(folder: Folder) -> None:
    model = opened(folder("llama"), down=True)
    assert Online.of_json(model.online.to_json(), {}, 3) == model.online
    assert model.online.hadamard == {f"model.layers.{i}.mlp.down_proj": 128 for i in range(3)}
    assert not Online()


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        [],
        {"hadamard": None},
        {"hadamard": [1]},
        {"hadamard": {"model.layers.0.mlp.down_proj": "many"}},
        {"hadamard": {"model.layers.0.mlp.down_proj": 64.5}},
        {"hadamard": {"model.layers.0.mlp.down_proj": True}},
    ],
)
def test_damaged_operations_are_named(content: Any) -> None:
    with pytest.raises(InputError, match="damaged crossbit_online") as failure:
        Online.of_json(content, {}, 3)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "hadamard",
    [
        {"model.layers.0.mlp.dawn_proj": 128},
        {"model.layers.7.mlp.down_proj": 128},
        {"model.layers.0.mlp.down_proj": 24},
        {"model.layers.0.mlp.down_proj": 0},
        {"model.layers.0.mlp.down_proj": -128},
        {"model.layers.0.mlp.down_proj": 256},
    ],
)
def test_operations_of_another_model_are_refused(hadamard: Any, folder: Folder) -> None:
    shell = Shell(open_config(folder("llama")))
    (name,) = hadamard
    with pytest.raises(InputError, match=re.escape(name)):
        Online(hadamard).dress(shell)
