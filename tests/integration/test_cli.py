"""Every command with its flags, on a tiny folder: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.running import Cli, assert_stops, short_run, write_text
from tests.tiny import tiny_folder

import crossbit.api
import crossbit.pipeline
from crossbit.recipe import Recipe, preset_names, preset_text
from crossbit.recipe_files import addon_names

BARS = ("Dispatching", "Decompressing", "it/s")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and the model quantized once by the command."""
    place = tmp_path_factory.mktemp("cli")
    tiny_folder(place / "model", "llama")
    (place / "model" / "LICENSE").write_text("do as you like\n")
    (place / "model" / "crossbit-source.json").write_text('{"file": "old.gguf"}\n')
    text = write_text(place / "text.txt")
    mask = os.umask(0o022)
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "crossbit", "quantize", str(place / "model")),
                *("--recipe", "rtn-w8a8", "--out", str(place / "out"), *short_run(text)),
                *("--dtype", "float32", "--json", str(place / "result.json")),
            ],
            capture_output=True,
            text=True,
        )
    finally:
        os.umask(mask)
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf8"))


# -- quantize -------------------------------------------------------------------------------------


def test_quantize_writes_a_whole_folder(place: Path) -> None:
    out = place / "out"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "README.md",
        "crossbit.json",
        "report.html",
    }
    assert "crossbit-source.json" not in names
    assert sorted(p.name for p in place.iterdir() if p.name.startswith(("out", ".out"))) == ["out"]
    assert read(out / "crossbit.json") == read(place / "result.json")
    card = (out / "README.md").read_text("utf8")
    checks = len(read(out / "crossbit.json")["verify"]["checks"])
    assert f"found it to be the model that was evaluated ({checks} checks)" in card


def test_quantize_respects_the_umask(place: Path) -> None:
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (place / "out").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_quantize_reports_without_the_bars_of_others(place: Path) -> None:
    shown = (place / "stderr").read_text()
    assert not any(bar in shown for bar in BARS), shown
    assert "quantizing blocks: 3/3" in shown
    assert "verifying" in shown
    printed = (place / "stdout").read_text()
    assert "perplexity" in printed
    assert "verified" in printed


def test_quantize_result_says_what_was_asked(place: Path) -> None:
    result = read(place / "out" / "crossbit.json")
    assert result["recipe"]["name"] == "rtn-w8a8"
    assert result["manifest"]["dtype"] == "float32"
    evaluation = result["evaluation"]
    assert (evaluation["windows"], evaluation["length"], evaluation["tokens"]) == (3, 128, 384)
    ratio = evaluation["quantized"]["perplexity"] / evaluation["original"]["perplexity"]
    assert evaluation["paired"]["loss"] == pytest.approx(ratio - 1, rel=1e-9)
    assert result["verify"]["passed"] is True


def test_options_reach_the_recipe(cli: Cli, place: Path, tmp_path: Path) -> None:
    """Also the research kind, a work folder of its own and an output in folders that are not."""
    text = place / "text.txt"
    out, work = tmp_path / "a" / "b" / "out", tmp_path / "w" / "work"
    ran = cli(
        *("quantize", place / "model", "--recipe", "crossquant-paper-w8a8", "--out", out),
        *("--work", work, "--seed", "5"),
        *short_run(text),
        *("--set", "activations.alpha=0.25", "--dtype", "bfloat16", "--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    result = read(out / "crossbit.json")
    assert result["kind"] == "research"
    assert result["recipe"]["activations"]["alpha"] == 0.25
    assert result["manifest"]["dtype"] == "bfloat16"
    settings = result["recipe"]["calibration"]
    assert (settings["samples"], settings["length"], settings["seed"]) == (4, 64, 5)
    assert not work.exists()
    for command in ("quantize", "analyze"):
        more: list[str | Path] = ["--out", tmp_path / "again"] if command == "quantize" else []
        assert "already quantized (a research result" in cli(command, out, *more).refusal
    verified = cli("verify", out)
    assert verified.code == 0
    assert "refuses it" in " ".join(verified.out.split())
    assert cli("generate", out, "the quick", "--tokens", "2").code == 0


def test_resume_of_a_finished_run_does_nothing(cli: Cli, place: Path) -> None:
    out = place / "out"
    before = (out / "crossbit.json").stat().st_mtime_ns
    same: list[str | Path] = [
        *("quantize", place / "model", "--recipe", "rtn-w8a8", "--out", out),
        *(*short_run(place / "text.txt"), "--dtype", "float32"),
    ]
    ran = cli(*same, "--resume")
    assert ran.code == 0
    assert "finished already" in ran.err
    assert (out / "crossbit.json").stat().st_mtime_ns == before
    assert "not empty" in cli(*same).refusal
    other = cli(*same, "--resume", "--set", "weights.bits=7")
    assert "other work" in other.refusal
    assert not (place / "out.crossbit-work").exists()


def test_overwrite_replaces_only_when_done(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    command: list[str | Path] = [
        *("quantize", place / "model", "--recipe", "rtn-w8a16", "--out", out),
        *(*short_run(place / "text.txt"), "--overwrite"),
    ]
    assert cli(*command, "--set", "evaluation.text=nosuch.txt").code == 2
    assert (out / "mine").exists()
    # --resume as well: what a stopped run tells the user to type.
    ran = cli(*command, "--resume")
    assert ran.code == 0, ran.err
    assert not (out / "mine").exists()
    assert (out / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resume_into_an_empty_folder_starts_afresh(cli: Cli, place: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        *("quantize", place / "model", "--recipe", "rtn-w8a16", "--out", tmp_path, "--resume"),
        *short_run(place / "text.txt"),
    ]
    ran = cli(*command, "--work", tmp_path.with_name("elsewhere"))
    assert ran.code == 0, ran.err
    assert (tmp_path / "model.safetensors").exists()


# -- evaluate -------------------------------------------------------------------------------------


def test_evaluate_json(cli: Cli, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "e.json"
    ran = cli(
        *("evaluate", place / "out", "--against", place / "model", "--text", place / "text.txt"),
        *("--length", "64", "--windows", "5", "--dtype", "float32", "--device", "cpu"),
        *("--execution", "fake", "--json", file),
    )
    assert ran.code == 0, ran.err
    result = read(file)
    found = result["perplexity"]
    assert {"text", "tokens", "value", "stderr"} <= set(found)
    assert (found["text"], found["tokens"]) == ("text.txt", 320)
    assert len(found["losses"]) == 5
    assert found["value"] == pytest.approx(exp(sum(found["losses"]) / 5), rel=1e-9)
    assert found["stderr"] > 0
    ratio = found["value"] / result["against"]["value"]
    assert result["paired"]["loss"] == pytest.approx(ratio - 1, rel=1e-9)
    assert f"{found['value']:.4f}" in ran.out
    assert (result["kind"], result["against"]["kind"]) == ("plain", None)
    assert ran.out.count("(plain)") == 1


def test_evaluate_one_window_has_no_error(cli: Cli, place: Path, tmp_path: Path) -> None:
    ran = cli(
        *("evaluate", place / "model", "--text", place / "text.txt", "--length", "64"),
        *("--windows", "1", "--json", tmp_path / "e.json"),
    )
    assert ran.code == 0
    assert read(tmp_path / "e.json")["perplexity"]["stderr"] is None


def test_evaluate_divisor_changes_the_result(cli: Cli, place: Path, tmp_path: Path) -> None:
    values = []
    for divisor in ("127.5", "100"):
        file = tmp_path / f"{divisor}.json"
        ran = cli(
            *("evaluate", place / "out", "--text", place / "text.txt", "--length", "64"),
            *("--windows", "2", "--divisor", divisor, "--json", file),
        )
        assert ran.code == 0
        values.append(read(file)["perplexity"]["value"])
    assert values[0] != values[1]


def test_tasks_run_first_and_as_quiet_as_asked(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def tasks(folder: Path, names: tuple[str, ...], **options: Any) -> dict[str, dict[str, float]]:
        asked.append((folder, names, options))
        return {"arc": {"acc": 0.25}}

    def losses(*_: Any, **__: Any) -> list[float]:
        assert asked
        return [1.0, 1.5]

    monkeypatch.setattr("crossbit.evaluation.tasks.run_tasks", tasks)
    monkeypatch.setattr(crossbit.api, "losses_of", losses)
    ran = cli(
        *("evaluate", place / "model", "--text", place / "text.txt", "--length", "64"),
        *("--tasks", "arc,piqa", "--json", tmp_path / "e.json"),
    )
    assert ran.code == 0
    folder, names, options = asked[0]
    assert (folder, names) == (place / "model", ("arc", "piqa"))
    assert options["quiet"] is False
    assert read(tmp_path / "e.json")["tasks"] == {"arc": {"acc": 0.25}}
    assert "arc: acc 0.25" in ran.out
    crossbit.api.evaluate(
        str(place / "model"), text=str(place / "text.txt"), length=64, tasks=("arc",)
    )
    assert asked[1][2]["quiet"] is True


# -- analyze, verify, generate, recipes, report ---------------------------------------------------


def test_analyze(cli: Cli, place: Path, tmp_path: Path) -> None:
    text = place / "text.txt"
    ran = cli(
        *("analyze", place / "model", "--calibration", text, "--samples", "2", "--length", "32"),
        *("--seed", "3", "--text", text, "--windows", "2", "--window-length", "48"),
        *("--out", tmp_path / "an", "--dtype", "float32", "--json", tmp_path / "a.json"),
    )
    assert ran.code == 0, ran.err
    result = read(tmp_path / "a.json")
    assert result == read(tmp_path / "an" / "analysis.json")
    assert (tmp_path / "an" / "analysis.html").stat().st_size > 1000
    assert result["calibration"]["tokens"] == 64
    assert (result["evaluation"]["windows"], result["evaluation"]["length"]) == (2, 48)
    assert {"kernel", "outliers", "modes", "remove_kernel"} <= set(result)


def test_verify(cli: Cli, place: Path, tmp_path: Path) -> None:
    ran = cli("verify", place / "out", "--device", "cpu", "--json", tmp_path / "v.json")
    assert (ran.code, ran.err) == (0, "")
    report = read(tmp_path / "v.json")
    assert report["passed"] is True
    assert {"tensors", "files", "reload", "weights", "layers", "logits"} <= {
        c["name"] for c in report["checks"]
    }


def test_verify_fails_on_a_changed_file(cli: Cli, place: Path, tmp_path: Path) -> None:
    for path in (place / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ran = cli("verify", tmp_path, "--json", tmp_path / "v.json")
    assert ran.code == 1
    assert "not what was evaluated (tensors" in ran.message
    assert "FAILED" in ran.out
    assert read(tmp_path / "v.json")["passed"] is False


def test_generate(cli: Cli, place: Path) -> None:
    plain = cli("generate", place / "out", "the quick", "--tokens", "4", "--dtype", "float32")
    assert (plain.code, plain.err) == (0, "")
    assert plain.out == cli("generate", place / "out", "the quick", "--tokens", "4").out
    first = cli("generate", place / "model", "hello", "--chat", "--seed", "1", "--tokens", "6")
    again = cli("generate", place / "model", "hello", "--chat", "--seed", "1", "--tokens", "6")
    other = cli("generate", place / "model", "hello", "--chat", "--seed", "2", "--tokens", "6")
    assert first.code == 0
    assert first.out == again.out != other.out
    # "at most": stops at the model's 512 positions without a word on stderr
    assert cli("generate", place / "model", "a" * 510, "--tokens", "600").err == ""


def test_recipes(cli: Cli) -> None:
    listed = cli("recipes")
    assert listed.code == 0
    for name in preset_names():  # whole names, in the 80 columns of a pipe
        assert name in listed.out
    shown = cli("recipes", "crossquant-w8a8")
    assert shown.code == 0
    assert shown.out == f"# plain: loads in transformers\n{preset_text('crossquant-w8a8')}"
    assert "cross_fold" in shown.out
    assert "source:" in shown.out
    assert cli("recipes", "best-w4a4").out.startswith("# online: loads in crossbit only\n")
    assert cli("recipes", "crossquant-paper-w8a8").out.startswith("# research: loads in crossbit")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("omniquant-w3a16+sde+cl", "plain"),
        ("omniquant-w3a16+sde+kv4", "online"),
        ("duquant-w4a4+e2e", "online"),
        ("smoothquant-w8a8+rotate", "plain"),
    ],
)
def test_a_recipe_with_addons_is_shown(name: str, kind: str, cli: Cli, tmp_path: Path) -> None:
    """With its kind, and as a file that is the same recipe."""
    shown = cli("recipes", name)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"# {kind}: loads in ")
    path = tmp_path / "own.yaml"
    path.write_text(shown.out)
    assert Recipe.load(path) == Recipe.load(name).model_copy(update={"name": "own"})


def test_addons_that_do_not_go_with_a_recipe_are_refused(cli: Cli) -> None:
    assert "unknown key 'solver.gptq.expansion'" in cli("recipes", "gptq-w4a16+sde").refusal
    assert "duquant before other transforms" in cli("recipes", "best-w4a4+let").refusal
    assert "did you mean 'sde'" in cli("recipes", "omniquant-w4a16+sdee").refusal


def test_addons_are_listed_with_the_kind_that_they_make(cli: Cli) -> None:
    kinds = {}
    for line in cli("recipes").out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0].startswith("+"):
            kinds[cells[0].removeprefix("+")] = cells[1]
    online = {"duquant", "kv4", "kv8", "online", "prefix"}
    assert kinds == {n: "online" if n in online else "as it was" for n in addon_names()}


def test_report(cli: Cli, place: Path) -> None:
    page = place / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    ran = cli("report", place / "out")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.strip() == str(page)
    assert page.read_text() == before


def test_help_and_usage(cli: Cli) -> None:
    for command in ("quantize", "evaluate", "analyze", "verify", "generate", "recipes", "report"):
        assert cli(command, "--help").code == 0
    assert "no command given" in cli().message
    assert "nosuch" in cli("nosuch").refusal
    assert "--frob" in cli("recipes", "--frob").refusal
    assert "Missing argument" in cli("quantize").refusal
    assert "--samples" in cli("quantize", "m", "--samples", "few").refusal


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_names_the_resume_command(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Also where the work catches every exception."""

    def work(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception:
            pytest.fail("handled as an error of the work")

    monkeypatch.setattr(crossbit.pipeline, "quantize", work)
    ran = cli("quantize", "my model", "--out", "o")
    assert ran.code == 1
    assert (
        ran.err == "crossbit: stopped; go on with: crossbit quantize 'my model' --out o --resume\n"
    )
    ran = cli("quantize", "m", "--resume")
    assert ran.err.endswith("crossbit quantize m --resume\n")
    monkeypatch.setattr("crossbit.api.evaluate", work)
    assert cli("evaluate", "m").err == "crossbit: stopped\n"


_SLOW = """
import sys, time
import crossbit.pipeline as pipeline
run = pipeline.run_blocks
def slow(job, work, reporter):
    write = job.write
    def writes(index, *rest):
        if index == 1:
            print("ready", flush=True)
            time.sleep(60)
        return write(index, *rest)
    object.__setattr__(job, "write", writes)
    run(job, work, reporter)
pipeline.run_blocks = slow
from crossbit.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    cli: Cli, place: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    args = [
        *("quantize", str(place / "model"), "--recipe", "rtn-w8a8", "--out", str(out)),
        *(*short_run(place / "text.txt"), "--dtype", "float32"),
    ]
    assert_stops(_SLOW, args, number)
    assert not out.exists()
    assert (tmp_path / "out.crossbit-work" / "block-00000.safetensors").exists()
    ran = cli(*args, "--resume")
    assert ran.code == 0, ran.err
    assert "resuming at block 1 of 3" in ran.err
    whole, resumed = place / "out", out
    assert (resumed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out.crossbit-work").exists()


def test_a_failure_after_work_started_keeps_the_output_path_free(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossbit.errors import InputError

    def broken(*_: Any, **__: Any) -> None:
        raise InputError("found too late")

    monkeypatch.setattr(crossbit.pipeline, "run_blocks", broken)
    ran = cli(
        *("quantize", place / "model", "--recipe", "rtn-w8a16", "--out", tmp_path / "out"),
        *short_run(place / "text.txt"),
    )
    assert ran.code == 1
    assert ran.message == "found too late"
    assert not (tmp_path / "out").exists()


def test_exported_weights_are_integers(place: Path) -> None:
    with safe_open(str(place / "out" / "model.safetensors"), framework="pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.down_proj.weight")
        kept = file.get_tensor("model.norm.weight")
    assert weight.dtype == torch.int8
    assert kept.dtype == torch.float32
