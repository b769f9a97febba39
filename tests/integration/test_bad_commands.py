"""Bad input of the commands beside quantize, and failures after work has started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.running import Cli, short_run
from tests.tiny import tiny_folder

import crossbit.pipeline


@pytest.fixture
def text(source: Path) -> Path:
    return source.with_name("text.txt")


# -- the other commands ---------------------------------------------------------------------------


def test_evaluate(cli: Cli, source: Path, text: Path, tmp_path: Path) -> None:
    def refused(*options: str | Path) -> str:
        return cli("evaluate", source, "--text", text, *options).refusal

    assert "--length 512" in refused()
    assert "--length 1" in refused("--length", "1")
    assert "--windows 0" in refused("--length", "64", "--windows", "0")
    assert "too short" in refused("--length", "64", "--windows", "9999")
    assert "--execution slow" in refused("--length", "64", "--execution", "slow")
    assert "--divisor" in refused("--length", "64", "--divisor", "0")
    assert "--divisor" in refused("--length", "64", "--divisor", "nan")
    assert "no such file" in refused("--length", "64", "--against", "./none")
    other = tiny_folder(tmp_path / "other", "qwen2")
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 300}))
    assert "vocabulary" in refused("--length", "64", "--against", other)
    assert "is a folder" in refused("--length", "64", "--json", tmp_path)
    assert "cannot be written" in refused("--length", "64", "--json", "/dev/null/x.json")
    assert "no such model" in cli("evaluate", "dmo").refusal
    assert 'did you mean "c4"' in cli("evaluate", source, "--text", "c5", "--length", "9").refusal


def test_evaluate_damaged_folder_of_ours(
    cli: Cli, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = ["--recipe", "rtn-w8a16", *short_run(text)]
    assert cli("quantize", source, "--out", out, *run).code == 0
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    commands: dict[str, list[str]] = {
        "evaluate": ["--text", str(text), "--length", "64"],
        "verify": [],
        "generate": ["hi"],
    }
    for command, more in commands.items():
        message = cli(command, out, *more).refusal
        assert "truncated or corrupt" in message
    weights.unlink()
    assert "no weights" in cli("evaluate", out, "--text", text, "--length", "64").refusal


def test_analyze(cli: Cli, source: Path, text: Path, tmp_path: Path) -> None:
    def refused(*options: str | Path) -> str:
        few = ["--samples", "2", "--length", "32", "--calibration", str(text), "--text", str(text)]
        return cli("analyze", source, *few, *options).refusal

    assert "windows of 600 tokens" in refused("--window-length", "600")
    assert "--windows -1" in refused("--windows", "-1")
    assert "sequences of 600 tokens" in refused("--length", "600")
    assert "no such text" in refused("--text", tmp_path / "none.txt")
    assert "not a folder" in refused("--out", text)
    assert "cannot be written" in refused("--json", "/dev/null/a.json")


def test_verify_and_report_of_other_folders(cli: Cli, source: Path, tmp_path: Path) -> None:
    assert "no such folder" in cli("verify", tmp_path / "none").refusal
    for command in ("verify", "report"):
        assert "no crossbit.json" in cli(command, source).refusal
    for content in ("", "[1]", '{"size": 3, "layers": "x", "evaluation": 7}'):
        (tmp_path / "crossbit.json").write_text(content)
        assert "crossbit.json" in cli("verify", tmp_path).refusal
    assert "no crossbit.json" in cli("report", tmp_path / "none").refusal
    (tmp_path / "crossbit.json").write_text("{")
    assert "damaged" in cli("report", tmp_path).refusal
    (tmp_path / "crossbit.json").write_text("{}")
    assert "damaged" in cli("report", tmp_path).refusal
    assert not (tmp_path / "report.html").exists()


def test_generate(cli: Cli, source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    assert "prompt is empty" in cli("generate", source, "").refusal
    assert "--tokens 0" in cli("generate", source, "hi", "--tokens", "0").refusal
    assert (
        "513 tokens are longer than the model's 512 positions"
        in cli("generate", source, "a" * 512).refusal
    )
    assert "no such model" in cli("generate", "nosuch", "hi").refusal
    (model / "chat_template.jinja").unlink()
    assert "no chat template" in cli("generate", model, "hi", "--chat").refusal


# -- after work started ---------------------------------------------------------------------------


def test_disk_full_while_working(
    cli: Cli, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crossbit.engine.workdir.save_file", full)
    ran = cli(
        *("quantize", source, "--recipe", "rtn-w8a16", "--out", tmp_path / "out"),
        *short_run(text),
    )
    assert ran.code == 1
    assert "No space left" in ran.message
    assert "--resume" in ran.message
    assert not (tmp_path / "out").exists()


def test_a_bug_is_one_line_too(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("over\nthere")

    monkeypatch.delenv("CROSSBIT_DEBUG", raising=False)
    monkeypatch.setattr(crossbit.pipeline, "resolve_model", broken)
    ran = cli("quantize", source, "--out", tmp_path / "out")
    assert ran.code == 1
    assert ran.err == (
        "crossbit: ZeroDivisionError: over (a bug; set CROSSBIT_DEBUG=1 to see where)\n"
    )


def test_exit_codes_of_a_process(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crossbit", "quantize", str(source), "--recipe", "rtn-w4a17"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("crossbit: recipe 'rtn-w4a17'")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
