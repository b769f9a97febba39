"""Models that need BOS before every text, after a prefix that ends with it: there is one BOS."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.pipelines import custom, run, shorten
from tests.tiny import BOS, MASSIVE_TOKEN, tiny_folder, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

import crossbit
from crossbit.runtime.loader import load_model

pytestmark = pytest.mark.usefixtures("quick", "no_collection")

LENGTH = 32


class Stopped(BaseException):
    """The test has seen what it wanted."""


def recipe(**data: Any) -> crossbit.Recipe:
    return custom(**{"embedding": None, "head": None, "solver": {"kind": "gptq"}, **data})


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, the template of whose chats begins with BOS."""
    folder = tiny_folder(tmp_path_factory.mktemp("gemma"), "gemma3_text", seed=3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, gemma: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        chosen = recipe(
            prefix={"tokens": [MASSIVE_TOKEN, BOS]},
            evaluation={"windows": 2, "length": LENGTH, "text": str(text)},
        )
        run(gemma, text, out, chosen, settings=())
    return out


def windows(text: Path) -> Tensor:
    return torch.tensor(list(text.read_bytes()[: 2 * LENGTH])).reshape(2, LENGTH)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, skipped: int) -> float:
    """Of what comes after the first token, and after those ``skipped``."""
    losses = [
        float(
            cross_entropy(
                model(row[None], use_cache=False).logits[0, skipped:-1], row[1:][skipped:]
            )
        )
        for row in ids
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("prefix", [{"tokens": [MASSIVE_TOKEN, BOS]}, {}])
def test_calibration_comes_after_the_bos_of_the_prefix(
    prefix: Any, gemma: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossbit.engine.prefix import outlier_tokens

    searched: list[Tensor] = []

    def search(shell: Any, weights: Any, ids: Tensor, config: Any) -> Tensor:
        searched.append(ids)
        return outlier_tokens(shell, weights, ids, config)

    def stop(job: Any, *_: Any) -> None:
        assert job.ids.shape == (4, LENGTH)
        assert not (job.ids == BOS).any()
        assert job.online.prefix.ids[-1] == BOS
        raise Stopped

    monkeypatch.setattr("crossbit.pipeline.outlier_tokens", search)
    monkeypatch.setattr("crossbit.pipeline.run_blocks", stop)
    with pytest.raises(Stopped):
        run(gemma, text, tmp_path / "out", recipe(prefix=prefix))
    assert len(searched) == ("tokens" not in prefix)
    for ids in searched:  # before there is a prefix
        assert ids.shape == (4, LENGTH + 1)
        assert (ids[:, 0] == BOS).all()


@pytest.mark.parametrize("prefix", [None, {"tokens": [BOS, MASSIVE_TOKEN]}])
def test_calibration_begins_with_bos_where_no_prefix_ends_with_it(
    prefix: Any, gemma: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Any, *_: Any) -> None:
        assert (job.ids[:, 0] == BOS).all()
        raise Stopped

    monkeypatch.setattr("crossbit.pipeline.run_blocks", stop)
    with pytest.raises(Stopped):
        run(gemma, text, tmp_path / "out", recipe(prefix=prefix))


def test_original_and_result_predict_the_same_tokens_after_one_bos(
    gemma: Path, quantized: Path, text: Path
) -> None:
    known = json.loads((quantized / "crossbit.json").read_text())["evaluation"]
    assert (known["bos"], known["length"]) == (False, LENGTH)
    ids = windows(text)
    original = hf.AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    started = torch.cat((torch.full((2, 1), BOS), ids), 1)
    expected = perplexity(original, started, 1)
    assert known["original"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert known["original"]["perplexity"] != pytest.approx(perplexity(original, ids, 0), rel=1e-5)
    expected = perplexity(load_model(quantized, dtype=torch.float32), ids, 0)
    assert known["quantized"]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_takes_the_windows_of_the_run(gemma: Path, quantized: Path, text: Path) -> None:
    known = json.loads((quantized / "crossbit.json").read_text())["evaluation"]
    options: dict[str, Any] = {"text": str(text), "length": LENGTH, "windows": 2}
    found = crossbit.evaluate(str(quantized), **options, against=str(gemma))
    assert found["perplexity"]["bos"] is False
    assert found["perplexity"]["value"] == known["quantized"]["perplexity"]
    assert found["paired"] == known["paired"]
    turned = crossbit.evaluate(str(gemma), **options, against=str(quantized))
    assert turned["perplexity"]["value"] == known["original"]["perplexity"]
    alone = crossbit.evaluate(str(gemma), **options)
    assert alone["perplexity"]["bos"] is True


@pytest.mark.parametrize("chat", [False, True])
def test_generation_comes_after_one_bos(chat: bool, quantized: Path) -> None:
    prompt = "<user>the quick\n<assistant>" if chat else "the quick"
    ids = torch.tensor([list(prompt.encode())])
    model: Any = load_model(quantized, dtype=torch.float32)
    new: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            new.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([new[-1:]])), 1)
    expected = tiny_tokenizer().decode(new, skip_special_tokens=True)
    assert crossbit.generate(quantized, "the quick", tokens=6, chat=chat) == expected


def test_the_harness_adds_no_second_bos(quantized: Path) -> None:
    pytest.importorskip("lm_eval")
    from crossbit.evaluation import tasks

    lm = tasks._language_model(tasks._harness(), quantized, torch.float32, "cpu", 1)
    assert lm.tok_encode("abc") == list(b"abc")
