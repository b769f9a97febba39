"""Whole runs with quantized keys and values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cqe import KEYS, cached, perplexity
from tests.opened import token_error
from tests.pipelines import run
from tests.tiny import BLOCKS, sample_ids
from tests.training import weights_of

import crossbit
from crossbit.engine.closing import close_block
from crossbit.engine.job import Job
from crossbit.engine.originals import through_original
from crossbit.errors import InputError
from crossbit.runtime.loader import load_model
from crossbit.verification import verify

pytestmark = pytest.mark.usefixtures("quick", "no_collection")


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
