"""Whole runs that rotate: plain folders, online ones, and what is said of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipelines import EVALUATION, custom, run, shorten
from tests.rotated import llama_folder
from tests.running import Cli
from tests.tiny import BLOCKS, VOCAB, WIDTH, tiny_folder, tiny_tokenizer
from tests.training import A4, interrupted_at, weights_of
from transformers import AutoModelForCausalLM

import crossbit
from crossbit.errors import InputError
from crossbit.evaluation.run import losses_of
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.recipe import Recipe
from crossbit.report.html import write_report
from crossbit.verification import verify

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

ROTATE, ONLINE = {"kind": "rotate"}, {"kind": "rotate", "down": True}
ROUNDING = {"kind": "rounding"}
TRAINING = {"epochs": 2, "batch": 2}
TRAINED = custom(
    weights={"bits": 4, "group": "channel"},
    transforms=[ONLINE],
    activations=A4,
    solver=ROUNDING,
    training=TRAINING,
    objective={"window": 2, "overlap": 1, "ahead": [1.0, 1.0]},
)


NOTHING: dict[str, Any] = {
    "hadamard": {},
    "rotations": {},
    "keys": False,
    "cache": None,
    "prefix": None,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head is tied to the embedding."""
    return tiny_folder(tmp_path_factory.mktemp("tied") / "model", "llama", True)


@pytest.fixture(scope="module")
def online(
    tmp_path_factory: pytest.TempPathFactory, tied: Path, text: Path
) -> tuple[Path, dict[str, Any]]:
    """A trained online result with its report."""
    out = tmp_path_factory.mktemp("online") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr("crossbit.finish.write_report", write_report)
        result = run(tied, text, out, TRAINED)
    return out, result


def config_of(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def loss(folder: Path, **options: Any) -> float:
    found = crossbit.evaluate(str(folder), text="embedded", length=32, windows=2, **options)
    return float(found["perplexity"]["value"])


# -- plain ----------------------------------------------------------------------------------------


def test_a_rotation_that_leaves_nothing_to_run_time_is_plain(text: Path, tmp_path: Path) -> None:
    """All of Mixtral's down_proj are those of experts."""
    model = tiny_folder(tmp_path / "model", "mixtral")
    result = run(model, text, tmp_path / "out", custom(transforms=[ONLINE]))
    assert result["kind"] == "plain"
    assert result["verify"]["passed"] is True
    assert config_of(tmp_path / "out")["model_type"] == "mixtral"
    notes = " ".join(result["warnings"])
    assert "the input of the experts' down_proj is not rotated" in notes
    assert "online" not in notes


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ({"bits": 4, "group": 16}, {"solver": {"kind": "gptq"}}),
        ({"bits": 4, "group": "channel"}, {"solver": ROUNDING, "training": TRAINING}),
    ],
    ids=["gptq-group", "trained-channel"],
)
def test_a_plain_rotation_loads_in_transformers(
    weights: Any, more: dict[str, Any], tied: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(
        tied, text, out, custom(transforms=[ROTATE], weights=weights, activations=A4, **more)
    )
    assert result["kind"] == "plain"
    assert result["verify"]["passed"] is True
    assert {"reload", "layers", "logits"} <= {c["name"] for c in result["verify"]["checks"]}
    config = config_of(out)
    assert config["tie_word_embeddings"] is False
    assert config["model_type"] == "llama"
    assert config_of(tied)["tie_word_embeddings"] is True
    notes = " ".join(result["warnings"])
    assert "online" not in notes
    stored = load_file(out / "model.safetensors")
    head = [n for n in stored if n.startswith("lm_head.") and not n.endswith("_shape")]
    head_bytes = sum(stored[n].nbytes for n in head)
    floats = 4 * VOCAB * WIDTH
    assert (
        f"a matrix of {VOCAB} x {WIDTH} more to store, {head_bytes:,} bytes at 8 bits "
        f"({floats:,} in float32)"
    ) in notes
    gains = [t for n, t in stored.items() if n.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(gains) == 2 * BLOCKS + 1
    assert all(bool((gain == 1).all()) for gain in gains)
    found = QuantizedCheckpoint(out)
    own, embedding = (found.tensor(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    assert own.shape == embedding.shape == (VOCAB, WIDTH)
    assert not torch.equal(own, embedding)
    assert loss(out) == pytest.approx(result["evaluation"]["quantized"]["perplexity"])
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("family", "rotate"),
    [
        *((family, rotate) for family in ("llama", "qwen2_moe") for rotate in (ROTATE, ONLINE)),
        ("48 channels", {**ONLINE, "keys": True}),
    ],
    ids=["llama", "llama-online", "qwen2_moe", "qwen2_moe-online", "12, 48 and 96 channels"],
)
def test_with_8_bits_nothing_is_lost(
    family: str, rotate: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """Through folds too: no factor goes to a layer whose output is mixed before it is read.

    So it is with widths, and heads, that are no powers of two.
    """
    if family == "48 channels":
        model = llama_folder(tmp_path / "model", hidden_size=48, intermediate_size=96)
    else:
        model = tiny_folder(tmp_path / "model", family)
    chosen = custom(
        transforms=[rotate, {"kind": "awq_scale"}],
        weights={"bits": 8, "group": 16, "scale_dtype": "float32"},
        embedding=None,
        head=None,
    )
    result = run(model, text, tmp_path / "out", chosen)
    assert abs(result["evaluation"]["paired"]["loss"]) < 0.02
    assert all(block["relative_error"] < 0.05 for block in result["blocks"])
    skipped = {f["group"] for f in result["folds"] if "run time" in f.get("skipped", "")}
    assert ("down" in skipped or "shared_expert.down" in skipped) is rotate.get("down", False)
    assert "o" not in skipped
    if rotate.get("keys"):
        online = config_of(tmp_path / "out")["crossbit_online"]
        assert (online["keys"], set(online["hadamard"].values())) == (True, {96})
        assert not any("rotated" in note for note in result["warnings"])


def test_norms_that_do_not_commute_are_said(text: Path, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "gemma2", True)
    result = run(model, text, tmp_path / "out", custom(transforms=[ROTATE], activations=A4))
    (note,) = (n for n in result["warnings"] if "rotated" in n)
    assert note.startswith("the residual stream is not rotated: post_attention_layernorm")
    assert result["verify"]["passed"] is True
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["tie_word_embeddings"]) == ("gemma2", True)


def test_keys_of_a_size_that_no_matrix_has(cli: Cli, text: Path, tmp_path: Path) -> None:
    """Refused alone; beside another rotation they are left out, and that is said before work."""
    model = llama_folder(tmp_path / "model", hidden_size=92, num_attention_heads=2)
    recipe, keys = tmp_path / "keys.yaml", {**ROTATE, "keys": True}
    settings = [part for s in EVALUATION for part in ("--set", s)]
    options: list[str | Path] = ["--recipe", recipe, "--out", tmp_path / "out", *settings]
    words = "queries and keys are not rotated (keys): no Hadamard matrix is known here for 46"
    alone = [{**keys, "residual": False, "heads": False}]
    recipe.write_text(json.dumps({"transforms": alone, "weights": {"group": "channel"}}))
    for command in ("plan", "quantize"):
        assert words in cli(command, model, *options).refusal
    recipe.write_text(json.dumps({"transforms": [keys], "weights": {"group": "channel"}}))
    ran = cli("quantize", model, *options)
    assert ran.code == 0, ran.err
    assert ran.err.index(f"note: {words}") < ran.err.index("verifying")
    assert "online" not in ran.out + ran.err
    result = json.loads((tmp_path / "out" / "crossbit.json").read_text())
    assert result["kind"] == "plain"
    assert any(words in note for note in result["warnings"])
    assert verify(tmp_path / "out").passed


# -- online ---------------------------------------------------------------------------------------


def test_an_online_folder_opens_in_crossbit_only(online: Any, cli: Cli, tmp_path: Path) -> None:
    out, result = online
    assert result["kind"] == "online"
    config = config_of(out)
    assert (config["model_type"], config["crossbit_kind"]) == ("crossbit", "online")
    assert config["crossbit_online"] == {
        **NOTHING,
        "hadamard": {f"model.layers.{i}.mlp.down_proj": 128 for i in range(BLOCKS)},
    }
    inner = config["crossbit_config"]
    assert (inner["model_type"], inner["tie_word_embeddings"]) == ("llama", False)
    with pytest.raises(ValueError, match="crossbit"):
        AutoModelForCausalLM.from_pretrained(out)
    assert any("online recipe" in note for note in result["warnings"])
    assert not any("research" in note for note in result["warnings"])
    for command in ("quantize", "analyze"):
        more: list[str | Path] = ["--out", tmp_path / "again"] if command == "quantize" else []
        assert "already quantized (an online result" in cli(command, out, *more).refusal


def test_it_is_verified(online: Any, cli: Cli, tmp_path: Path) -> None:
    out, result = online
    assert result["verify"]["passed"] is True
    checks = ["tensors", "files", "refused", "recorded"]
    assert [c["name"] for c in result["verify"]["checks"]] == checks
    assert verify(out).passed
    shown = cli("verify", out)
    assert (shown.code, shown.err) == (0, "")
    assert "loads in crossbit only" in " ".join(shown.out.replace("│", " ").split())
    # Without its rotations the same integers are another model.
    other = Path(shutil.copytree(out, tmp_path / "other"))
    config = config_of(other)
    config["crossbit_online"]["hadamard"] = {}
    (other / "config.json").write_text(json.dumps(config))
    report = verify(other)
    assert {c.name for c in report.checks if not c.passed} == {"files", "recorded"}
    assert loss(other) != pytest.approx(loss(out), rel=1e-2)


def test_what_was_measured_is_the_folder(online: Any, tied: Path) -> None:
    out, result = online
    recorded = result["evaluation"]
    assert recorded["path"] == "exported integers"
    assert loss(out) == pytest.approx(recorded["quantized"]["perplexity"])
    found = crossbit.evaluate(
        str(out), text="embedded", length=32, windows=2, against=str(tied), execution="fake"
    )
    assert (found["kind"], found["against"]["kind"]) == ("online", None)
    assert found["paired"]["loss"] == pytest.approx(recorded["paired"]["loss"], rel=1e-3)
    ids = torch.arange(192).reshape(6, 32)
    losses, fake = (torch.tensor(losses_of(out, ids, execution=e)) for e in ("integer", "fake"))
    # Sums in another order: an input of 4 bits may fall on the neighbouring code. How far that
    # moves the loss of one window is chance, not so the mean of several.
    assert float(losses.mean()) == pytest.approx(float(fake.mean()), rel=1e-2)
    assert losses.tolist() == pytest.approx(fake.tolist(), rel=3e-2)


def test_its_figure_is_labelled(online: Any, tied: Path, cli: Cli, tmp_path: Path) -> None:
    out, file = online[0], tmp_path / "e.json"
    options = ("--length", "32", "--windows", "2", "--json", file)
    ran = cli("evaluate", tied, "--against", out, *options)
    assert ran.code == 0, ran.err
    assert ran.out.count("(online)") == 1
    found = json.loads(file.read_text())
    assert (found["kind"], found["against"]["kind"]) == (None, "online")


def test_it_generates(online: Any, cli: Cli) -> None:
    """Token by token, with a cache, what a pass over all of them gives."""
    out, _ = online
    text = crossbit.generate(out, "the quick", tokens=6)
    assert crossbit.generate(out, "the quick", tokens=6) == text
    tokenizer = tiny_tokenizer()
    model: Any = crossbit.runtime.loader.load_model(out)
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            chosen = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat((ids, chosen.reshape(1, 1)), dim=1)
    assert tokenizer.decode(ids[0, -6:], skip_special_tokens=True) == text
    ran = cli("generate", out, "the quick", "--tokens", "6")
    assert (ran.code, ran.out) == (0, f"{text}\n")


def test_training_goes_on_to_the_same_bytes(
    online: Any, tied: Path, text: Path, tmp_path: Path
) -> None:
    """Killed inside the second window: one block comes from the state, one ahead is frozen."""
    out = tmp_path / "out"
    with interrupted_at((1, 3)):
        run(tied, text, out, TRAINED)
    assert not out.exists()
    result = run(tied, text, out, TRAINED, resume=True)
    assert weights_of(out) == weights_of(online[0])
    assert config_of(out) == config_of(online[0])
    assert result["verify"]["passed"] is True
    assert result["kind"] == "online"


def test_training_is_what_it_says(online: Any) -> None:
    out, result = online
    assert [w["blocks"] for w in result["training"]] == [[0, 1], [1, 2]]
    assert all(w["after"] <= w["before"] for w in result["training"])
    assert any(w["after"] < w["before"] for w in result["training"])
    assert all(row["solver"] == "gptq, trained" for row in result["layers"])
    layer = QuantizedCheckpoint(out).layer("model.layers.1.mlp.down_proj")
    assert layer is not None
    assert layer.activations is not None
    assert (layer.activations.bits, layer.activations.kind) == (4, "per_token")


def test_without_epochs_it_is_gptq(tied: Path, text: Path, tmp_path: Path) -> None:
    """What is trained reads the same turned inputs, and so do the blocks after it."""
    trained = TRAINED.model_dump(mode="json")
    chosen = {
        "a": {**trained, "solver": {"kind": "gptq"}, "objective": {}, "training": {}},
        "b": {**trained, "training": {**trained["training"], "epochs": 0}},
    }
    for name, data in chosen.items():
        recipe = Recipe.parse({**data, "evaluation": {"windows": 0}}, "custom")
        run(tied, text, tmp_path / name, recipe, settings=())
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_a_plan_of_it(tied: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "out", "calibration": str(text)}
    found = crossbit.plan(str(tied), TRAINED, samples=4, length=32, settings=EVALUATION, **options)
    assert found["fits"]
    assert found["seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    # The head is stored beside the embedding.
    unrotated = TRAINED.model_copy(update={"transforms": ()})
    plain = crossbit.plan(
        str(tied), unrotated, samples=4, length=32, settings=EVALUATION, **options
    )
    assert found["disk"]["output"] >= plain["disk"]["output"] + VOCAB * WIDTH


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "damaged crossbit_online; quantize again"),
        ({}, "damaged crossbit_online; quantize again"),
        ([], "damaged crossbit_online; quantize again"),
        ({"hadamard": ["model.layers.0.mlp.down_proj"]}, "damaged crossbit_online"),
        ({"hadamard": {"model.layers.0.mlp.down_proj": None}}, "damaged crossbit_online"),
        (
            {**NOTHING, "hadamard": {"model.layers.0.mlp.down": 128}},
            "no linear layer model.layers.0.mlp.down",
        ),
        ({**NOTHING, "hadamard": {"model.layers.0.mlp.down_proj": 56}}, "has 128 channels"),
        ({**NOTHING, "hadamard": {"model.layers.0.mlp.down_proj": 10**9}}, "has 128 channels"),
    ],
    ids=str,
)
def test_damage_is_named(content: Any, words: str, online: Any, cli: Cli, tmp_path: Path) -> None:
    other = Path(shutil.copytree(online[0], tmp_path / "other"))
    config = config_of(other)
    config["crossbit_online"] = content
    (other / "config.json").write_text(json.dumps(config))
    ran = cli("evaluate", other, "--length", "32", "--windows", "2")
    assert words in ran.refusal
    assert str(other / "config.json") in ran.refusal
    with pytest.raises(InputError, match="crossbit_online"):
        crossbit.generate(other, "the quick", tokens=1)
    report = verify(other)
    assert {c.name for c in report.checks if not c.passed} == {"files", "open"}


def test_a_list_of_operations_that_is_gone(online: Any, cli: Cli, tmp_path: Path) -> None:
    other = Path(shutil.copytree(online[0], tmp_path / "other"))
    config = config_of(other)
    del config["crossbit_online"]
    (other / "config.json").write_text(json.dumps(config))
    ran = cli("evaluate", other, "--length", "32", "--windows", "2")
    assert "damaged crossbit_online" in ran.refusal


def test_pages_say_online_and_claim_no_other_runtime(online: Any) -> None:
    out, _ = online
    page, card = (out / "report.html").read_text("utf8"), (out / "README.md").read_text("utf8")
    for words in ("Online result", "exported integers"):
        assert words in page
        assert words in card
    for words in ("vllm", "vLLM", "AutoModel", "research", "Research", "was simulated"):
        assert words not in page
        assert words not in card
    assert "crossbit generate" in card
    assert "transformers" not in card.replace("transformers refuses it", "")
    assert page.count("transformers") == page.count("transformers refuses it")


def test_the_command_says_it(cli: Cli, tied: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "turned.yaml"
    recipe.write_text("transforms: [{kind: rotate, down: true}]\nweights: {group: 16}\n")
    settings = [part for s in EVALUATION for part in ("--set", s)]
    ran = cli("quantize", tied, "--recipe", recipe, "--out", tmp_path / "out", *settings)
    assert ran.code == 0, ran.err
    shown = " ".join(ran.out.split())
    assert "verified yes (online: loads in crossbit only)" in shown
    assert "exported integers" in shown
    assert "note: online recipe: " in ran.err


def test_recipes_are_listed_with_their_kind(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "turned": custom(transforms=[ONLINE], summary="turned at run time"),
        "folded": custom(transforms=[ROTATE], summary="all in the weights"),
        "simulated": custom(
            transforms=[ONLINE], activations={"kind": "cross_dynamic"}, summary="a simulation"
        ),
    }
    monkeypatch.setattr("crossbit.recipe.preset_names", lambda: list(known))
    monkeypatch.setattr(Recipe, "load", lambda name: known[name])
    rows = {}
    for line in cli("recipes").out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0] in known:
            rows[cells[0]] = cells[1]
    assert rows == {"turned": "online", "folded": "plain", "simulated": "research"}
