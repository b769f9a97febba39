"""Looking ahead: errors after more original blocks, which stay as they are."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from tests.pipelines import shorten, write_text
from tests.tiny import BLOCKS, tiny_folder
from tests.training import A4, recipe, train, weights_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import crossbit
from crossbit.engine import window
from crossbit.engine.fit import Progress, Task, _loss, fit
from crossbit.engine.job import Job
from crossbit.engine.logits import hidden_logit_kl
from crossbit.engine.originals import through_original
from crossbit.engine.trained import layers_of, materialised
from crossbit.errors import InputError
from crossbit.objective import (
    homologous,
    reconstruction_loss,
    sequences_ahead,
    terms_ahead,
)
from crossbit.recipe import Training
from crossbit.windows import Window

# -- which terms there are ------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: max(w) > 0)


@given(WEIGHTS, st.integers(0, 6))
def test_terms_beyond_the_last_block_fall_on_it(weights: list[float], left: int) -> None:
    found = terms_ahead(weights, left)
    assert len(found) <= min(left + 1, len(weights))
    assert found[-1] > 0
    assert min(found) >= 0
    assert math.isclose(sum(found), sum(weights))
    # Where all fits, nothing but zeros at the end is left out.
    if left + 1 >= len(weights):
        assert (*found, *[0.0] * (len(weights) - len(found))) == tuple(weights)
    else:
        known = tuple(weights[:left])
        assert found[:left] == known[: len(found)]


@pytest.mark.parametrize(
    ("weights", "left", "expected"),
    [
        ([1, 0, 0], 2, (1,)),
        ([1, 0, 1], 5, (1, 0, 1)),
        ([1, 0, 1], 1, (1, 1)),
        ([1, 0, 1], 0, (2,)),
        ([0, 0, 1], 0, (1,)),
        ([0, 0, 1], 1, (0, 1)),
        ([0.5, 0, 0, 0], 1, (0.5,)),
    ],
)
def test_terms(weights: list[float], left: int, expected: tuple[float, ...]) -> None:
    assert terms_ahead(weights, left) == expected


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [-1.0]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="objective ahead: ") as failure:
        terms_ahead(weights, 2)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "objective.ahead: input should have a weight above 0, such as"),
        ("[0.0, 0]", "objective.ahead: input should have a weight above 0, such as"),
        ("[1, -1]", "objective.ahead.1: input should be greater than or equal to 0"),
        ("[1, .nan]", "objective.ahead.1: input should be"),
        ("[.inf]", "objective.ahead.0: input should be a finite number"),
        ("1", "objective.ahead: input should be a valid tuple"),
        ("[a]", "objective.ahead.0: input should be a valid number"),
        ("null", "objective.ahead: input should be a valid tuple"),
    ],
)
def test_recipes_refuse_them_in_one_line(value: str, words: str) -> None:
    with pytest.raises(InputError) as failure:
        crossbit.Recipe.load("cbq-w4a8", [f"objective.ahead={value}"])
    message = str(failure.value)
    assert words in message
    assert "\n" not in message


# -- a share of the sequences ---------------------------------------------------------------------


@given(st.integers(1, 20).map(lambda n: n / 20), st.integers(1, 8), st.integers(1, 60))
def test_a_share_of_all_sequences_looks_ahead(share: float, batch: int, steps: int) -> None:
    counts = [sequences_ahead(share, batch, step) for step in range(steps)]
    assert sum(counts) == math.floor(share * batch * steps + 1e-6)
    assert max(counts) <= math.ceil(share * batch - 1e-6) <= batch
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("batch", "share"), [(1, 0.5), (1, 0.25), (2, 0.5), (4, 0.25), (4, 0.75)])
@pytest.mark.parametrize("terms", [(1.0, 1.0), (0.5, 0.0, 2.0)])
def test_the_objective_is_that_of_all(batch: int, share: float, terms: tuple[float, ...]) -> None:
    """Of sequences that are alike, the mean over steps is the loss of looking ahead with all."""
    found, steps = [], 4
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).expand(batch, 5, 3)
    went: list[int] = []

    def ahead(hidden: Tensor) -> Tensor:
        went.append(hidden.shape[0])
        return hidden * 2

    objective = SimpleNamespace(
        norm="mean", kl=0.0, temperature=1.0, homologous=0.0, logits=0.0, metric="euclidean"
    )
    job: Any = SimpleNamespace(recipe=SimpleNamespace(objective=objective))
    task = Task(
        blocks=(),
        read=lambda numbers: (x[: len(numbers)], [0 * x[: len(numbers)]] * len(terms)),
        loss=window._loss(job, False, terms, [None] * len(terms)),
        fitting=torch.arange(batch),
        held=torch.arange(batch),
        length=5,
        settings=Training(batch=batch),
        steps={},
        dtype=torch.float32,
        seed=0,
        ahead=[ahead] * (len(terms) - 1),
    )
    for step in range(steps):
        count = sequences_ahead(share, batch, step)
        found.append(float(_loss(task, torch.arange(batch), count, share)))
    assert sum(went) == share * batch * steps * (len(terms) - 1)
    everything = float(_loss(task, torch.arange(batch), batch, 1.0))
    assert sum(found) / steps == pytest.approx(everything, rel=1e-6)
    power = float(x.square().mean())
    wanted = sum(weight * 4**depth for depth, weight in enumerate(terms)) * power
    assert everything == pytest.approx(wanted, rel=1e-6)


# -- windows that are trained ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt", 1)


@dataclass
class Seen:
    """A window before it was trained, on its held-out sequences; and how training went."""

    window: Window
    ids: Tensor
    entering: Tensor
    targets: list[Tensor]
    weights: dict[str, Tensor]
    outputs: list[Tensor]
    loss: float
    divergence: float
    progress: Progress
    powers: list[float]


Watch = Callable[..., list[Seen]]


@pytest.fixture
def watch(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Train a recipe; what every window was trained on. Blocks that look ahead must not change."""
    shorten(monkeypatch)
    monkeypatch.setattr("crossbit.pipeline.gc.collect", lambda: 0)
    seen: list[Seen] = []
    entered: list[tuple[Job, Window]] = []
    train_window = window.train_window

    def entering(job: Job, work: Any, part: Window, *args: Any) -> Any:
        entered.append((job, part))
        return train_window(job, work, part, *args)

    def fitting(task: Task, *args: Any) -> Progress:
        job, part = entered[-1]
        assert job.ids is not None
        frozen = [inspect.getclosurevars(run).nonlocals["block"] for run in task.ahead]
        before = [{n: p.clone() for n, p in block.named_parameters()} for block in frozen]
        everything = task.read(torch.cat([task.fitting, task.held]))[1]
        powers = [float(target.double().square().mean()) for target in everything]
        x, targets = task.read(task.held)
        outputs = [x]
        with torch.no_grad(), materialised(task.blocks, task.dtype, hard=True, first=True):
            for block in task.blocks:
                outputs = [block.run(outputs[0])]
            for run in task.ahead:
                outputs.append(run(outputs[-1]))
            loss = float(task.loss(outputs, targets, 1.0))
            divergence = math.nan
            if job.recipe.objective.logits and part.stop == BLOCKS:
                divergence = float(hidden_logit_kl(job.shell, outputs[0], targets[0]))
        weights = {n: w.hardened().qtensor.dequantize() for n, w in layers_of(task.blocks)}
        progress = fit(task, *args)
        assert progress.done > 0
        for block, known in zip(frozen, before, strict=True):
            for name, parameter in block.named_parameters():
                assert torch.equal(parameter, known[name])
                assert parameter.grad is None
        ids = job.ids[task.held]
        known_by = (part, ids, x, targets, weights, outputs, loss, divergence, progress, powers)
        seen.append(Seen(*known_by))
        return progress

    monkeypatch.setattr("crossbit.engine.loop.train_window", entering)
    monkeypatch.setattr("crossbit.engine.window.fit", fitting)

    def run(model: Path = llama, **data: Any) -> list[Seen]:
        seen.clear()
        train(model, text, tmp_path / "out", recipe(**data))
        return seen

    return run


def hidden_states(llama: Path, **inputs: Tensor) -> list[Tensor]:
    """What leaves each block of transformers' own model."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    return _leaving(model, **inputs)


@torch.no_grad()
def _leaving(model: Any, **inputs: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *a: seen.append(a[2]))
    model(**inputs, use_cache=False)
    return seen


def quantized_states(llama: Path, seen: Seen) -> list[Tensor]:
    """The same after the window, its weights replaced, for what enters it."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for name, weight in seen.weights.items():
        index, _, relative = name.partition("/")
        model.model.layers[int(index)].get_submodule(relative).weight.data = weight.float()
    model.model.layers = model.model.layers[seen.window.start :]
    size = seen.window.stop - seen.window.start
    return _leaving(model, inputs_embeds=seen.entering)[size - 1 :]


def by_token(output: Tensor, target: Tensor) -> float:
    """The share of each token's power that is error, in float64."""
    o, t = output.double().flatten(0, 1), target.double().flatten(0, 1)
    length = t.square().sum(-1)
    middle = length.sort().values[(length.numel() - 1) // 2]
    errors = [
        float((a - b).square().sum() / (n if n > 1e-4 * middle else middle))
        for a, b, n in zip(o, t, length, strict=True)
    ]
    return sum(e / (1 + e) for e in errors) / len(errors)


ALONE = {"window": 1, "overlap": 0}


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        ([0.0, 0.0, 1.0], [(0, 0, 1), (0, 1), (1,)]),
        ([0.5, 0.0, 2.0], [(0.5, 0, 2), (0.5, 2), (2.5,)]),
    ],
)
def test_the_loss_is_that_of_later_blocks(
    ahead: list[float], expected: list[tuple[float, ...]], watch: Watch, llama: Path
) -> None:
    """Against transformers' blocks, the sums written out; at the end all falls on the last."""
    check_terms(watch(objective={**ALONE, "ahead": ahead}), expected, llama)


def test_the_loss_is_that_of_blocks_further_on(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks ahead, and that of one in between left out."""
    monkeypatch.setitem(tiny._GATED, "num_hidden_layers", 5)
    deep = tiny_folder(tmp_path / "deep", "llama")
    found = watch(deep, objective={**ALONE, "ahead": [1.0, 0.5, 0.0, 2.0]})
    terms = [(1, 0.5, 0, 2)] * 2
    check_terms(found, [*terms, (1, 0.5, 2), (1, 2.5), (3.5,)], deep)


def check_terms(found: list[Seen], expected: list[tuple[float, ...]], model: Path) -> None:
    assert [s.window.start for s in found] == list(range(len(expected)))
    for seen, terms in zip(found, expected, strict=True):
        targets = hidden_states(model, input_ids=seen.ids)[seen.window.stop - 1 :]
        outputs = quantized_states(model, seen)
        targets, outputs = targets[: len(terms)], outputs[: len(terms)]
        assert len(seen.outputs) == len(seen.targets) == len(terms) == len(outputs)
        for mine, theirs in zip(seen.targets, targets, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        parts = [
            weight * by_token(o, t) for weight, o, t in zip(terms, outputs, targets, strict=True)
        ]
        assert seen.loss == pytest.approx(sum(parts), rel=1e-3)
        # Of layers that have no first integers but these, it is also where training begins.
        assert seen.progress.before == pytest.approx(seen.loss, rel=1e-5)
    assert any(s.progress.best < s.progress.before for s in found[:2])


def test_a_plain_square_counts_errors_alike_however_large_later_states_are(watch: Watch) -> None:
    """Each term by its target's power over all sequences, in units of the window's own."""
    found = watch(objective={**ALONE, "ahead": [1.0, 0.0, 2.0], "norm": "mean"})
    sizes = []
    for seen, terms in zip(found, [(1, 0, 2), (1, 2), (3,)], strict=True):
        errors = [
            float((o.double() - t.double()).square().mean())
            for o, t in zip(seen.outputs, seen.targets, strict=True)
        ]
        powers = [seen.powers[number] for number in range(len(terms))]
        sizes += [power / powers[0] for power in powers[1:]]
        shares = [w * e * powers[0] / p for w, e, p in zip(terms, errors, powers, strict=True)]
        assert seen.loss == pytest.approx(sum(shares), rel=1e-4)
    assert max(abs(size - 1) for size in sizes) > 0.05  # or nothing would have to be divided


def test_windows_of_two_with_every_other_term(watch: Watch) -> None:
    """Blocks ahead, the homologous target and, at the end, logits."""
    objective = {"window": 2, "overlap": 1, "homologous": 0.5, "kl": 0.1, "logits": 0.3}
    found = watch(objective={**objective, "ahead": [1.0, 0.25]}, activations=A4)
    assert [(s.window.start, s.window.stop) for s in found] == [(0, 2), (1, 3)]
    first, last = found
    assert (len(first.outputs), len(first.targets)) == (2, 3)
    assert (len(last.outputs), len(last.targets)) == (1, 2)
    at, near = first.outputs
    target, ahead, same = first.targets
    wanted = homologous(at, target, same, weight=0.5, kl=0.1)
    wanted = wanted + 0.25 * reconstruction_loss(near, ahead, kl=0.1)
    assert first.loss == pytest.approx(float(wanted), rel=1e-6)
    assert not torch.equal(target, same)
    assert last.divergence > 0
    wanted = 1.25 * homologous(last.outputs[0], *last.targets, weight=0.5, kl=0.1)
    assert last.loss == pytest.approx(float(wanted) + 0.3 * last.divergence, rel=1e-6)


def test_what_looks_no_block_ahead_is_the_window_itself(
    llama: Path, text: Path, tmp_path: Path, watch: Watch
) -> None:
    """Bit for bit; with weight on later blocks training finds other integers."""
    found = {}
    for name, more in {
        "without": {},
        "one": {"ahead": [1.0]},
        "zeros": {"ahead": [1.0, 0.0, 0.0]},
        "later": {"ahead": [0.0, 0.0, 1.0]},
    }.items():
        seen = watch(objective={**ALONE, **more}, activations=A4)
        ahead = [len(s.outputs) - 1 for s in seen]
        assert ahead == ([2, 1, 0] if name == "later" else [0, 0, 0])
        # Of the same length, so that the file is compared and not its head.
        found[name] = weights_of(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert found["without"] == found["one"] == found["zeros"]
    assert found["later"] != found["without"]


@pytest.mark.parametrize("batch", [1, 3])
def test_what_judges_looks_ahead_as_a_whole(batch: int, watch: Watch, tmp_path: Path) -> None:
    """Half of the training sequences look ahead, of batches of one every other."""
    ahead, training = [1.0, 0.0, 1.0], {"epochs": 2, "batch": batch}
    objective = {**ALONE, "ahead": ahead}
    one = watch(objective=objective, training=training)[:]
    shutil.rmtree(tmp_path / "out")
    half = watch(objective={**objective, "ahead_share": 0.5}, training=training)
    assert [len(s.outputs) for s in half] == [3, 2, 1]
    assert [len(s.outputs[-1]) for s in half] == [len(s.ids) for s in half]
    assert half[0].loss == one[0].loss
    assert half[0].progress.before == one[0].progress.before
    assert half[0].progress.best < half[0].progress.before
    assert half[0].progress.losses != one[0].progress.losses


def test_nothing_of_it_is_left_in_the_work_folder(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of later blocks go with their window."""
    left: list[list[str]] = []
    original = window.described

    def described(*args: Any) -> Any:
        (work,) = works
        left.append([n for n in work.names("") if n.startswith(("ahead", "homologous"))])
        return original(*args)

    works: list[Any] = []
    begin = through_original

    def through(job: Job, work: Any, *args: Any, **options: Any) -> Any:
        works[:] = [work]
        return begin(job, work, *args, **options)

    monkeypatch.setattr(window, "described", described)
    monkeypatch.setattr(window, "through_original", through)
    watch(objective={**ALONE, "homologous": 1.0, "ahead": [1.0, 1.0, 1.0]})
    assert left == [[], [], []]
