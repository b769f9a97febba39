"""The analysis against the same figures taken from transformers' own model, hooked by hand."""

from __future__ import annotations

import functools
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.tiny import tiny_folder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from crossbit.analysis.run import analyze, print_analysis
from crossbit.corpora import calibration_windows, evaluation_windows, load_text
from crossbit.errors import InputError
from crossbit.models.opening import open_tokenizer
from crossbit.models.shell import Shell

SAMPLES, LENGTH, WINDOWS, WINDOW = 3, 48, 3, 64
PROPORTIONS = (0.0, 0.05, 0.3)
Hook = Callable[[str, Tensor], Tensor | None]


def write_text(path: Path, seed: int) -> Path:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 8))) for _ in range(60)]
    path.write_text(" ".join(rng.choice(words) for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "calibration.txt", 1), write_text(folder / "evaluation.txt", 2)


def run(folder: Path, texts: tuple[Path, Path], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "calibration": str(texts[0]),
        "samples": SAMPLES,
        "length": LENGTH,
        "text": str(texts[1]),
        "windows": WINDOWS,
        "window_length": WINDOW,
        "proportions": PROPORTIONS,
    }
    return analyze(str(folder), **(settings | options))


class Reference:
    """transformers' model of a folder, hooks on the linear layers of its blocks."""

    def __init__(self, folder: Path, texts: tuple[Path, Path]) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.eval().requires_grad_(False)
        self.linears = {
            n: m
            for n, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and "layers" in n
        }
        tokenizer = open_tokenizer(folder)
        self.calibration = calibration_windows(
            load_text(str(texts[0]), split="calibration"),
            tokenizer,
            samples=SAMPLES,
            length=LENGTH,
            seed=0,
            bos=False,
        )
        self.evaluation = evaluation_windows(
            load_text(str(texts[1]), split="evaluation"),
            tokenizer,
            length=WINDOW,
            windows=WINDOWS,
            bos=False,
        )

    def losses(self, ids: Tensor, hook: Hook) -> list[float]:
        """Loss of each window while ``hook(name, x)`` sees, and may replace, every input."""
        handles = [
            m.register_forward_pre_hook(lambda _, args, n=n: hook(n, args[0]))
            for n, m in self.linears.items()
        ]
        losses = []
        for row in ids:
            logits = self.model(input_ids=row[None]).logits[0]
            losses.append(float(F.cross_entropy(logits[:-1].double(), row[1:])))
        for handle in handles:
            handle.remove()
        return losses

    def inputs(self, ids: Tensor) -> dict[str, list[Tensor]]:
        """Every layer's input, one [L, K] float64 a window."""
        found: dict[str, list[Tensor]] = {n: [] for n in self.linears}
        self.losses(ids, lambda n, x: found[n].append(x[0].double()))
        return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def reference(llama: Path, texts: tuple[Path, Path]) -> Reference:
    return Reference(llama, texts)


@pytest.fixture(scope="module")
def result(llama: Path, texts: tuple[Path, Path]) -> dict[str, Any]:
    return run(llama, texts, weights="original")


def cross(x: Tensor, q: float, alpha: float, columns: Tensor, *, rescaled: bool) -> Tensor:
    """Step of every element of x [T, K] by the paper's formulas, float64."""
    rows, factor = x.abs().amax(1, keepdim=True), columns ** (1 - alpha)
    if rescaled and alpha != 1:
        return (x.abs() / factor).amax(1, keepdim=True) * factor / q
    return rows**alpha * factor / q


# -- kernels -------------------------------------------------------------------------------------


def test_kernels_are_those_of_the_definition(result: dict[str, Any], reference: Reference) -> None:
    inputs = reference.inputs(reference.calibration)
    shares: dict[tuple[str, int, float, bool], float] = {}
    for name, windows in inputs.items():
        for bits, q in ((8, 127), (6, 31), (4, 7)):
            for alpha, rescaled in ((1.0, False), (0.15, False), (0.15, True), (0.7, True)):
                kernel = total = 0
                for x in windows:  # columns of each sequence on its own
                    step = cross(x, q, alpha, x.abs().amax(0), rescaled=rescaled)
                    kernel += int((x.abs() <= step / 2).sum())
                    total += x.numel()
                shares[name, bits, alpha, rescaled] = kernel / total
    seen: list[str] = []
    for row in result["kernel"]["layers"]:
        seen += row["layers"]
        for name in row["layers"]:
            assert row["block"] == int(name.split(".")[2])
            for k in row["kernel"]:
                expected = shares.get((name, k["bits"], k["alpha"], k["rescaled"]))
                if expected is not None:
                    assert k["proportion"] == pytest.approx(expected, abs=1e-3)
    assert sorted(seen) == sorted(inputs)  # every layer, once
    assert [r["role"] for r in result["kernel"]["layers"][:4]] == ["q/k/v", "o", "gate/up", "down"]


def test_types_and_model_weigh_elements(result: dict[str, Any]) -> None:
    kernel = result["kernel"]

    def share(counts: dict[str, Any]) -> float:
        return float(
            next(k["proportion"] for k in counts["kernel"] if (k["bits"], k["alpha"]) == (8, 1))
        )

    rows = [(r["role"], r["elements"], share(r), len(r["layers"])) for r in kernel["layers"]]
    for role, counts in kernel["types"].items():
        mine = [r for r in rows if r[0] == role]
        assert counts["elements"] == sum(r[1] for r in mine)
        mean = sum(r[1] * r[2] for r in mine) / counts["elements"]
        assert share(counts) == pytest.approx(mean, rel=1e-9)
    for key, weights in (("model", [1] * len(rows)), ("model_by_layer", [r[3] for r in rows])):
        elements = sum(w * r[1] for w, r in zip(weights, rows, strict=True))
        assert kernel[key]["elements"] == elements
        mean = sum(w * r[1] * r[2] for w, r in zip(weights, rows, strict=True)) / elements
        assert share(kernel[key]) == pytest.approx(mean, rel=1e-9)
    assert kernel["model_by_layer"]["elements"] > kernel["model"]["elements"]


# -- modes ---------------------------------------------------------------------------------------


def test_modes_are_what_their_labels_say(result: dict[str, Any], reference: Reference) -> None:
    columns = {
        n: torch.cat(w).abs().amax(0) for n, w in reference.inputs(reference.calibration).items()
    }

    def quantize(name: str, x: Tensor, mode: str, q: int) -> Tensor:
        values = x[0].double()
        own = values.abs().amax(0)
        alpha = 1.0 if mode == "per_token" else 0.15
        chosen = own if mode in ("per_token", "cross_dynamic") else columns[name]
        step = cross(values, q, alpha, chosen, rescaled=mode == "cross_static")
        codes = (values / step).nan_to_num(0).round().clamp(-q - 1, q)
        return (codes * step).float()[None]

    original = reference.losses(reference.evaluation, lambda n, x: None)
    assert result["modes"][0]["losses"] == pytest.approx(original, rel=1e-5)
    expected: dict[tuple[str, int], list[float]] = {}
    for bits, q in ((8, 127), (4, 7)):
        for mode in ("per_token", "cross_dynamic", "cross_static", "cross_static_clip"):
            hook = functools.partial(quantize, mode=mode, q=q)
            expected[mode, bits] = reference.losses(reference.evaluation, hook)
    rows = {(r["mode"], r["bits"]): r for r in result["modes"] if r["mode"] != "none"}
    assert rows.keys() == expected.keys()
    for key, losses in expected.items():
        tolerance = 2e-4 if key[1] == 8 else 5e-3  # a code at a tie may fall either way
        assert rows[key]["losses"] == pytest.approx(losses, rel=tolerance), key

        def distance(other: list[float], mine: list[float] = rows[key]["losses"]) -> float:
            return max(abs(a - b) for a, b in zip(mine, other, strict=True))

        # No other mode explains the figures as well.
        others = [distance(v) for k, v in expected.items() if k != key]
        assert 3 * distance(losses) < min(others), key
        difference = sum(a - b for a, b in zip(losses, original, strict=True)) / WINDOWS
        assert rows[key]["loss"] == pytest.approx(math.expm1(difference), abs=10 * tolerance)
        assert rows[key]["execution"] == "fake-quant"
        assert rows[key]["weights"] == "original"
        assert rows[key]["causal"] == (key[0] != "cross_dynamic")
        assert rows[key]["deployable"] == (key[0] == "per_token")
        assert f"A{key[1]}" in rows[key]["name"]


def test_int8_weights_and_the_first_removal_point(llama: Path, texts: tuple[Path, Path]) -> None:
    found = run(llama, texts, bits=(8,))
    hooked = Reference(llama, texts)
    calibration = hooked.inputs(hooked.calibration)
    for linear in hooked.linears.values():
        w = linear.weight.double()
        scale = (w.abs().amax(1, keepdim=True).float() / 127.5).bfloat16().double()
        linear.weight.data = ((w / scale).round().clamp(-128, 127) * scale).float()
    expected = hooked.losses(hooked.evaluation, lambda n, x: None)
    weights_only = found["modes"][1]
    assert weights_only["losses"] == pytest.approx(expected, rel=1e-5)
    assert "INT8" in weights_only["weights"]

    points = found["remove_kernel"]["points"]
    assert [p["requested"] for p in points] == list(PROPORTIONS)
    assert points[0]["perplexity"] == weights_only["perplexity"]
    assert points[0]["removed"] == 0

    thetas = {
        n: torch.cat([(x.abs() / x.abs().amax(1, keepdim=True)).flatten() for x in w]).quantile(0.3)
        for n, w in calibration.items()
    }
    zeros: list[Tensor] = []

    def remove(name: str, x: Tensor) -> Tensor:
        small = x.abs() < thetas[name] * x.abs().amax(-1, keepdim=True)
        if "k_proj" not in name and "v_proj" not in name and "up_proj" not in name:
            zeros.append(small.flatten())
        return torch.where(small, 0.0, x)

    losses = hooked.losses(hooked.evaluation, remove)
    measured = float(torch.cat(zeros).double().mean())
    assert points[2]["proportion"] == pytest.approx(measured, abs=2e-3)
    mean = sum(losses) / len(losses)
    assert math.log(points[2]["perplexity"]) == pytest.approx(mean, rel=2e-3)
    assert math.log(points[2]["perplexity"]) != pytest.approx(sum(expected) / 3, rel=2e-3)
    shares = [p["proportion"] for p in points]
    assert shares == sorted(shares)


# -- files, texts and errors ---------------------------------------------------------------------


def test_files_are_written_whole_and_the_same_each_time(
    llama: Path, texts: tuple[Path, Path], result: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "folder"
    again = run(llama, texts, weights="original", out=target)
    assert again == result
    assert json.loads((target / "analysis.json").read_text()) == result
    assert sorted(p.name for p in target.iterdir()) == ["analysis.html", "analysis.json"]
    page = (target / "analysis.html").read_text()
    assert "A8 CrossQuant 0.15 dynamic, fake-quant" in page
    assert "calibration.txt" in page


def test_one_block_in_memory_at_a_time(
    llama: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: set[int] = set()
    most = 0
    load, free = Shell.load_block, Shell.free_block

    def counted_load(self: Shell, index: int, *args: Any) -> nn.Module:
        nonlocal most
        loaded.add(index)
        most = max(most, len(loaded))
        return load(self, index, *args)

    def counted_free(self: Shell, index: int) -> None:
        loaded.discard(index)
        free(self, index)

    monkeypatch.setattr(Shell, "load_block", counted_load)
    monkeypatch.setattr(Shell, "free_block", counted_free)
    found = run(llama, texts, windows=0)
    assert (most, loaded) == (1, set())
    assert not {"modes", "remove_kernel", "evaluation"} & found.keys()


def test_calibrating_on_the_evaluation_text_is_said(llama: Path, texts: tuple[Path, Path]) -> None:
    found = run(llama, (texts[1], texts[1]), windows=1, bits=(8,), proportions=())
    assert any("evaluation text" in line for line in found["warnings"])
    assert any("no standard errors" in line for line in found["warnings"])
    assert "remove_kernel" not in found
    assert found["modes"][0]["stderr"] is None


@pytest.mark.parametrize("family", ["opt", "mixtral", "qwen2_moe", "phi3", "gemma3_text"])
def test_every_linear_layer_of_other_families_is_counted(
    family: str, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path, family)
    found = run(folder, texts, samples=2, windows=1, bits=(8,), proportions=(0.1,), out=tmp_path)
    seen = [name for row in found["kernel"]["layers"] for name in row["layers"]]
    assert len(seen) == len(set(seen))
    unseen = sum("no calibration token reached" in line for line in found["warnings"])
    config = json.loads((folder / "config.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    routers = ("mlp.gate", "mlp.shared_expert_gate", "block_sparse_moe.gate")
    assert {n for n in dense if not n.endswith(routers)} <= set(seen)
    experts = [n for n in seen if ".experts." in n]
    if family in ("mixtral", "qwen2_moe"):
        count = config.get("num_local_experts") or config["num_experts"]
        sparse = 3 - len(config.get("mlp_only_layers") or [])
        assert len(experts) == 3 * count * sparse or unseen
        assert {"expert gate/up", "expert down"} <= set(found["kernel"]["types"])
    else:
        assert not experts
        assert not unseen
    if family == "opt":
        fc2 = found["kernel"]["types"]["fc2"]
        assert fc2["zeros"] > 0.2  # ReLU; they belong to the kernel
        assert all(k["proportion"] >= fc2["zeros"] for k in fc2["kernel"])
    assert all(math.isfinite(m["perplexity"]) for m in found["modes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (9,)}, "bits: 9"),
        ({"alphas": (1.5,)}, "alpha: 1.5"),
        ({"alpha": -1.0}, "alpha: -1"),
        ({"proportions": (1.5,)}, "proportion 1.5"),
        ({"windows": -1}, "windows -1"),
        ({"length": 5000}, "512 positions"),
        ({"window_length": 5000}, "512 positions"),
        ({"samples": 10**6}, "too short"),
        ({"text": "nothing-here.txt"}, "no such text file"),
        ({"device": "cuda"}, "CUDA"),
    ],
)
def test_bad_input_is_refused_before_work(
    llama: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is there")

    def work(*_: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(Shell, "load_block", work)
    with pytest.raises(InputError, match=message) as raised:
        run(llama, texts, out=tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(InputError, match="taken"):
            run(llama, texts, out=out)
    assert (tmp_path / "taken").read_text() == "mine"


# -- the printed tables --------------------------------------------------------------------------


def printed(result: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_analysis(result, Console(file=stream, width=160))
    return stream.getvalue()


def test_tables_hold_the_figures(result: dict[str, Any]) -> None:
    shown = printed(result)
    model = next(
        k["proportion"]
        for k in result["kernel"]["model"]["kernel"]
        if (k["bits"], k["alpha"]) == (8, 1)
    )
    for part in ("q/k/v", "down", "A4 CrossQuant 0.15", "static, rescaled", f"{100 * model:.2f} %"):
        assert part in shown
    worst = max(result["outliers"], key=lambda r: r["ratio"] or 0)
    assert worst["name"] in shown
    for point in result["remove_kernel"]["points"]:
        assert f"{100 * point['proportion']:.2f} %" in shown


def test_tables_survive_missing_parts_and_odd_names(result: dict[str, Any]) -> None:
    few = {k: v for k, v in result.items() if k not in ("modes", "remove_kernel", "evaluation")}
    assert "Accuracy" not in printed(few)
    odd = result | {
        "evaluation": result["evaluation"] | {"text": "[/b]odd[red]"},
        "warnings": ["[/i] note"],
    }
    assert "[/b]odd[red]" in printed(odd)
    assert "[/i] note" in printed(odd)
