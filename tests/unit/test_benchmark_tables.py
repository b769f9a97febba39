"""What the tables compute beyond what is stored."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from benchmarks.probe import TABLE
from benchmarks.tables_cqe import plug_in, probes, reduction
from benchmarks.tables_low_bits import headline, low_bits


def test_a_reduction_is_of_the_loss() -> None:
    """Perplexities 10, 20 and 15: a loss of 100 % becomes 50 %; windows alike have no error."""
    original, base, other = ([math.log(value)] * 4 for value in (10.0, 20.0, 15.0))
    found = reduction(base, other, original)
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(0, abs=1e-9)


def test_its_error_is_that_of_windows_drawn_again() -> None:
    """Against the standard deviation of the same figure over resampled windows."""
    count, generator = 200, random.Random(0)
    original = [2 + generator.gauss(0, 0.3) for _ in range(count)]
    base = [value + 0.5 + generator.gauss(0, 0.1) for value in original]
    other = [value + 0.3 + generator.gauss(0, 0.1) for value in original]
    found = reduction(base, other, original)
    again = []
    for _ in range(400):
        drawn = [generator.randrange(count) for _ in range(count)]
        rows = ([row[n] for n in drawn] for row in (base, other, original))
        again.append(_share(*rows))
    mean = sum(again) / len(again)
    spread = math.sqrt(sum((value - mean) ** 2 for value in again) / len(again))
    assert found.value == pytest.approx(_share(base, other, original))
    assert found.stderr == pytest.approx(spread, rel=0.15)


def _share(base: list[float], other: list[float], original: list[float]) -> float:
    losses = [math.exp((sum(row) - sum(original)) / len(original)) - 1 for row in (base, other)]
    return 1 - losses[1] / losses[0]


def test_bases_are_paired_by_seed() -> None:
    row = {"losses": [2.0, 3.0], "kind": "online"}
    results: dict[str, dict[str, Any]] = {
        "demo-original-40": {"losses": [1.0, 1.5]},
        "cqe-omniquant-w4a4-seed0": row,
        "cqe-omniquant-w4a4+sde+cl-seed0": {"losses": [1.5, 2.0]},
        "cqe-duquant-w4a4-seed1": row,
    }
    lines = [line for line in plug_in(results) if line.startswith("| omniquant-w4a4")]
    assert len(lines) == 1
    assert lines[0].startswith("| omniquant-w4a4+sde+cl | online | 0 |")
    assert lines[0].endswith("| yes |")
    assert not any("duquant" in line for line in plug_in(results))
    assert plug_in({}) == []


def test_probes_stand_by_their_bases() -> None:
    """Base by base, the least loss first; nothing where nothing was tried."""
    tried = {"a": ("x-w4a4+cl", 1.3), "b": ("x-w4a4", 1.4), "c": ("a-w4a4", 1.9)}
    results: dict[str, dict[str, Any]] = {
        f"probe-{name}": {
            "row": f"{recipe} training.step=0",
            "kind": "online" if name == "c" else "plain",
            "seed": 0,
            "losses": [loss, loss + 0.1],
            "cpu_seconds": 60.0,
        }
        for name, (recipe, loss) in tried.items()
    }
    assert probes(results) == []
    results[TABLE.original] = {"losses": [1.0, 1.2]}
    rows = [line for line in probes(results) if "training.step" in line]
    assert [row.split()[1] for row in rows] == ["a-w4a4", "x-w4a4+cl", "x-w4a4"]
    assert [row.split("|")[2].strip() for row in rows] == ["online", "plain", "plain"]
    assert probes({TABLE.original: results[TABLE.original]}) == []


def test_low_bits_stand_in_one_table() -> None:
    """CBQ and peers as they are stored; of CQE+ the presets and add-ons of seed 0, no changes."""
    about: dict[str, Any] = {"samples": 64, "length": 512, "seconds": 1.0, "peak_rss": 1e6}
    cqe = {**about, "perplexity": 5.0, "losses": [2.0, 3.0], "kind": "online", "windows": [{}]}
    results: dict[str, dict[str, Any]] = {
        "demo-original-40": {"losses": [1.0, 1.5]},
        "low-bits-w4a4-g64-ours-cbq-64x512": {
            **about,
            "setting": "w4a4-g64",
            "method": "ours-cbq",
            "perplexity": 9.0,
            "windows": 40,
            "loss": 40.0,
            "loss_stderr": 0.1,
            "bits_per_weight": 4.25,
        },
        "cqe-duquant-w4a4-seed0": cqe,
        "cqe-duquant-w4a4-seed1": cqe,
        "cqe-omniquant-w2a16-band-8-seed0": cqe,
    }
    lines = [line for line in low_bits(results) if line.startswith("| W")]
    assert [line.split("|")[2].strip() for line in lines] == ["duquant-w4a4 (online)", "ours-cbq"]
    assert f"{100 * (math.exp(1.25) - 1):+.2f} %" in lines[0]
    assert "| 4.25 |" in lines[1]
    assert low_bits({"demo-original-40": {"losses": [1.0, 1.5]}}) == []


def test_the_headline_is_the_least_loss_of_each_side_and_kind() -> None:
    """From the same tokens; what a row is made with can be typed."""

    def row(method: str, loss: float, samples: int = 64, kind: str = "plain") -> dict[str, Any]:
        return {
            "setting": "w4a4-g64",
            "method": method,
            "kind": kind,
            "samples": samples,
            "length": 512,
            "loss": loss,
            "loss_stderr": 0.01,
            "losses": [2.0, 3.0],
        }

    made = [
        row("ours-cbq", 2.0),
        row("ours-quarot", 3.0, kind="online"),
        row("ours-best", 1.0, samples=128, kind="online"),
        row("autoround", 9.0),
        row("llmcompressor-gptq", 8.0),
        row("ours-rtn", 50.0, samples=1),
    ]
    results = {f"low-bits-{n}": r for n, r in enumerate(made)}
    assert headline(results) == []
    results["demo-original-40"] = {"losses": [1.0, 1.5]}
    lines = [line for line in headline(results) if line.startswith("| W")]
    peer = "llmcompressor-gptq | +800.0 % +- 1.0 | +5000.0 % |"
    assert lines == [
        f"| W4A4 | `cbq-w4a4` | plain | +200.0 % +- 1.0 | {peer}",
        f"| W4A4 | `quarot-w4a4` | online | +300.0 % +- 1.0 | {peer}",
    ]
    row_of_cqe = row("", 0, kind="online") | {"losses": [1.1, 1.6]}
    results["cqe-duquant-w4a4+cl-half-ahead-seed0"] = row_of_cqe
    shown = headline(results)[-2]
    assert shown.startswith("| W4A4 | `duquant-w4a4+cl --set training.epochs=4 --set ")
    assert " --set objective.ahead_share=0.5` | online | +10.5 % " in shown
    for method, wanted in {
        "cbq-no-overlap-e2e-hold": "cbq-w3a16-e2e",
        "gptq": "gptq-w4a16-g64 --set weights.bits=3 --set weights.group=64 "
        "--set weights.symmetric=false",
    }.items():
        results["low-bits-w3"] = row(f"ours-{method}", 1.0) | {"setting": "w3a16"}
        assert any(f"| `{wanted}` | plain | +100.0 % " in line for line in headline(results))
