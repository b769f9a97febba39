"""The lm-evaluation-harness adapter, offline: a local task on tiny models."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.exporting import CHANNEL8, TOKEN8, everywhere, export_folder
from tests.tiny import BOS, tiny_folder, tiny_model

from crossbit.errors import InputError
from crossbit.evaluation import tasks as adapter
from crossbit.evaluation.tasks import run_tasks
from crossbit.runtime.loader import load_model

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"q": "The sky is", "choices": ["blue", "a spoon", "seven"], "gold": 0},
    {"q": "Two and two make", "choices": ["four", "five!"], "gold": 0},
    {"q": "Water is", "choices": ["dry as a bone", "wet"], "gold": 1},
    {"q": "A cat says", "choices": ["moo", "woof", "meow", "x"], "gold": 2},
    {"q": "Ice is", "choices": ["hot", "cold"], "gold": 1},
    {"q": "Grass:", "choices": ["red", "green", "of a colour that nobody saw"], "gold": 1},
    {"q": "One, two,", "choices": ["three", "nine"], "gold": 0},
]


def task_file(folder: Path, name: str = "tiny_facts", **changes: Any) -> Path:
    """A multiple-choice task over a local jsonl file."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))  # JSON is YAML
    return path


@torch.no_grad()
def log_likelihoods(
    model: Any, prompt: str, choices: list[str], *, bos: bool = False
) -> list[float]:
    """Sum of log p(byte) of " choice" after the prompt; the tiny tokenizer's tokens are bytes."""
    sums = []
    for choice in choices:
        context = ([BOS] if bos else []) + list(prompt.encode())
        ids = torch.tensor([context + list(f" {choice}".encode())])
        logp = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        picked = logp[:-1].gather(1, ids[0, 1:, None])[len(context) - 1 :, 0]
        sums.append(float(picked.sum()))
    return sums


def by_hand(model: Any, count: int = len(QUESTIONS), *, bos: bool = False) -> dict[str, float]:
    """acc, acc_norm (log-likelihood a byte of the choice) and their standard errors."""
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for question in QUESTIONS[:count]:
        choices: list[str] = question["choices"]  # type: ignore[assignment]
        sums = log_likelihoods(model, str(question["q"]), choices, bos=bos)
        a_byte = [s / len(c) for s, c in zip(sums, choices, strict=True)]
        hits["acc"].append(float(sums.index(max(sums)) == question["gold"]))
        hits["acc_norm"].append(float(a_byte.index(max(a_byte)) == question["gold"]))
    result = {"n": float(count)}
    for name, values in hits.items():
        mean = sum(values) / count
        variance = sum((v - mean) ** 2 for v in values) / (count - 1)
        result |= {name: mean, f"{name}_stderr": math.sqrt(variance / count)}
    return result


def plain(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_file(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama") / "m", "llama", tied=True)


def run(folder: Path, *tasks: str | Path, **options: Any) -> dict[str, dict[str, float]]:
    names = tuple(map(str, tasks))
    return run_tasks(folder, names, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_accuracy_is_that_of_plain_log_likelihoods(
    tmp_path: Path, yaml_file: Path, seed: int
) -> None:
    folder = tiny_folder(tmp_path / "m", "llama", seed=seed)
    expected = by_hand(plain(folder))
    assert 0 < expected["acc"] < 1  # a constant answer would not show a mistake
    assert run(folder, yaml_file) == {"tiny_facts": pytest.approx(expected)}


def test_seeds_of_that_test_differ(tmp_path: Path) -> None:
    results = set()
    for seed in (0, 1, 4):
        folder = tiny_folder(tmp_path / str(seed), "llama", seed=seed)
        values = by_hand(plain(folder))
        results.add((values["acc"], values["acc_norm"]))
    assert len(results) > 1


def test_limit_takes_the_first_examples(llama: Path, yaml_file: Path) -> None:
    assert run(llama, yaml_file, limit=3)["tiny_facts"] == pytest.approx(by_hand(plain(llama), 3))


def test_batches_score_like_single_sequences(llama: Path, yaml_file: Path) -> None:
    assert run(llama, yaml_file, batch_size=4) == run(llama, yaml_file)


def test_a_quantized_folder_is_scored_by_its_integers(tmp_path: Path, yaml_file: Path) -> None:
    source = tiny_folder(tmp_path / "m", "llama", tied=True)
    model = tiny_model("llama", tied=True, dtype=torch.float32)
    scheme = everywhere(CHANNEL8, TOKEN8)
    out = export_folder(source, tmp_path / "q", model, scheme, embedding=CHANNEL8).folder
    # An answer-changing edit, so that only a reader of the stored codes gets it right.
    shard = next(out.glob("*.safetensors"))
    tensors = load_file(shard)
    codes = next(n for n in tensors if n.endswith("layers.2.mlp.down_proj.weight"))
    tensors[codes] = tensors[codes].roll(1, dims=0)
    save_file(tensors, shard, {"format": "pt"})

    expected = by_hand(load_model(out, dtype=torch.float32))
    assert run(out, yaml_file)["tiny_facts"] == pytest.approx(expected)
    sky = ("The sky is", ["blue", "a spoon", "seven"])
    changed = log_likelihoods(load_model(out, dtype=torch.float32), *sky)
    assert changed != pytest.approx(log_likelihoods(plain(source), *sky), rel=1e-2)


def test_gemma_gets_a_bos_token(tmp_path: Path, yaml_file: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "gemma3_text", tied=True, seed=3)
    model = plain(folder)
    with_bos, without = by_hand(model, bos=True), by_hand(model)
    assert with_bos != without  # or this test could not fail
    assert run(folder, yaml_file)["tiny_facts"] == pytest.approx(with_bos)


def test_groups_and_files_beside_the_named_one(tmp_path: Path, llama: Path) -> None:
    for name in ("facts_a", "facts_b"):
        task_file(tmp_path / "t", name)
    group = tmp_path / "t" / "all_facts.yaml"
    group.write_text(
        json.dumps(
            {
                "group": "all_facts",
                "task": ["facts_a", "facts_b"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
            }
        )
    )
    found = run(llama, group)
    assert set(found) == {"all_facts", "facts_a", "facts_b"}
    assert found["all_facts"]["acc"] == pytest.approx(by_hand(plain(llama))["acc"])
    assert found["all_facts"]["n"] == 2 * len(QUESTIONS)


def test_include_path_makes_names_known(
    monkeypatch: pytest.MonkeyPatch, llama: Path, yaml_file: Path
) -> None:
    _without_defaults(monkeypatch)
    found = run(llama, "tiny_facts", include_path=str(yaml_file.parent))
    assert found["tiny_facts"] == pytest.approx(by_hand(plain(llama)))


def test_metric_names_stay_apart_where_filters_differ(tmp_path: Path, llama: Path) -> None:
    take_first = [{"function": "take_first"}]
    path = task_file(
        tmp_path / "t",
        output_type="generate_until",
        doc_to_target="{{choices[gold]}}",
        doc_to_choice=None,
        generation_kwargs={"max_gen_toks": 2, "until": ["\n"]},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[
            {"name": "strict", "filter": take_first},
            {"name": "loose", "filter": [{"function": "lowercase"}, *take_first]},
        ],
    )
    found = run(llama, path, limit=2)["tiny_facts"]
    assert {"exact_match_strict", "exact_match_loose", "n"} <= set(found)
    assert "exact_match_strict_stderr" in found


def _without_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's own 14,000 definitions, which take 10 s to read."""
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager

    def small(**options: Any) -> Any:
        return original(**{**options, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


def refused(folder: Path, *tasks: str | Path, **options: Any) -> str:
    """The message of the refusal: one line, before the model is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "load_model", lambda *_, **__: pytest.fail("model was loaded"))
        with pytest.raises(InputError) as caught:
            run(folder, *tasks, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_task_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, llama: Path, yaml_file: Path
) -> None:
    _without_defaults(monkeypatch)
    message = refused(llama, "tiny_fact", include_path=str(yaml_file.parent))
    assert "'tiny_fact'" in message
    assert "tiny_facts" in message.partition("nearest:")[2]


def test_bad_arguments_are_refused(tmp_path: Path, llama: Path, yaml_file: Path) -> None:
    assert "no such file" in refused(llama, tmp_path / "missing.yaml")
    assert "no task named" in refused(llama, " ")
    assert "at least 1" in refused(llama, yaml_file, limit=0)
    assert "no such folder" in refused(llama, yaml_file, include_path=str(tmp_path / "none"))


def test_data_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    files = {"data_files": {"test": str(tmp_path / "gone.jsonl")}}
    missing = task_file(tmp_path / "a", "gone", dataset_kwargs=files)
    message = refused(llama, missing)
    assert "gone.jsonl" in message
    assert "local data_files" in message

    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\n  after 5 tries")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = refused(llama, task_file(tmp_path / "b", "remote", dataset_path="someone/some-data"))
    assert "Couldn't reach the hub after 5 tries" in message


def test_the_same_task_twice_is_refused_by_name(tmp_path: Path, llama: Path) -> None:
    task = task_file(tmp_path / "t", "facts_a")
    group = tmp_path / "t" / "g.yaml"
    group.write_text(json.dumps({"group": "g", "task": ["facts_a"]}))
    assert "facts_a" in refused(llama, task, group)


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, llama: Path, yaml_file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'pip install "crossbit[tasks]"' in refused(llama, yaml_file)
