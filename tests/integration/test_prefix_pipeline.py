"""Whole runs with a prefix: searched and named, what is written, measured, generated, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from tests.pipelines import custom, run, shorten
from tests.tiny import BOS, MASSIVE_TOKEN, MASSIVE_UNIT, sample_ids, tiny_folder, tiny_tokenizer
from tests.training import interrupted_at
from torch import Tensor
from torch.nn.functional import cross_entropy

import crossbit
from crossbit.errors import InputError, WorkError
from crossbit.evaluation.run import losses_of
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.report.html import render_report
from crossbit.runtime.loader import load_model
from crossbit.verification import own_logits

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

TOKENS = [MASSIVE_TOKEN, BOS]
NAMED = {"tokens": TOKENS}
STATIC = {"bits": 4, "kind": "per_tensor_static"}
TOKEN = {"bits": 4, "kind": "per_token"}
POSITIONS = 512  # of the tiny models


def recipe(text: Path | None = None, **data: Any) -> crossbit.Recipe:
    """W4 on the embedding's and head's own floats."""
    evaluation = {"windows": 0} if text is None else {"windows": 2, "length": 32, "text": str(text)}
    return custom(**{"embedding": None, "head": None, "evaluation": evaluation, **data})


def quantize(model: Path, text: Path, out: Path, chosen: crossbit.Recipe, **more: Any) -> Any:
    return run(model, text, out, chosen, settings=(), **more)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A text in which the massive token (the byte 7) ends every sixth word."""
    words = text.read_text().split(" ")
    for place in range(5, len(words), 6):
        words[place] += chr(MASSIVE_TOKEN)
    path = tmp_path_factory.mktemp("noisy") / "noisy.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, llama: Path, noisy: Path) -> Path:
    """W4A4 with one scale a token, the prefix searched."""
    out = tmp_path_factory.mktemp("searched") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        quantize(llama, noisy, out, recipe(noisy, prefix={"ratio": 20}, activations=TOKEN))
    return out


def result_of(out: Path) -> Any:
    return json.loads((out / "crossbit.json").read_text())


def prefix_part(out: Path) -> dict[str, Tensor]:
    with safe_open(str(out / "model.safetensors"), "pt") as file:
        return {n: file.get_tensor(n) for n in file.keys() if "prefix" in n}  # noqa: SIM118


# -- what a run leaves behind ---------------------------------------------------------------------


def test_the_prefix_is_searched_written_and_told(searched: Path) -> None:
    result = result_of(searched)
    assert result["kind"] == "online"
    assert result["prefix"] == {"tokens": TOKENS, "text": "\x07<s>"}
    assert json.loads((searched / "config.json").read_text())["crossbit_online"]["prefix"] == TOKENS
    stored = prefix_part(searched)
    assert stored["crossbit_prefix.ids"].tolist() == TOKENS
    assert len(stored) == 1 + 2 * 3
    assert stored.keys() <= result["verify"]["tensors"].keys()
    assert result["verify"]["passed"] is True
    words = "token ids 7, 256: before every text"
    assert words in (searched / "README.md").read_text()
    assert words in render_report(result)
    assert any("online recipe" in note for note in result["warnings"])


def test_a_run_without_a_prefix_tells_of_none(llama: Path, text: Path, tmp_path: Path) -> None:
    result = quantize(llama, text, tmp_path / "out", recipe())
    assert result["prefix"] is None
    assert prefix_part(tmp_path / "out") == {}


def test_verify_passes_and_finds_a_changed_byte_of_the_prefix(
    searched: Path, tmp_path: Path
) -> None:
    assert crossbit.verify(searched).passed
    for name in ("crossbit_prefix.1.value", "crossbit_prefix.2.key"):
        out = Path(shutil.copytree(searched, tmp_path / name))
        path = out / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        start, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        data[8 + length + start] ^= 1  # the lowest bit of one number
        path.write_bytes(data)
        report = crossbit.verify(out)
        assert [c.name for c in report.checks if not c.passed] == ["tensors"]
        assert name in report.checks[0].detail


def test_evaluation_of_the_folder_is_that_of_the_run(
    searched: Path, llama: Path, noisy: Path
) -> None:
    known = result_of(searched)["evaluation"]
    options: dict[str, Any] = {"text": str(noisy), "length": 32, "windows": 2}
    found = crossbit.evaluate(str(searched), **options, against=str(llama))
    assert found["perplexity"]["value"] == known["quantized"]["perplexity"]
    assert found["paired"] == known["paired"]
    longest = POSITIONS - len(TOKENS)
    for model, against in ((str(searched), None), (str(llama), str(searched))):
        with pytest.raises(InputError, match=rf"prefix of 2 .* give --length {longest} or less"):
            crossbit.evaluate(model, length=longest + 1, against=against)


# -- against transformers alone -------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """W4, inputs in floating point, the prefix named, nothing calibrated."""
    out = tmp_path_factory.mktemp("weights") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        # More than the model has positions, and of no use here.
        calibration = {"length": 4 * POSITIONS}
        chosen = recipe(text, prefix=NAMED, calibration=calibration)
        result = quantize(llama, text, out, chosen, length=None)
    assert result["calibration"] is None
    return out


def losses(folder: Path, ids: Tensor) -> list[float]:
    """A loss a sequence, block by block."""
    return losses_of(folder, ids, dtype=torch.float32)


class Reference:
    """transformers' own: weights that were read back, and a cache that the original has filled."""

    def __init__(self, original: Path, quantized: Path) -> None:
        self.original = hf.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        self.model = hf.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        stored = QuantizedCheckpoint(quantized)
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(stored.tensor(name))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[1, L, V] of ids [1, L] after the prefix."""
        cache = hf.DynamicCache(config=self.model.config)
        self.original(torch.tensor([TOKENS]), past_key_values=cache, use_cache=True)
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits


def test_logits_are_those_of_a_cache_that_the_original_filled(
    llama: Path, weights_only: Path
) -> None:
    ids = sample_ids(1, 20)
    expected = Reference(llama, weights_only).logits(ids)
    model = load_model(weights_only, dtype=torch.float32)
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    streamed = own_logits(weights_only, ids, "cpu")
    assert (streamed - expected[0]).abs().max() <= 1e-5 * expected.abs().max()


def test_generation_comes_after_the_prefix(llama: Path, weights_only: Path) -> None:
    reference = Reference(llama, weights_only)
    prompt = "the quick"
    ids = torch.tensor([list(prompt.encode())])
    new: list[int] = []
    for _ in range(6):
        new.append(int(reference.logits(ids)[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([new[-1:]])), 1)
    expected = tiny_tokenizer().decode(new, skip_special_tokens=True)
    assert len(set(new)) > 1
    assert crossbit.generate(weights_only, prompt, tokens=6) == expected


def test_generation_ends_where_the_positions_do(
    tmp_path_factory: pytest.TempPathFactory, text: Path, tmp_path: Path
) -> None:
    """OPT has no embedding for another position."""
    model = tiny_folder(tmp_path / "opt", "opt")
    quantize(model, text, tmp_path / "out", recipe(prefix=NAMED))
    free = POSITIONS - len(TOKENS)
    crossbit.generate(tmp_path / "out", "x" * (free - 2), tokens=8)
    words = f"continuation of {free + 1} tokens after a prefix of 2 are longer than the model's 512"
    with pytest.raises(InputError, match=words):
        crossbit.generate(tmp_path / "out", "x" * free, tokens=1)


@pytest.mark.parametrize("name", ["searched", "weights_only"])
def test_the_harness_counts_positions_as_evaluation_does(
    name: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("lm_eval")
    from crossbit.evaluation import tasks

    folder: Path = request.getfixturevalue(name)
    ids = sample_ids(1, 24)
    (expected,) = losses(folder, ids)
    lm = tasks._language_model(tasks._harness(), folder, torch.float32, "cpu", 1)
    assert lm.max_length == POSITIONS - len(TOKENS)
    text = ids[0].tolist()
    ((found, _),) = lm._loglikelihood_tokens([(("", ""), text[:1], text[1:])], disable_tqdm=True)
    assert found == pytest.approx(-expected * (len(text) - 1), rel=1e-5)


# -- what it is for -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first position is massive at fc2 of a block, whatever token stands there."""
    folder = tiny_folder(tmp_path_factory.mktemp("sink") / "opt", "opt")
    model = hf.OPTForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.model.decoder.embed_positions.weight[2] *= 30  # the first position: OPT adds 2
    fc1 = model.model.decoder.layers[1].fc1
    seen: list[Tensor] = []
    hook = fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    model(sample_ids(1, 24))
    hook.remove()
    first, others = seen[0][0], seen[0][1:].mean(0)
    direction = (first - others) / (first - others).square().sum()
    # 1000 at the first position, -3000 at the others' mean: rounding makes none of them positive.
    fc1.weight[MASSIVE_UNIT] = 4000 * direction
    fc1.bias[MASSIVE_UNIT] = -4000 * direction.dot(others) - 3000
    model.save_pretrained(folder)
    return folder


def test_a_prefix_takes_what_is_massive_in_every_text(
    sink: Path, text: Path, tmp_path: Path
) -> None:
    """One scale a tensor: without a prefix it is the massive token's."""
    chosen = {"activations": STATIC, "cache": {"bits": 8}}
    found = {}
    for name, prefix in (("with", {}), ("without", None)):
        result = quantize(sink, text, tmp_path / name, recipe(text, prefix=prefix, **chosen))
        assert result["verify"]["passed"] is True
        found[name] = result
    assert found["with"]["prefix"]["tokens"] == [BOS]
    errors = {n: r["blocks"][1]["relative_error"] for n, r in found.items()}
    assert errors["with"] < 0.6 * errors["without"]
    losses = {n: r["evaluation"]["quantized"]["perplexity"] for n, r in found.items()}
    assert losses["with"] < losses["without"]


def test_folds_leave_the_prefix_what_it_is(llama: Path, text: Path, tmp_path: Path) -> None:
    """Values with a factor, beside a prefix without it, would be another model's."""
    errors = []
    for name, prefix in (("with", NAMED), ("without", None)):
        folded = {"kind": "cross_folded", "bits": 8}
        chosen = recipe(
            prefix=prefix,
            weights={"bits": 8},
            activations=folded,
            transforms=[{"kind": "cross_fold", "alpha": 0.3}],
        )
        result = quantize(llama, text, tmp_path / name, chosen)
        errors.append(max(block["relative_error"] for block in result["blocks"]))
        skipped = {f["group"] for f in result["folds"] if "skipped" in f}
        assert skipped == ({"o"} if prefix else set())
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_everything_at_once(family: str, text: Path, tmp_path: Path) -> None:
    """Trained, keys rotated and quantized, sliding windows, positions before the blocks."""
    model = tiny_folder(tmp_path / "model", family)
    chosen = recipe(
        text,
        prefix=NAMED,
        activations=TOKEN,
        cache={"bits": 4},
        transforms=[{"kind": "rotate", "down": True, "keys": True}],
        solver={"kind": "rounding"},
        training={"epochs": 1, "batch": 2},
    )
    out = tmp_path / "out"
    result = quantize(model, text, out, chosen)
    assert result["verify"]["passed"] is True
    known = result["evaluation"]["quantized"]["perplexity"]
    found = crossbit.evaluate(str(out), text=str(text), length=32, windows=2)
    assert found["perplexity"]["value"] == known
    ids = torch.tensor([list(text.read_bytes()[:40])])
    (expected,) = losses(out, ids)
    with torch.no_grad():
        logits = load_model(out, dtype=torch.float32)(ids, use_cache=False).logits[0, :-1]
    assert float(cross_entropy(logits, ids[0, 1:])) == pytest.approx(expected, rel=1e-5)
    assert crossbit.generate(out, "the quick", tokens=3) == crossbit.generate(
        out, "the quick", tokens=3
    )


# -- the same bytes -------------------------------------------------------------------------------

TRAINED = recipe(
    prefix={"ratio": 20},
    activations=TOKEN,
    solver={"kind": "rounding"},
    training={"epochs": 2, "batch": 2},
    objective={"window": 2, "overlap": 1},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, noisy: Path) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        assert quantize(llama, noisy, out, TRAINED)["prefix"]["tokens"] == TOKENS
    return out


def same(one: Path, other: Path) -> bool:
    files = ("model.safetensors", "config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@pytest.mark.parametrize("moment", ["the prefix found", "inside the second window", None])
def test_runs_give_the_same_bytes_killed_or_not(
    moment: str | None,
    llama: Path,
    noisy: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    def again(*_: Any) -> None:
        raise AssertionError("searched again")

    if moment is not None:
        if moment == "the prefix found":
            with monkeypatch.context() as patch:
                patch.setattr("crossbit.pipeline.run_blocks", die)
                with pytest.raises(KeyboardInterrupt):
                    quantize(llama, noisy, out, TRAINED)
        else:
            with interrupted_at((1, 3)):
                quantize(llama, noisy, out, TRAINED)
        assert not out.exists()
        monkeypatch.setattr("crossbit.pipeline.outlier_tokens", again)
        monkeypatch.setattr("crossbit.pipeline.prefix_tokens", again)
    quantize(llama, noisy, out, TRAINED, resume=moment is not None)
    assert same(out, trained)


# -- before work starts ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [NAMED, {}])
def test_plan_knows_recipes_with_a_prefix(prefix: Any, llama: Path, text: Path) -> None:
    chosen = recipe(prefix=prefix, activations=TOKEN)
    found = crossbit.plan(str(llama), chosen, calibration=str(text), samples=4, length=32)
    assert found["fits"] is True
    assert found["seconds"] > 0


LONG = f"sequences of {POSITIONS - 1} tokens after a prefix of 2 are longer than the model's"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prefix": NAMED, "solver": {"kind": "gptq"}}, LONG),
        ({"prefix": {"tokens": [5, 264]}}, "prefix: token 264 is outside the vocabulary of 264"),
        ({"prefix": {"tokens": [5] * 512}}, "prefix: 512 tokens leave none of the model's 512"),
    ],
)
def test_a_prefix_that_is_named_is_checked_before_work_starts(
    data: Any, words: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    chosen = recipe(**data)
    options: dict[str, Any] = {"samples": 4, "length": POSITIONS - 1}
    with pytest.raises(InputError, match=words) as found:
        quantize(llama, text, tmp_path / "out", chosen, **options)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError) as planned:
        crossbit.plan(str(llama), chosen, calibration=str(text), **options)
    assert str(planned.value) == str(found.value)


def test_a_prefix_that_is_found_and_leaves_too_few_positions(
    llama: Path, noisy: Path, tmp_path: Path
) -> None:
    chosen = recipe(prefix={"ratio": 20})
    with pytest.raises(WorkError, match=LONG) as found:
        quantize(llama, noisy, tmp_path / "out", chosen, samples=2, length=POSITIONS - 1)
    assert str(found.value).endswith(f"give --length {POSITIONS - 2} or less")


def test_no_tokens_are_no_prefix() -> None:
    with pytest.raises(InputError, match="prefix"):
        recipe(prefix={"tokens": []})
