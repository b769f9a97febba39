"""Whole runs with DuQuant's rotations: what is written, read back, refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cqe import DUQUANT, FLOAT_ENDS, TURN, TURNED, TURNED_AND_TRAINED, perplexity
from tests.pipelines import custom, run, shorten
from tests.rotated import llama_folder
from tests.tiny import BLOCKS
from tests.training import A8, killed_and_resumed, train, weights_of

import crossbit
from crossbit.errors import InputError
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.models.opening import open_tokenizer
from crossbit.runtime.loader import load_model, open_blocks
from crossbit.verification import verify

pytestmark = pytest.mark.usefixtures("quick", "no_collection")


@pytest.fixture(scope="module")
def turned(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path
) -> tuple[Path, dict[str, Any]]:
    """A run of TURNED, and its result."""
    out = tmp_path_factory.mktemp("turned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        result = run(llama, text, out, TURNED)
    return out, result


def test_rotated_inputs_are_online(turned: Any) -> None:
    out, result = turned
    assert result["kind"] == "online"
    assert result["evaluation"]["path"] == "exported integers"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "crossbit"
    assert config["crossbit_kind"] == "online"
    stored = load_file(out / "model.safetensors")
    firsts = {n.removesuffix(".input_rotation_first") for n in stored if n.endswith("_first")}
    keepers = config["crossbit_online"]["rotations"]
    assert len(keepers) == 7 * BLOCKS
    assert firsts == set(keepers.values())
    block = "model.layers.1."
    assert {n.removeprefix(block): k for n, k in keepers.items() if n.startswith(block)} == {
        **{f"self_attn.{n}_proj": f"{block}self_attn.q_proj" for n in "qkv"},
        "self_attn.o_proj": f"{block}self_attn.o_proj",
        **{f"mlp.{n}_proj": f"{block}mlp.gate_proj" for n in ("gate", "up")},
        "mlp.down_proj": f"{block}mlp.down_proj",
    }
    for name in firsts:
        width = stored[f"{name}.input_rotation_permutation"].numel()
        assert width == (128 if name.endswith("down_proj") else 64)
        assert stored[f"{name}.input_rotation_second"].shape == (16, 16)
        assert stored[f"{name}.input_rotation_first"].dtype == torch.float32


def test_what_is_read_is_what_was_evaluated(turned: Any) -> None:
    out, result = turned
    assert verify(out).passed
    assert perplexity(out) == pytest.approx(result["evaluation"]["quantized"]["perplexity"])
    tokenizer = open_tokenizer(out)
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    likeliest = load_model(out)(input_ids=ids).logits[0, -1].argmax()
    assert crossbit.generate(out, "The quick", tokens=1) == tokenizer.decode([int(likeliest)])


def test_rotations_are_applied_when_it_is_read(turned: Any, tmp_path: Path) -> None:
    """Identities in their place make another model, which verification finds."""
    other = Path(shutil.copytree(turned[0], tmp_path / "other"))
    stored = load_file(other / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith(("rotation_first", "rotation_second")):
            stored[name] = torch.eye(tensor.shape[-1])
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    assert perplexity(other) != pytest.approx(perplexity(turned[0]), rel=1e-2)
    assert not verify(other).passed


UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
FIRST, PERMUTATION = "input_rotation_first", "input_rotation_permutation"


@pytest.mark.parametrize("reader", [GATE, UP])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (FIRST, None, "input_rotation_first is missing; incomplete export"),
        (PERMUTATION, None, "input_rotation_permutation is missing; incomplete export"),
        ("all", None, "is missing; incomplete export"),
        (FIRST, torch.eye(24), r"has shape \[24, 24\], which is no rotation of 64 channels"),
        (FIRST, torch.ones(()), r"has shape \[\], which is no rotation"),
        (FIRST, torch.ones(2, 16, 16), r"has shape \[2, 16, 16\], which is no rotation"),
        (FIRST, torch.eye(32), "the second rotation"),
        (FIRST, 2 * torch.eye(16), "not orthogonal"),
        (FIRST, torch.full((16, 16), torch.nan), "not orthogonal"),
        (PERMUTATION, torch.arange(32), r"has shape \[32\], \[64\] expected"),
        (PERMUTATION, torch.zeros(64, dtype=torch.int64), "each of 64 channels once"),
        (PERMUTATION, torch.arange(64).float(), "a permutation is int64"),
    ],
)
def test_a_damaged_rotation_is_named(
    part: str, value: Any, message: str, reader: str, turned: Any, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(turned[0], tmp_path / "other"))
    stored = load_file(other / "model.safetensors")
    name = GATE
    parts = [n for n in stored if n.startswith(f"{name}.input_rotation")]
    for tensor in parts if part == "all" else [f"{name}.{part}"]:
        del stored[tensor]
    if value is not None:
        stored[f"{name}.{part}"] = value
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message) as found:
        QuantizedCheckpoint(other).layer(reader)
    assert name in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=message):
        perplexity(other)


@pytest.mark.parametrize(
    ("rotations", "message"),
    [
        ({}, "input_rotation_first contradicts the config"),
        ({UP: UP}, "up_proj.input_rotation_permutation is missing|contradicts the config"),
        ({UP: GATE}, "input_rotation_first contradicts the config"),
        ([UP], "damaged crossbit_online"),
        ("model", "damaged crossbit_online"),
        (None, "damaged crossbit_online"),
    ],
)
def test_a_config_that_does_not_match_is_named(
    rotations: Any, message: str, turned: Any, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(turned[0], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["crossbit_online"]["rotations"] = rotations
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_blocks(other)


def test_a_module_that_is_not_there_is_named(turned: Any, tmp_path: Path) -> None:
    other = Path(shutil.copytree(turned[0], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["crossbit_online"]["rotations"][UP.replace("1", "9")] = GATE
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers.9.mlp.up_proj as rotated, which is not"):
        QuantizedCheckpoint(other)


def rotated(model: Path, text: Path, out: Path, chosen: Any) -> dict[str, str]:
    """The rotated layers of a run, after what is read back was found to be what was evaluated."""
    result = run(model, text, out, chosen)
    assert result["kind"] == "online"
    assert verify(out).passed
    assert perplexity(out) == pytest.approx(result["evaluation"]["quantized"]["perplexity"])
    online = json.loads((out / "config.json").read_text())["crossbit_online"]
    found: dict[str, str] = online["rotations"]
    return found


@pytest.mark.parametrize(("family", "count"), [("gemma3_text", 7), ("opt", 6), ("mixtral", 4)])
def test_other_families_turn_their_inputs(
    family: str, count: int, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    layers = rotated(models[family], text, tmp_path / "out", TURNED)
    assert len(layers) == count * BLOCKS
    assert not any("experts" in name for name in layers)  # they read floats


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 7), ("gemma3_text", 7), ("opt", 6), ("mixtral", 4 + 4 * 3)]
)
def test_inputs_of_weights_alone_are_rotated(
    family: str, count: int, models: dict[str, Path], llama: Path, text: Path, tmp_path: Path
) -> None:
    """Experts' too."""
    weights = {**DUQUANT, "activations": None, "transforms": TURN[1:]}
    chosen = custom(**weights, solver={"kind": "gptq"})
    source = llama if family == "llama" else models[family]
    assert len(rotated(source, text, tmp_path / "out", chosen)) == count * BLOCKS


@pytest.fixture(scope="module")
def turned_and_trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """An uninterrupted run of TURNED_AND_TRAINED."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(llama, text, out, TURNED_AND_TRAINED)
    return out


def test_a_training_with_rotations_is_the_same_again(
    turned_and_trained: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    train(llama, text, tmp_path / "again", TURNED_AND_TRAINED)
    assert weights_of(tmp_path / "again") == weights_of(turned_and_trained)
    killed_and_resumed((1, 3), llama, text, tmp_path / "out", TURNED_AND_TRAINED)
    assert weights_of(tmp_path / "out") == weights_of(turned_and_trained)


def test_blocks_are_closed_as_they_were_trained(turned_and_trained: Path, turned: Any) -> None:
    """A rotation twice would leave nothing of a block's output for the next block."""
    found = json.loads((turned_and_trained / "crossbit.json").read_text())["blocks"]
    plain = turned[1]["blocks"]
    for trained, solved in zip(found, plain, strict=True):
        assert trained["relative_error"] < 2 * solved["relative_error"]


def test_rotations_help_an_outlier(llama: Path, text: Path, tmp_path: Path) -> None:
    """One channel of the residual stream is an outlier: at 4 bits the first block errs less."""
    errors = []
    for transforms in ([], TURN[1:]):
        data = {**DUQUANT, "transforms": transforms, "solver": {"kind": "gptq"}}
        chosen = custom(**data, evaluation={"windows": 0})
        result = run(llama, text, tmp_path / str(len(transforms)), chosen, settings=())
        errors.append(result["blocks"][0]["relative_error"])
    assert errors[1] < 0.8 * errors[0]


def test_a_float_input_is_not_rotated(llama: Path, text: Path, tmp_path: Path) -> None:
    """Nor one that a layer reads which is not quantized; everything reads back."""
    chosen = custom(
        **DUQUANT,
        overrides=[{"match": "down_proj", "activations": "none"}],
        ignore=["gate_proj"],
        evaluation={"windows": 0},
    )
    result = run(llama, text, tmp_path / "out", chosen, settings=())
    assert verify(tmp_path / "out").passed
    rotations = json.loads((tmp_path / "out" / "config.json").read_text())["crossbit_online"][
        "rotations"
    ]
    assert {name.rpartition(".")[2] for name in rotations} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    skipped = {f["group"] for f in result["folds"] if f["kind"] == "duquant" and "skipped" in f}
    assert skipped == {"gate_up"}
    (note,) = (note for note in result["warnings"] if note.startswith("duquant: "))
    assert note == (
        "duquant: no rotation of the input of gate_proj, up_proj "
        "(gate_proj, which is not quantized, reads it too)"
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose down_proj reads 67 channels, which no block size below divides."""
    path = tmp_path_factory.mktemp("odd") / "model"
    return llama_folder(path, hidden_size=64, intermediate_size=67)


ODD: dict[str, Any] = {
    **DUQUANT,
    "weights": {"bits": 4, "group": "channel"},
    "solver": {"kind": "gptq"},
    "evaluation": {"windows": 0},
}
NO_BLOCK = (
    "duquant: no rotation of the input of down_proj (67 channels cannot be split into rotation "
    "blocks of 2 to 32 channels; ask for larger blocks)"
)


def test_a_width_that_no_block_divides_is_left_out(odd: Path, text: Path, tmp_path: Path) -> None:
    """The other inputs are rotated; the plan and the report say what is not, and why."""
    chosen, out = custom(**ODD), tmp_path / "out"
    planned = crossbit.plan(str(odd), chosen, out=out, calibration=str(text), samples=4, length=32)
    assert planned["kind"] == "online"
    result = run(odd, text, out, chosen, settings=())
    for notes in (planned["notes"], result["warnings"]):
        assert [note for note in notes if note.startswith("duquant: ")] == [NO_BLOCK]
    rotations = json.loads((out / "config.json").read_text())["crossbit_online"]["rotations"]
    assert len(rotations) == 6 * 2
    assert not any("down_proj" in name for name in rotations)
    turns = [f for f in result["folds"] if f["kind"] == "duquant"]
    skipped = {f["group"]: f["skipped"] for f in turns if "skipped" in f}
    assert skipped == {"down": NO_BLOCK.partition("(")[2].removesuffix(")")}
    assert result["verify"]["passed"] is True
    assert verify(out).passed


def test_with_nothing_to_rotate_it_is_refused(odd: Path, text: Path, tmp_path: Path) -> None:
    floats = [{"match": m, "activations": "none"} for m in ("*.self_attn.*", "*_proj")]
    floats.append({"match": "down_proj", "activations": DUQUANT["activations"]})
    chosen = custom(**ODD, overrides=floats)
    with pytest.raises(InputError, match=rf"{re.escape(NO_BLOCK)}; leave it out") as failure:
        run(odd, text, tmp_path / "out", chosen, settings=())
    assert "\n" not in str(failure.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [{"kind": "smooth", "targets": "all"}, {"kind": "awq_scale"}])
def test_no_factor_is_folded_into_a_rotated_input(
    config: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    """A factor of the channels before a Hadamard transform is none of those behind it."""
    down = {"kind": "rotate", "residual": False, "heads": False, "down": True}
    weights = {"bits": 8, "group": 16, "scale_dtype": "float32"}
    smooth = config["kind"] == "smooth"
    errors = []
    for number, transforms in enumerate(([down], [down, config])):
        chosen = custom(
            weights=weights,
            activations=A8 if smooth else None,
            transforms=transforms,
            solver={"kind": "gptq"},
            evaluation={"windows": 0},
            **FLOAT_ENDS,
        )
        result = run(llama, text, tmp_path / str(number), chosen, settings=())
        errors.append([b["relative_error"] for b in result["blocks"]])
    reasons = {f["group"]: f.get("skipped") for f in result["folds"]}
    assert reasons["down"] == "its input is rotated at run time"
    assert reasons["o"] is None
    for one, other in zip(*errors, strict=True):
        assert other < 2 * one
