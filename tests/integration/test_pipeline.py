"""What a run leaves behind, and what happens when it is killed, repeated, refused or fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.killing import Death, When, kill
from tests.pipelines import EVALUATION, RECIPE, run, shorten, write_text
from tests.tiny import BLOCKS, tiny_folder
from typer.testing import CliRunner

import crossbit
from crossbit import pipeline
from crossbit.cli import app
from crossbit.engine.workdir import WorkDir, part_name
from crossbit.errors import InputError, WorkError
from crossbit.verification import VerifyReport
from crossbit.verification import verify as real_verify

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """The result of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        out = tmp_path_factory.mktemp("finished") / "out"
        run(llama, text, out)
    return out


def assert_same_bytes(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name != out.name)


# -- the same bytes, whatever happens -------------------------------------------------------------


def test_a_second_run_gives_the_same_bytes(
    llama: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    run(llama, text, tmp_path / "out")
    assert_same_bytes(tmp_path / "out", finished)
    assert leftovers(tmp_path / "out") == []


MOMENTS: dict[str, tuple[str, When]] = {
    "first file": ("manifest.json", "before"),
    "embedding written": ("outside.safetensors", "after"),
    "activations of block 0": ("stream-00000.safetensors", "before"),
    "record without its block": ("block-00000.json", "after"),
    "mid-write of a block": ("block-00001.safetensors", "before"),
    "stream without its block": ("stream-00002.safetensors", "after"),
    "block boundary": ("block-00001.safetensors", "after"),
    "last block": ("block-00002.safetensors", "after"),
    "config of the staged folder": ("config.json", "before"),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> dict[str, Path]:
    """Output folders whose runs were killed at each of MOMENTS."""
    folder = tmp_path_factory.mktemp("killed")
    outs = {moment: folder / f"out{i}" for i, moment in enumerate(MOMENTS)}
    common = {"model": str(llama), "calibration": str(text), "samples": 4, "length": 32}
    chosen = {**common, "recipe": RECIPE, "settings": EVALUATION}
    kill(
        [Death(*MOMENTS[moment], {**chosen, "out": str(out)}) for moment, out in outs.items()],
        seconds=120,
    )
    return outs


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bytes(
    moment: str, killed: dict[str, Path], llama: Path, text: Path, finished: Path
) -> None:
    out = killed[moment]
    assert not out.exists()
    result = run(llama, text, out, resume=True)
    assert result["verify"]["passed"] is True
    assert_same_bytes(out, finished)
    assert not out.with_name(out.name + ".crossbit-work").exists()


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def interrupted(
    model: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A run stopped just before it writes a part."""
    save = WorkDir.save_part

    def stop(self: WorkDir, name: str, *args: Any) -> None:
        die() if name == part else save(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "save_part", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, text, out)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_finished_blocks_are_not_done_again(
    block: int,
    llama: Path,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the run died after it wrote a block's output and before it wrote the block."""
    out = tmp_path / "out"
    interrupted(llama, text, out, monkeypatch, part_name(block))
    written: list[str] = []
    save = WorkDir.save_part

    def watch(self: WorkDir, name: str, *args: Any) -> None:
        written.append(name)
        save(self, name, *args)

    monkeypatch.setattr(WorkDir, "save_part", watch)
    run(llama, text, out, resume=True)
    assert written == [*(part_name(i) for i in range(block, BLOCKS)), "outside"]
    assert_same_bytes(out, finished)


def test_resume_of_other_work_is_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(llama, text, out, monkeypatch, part_name(1))
    before = sorted(p.name for p in (tmp_path / "out.crossbit-work").iterdir())
    other_model = tiny_folder(tmp_path / "model", "llama", seed=1)
    other_text = write_text(tmp_path / "other.txt", 2)
    changes: dict[str, Any] = {
        "another recipe": lambda: run(llama, text, out, "gptq-w8a8", resume=True),
        "another calibration text": lambda: run(llama, other_text, out, resume=True),
        "another model": lambda: run(other_model, text, out, resume=True),
        "another dtype": lambda: run(llama, text, out, resume=True, dtype=torch.bfloat16),
    }
    for difference, change in changes.items():
        with pytest.raises(InputError, match=difference):
            change()
    assert sorted(p.name for p in (tmp_path / "out.crossbit-work").iterdir()) == before
    assert not out.exists()


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_resume_under_another_version_is_refused(
    library: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums may differ in their last bits; what is finished is finished."""
    out = tmp_path / "out"
    interrupted(llama, text, out, monkeypatch, part_name(1))
    module = getattr(pipeline, library)  # as it is known there, whatever other tests import anew
    version = module.__version__
    with monkeypatch.context() as patch:
        patch.setattr(module, "__version__", "99.9.0")
        difference = (
            rf"another {library} version \({re.escape(version)}, now 99\.9\.0\); install that"
        )
        with pytest.raises(InputError, match=difference):
            run(llama, text, out, resume=True)
    run(llama, text, out, resume=True)
    monkeypatch.setattr(module, "__version__", "99.9.0")
    monkeypatch.setattr("crossbit.pipeline.run_blocks", die)
    run(llama, text, out, resume=True)


def test_resume_under_another_crossbit_is_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version may quantize differently: finished work is not its result either."""
    out = tmp_path / "out"
    interrupted(llama, text, out, monkeypatch, part_name(1))
    module = vars(pipeline)["crossbit"]  # as it is known there, whatever other tests import anew
    version = re.escape(module.__version__)
    with monkeypatch.context() as patch:
        patch.setattr(module, "__version__", "99.9.0")
        with pytest.raises(
            InputError, match=rf"another crossbit version \({version}, now 99\.9\.0\)"
        ):
            run(llama, text, out, resume=True)
    run(llama, text, out, resume=True)
    monkeypatch.setattr(module, "__version__", "99.9.0")
    with pytest.raises(InputError, match="holds the result of other work"):
        run(llama, text, out, resume=True)


def test_resume_with_other_threads_is_said(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    interrupted(llama, text, out, monkeypatch, part_name(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    result = run(llama, text, out, resume=True)
    (note,) = (w for w in result["warnings"] if "computed in parts" in w)
    assert re.search(rf" {threads} threads?; .* {threads + 1} threads: bytes may differ", note)


def test_resume_with_the_same_threads_says_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(llama, text, tmp_path / "out", monkeypatch, part_name(1))
    result = run(llama, text, tmp_path / "out", resume=True)
    assert not any("computed in parts" in w for w in result["warnings"])


def test_resume_of_finished_work_returns_at_once(
    llama: Path, text: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossbit.pipeline.run_blocks", die)
    before = (finished / "crossbit.json").read_bytes()
    assert run(llama, text, finished, resume=True) == json.loads(before)
    sets = [part for setting in EVALUATION for part in ("--set", setting)]
    arguments = ["quantize", str(llama), "--recipe", RECIPE, "--out", str(finished), "--resume"]
    arguments += ["--calibration", str(text), "--samples", "4", "--length", "32", *sets]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert (finished / "crossbit.json").read_bytes() == before
    with pytest.raises(InputError, match="other work"):
        run(llama, text, finished, "gptq-w8a8", resume=True)


def test_resume_without_anything_starts_afresh(
    llama: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(llama, text, out, resume=True)
    assert_same_bytes(out, finished)


# -- the output folder ----------------------------------------------------------------------------


def test_what_is_there_stays_unless_overwritten(
    llama: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("crossbit.pipeline.resolve_model", die)  # refused before any work
        with pytest.raises(InputError, match=r"not empty.*--overwrite"):
            run(llama, text, out)
        with pytest.raises(InputError, match="not a folder"):
            run(llama, text, out / "mine.txt")
        with pytest.raises(InputError, match="cannot be written"):
            run(llama, text, out / "mine.txt" / "out")
        with pytest.raises(InputError, match="cannot be written"):
            run(llama, text, tmp_path / "new", work=Path("/proc/none/work"))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    run(llama, text, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert_same_bytes(out, finished)
    assert leftovers(out) == []


def test_a_failed_overwrite_leaves_the_old_result(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    monkeypatch.setattr("crossbit.pipeline.run_blocks", die)
    with pytest.raises(KeyboardInterrupt):
        run(llama, text, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_another_file_system_for_work(
    llama: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that cannot be done is a copy; one that fails leaves the old result in place."""
    out, work = tmp_path / "result" / "out", tmp_path / "work" / "here"
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(work) in str(source) and str(out.parent) in str(target):
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run(llama, text, out, work=work)
    assert_same_bytes(out, finished)
    assert leftovers(out) == []
    assert not work.exists()

    def full(source: Any, target: Any, **_: Any) -> None:
        Path(target).mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("crossbit.output.shutil.copytree", full)
        with pytest.raises(WorkError, match="No space left"):
            run(llama, text, out, work=work, overwrite=True)
    assert_same_bytes(out, finished)
    assert leftovers(out) == []


def test_a_folder_of_someone_else_is_no_work_folder(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "photos"
    theirs.mkdir()
    (theirs / "photo.jpg").write_text("precious")
    choices: tuple[dict[str, bool], ...] = ({}, {"resume": True}, {"overwrite": True})
    for options in choices:
        with pytest.raises(InputError, match=r"--work .*photos"):
            run(llama, text, tmp_path / "out", work=theirs, **options)
    assert [p.name for p in theirs.iterdir()] == ["photo.jpg"]


# -- verification ---------------------------------------------------------------------------------


def test_a_failed_verification_publishes_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit in the staged weights is found, and the folder does not get its name."""
    staged: list[Path] = []

    def damaged(folder: Path, *, device: str) -> VerifyReport:
        staged.append(folder)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return real_verify(folder, device=device)

    monkeypatch.setattr("crossbit.finish.verify", damaged)
    out = tmp_path / "out"
    with pytest.raises(WorkError, match="verification failed: tensors") as caught:
        run(llama, text, out)
    assert "\n" not in str(caught.value)
    assert str(staged[0]) in str(caught.value)
    assert staged[0].is_dir()
    assert not out.exists()


# -- limits ----------------------------------------------------------------------------------------


def test_the_text_is_not_longer_than_the_model(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="512 positions"):
        run(llama, text, tmp_path / "out", length=513)
    assert leftovers(tmp_path / "out") == []


def test_the_default_evaluation_text(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything real: the embedded texts whole, windows cut to the model's positions, a report."""
    monkeypatch.undo()
    out = tmp_path / "out"
    settings = ("evaluation.windows=1", "weights.group=16")
    result = crossbit.quantize(
        str(llama), "gptq-w4a16", out=out, samples=2, length=16, settings=settings
    )
    assert result["evaluation"]["length"] == 512
    assert result["calibration"]["tokens"] == 32
    assert (out / "report.html").stat().st_size > 10_000
    assert real_verify(out).passed


def test_sigterm_ends_cleanly(llama: Path, text: Path, tmp_path: Path) -> None:
    """One line that names the command to go on with, and no folder."""
    code = (
        "import os, signal, crossbit.pipeline, crossbit.cli, sys\n"
        "def stop(*a): os.kill(os.getpid(), signal.SIGTERM)\n"
        "crossbit.pipeline.run_blocks = stop\n"
        "crossbit.cli.main()\n"
    )
    arguments = ["quantize", str(llama), "--out", str(tmp_path / "out"), "--calibration", str(text)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--samples", "4", "--length", "32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "--resume" in last
    assert str(tmp_path / "out") in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
