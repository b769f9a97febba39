"""Whole runs with LET, DuQuant and quantized keys and values: written, read, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.opened import token_error
from tests.pipelines import custom, run, shorten
from tests.running import Cli
from tests.tiny import BLOCKS, sample_ids, tiny_folder
from tests.training import A4, A8, interrupted_at, recipe, train, weights_of

import crossbit
from crossbit.engine.closing import close_block
from crossbit.engine.job import Job
from crossbit.engine.window import through_original
from crossbit.errors import InputError
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.models.opening import open_tokenizer
from crossbit.runtime.loader import load_model, open_blocks
from crossbit.verification import verify

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

FLOAT_ENDS: dict[str, Any] = {"embedding": None, "head": None}
WEIGHTS = {"bits": 3, "group": 16, "symmetric": False}
LWC = {"kind": "rounding", "start": {"kind": "rtn"}, "parameter": "none", "limits": "range"}
SINGLE = {"window": 1, "overlap": 0}
LET: dict[str, Any] = {
    "transforms": [{"kind": "let"}],
    "weights": WEIGHTS,
    "activations": A8,
    "training": {"epochs": 2, "batch": 2, "range": 0.05, "let": 0.02},
    **FLOAT_ENDS,
}
OMNIQUANT = recipe(LWC, **LET, objective=SINGLE)
EXPANDED = recipe(
    {**LWC, "expansion": {"kind": "band", "width": 4}},
    **LET,
    objective={"window": 2, "overlap": 1, "homologous": 1, "ahead": [1, 0, 1]},
)
TURN = [{"kind": "smooth", "strength": 0.6}, {"kind": "duquant", "block": 16, "steps": 8}]
DUQUANT: dict[str, Any] = {"activations": A4, "transforms": TURN, **FLOAT_ENDS}
TURNED = custom(**DUQUANT, solver={"kind": "gptq"})
TURNED_AND_TRAINED = recipe(**DUQUANT, cache={"bits": 8}, objective={"window": 2, "overlap": 1})
KEYS = {"kind": "rotate", "residual": False, "heads": False, "keys": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models."""
    place = tmp_path_factory.mktemp("models")
    return {n: tiny_folder(place / n, n) for n in ("gemma3_text", "opt", "mixtral")}


@pytest.fixture
def models(folders: dict[str, Path], llama: Path) -> dict[str, Path]:
    """With the one that other tests share."""
    return {**folders, "llama": llama}


def perplexity(folder: Path) -> float:
    found = crossbit.evaluate(str(folder), text="embedded", length=32, windows=2)
    return float(found["perplexity"]["value"])


# -- LET ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "mixtral"])
def test_omniquant_makes_a_plain_folder(
    family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """transformers computes what was evaluated; the norms hold the inverse of the factors."""
    chosen = OMNIQUANT
    if family == "mixtral":  # whose experts must be symmetric
        weights = {**WEIGHTS, "symmetric": True}
        chosen = recipe(LWC, **{**LET, "weights": weights}, objective=SINGLE)
    result = train(models[family], text, tmp_path / "out", chosen)
    assert result["kind"] == "plain"
    assert verify(tmp_path / "out").passed
    if family != "mixtral":  # of whose blocks only attention has factors
        assert any(record["best_at"] for record in result["training"])
    groups = {f["group"] for f in result["folds"] if f["kind"] == "let" and "chosen" in f}
    names = {"llama": "gate_up", "gemma3_text": "gate_up", "opt": "fc1"}
    assert groups == {"qkv", "o", names.get(family, "o")}


def test_factors_that_stay_are_a_fold(llama: Path, text: Path, tmp_path: Path) -> None:
    """At rate 0 it is SmoothQuant's start; trained, the norms are others."""
    norms, weights = [], []
    for rate in (0.0, 0.05):
        data = {**LET, "training": {**LET["training"], "let": rate}}
        train(llama, text, tmp_path / str(rate), recipe(LWC, **data, objective=SINGLE))
        stored = load_file(tmp_path / str(rate) / "model.safetensors")
        norms.append(stored["model.layers.0.input_layernorm.weight"])
        weights.append(stored["model.layers.0.self_attn.q_proj.weight_scale"])
    smooth = {**LET, "transforms": [{"kind": "smooth", "targets": "norms"}]}
    train(llama, text, tmp_path / "smooth", recipe(LWC, **smooth, objective=SINGLE))
    stored = load_file(tmp_path / "smooth" / "model.safetensors")
    assert torch.equal(stored["model.layers.0.input_layernorm.weight"], norms[0])
    assert not torch.equal(norms[1], norms[0])
    assert not torch.equal(weights[1], weights[0])


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """An uninterrupted run of EXPANDED."""
    out = tmp_path_factory.mktemp("expanded") / "out"
    train(llama, text, out, EXPANDED)
    return out


def killed_and_resumed(
    moment: tuple[int, int], model: Path, text: Path, out: Path, chosen: crossbit.Recipe
) -> None:
    """Stop a run in a window after some steps, then go on."""
    with interrupted_at(moment):
        train(model, text, out, chosen)
    assert (out.with_name("out.crossbit-work") / "training.safetensors").exists()
    train(model, text, out, chosen, resume=True)


def test_a_training_of_everything_is_the_same_again(
    expanded: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    record = json.loads((expanded / "crossbit.json").read_text())
    assert record["kind"] == "plain"
    assert any(r["best_at"] for r in record["training"])
    train(llama, text, tmp_path / "again", EXPANDED)
    assert weights_of(tmp_path / "again") == weights_of(expanded)
    killed_and_resumed((1, 3), llama, text, tmp_path / "out", EXPANDED)
    assert weights_of(tmp_path / "out") == weights_of(expanded)


# -- DuQuant --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "mixtral"])
def test_other_families_turn_their_inputs(
    family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    result = run(models[family], text, tmp_path / "out", TURNED)
    assert verify(tmp_path / "out").passed
    online = json.loads((tmp_path / "out" / "config.json").read_text())["crossbit_online"]
    count = {"gemma3_text": 7, "opt": 6, "mixtral": 4}[family]  # experts read floats
    assert len(online["rotations"]) == count * BLOCKS
    assert not any("experts" in name for name in online["rotations"])
    assert perplexity(tmp_path / "out") == pytest.approx(
        result["evaluation"]["quantized"]["perplexity"]
    )


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


# -- keys and values ------------------------------------------------------------------------------


def cached(cache: dict[str, Any] | None, **data: Any) -> crossbit.Recipe:
    """8 bits of everything else, which lose next to nothing."""
    weights = {"bits": 8, "group": 16, "scale_dtype": "float32"}
    return custom(**{"weights": weights, "cache": cache, **FLOAT_ENDS, **data})


def figure_of(model: Path, text: Path, out: Path, chosen: crossbit.Recipe) -> float:
    result = run(model, text, out, chosen)
    assert result["kind"] == chosen.kind
    assert result["verify"]["passed"]
    return float(result["evaluation"]["quantized"]["perplexity"])


def with_cache(folder: Path, to: Path, bits: int) -> Path:
    """A copy whose config asks for another cache."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["crossbit_online"]["cache"]["bits"] = bits
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_fewer_bits_of_keys_and_values_lose_more(
    keys: bool, family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Against a float cache; a random model's loss itself would not tell."""
    model, out = models[family], tmp_path / "8"
    transforms = [KEYS] if keys else []
    quick = {"settings": ("evaluation.windows=0",), "check": False}
    run(model, text, tmp_path / "float", cached(None), **quick)
    run(model, text, out, cached({"bits": 8}, transforms=transforms), **quick)
    assert weights_of(out) == weights_of(tmp_path / "float")
    ids = sample_ids(2, 32)
    wanted = load_model(tmp_path / "float")(input_ids=ids).logits
    errors = []
    for folder in (out, with_cache(out, tmp_path / "4", 4), with_cache(out, tmp_path / "2", 2)):
        logits = load_model(folder)(input_ids=ids).logits
        errors.append(token_error(logits, wanted))
    assert 0 < 4 * errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.1


@pytest.mark.parametrize(
    ("cache", "transforms"),
    [
        ({"bits": 4, "before_rope": True}, []),
        ({"bits": 4, "symmetric": True, "clip": 0.9}, []),
        ({"bits": 4}, [KEYS]),
    ],
)
def test_choices_of_the_cache_run(
    cache: Any, transforms: Any, llama: Path, text: Path, tmp_path: Path
) -> None:
    result = run(llama, text, tmp_path / "out", cached(cache, transforms=transforms))
    figure = result["evaluation"]["quantized"]["perplexity"]
    assert perplexity(tmp_path / "out") == pytest.approx(figure)
    assert verify(tmp_path / "out").passed
    online = json.loads((tmp_path / "out" / "config.json").read_text())["crossbit_online"]
    assert online["cache"] == {"symmetric": False, "clip": 1.0, "before_rope": False, **cache}
    assert online["keys"] is bool(transforms)
    assert crossbit.generate(tmp_path / "out", "The quick", tokens=3)
    # What the config says is what is done.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["crossbit_online"]["cache"] = None
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert perplexity(tmp_path / "out") != pytest.approx(figure, rel=1e-7)


def test_rotated_keys_alone_lose_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    plain = figure_of(llama, text, tmp_path / "plain", cached(None))
    rotated = figure_of(llama, text, tmp_path / "rotated", cached(None, transforms=[KEYS]))
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "rotated")
    assert rotated == pytest.approx(plain, rel=1e-4)


def test_damage_of_the_cache_is_named(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, text, tmp_path / "out", cached({"bits": 4}), settings=("evaluation.windows=0",))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for cache in ({"bits": 9}, {"bit": 4}, "4"):
        config["crossbit_online"]["cache"] = cache
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"crossbit_online|KV bits"):
            perplexity(tmp_path / "out")


@pytest.mark.parametrize("rounding", ["gptq", "trained"])
def test_the_original_is_not_rounded(
    rounding: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets are those of a float cache; the quantized blocks' own activations are not."""
    targets: list[dict[str, torch.Tensor]] = []
    streams: list[dict[str, torch.Tensor]] = []

    def watched(job: Job, work: Any, index: int, entering: Any, name: str, **options: Any) -> Any:
        made = through_original(job, work, index, entering, name, **options)
        if name.startswith("teacher"):
            targets[-1][name] = made.read(0, made.shape[0])
        return made

    def closed(job: Job, work: Any, index: int, opened: Any, entering: Any) -> Any:
        target = opened.target
        if index == 0:
            targets[-1][f"target-{index}"] = target.read(0, target.shape[0])
        leaving = close_block(job, work, index, opened, entering)
        streams[-1][str(index)] = leaving.read(0, leaving.shape[0])  # type: ignore[union-attr]
        return leaving

    for name in ("window", "loop"):
        monkeypatch.setattr(f"crossbit.engine.{name}.through_original", watched)
    monkeypatch.setattr("crossbit.engine.loop.close_block", closed)
    data: dict[str, Any] = {"solver": {"kind": "gptq"}}
    if rounding == "trained":
        data = {
            "transforms": [KEYS],  # which belong to the original too
            "solver": {"kind": "rounding"},
            "objective": {"window": 2, "overlap": 1, "ahead": [1, 1]},
            "training": {"epochs": 1},
        }
    before: list[float] = []
    for number, cache in enumerate((None, {"bits": 2})):
        targets.append({})
        streams.append({})
        chosen = cached(cache, **data, evaluation={"windows": 0})
        result = run(llama, text, tmp_path / str(number), chosen, settings=())
        before += [record["before"] for record in result["training"][:1]]
    if before:  # blocks in training round theirs
        assert before[1] > 2 * before[0]
    assert targets[0].keys() == targets[1].keys()
    assert len(targets[0]) == (1 if rounding == "gptq" else 1 + BLOCKS)
    for name, tensor in targets[0].items():
        assert torch.equal(tensor, targets[1][name]), name
    for name, tensor in streams[0].items():
        assert not torch.equal(tensor, streams[1][name])


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [OMNIQUANT, EXPANDED, TURNED, TURNED_AND_TRAINED, cached({"bits": 4}, transforms=[KEYS])],
    ids=("omniquant", "expanded", "duquant", "duquant trained", "cache"),
)
def test_plans(chosen: crossbit.Recipe, llama: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(chosen.model_dump(mode="json")))
    options = ("--calibration", text, "--samples", "4", "--length", "32")
    ran = cli("plan", llama, "--recipe", path, *options)
    assert ran.code == 0
    assert "it fits" in ran.out
