"""Windows of blocks trained on tiny models: what is trained, stored and refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.running import Cli, short_run
from tests.tiny import BLOCKS, FAMILIES, tiny_folder, tiny_model, tiny_tokenizer
from tests.training import A4, A8, GPTQ, digests, recipe, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from crossbit.engine import window
from crossbit.engine.fit import Progress, Task, fit
from crossbit.engine.job import Job
from crossbit.engine.logits import hidden_logit_kl
from crossbit.engine.trained import layers_of
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.objective import reconstruction_loss
from crossbit.recipe import Objective
from crossbit.runtime.loader import BlockSource, open_blocks

pytestmark = pytest.mark.usefixtures("quick", "no_collection")


# -- what training amounts to ---------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Task, Progress]]:
    """Tasks and outcomes of every window that is trained in the test."""
    tasks: list[tuple[Task, Progress]] = []

    def watched(task: Task, *args: Any) -> Progress:
        progress = fit(task, *args)
        tasks.append((task, progress))
        return progress

    monkeypatch.setattr("crossbit.engine.window.fit", watched)
    return tasks


def test_eight_bits_lose_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before anything is quantized, both targets are the same."""
    chosen = recipe(
        weights={"bits": 8, "group": 16, "scale_dtype": "float32"},
        objective={"window": 2, "overlap": 1, "homologous": 1.0},
        embedding=None,
        head=None,
    )
    same: list[bool] = []

    def watched(task: Task, *args: Any) -> Progress:
        _, (target, homologous) = task.read(task.held)
        same.append(torch.equal(target, homologous))
        progress = fit(task, *args)
        assert progress.best <= progress.before < 2e-4
        return progress

    monkeypatch.setattr("crossbit.engine.window.fit", watched)
    train(llama, text, tmp_path / "out", chosen)
    assert same == [True, False]


def on_the_grid(weight: Tensor) -> Tensor:
    """Values of a signed grid of 8 bits in groups of 16, whose steps are powers of 2."""
    view = weight.reshape(-1, 16)
    largest = view.abs().argmax(-1, keepdim=True)
    limit = torch.exp2(view.gather(-1, largest).abs().log2().ceil())
    codes = (view / limit * 128).round().clamp(-127, 127)
    codes.scatter_(-1, largest, 128 * view.gather(-1, largest).sign())
    return (codes / 128 * limit).reshape(weight.shape)


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_where_rounding_changes_nothing_there_is_no_loss(
    start: str, text: Path, tmp_path: Path, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with 16 bits: both targets are equal in every window, and every term is 0."""
    model = tiny_model("llama", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.copy_(on_the_grid(parameter))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    same: list[bool] = []
    make_task = window.make_task

    def watched(*args: Any, **options: Any) -> Task:
        task = make_task(*args, **options)
        _, (target, homologous) = task.read(torch.cat([task.fitting, task.held]))
        same.append(torch.equal(target, homologous))
        return task

    monkeypatch.setattr("crossbit.engine.window.make_task", watched)
    terms = {"homologous": 1.0, "kl": 0.1, "logits": 0.1}
    chosen = recipe(
        {"start": {"kind": start}},
        weights={"bits": 8, "group": 16, "scale_dtype": "float32", "signed": True},
        objective={"window": 2, "overlap": 1, "expand": "ends", **terms},
        embedding=None,
        head=None,
    )
    train(tmp_path / "model", text, tmp_path / "out", chosen)
    assert same == [True] * 5
    for _, progress in seen:
        assert progress.done > 0
        assert progress.before == 0.0
        assert progress.losses == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("expand", ["none", "ends"])
def test_the_teacher_is_the_original_model(
    expand: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every window, however often its blocks were trained; and what they become is written."""
    targets: dict[int, Tensor] = {}
    trained: dict[str, Tensor] = {}
    ids: list[Tensor] = []
    original = window.train_window

    def watched(job: Job, work: Any, part: Any, blocks: Any, streams: Any, *args: Any) -> Any:
        assert job.ids is not None
        ids[:] = [job.ids]
        found = streams.teacher.read(0, job.ids.shape[0])
        assert torch.equal(targets.setdefault(part.stop, found), found)
        report = original(job, work, part, blocks, streams, *args)
        assert report["blocks"] == [part.start, part.stop - 1]
        for name, layer in layers_of(blocks):
            index, _, relative = name.partition("/")
            weight = layer.hardened().qtensor.dequantize()
            trained[f"model.layers.{index}.{relative}"] = weight
        return report

    monkeypatch.setattr("crossbit.engine.loop.train_window", watched)
    objective = {"window": 1, "overlap": 0, "expand": expand, "largest": 2}
    if expand == "none":
        objective = {"window": 2, "overlap": 1}
    train(llama, text, tmp_path / "out", recipe(objective=objective))
    assert sorted(targets) == ([2, 3] if expand == "none" else [1, 2, 3])
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    outputs: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *a: outputs.append(a[2]))
    with torch.no_grad():
        model(input_ids=ids[0])
    for stop, target in targets.items():
        torch.testing.assert_close(target, outputs[stop - 1], rtol=1e-4, atol=1e-3)
    written = QuantizedCheckpoint(tmp_path / "out")
    assert len(trained) == 7 * BLOCKS
    for name, weight in trained.items():
        layer = written.layer(name)
        assert layer is not None
        assert torch.equal(layer.qtensor.dequantize(), weight)


def test_training_helps(llama: Path, text: Path, tmp_path: Path, seen: Any) -> None:
    chosen = recipe(GPTQ, training={"epochs": 4, "batch": 1}, weights={"bits": 3, "group": 16})
    result = train(llama, text, tmp_path / "out", chosen, samples=16)
    assert len(seen) == 2
    assert all(p.best < p.before for _, p in seen)
    assert {row["solver"] for row in result["layers"]} == {"gptq, trained"}


# -- every family, every choice -------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"activations": A8},
    {
        "activations": A4,
        "objective": {"homologous": 0.5, "kl": 0.1, "logits": 0.1},
        # Four bits on both sides of a model this small are so rough that longer steps roll back.
        "training": {"epochs": 2, "batch": 2, "rounding": 1e-3, "step": 1e-4},
    },
    {
        "solver": {"base": "zero", "parameter": "low_rank", "mode": "sigmoid"},
        "objective": {"window": 1, "overlap": 0, "expand": "ends", "norm": "sum"},
    },
    {
        "solver": {"start": {"kind": "rtn", "clip": "mse"}, "parameter": "low_rank"},
        "objective": {"window": 3, "overlap": 0, "norm": "mean"},
        "activations": {"bits": 8, "kind": "cross_static"},
        "weights": {"bits": 8, "group": "channel"},
    },
    {
        "activations": A8,
        "transforms": [{"kind": "cross_fold"}, {"kind": "cfp", "judge": False}],
        "weights": {"bits": 4, "group": 16, "symmetric": False},
    },
]


@dataclass
class Ends:
    """Held-out activations of a run: what enters the first block, and what should leave the last.

    The last window begins at block ``start``.
    """

    entering: Tensor
    target: Tensor
    start: int


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Ends]:
    """Of the run in the test."""
    found: list[Ends] = []
    original = window.train_window

    def watched(job: Job, work: Any, part: Any, blocks: Any, streams: Any, *args: Any) -> Any:
        count = streams.entering.shape[0]
        held = (count - job.held_out, count)
        first = found[0].entering if part.index else streams.entering.read(*held)
        found[:] = [Ends(first, streams.teacher.read(*held), part.start)]
        return original(job, work, part, blocks, streams, *args)

    monkeypatch.setattr("crossbit.engine.loop.train_window", watched)
    return found


def through(source: BlockSource, hidden: Tensor, blocks: range) -> Tensor:
    """Hidden states [B, L, D] through some blocks of a folder."""
    kwargs = source.shell.block_kwargs(hidden.shape[1], source.dtype)
    for index in blocks:
        source.load(index)
        hidden = source.shell.run_block(index, hidden, kwargs[index])
        source.free(index)
    return hidden


@torch.no_grad()
def loss_of(folder: Path, model: Path, held: Ends, objective: Objective) -> float:
    """The last window's loss, of the blocks that were written."""
    written, original = (open_blocks(f, dtype=torch.float32) for f in (folder, model))
    inner = through(written, held.entering, range(held.start))
    rest = range(held.start, BLOCKS)
    found = through(written, inner, rest)
    options: Any = {"norm": objective.norm, "kl": objective.kl}
    loss = reconstruction_loss(found, held.target, **options)
    if objective.homologous:
        same = through(original, inner, rest)
        loss += objective.homologous * reconstruction_loss(found, same, **options)
    if objective.logits:
        loss += objective.logits * hidden_logit_kl(original.shell, found, held.target)
    return float(loss)


@pytest.mark.parametrize(
    ("family", "tied", "choice"),
    [(f, i % 2 == 0, CHOICES[i % len(CHOICES)]) for i, f in enumerate(FAMILIES)],
    ids=FAMILIES,
)
def test_family(
    family: str,
    tied: bool,
    choice: dict[str, Any],
    text: Path,
    tmp_path: Path,
    seen: Any,
    ends: list[Ends],
) -> None:
    if family in ("mixtral", "qwen3_moe", "qwen2_moe"):  # asymmetric experts are refused
        choice = {**choice, "weights": {"bits": 4, "group": 16}}
    data = dict(choice)
    chosen = recipe(data.pop("solver", None), **data)
    model = tiny_folder(tmp_path / "model", family, tied)
    before = digests(model)
    result = train(model, text, tmp_path / "out", chosen)
    assert digests(model) == before
    assert all(row["solver"].endswith(", trained") for row in result["layers"])
    # Blocks that training did not help are not trained again.
    assert all(p.done > 0 or all(n.frozen for _, n in layers_of(t.blocks)) for t, p in seen)
    assert seen[0][1].done > 0
    # What the last window says it ended with is the loss of what was written.
    found = loss_of(tmp_path / "out", model, ends[0], chosen.objective)
    assert found == pytest.approx(seen[-1][1].best, rel=1e-5)
    assert found <= seen[-1][1].before * (1 + 1e-5)
    assert not [e for _, p in seen for e in p.events if "loss" in e]


def test_experts_without_tokens(text: Path, tmp_path: Path, seen: Any) -> None:
    """They are rounded, said to be, and stay so."""
    model = tiny_folder(tmp_path / "model", "qwen3_moe")
    # Of 8 bits, so that what training changes sends no token to another expert.
    chosen = recipe(GPTQ, weights={"bits": 8, "group": 16})
    result = train(model, text, tmp_path / "out", chosen, samples=2, length=8)
    idle = [row["name"] for row in result["layers"] if row["note"].startswith("no calibration")]
    assert 0 < len(idle) < len(result["layers"])
    layers = {
        f"model.layers.{name.replace('/', '.')}": layer
        for task, _ in seen
        for name, layer in layers_of(task.blocks)
    }
    for name in idle:
        assert float(layers[name].state.parameters["offset"].abs().max()) == 0.0


# -- layers that are not trained ------------------------------------------------------------------


def test_layers_that_are_frozen_or_ignored(llama: Path, text: Path, tmp_path: Path) -> None:
    chosen = recipe(
        overrides=[{"match": "down_proj", "solver": {"kind": "rtn"}}], ignore=["o_proj"]
    )
    result = train(llama, text, tmp_path / "out", chosen)
    plain_ = recipe({"kind": "rtn"}, ignore=["o_proj"], training={})
    train(llama, text, tmp_path / "rtn", plain_)
    solvers = {row["name"].rpartition(".")[2]: row["solver"] for row in result["layers"]}
    assert solvers["down_proj"] == "rtn"
    assert solvers["up_proj"] == "gptq, trained"
    assert "o_proj" not in solvers
    one = load_file(tmp_path / "out" / "model.safetensors")
    other = load_file(tmp_path / "rtn" / "model.safetensors")
    original = load_file(llama / "model.safetensors")
    for name in one:
        if "down_proj" in name:
            assert torch.equal(one[name], other[name])
        if "o_proj" in name:
            assert torch.equal(one[name], original[name])
    assert any(not torch.equal(one[n], other[n]) for n in one if "up_proj" in n)


def test_blocks_that_are_not_trained(llama: Path, text: Path, tmp_path: Path, seen: Any) -> None:
    """A window may have nothing to train."""
    solver = {"kind": "rounding"}
    chosen = recipe(
        {"kind": "rtn"},
        overrides=[{"match": "model.layers.0", "solver": solver}],
        objective={"window": 1, "overlap": 0},
    )
    result = train(llama, text, tmp_path / "out", chosen)
    trained = {r["name"].split(".")[2] for r in result["layers"] if "trained" in r["solver"]}
    assert trained == {"0"}
    assert [p.done > 0 for _, p in seen] == [True, False, False]


# -- refused before work starts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective.window=4", "objective: window size: 4 is more than the model's 3 blocks"),
        ("objective.window=0", "objective.window"),
        ("objective.overlap=2", "window overlap: 2 .*choose 0 to 1"),
        ("objective.overlap=-1", "objective.overlap"),
        ("objective.largest=2", "window largest: 2 needs windows that expand"),
        ("objective.expand=both", "objective.expand"),
        ("objective.norm=max", "objective.norm"),
        ("objective.temperature=0", "objective.temperature"),
        ("objective.windows=2", "did you mean 'window'"),
        ("solver.rank=0", "rank: .*greater than or equal to 1"),
        ("solver.reach=0", "reach: .*greater than 0"),
        ("solver.reach=.inf", "reach: .*finite"),
        ("solver.mode=soft", "mode: .*'straight_through' or 'sigmoid'"),
        ("solver.start.kind=rounding", "'rtn', 'gptq'"),
        ("training.epochs=-1", "training.epochs: .*greater than or equal to 0"),
        ("training.batch=0", "training.batch"),
        ("training.warmup=1", "training.warmup"),
        ("training.betas=[1.0, 0.9]", "training.betas.0: .*less than 1"),
        ("training.beta=[20, 0.5]", "training.beta.1: .*greater than or equal to 1"),
        ("calibration.seed=99999999999999999999", "calibration.seed: .*less than"),
    ],
)
def test_bad_settings(setting: str, message: str, cli: Cli, source: Path, tmp_path: Path) -> None:
    text = source.with_name("text.txt")
    place = tmp_path / "place"
    place.mkdir()
    options = ("--recipe", "gptq-w4a16", "--set", "solver.kind=rounding", "--set", setting)
    ran = cli("quantize", source, "--out", place / "out", *options, *short_run(text))
    assert re.search(message, ran.refusal), ran.refusal
    assert list(place.iterdir()) == []


def test_a_seed_may_be_large(llama: Path, text: Path, tmp_path: Path) -> None:
    chosen = recipe(objective={"window": 3})
    result = train(llama, text, tmp_path / "out", chosen, seed=2**63 - 1)
    assert result["verify"]["passed"]


def test_objectives_that_nothing_follows_are_mentioned(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    result = train(llama, text, tmp_path / "out", recipe({"kind": "rtn"}))
    assert any("end_to_end change nothing" in note for note in result["warnings"])


W3 = {"bits": 3, "group": 16}


def test_what_is_written_are_trained_norms(tmp_path: Path, llama: Path, text: Path) -> None:
    """With them, norms of the blocks differ from the original's; without, they are the same."""
    original = load_file(llama / "model.safetensors")
    for norms in (True, False):
        out = tmp_path / str(norms)
        chosen = recipe({"kind": "rounding", "start": {"kind": "rtn"}}, norms=norms, weights=W3)
        made = train(llama, text, out, chosen)
        assert made["training"][0]["after"] < made["training"][0]["before"]
        found = load_file(out / "model.safetensors")
        names = [n for n in original if "layernorm" in n]
        assert len(names) > 2
        changed = [n for n in names if not torch.equal(found[n], original[n])]
        assert bool(changed) == norms
