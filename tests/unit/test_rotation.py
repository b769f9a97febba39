"""Rotations of the whole model: the function stays, the weights do not, outliers are spread."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.tiny import (
    BOS,
    EOS,
    MASSIVE_TOKEN,
    PAD,
    VOCAB,
    WIDTH,
    sample_ids,
    tiny_folder,
    tiny_tokenizer,
)
from torch import Tensor, nn

from crossbit.compat import check_recipe
from crossbit.engine.prepare import OpenModel, open_model
from crossbit.errors import InputError
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.experts import checkpoint_name
from crossbit.models.opening import open_config
from crossbit.models.shell import Shell
from crossbit.models.source import resolve_model
from crossbit.models.structure import RowSource
from crossbit.recipe import Recipe
from crossbit.rotations.hadamard import hadamard_matrix, order_parts, random_signs
from crossbit.runtime.online import HadamardInput, Online, carry, turn_input
from crossbit.transforms import rotation
from crossbit.transforms.rotation import (
    Change,
    RotatedCheckpoint,
    RotationPlan,
    hadamard_block,
    untied,
)

RMS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "qwen2_moe"]
# Families whose residual stream cannot be rotated, and what the note must name.
REFUSED = {
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "opt": "model.decoder.final_layer_norm is no RMSNorm",
    "gpt_neox": "gpt_neox.final_layer_norm is no RMSNorm",
    "gpt_neox_serial": "gpt_neox.final_layer_norm is no RMSNorm",
    "opt_post_norm": "no single norm before its head",
}
MODES: dict[str, dict[str, bool]] = {
    "residual": {"heads": False},
    "heads": {"residual": False},
    "both": {},
    "all": {"down": True},
}
IDS = sample_ids(2, 24)

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Tiny models on disk, each written once."""
    known: dict[tuple[Any, ...], Path] = {}

    def make(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, tied, dtype)
        if key not in known:
            known[key] = tiny_folder(tmp_path_factory.mktemp(family), family, tied, dtype=dtype)
        return known[key]

    return make


def opened(path: Path, activations: Any = None, **rotate: Any) -> OpenModel:
    """The model as a run opens it."""
    data = {"transforms": [{"kind": "rotate", **rotate}], "embedding": None, "head": None}
    recipe = Recipe.parse({**data, "activations": activations}, "rotated")
    check_recipe(recipe)
    model = resolve_model(str(path))
    return open_model(model, open_config(model.path), recipe, "cpu")


@torch.no_grad()
def logits_of(shell: Shell, weights: Any, ids: Tensor = IDS) -> Tensor:
    """Float32 logits with every block loaded as the loop loads it."""
    shell.load_outside(weights, torch.float32)
    for index in range(shell.num_blocks):
        shell.load_block(index, weights, torch.float32)
    logits: Tensor = shell.model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def original(path: Path, ids: Tensor = IDS) -> Tensor:
    """Float32 logits of transformers' own model."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def stored(model: OpenModel, name: str) -> Tensor:
    """The tensor as it was before the rotation, by the model's own name."""
    assert isinstance(model.weights, RotatedCheckpoint)
    return model.weights._stored(name)


def changed(model: OpenModel) -> set[str]:
    """Names of the tensors that the rotation changes."""
    found = set()
    for name in model.weights.names:
        before, after = stored(model, name).float(), model.weights.tensor(name).float()
        assert before.shape == after.shape == model.weights.shape(name)
        if distance(after, before) > 0.01:
            found.add(name)
    return found


# -- the function stays, the weights do not -------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", RMS)
def test_the_function_stays(family: str, tied: bool, mode: str, folder: Folder) -> None:
    path = folder(family, tied)
    model = opened(path, **MODES[mode])
    assert distance(logits_of(model.shell, model.weights), original(path)) < 1e-5
    assert bool(model.online) == (mode == "all" and family != "mixtral")
    names = set(model.weights.names)
    norms = {n for n in names if re.search(r"(layernorm|model\.norm)\.weight$", n)}
    assert len(norms) == 2 * model.shell.num_blocks + 1
    wanted = set()
    if mode != "heads":
        # All but what never touches the residual stream: norms of heads, biases of what reads it.
        other = r"[qk]_norm\.weight$|(q|k|v|qkv|gate|up)_proj\.bias$"
        wanted = {n for n in names if not re.search(other, n)}
        assert all(bool((model.weights.tensor(n) == 1).all()) for n in norms)
        assert model.shell.structure.tied is False
    else:
        assert model.shell.structure.tied is tied
        assert model.notes == ()
    if mode != "residual":
        wanted |= {n for n in names if re.search(r"\.(v|o|qkv)_proj\.weight$|v_proj\.bias$", n)}
    assert changed(model) == wanted


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2_moe"])
def test_only_the_input_of_down_proj_is_turned(family: str, folder: Folder) -> None:
    """Its weight here, its input at run time; neither without the other computes the model."""
    path = folder(family)
    model = opened(path, residual=False, heads=False, down=True)
    wanted = original(path)
    assert distance(logits_of(model.shell, model.weights), wanted) < 1e-5
    names = {f"{n}.weight" for n in model.online.hadamard}
    assert changed(model) == names
    assert not any(".experts." in n for n in names)
    assert all(n.endswith("down_proj.weight") for n in names)
    model.shell.dress = None
    assert distance(logits_of(model.shell, model.weights), wanted) > 0.01


def test_weights_are_what_the_matrices_make_of_them(folder: Folder) -> None:
    """Against products with the dense matrices, in float64."""
    model = opened(folder("llama", True), down=True, seed=3)
    rotate = torch.diag(random_signs(WIDTH, 3)) @ hadamard_matrix(WIDTH) / WIDTH**0.5
    own = hadamard_matrix(16) / 4
    block = "model.layers.1."
    gains = {
        n: stored(model, f"{n}.weight").double()
        for n in ("model.norm", f"{block}input_layernorm", f"{block}post_attention_layernorm")
    }
    head, columns = (
        torch.kron(torch.eye(2, dtype=torch.float64), own),
        torch.kron(torch.eye(4, dtype=torch.float64), own),
    )
    inner = hadamard_matrix(128) / 128**0.5

    def before(name: str) -> Tensor:
        return stored(model, name).double()

    embedding = before("model.embed_tokens.weight")
    attention = gains[f"{block}input_layernorm"]
    wanted = {
        "model.embed_tokens.weight": embedding @ rotate,
        "lm_head.weight": embedding * gains["model.norm"] @ rotate,
        f"{block}self_attn.q_proj.weight": before(f"{block}self_attn.q_proj.weight")
        * attention
        @ rotate,
        f"{block}self_attn.v_proj.weight": head.T
        @ (before(f"{block}self_attn.v_proj.weight") * attention @ rotate),
        f"{block}self_attn.v_proj.bias": head.T @ before(f"{block}self_attn.v_proj.bias"),
        f"{block}self_attn.o_proj.weight": rotate.T
        @ before(f"{block}self_attn.o_proj.weight")
        @ columns,
        f"{block}self_attn.o_proj.bias": rotate.T @ before(f"{block}self_attn.o_proj.bias"),
        f"{block}mlp.up_proj.weight": before(f"{block}mlp.up_proj.weight")
        * gains[f"{block}post_attention_layernorm"]
        @ rotate,
        f"{block}mlp.down_proj.weight": rotate.T @ before(f"{block}mlp.down_proj.weight") @ inner,
        f"{block}mlp.down_proj.bias": rotate.T @ before(f"{block}mlp.down_proj.bias"),
        f"{block}mlp.up_proj.bias": before(f"{block}mlp.up_proj.bias"),
    }
    for name, expected in wanted.items():
        found = model.weights.tensor(name)
        assert found.dtype == torch.float32
        assert distance(found.double(), expected) < 1e-6, name


def test_the_seed_chooses_the_signs(folder: Folder) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    one, same, other = (opened(folder("llama"), seed=s).weights.tensor(name) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert distance(one, other) > 0.1


def llama_folder(path: Path, **config: Any) -> Path:
    """A LLaMA of other widths, its gains and biases random."""
    torch.manual_seed(0)
    given = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 128,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        **config,
    }
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_matrices_that_are_not_symmetric(tmp_path: Path) -> None:
    """A transposed one would not show in widths that are powers of two."""
    path = llama_folder(tmp_path, hidden_size=48, intermediate_size=96)
    for width in (48, 12, 96):
        matrix = hadamard_matrix(width)
        assert not torch.equal(matrix, matrix.T)
    model = opened(path, down=True)
    assert model.notes == ()
    assert distance(logits_of(model.shell, model.weights), original(path)) < 1e-5


# -- outliers -------------------------------------------------------------------------------------


def peak(x: Tensor) -> float:
    """Largest element over the root mean square, the median token's."""
    flat = x.reshape(-1, x.shape[-1]).float()
    return float((flat.abs().amax(-1) / flat.square().mean(-1).sqrt()).median())


@torch.no_grad()
def read_by(shell: Shell, weights: Any, name: str, ids: Tensor) -> Tensor:
    """What the named module reads."""
    logits_of(shell, weights, ids)
    seen: list[Tensor] = []
    shell.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shell.model(input_ids=ids, use_cache=False)
    return seen[0]


def test_outliers_are_spread(folder: Folder) -> None:
    """A channel of the residual stream, and a unit of the MLP that a token excites."""
    path = folder("llama")
    plain, model = Shell(open_config(path)), opened(path, down=True)
    ids = torch.tensor([[BOS, MASSIVE_TOKEN, 5]])
    before, after = (
        read_by(shell, weights, "model.layers.1.mlp.down_proj", ids)[0, 1]
        for shell, weights in ((plain, Checkpoint(path)), (model.shell, model.weights))
    )
    assert peak(before) > 10
    assert peak(after) < 2
    assert peak(plain.embed(IDS)) > 5
    assert peak(model.shell.embed(IDS)) < 3


# -- heads that are tied --------------------------------------------------------------------------


def test_a_tied_head_becomes_a_matrix_of_its_own(folder: Folder) -> None:
    path = folder("llama", True)
    config = open_config(path)
    model = opened(path)
    assert model.notes == (
        "the rotation unties the head from the embedding: a matrix of 264 x 64 more to store",
    )
    assert untied(config).tie_word_embeddings is False
    assert config.tie_word_embeddings is True
    assert "lm_head.weight" in model.weights
    assert model.weights.shape("lm_head.weight") == (VOCAB, WIDTH)
    head, embedding = (
        model.weights.tensor(f"{n}.weight") for n in ("lm_head", "model.embed_tokens")
    )
    assert distance(head, embedding) > 0.1
    kept = opened(path, residual=False)
    assert kept.shell.structure.tied is True
    assert kept.notes == ()


@pytest.mark.parametrize("mode", ["both", "heads"])
def test_a_tied_matrix_may_be_stored_as_the_head(mode: str, folder: Folder, tmp_path: Path) -> None:
    source = folder("llama", True)
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = opened(tmp_path, **MODES[mode])
    assert distance(logits_of(model.shell, model.weights), original(source)) < 1e-5


# -- what cannot be rotated -----------------------------------------------------------------------


@pytest.mark.parametrize("family", REFUSED)
def test_other_norms_keep_the_residual_stream(family: str, folder: Folder) -> None:
    """They do not commute with a rotation, or stand where one would have to pass."""
    path = folder(family, True)
    model = opened(path, down=True)
    (note,) = model.notes
    assert note.startswith("the residual stream is not rotated: ")
    assert REFUSED[family] in note
    assert model.shell.structure.tied is True
    assert distance(logits_of(model.shell, model.weights), original(path)) < 1e-5
    v = r"\.(v_proj|query_key_value)\.(weight|bias)$|\.(o_proj|out_proj|dense)\.weight$"
    down = r"\.(down_proj|fc2|dense_4h_to_h)\.weight$"
    assert changed(model) == {n for n in model.weights.names if re.search(f"{v}|{down}", n)}
    with pytest.raises(InputError, match=re.escape(note)) as failure:
        opened(path, heads=False)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_gains_fold_whatever_a_norm_adds_to_them(family: str, folder: Folder) -> None:
    """Gemma's norms multiply by 1 + weight: a gain of 1 is a weight of 0."""
    path = folder(family)
    shell = Shell(open_config(path))
    offset = shell.structure.family.gain_offset
    assert offset == (family == "gemma2")
    norms, changes = {"model.norm": offset}, {"lm_head": Change(gain="model.norm")}
    for block in shell.structure.blocks:
        for group in block.groups:
            if not isinstance(group.source, RowSource):
                assert group.source is not None
                norm = f"{block.name}.{group.source.module}"
                norms[norm] = offset
                changes |= {f"{block.name}.{n}": Change(gain=norm) for n in group.consumers}
    plan = RotationPlan(changes, norms, {}, False, ())
    weights = RotatedCheckpoint(Checkpoint(path), shell, plan)
    assert bool((weights.tensor("model.norm.weight") == 1 - offset).all())
    assert distance(logits_of(shell, weights), original(path)) < 1e-5


def test_nothing_to_rotate_is_refused(folder: Folder) -> None:
    for path, rotate, words in (
        (folder("llama"), {"residual": False, "heads": False}, "a rotation of nothing; valid"),
        (
            folder("mixtral"),
            {"residual": False, "heads": False, "down": True},
            "rotation: the input of the experts' down_proj is not rotated",
        ),
    ):
        with pytest.raises(InputError, match=words) as failure:
            opened(path, **rotate)
        assert "\n" not in str(failure.value)


def test_experts_keep_their_inputs_and_that_is_said(folder: Folder) -> None:
    for family, online in (("mixtral", False), ("qwen3_moe", True), ("qwen2_moe", True)):
        model = opened(folder(family), down=True)
        assert "the input of the experts' down_proj is not rotated" in " ".join(model.notes)
        assert bool(model.online) is online
        assert model.recipe.kind == ("online" if online else "plain")


def test_what_only_an_online_recipe_may_needs_something_online(folder: Folder) -> None:
    static = {"bits": 4, "kind": "per_tensor_static"}
    assert opened(folder("llama"), down=True, activations=static).recipe.kind == "online"
    with pytest.raises(InputError, match="static per-tensor activations below 8 bits"):
        opened(folder("mixtral"), down=True, activations=static)


# -- widths ---------------------------------------------------------------------------------------


@given(st.integers(1, 4096))
def test_a_block_is_the_largest_order_that_divides_the_width(width: int) -> None:
    def order(n: int) -> bool:
        try:
            order_parts(n)
        except InputError:
            return False
        return True

    fits = [n for n in range(4, width + 1) if width % n == 0 and order(n)]
    if fits:
        assert hadamard_block(width) == fits[-1]
    else:
        with pytest.raises(InputError, match=f"of 4 or more channels divides {width}; leave"):
            hadamard_block(width)


def test_widths_without_a_matrix_are_rotated_in_blocks(tmp_path: Path) -> None:
    path = llama_folder(tmp_path, hidden_size=92, num_attention_heads=2, intermediate_size=184)
    model = opened(path, down=True)
    block = hadamard_block(184)
    assert 4 <= block < 184
    assert set(model.online.hadamard.values()) == {block}
    residual, heads, down = model.notes
    assert residual == "the residual stream has 92 channels, rotated in blocks of 4"
    assert "heads of attention are not rotated: no Hadamard matrix is known here for 46" in heads
    assert down == f"the input of down_proj has 184 channels, rotated in blocks of {block}"
    assert distance(logits_of(model.shell, model.weights), original(path)) < 1e-5
    assert changed(model) >= {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("config", "rotate", "width"),
    [
        ({"hidden_size": 66, "num_attention_heads": 1, "num_key_value_heads": 1}, {}, 66),
        ({"hidden_size": 64, "intermediate_size": 66}, {"down": True}, 66),
    ],
)
def test_impossible_widths_are_refused(
    config: dict[str, int], rotate: dict[str, bool], width: int, tmp_path: Path
) -> None:
    path = llama_folder(tmp_path, **config)
    with pytest.raises(InputError, match=f"divides {width}; leave this rotation out") as failure:
        opened(path, **rotate)
    assert "\n" not in str(failure.value)


# -- vocabularies and what is stored --------------------------------------------------------------


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


# -- at run time ----------------------------------------------------------------------------------


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
