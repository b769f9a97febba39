"""Report pages and the model card: what they say, what they must not, and bad results."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crossbit.activations.kernel import KernelStats
from crossbit.errors import WorkError
from crossbit.report import plots
from crossbit.report.html import render_analysis, render_report, write_analysis, write_report
from crossbit.report.model_card import model_card

ROLES = ["q_proj", "down_proj"]


def full_result() -> dict[str, Any]:
    layers = [
        {
            "name": f"model.layers.{b}.{r}",
            "role": r,
            "block": b,
            "bits": 8,
            "group_size": None,
            "solver": "rtn",
            "weight_error": 1e-4 * (b + 1),
            "output_error": 2e-4 * (b + 1),
            "alpha": 0.5,
            "seconds": 0.25,
        }
        for b in range(3)
        for r in ROLES
    ]
    return {
        "crossbit": "0.1.0",
        "kind": "plain",
        "model": {
            "name": "Tiny",
            "origin": "owner/tiny",
            "note": "a note",
            "source_bytes": 300_000_000,
            "parameters": 135_000_000,
            "fingerprint": "f" * 64,
        },
        "recipe": {
            "name": "crossquant-w8a8",
            "summary": "CrossQuant, folded",
            "weights": {"bits": 8, "symmetric": True, "group": "channel"},
            "activations": {"bits": 8, "kind": "cross_folded"},
            "transforms": [{"kind": "cross_fold"}],
            "solver": {"kind": "rtn"},
            "embedding": {"bits": 8, "group": "channel"},
            "overrides": [{"match": "down_proj"}],
            "ignore": ["lm_head"],
        },
        "calibration": {"name": "calib", "samples": 64, "length": 1024, "seed": 0, "sha256": "ab"},
        "prefix": {"tokens": [46, 198, 1], "text": ".\n<s>"},
        "size": {
            "file_bytes": 150_000_000,
            "bytes_per_parameter": 1.11,
            "source_bytes": 300_000_000,
            "larger_than_source": False,
            "embedding": "int8 rows",
        },
        "evaluation": {
            "text": "wikitext2",
            "length": 2048,
            "windows": 40,
            "dtype": "float32",
            "path": "exported integers",
            "original": {"perplexity": 20.0, "stderr": 0.7},
            "quantized": {"perplexity": 20.1, "stderr": 0.7},
            "paired": {"loss": 0.0052, "stderr": 0.0004},
        },
        "verify": {
            "passed": True,
            "checks": [
                {"name": "codes", "passed": True, "value": 0, "bound": 0, "detail": "equal"},
                {"name": "logits", "passed": True, "value": 2e-6, "bound": 1e-4, "detail": "512"},
            ],
        },
        "layers": layers,
        "blocks": [{"block": b, "relative_error": 0.01 * (b + 1)} for b in range(3)],
        "alpha": {
            "chosen": {r["name"]: r["alpha"] for r in layers},
            "fixed": {"0.15": 0.02, "0.5": 0.006, "1": 0.03},
            "searched": 0.005,
        },
        "time": {"total": 432.0, "stages": {"blocks": 300.0, "verify": 132.0}},
        "memory": {"peak_rss": 1.9e9},
        "warnings": ["same domain"],
    }


def full_analysis() -> dict[str, Any]:
    stats = KernelStats(
        [(b, a, r) for b in (8, 4) for a in (0.15, 0.5, 1.0) for r in (False, True)]
    )
    types = {}
    for b in range(3):
        for k, role in enumerate(ROLES):
            g = torch.Generator().manual_seed(10 * b + k)
            x = torch.randn(20, 16, generator=g)
            x[:, 2] *= 30
            stats.update(f"layers.{b}.{role}", x)
            types[f"layers.{b}.{role}"] = role
    return {
        "model": {"name": "Tiny"},
        "calibration": {"name": "calib", "samples": 2, "length": 10},
        "kernel": {
            "layers": [
                {"name": n, "role": types[n], "block": int(n.split(".")[1]), **c.as_dict()}
                for n, c in stats.layers.items()
            ],
            "types": {t: c.as_dict() for t, c in stats.by_type(types).items()},
            "model": stats.total().as_dict(),
        },
        "modes": [
            {"name": "dynamic", "bits": 8, "causal": False, "deployable": False, "perplexity": 9.87}
        ],
        "evaluation": {"text": "wikitext2", "windows": 2, "length": 64},
        "remove_kernel": {
            "points": [
                {"proportion": p, "perplexity": 20 + 30 * p**2, "stderr": 0.1, "loss": 1.5 * p**2}
                for p in (0.0, 0.1, 0.2)
            ],
            "original": {"perplexity": 20.0, "stderr": 0.1},
            "threshold": 0.0816,
            "tolerance": 0.01,
            "weights": "INT8",
        },
        "outliers": [
            {
                "name": n,
                "role": r,
                "block": int(n.split(".")[1]),
                "ratio": 30.0,
                "ratio_without_massive": 9.0,
                "kurtosis": 12.0,
                "massive_positions": {"0": 2},
            }
            for n, r in types.items()
        ],
        "warnings": ["few windows"],
    }


class Page(HTMLParser):
    """Text outside style and script, tag balance, and every address the page mentions."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.words.append(data)


def card(result: dict[str, Any]) -> str:
    return model_card(result, licence=None, base_model="a/b")


RENDER: list[tuple[Callable[..., str], Callable[[], dict[str, Any]]]] = [
    (render_report, full_result),
    (render_analysis, full_analysis),
]


@pytest.mark.parametrize(("render", "make"), RENDER)
def test_page_is_whole_self_contained_and_deterministic(
    render: Callable[..., str], make: Callable[[], dict[str, Any]]
) -> None:
    page = render(make())
    assert page == render(make())
    parsed = Page(page)
    assert all(a.startswith("#") for a in parsed.addresses)
    without_names = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\((?!#)|@import", without_names)
    assert "default-src 'none'" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    for target in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page):
        assert "".join(target) in ids
    assert "None" not in parsed.text
    assert "nan" not in parsed.text.lower().split()


def test_report_states_the_headline_and_its_conditions() -> None:
    page = Page(render_report(full_result())).text
    for words in (
        "2.00 times smaller",
        "300 MB → 150 MB",
        "+0.52 ± 0.04 %",
        "20.00 → 20.10",
        "wikitext2",
        "40, not overlapping",
        "2048 tokens",
        "exported integers",
        "2 checks",
        "crossquant-w8a8",
        "column factors folded into the weights",
        "lm_head",
        "64 sequences of 1024 tokens, seed 0",
        "7 min 12 s",
        "1.9 GB",
        "same domain",
        "model.layers.2.down_proj",
    ):
        assert words in page, words
    for words in ("LARGER", "Research result", "Simulated", "not run", "FAILED"):
        assert words not in page, words
    assert "no difference beyond" not in page
    assert len(re.findall("<svg", render_report(full_result()))) == 3


@pytest.mark.parametrize("render", [lambda r: Page(render_report(r)).text, card])
def test_the_tokens_of_a_prefix_are_told(render: Callable[[dict[str, Any]], str]) -> None:
    said = render(full_result()).replace("\\", "").replace("&lt;", "<").replace("&gt;", ">")
    assert "'.n<s>', token ids 46, 198, 1: before every text" in said
    words = "before the quantized model's windows only; the original has none"
    assert words in said.replace("&#39;", "'")
    result = full_result()
    result["prefix"]["text"] = None
    assert "token ids 46, 198, 1: before" in render(result)
    assert "None" not in render(result)
    result["prefix"] = None
    assert "before every text" not in render(result)
    assert "the original has none" not in render(result)


def test_columns_of_cfp_are_shown_where_it_ran() -> None:
    result = full_result()
    page = render_report(result)
    assert "Channels scaled" not in page
    assert "Weights truncated" not in page
    result["layers"][0]["truncated"] = 0.0125
    page = render_report(result)
    assert "Channels scaled" not in page
    assert "Weights truncated" in page
    assert 'data-v="0.0125"' in page


def changed(path: str, value: Any) -> dict[str, Any]:
    result = full_result()
    *parents, last = path.split(".")
    node = result
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("size.file_bytes", 330_000_000, "LARGER: 1.10 times"),
        ("kind", "research", "Research result."),
        ("kind", "research", "loaded again by crossbit's own loader"),
        ("kind", "online", "Online result."),
        ("kind", "online", "loads in crossbit and nowhere else"),
        ("kind", "online", "loaded again by crossbit's own loader"),
        ("verify", {"tensors": {"a": "b"}, "token_ids": [1, 2]}, "Not run."),
        ("evaluation.path", "fake-quant", "Simulated."),
        ("verify", None, "Not run."),
        ("verify", {"passed": False, "checks": [{"name": "codes", "passed": False}]}, "FAILED"),
        ("verify", {"passed": True}, "the single checks are not recorded"),
        ("evaluation", None, "not evaluated"),
        ("evaluation.paired", None, "no standard error is known"),
        ("evaluation.paired.stderr", math.nan, "no standard error is known"),
        ("evaluation.paired.stderr", 0.004, "no difference beyond two standard errors"),
        ("evaluation.paired.loss", math.inf, "The quantized model is broken."),
        ("evaluation.paired.loss", -0.0052, "-0.52 ± 0.04 %"),
    ],
)
def test_report_says_what_a_sceptic_must_know(path: str, value: Any, words: str) -> None:
    assert words not in Page(render_report(full_result())).text
    assert words in Page(render_report(changed(path, value))).text


def all_paths(node: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        keys: list[Any] = list(node)
    elif isinstance(node, list):
        keys = list(range(min(len(node), 2)))
    else:
        return []
    found = [(*prefix, k) for k in keys]
    return found + [p for k in keys for p in all_paths(node[k], (*prefix, k))]


@pytest.mark.parametrize(("render", "make"), RENDER)
def test_every_key_may_be_absent_or_of_another_type(
    render: Callable[..., str], make: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The figures' inputs are still prepared; only drawing, which is slow, is left out.
    monkeypatch.setattr(plots, "_svg", lambda name, title, draw, size=(1, 1): "<svg></svg>")
    whole = make()
    assert Page(render({})).text
    others: list[Any] = [None, "text", [], math.nan, {}, True]
    for k, path in enumerate(all_paths(whole)):
        for change in ("absent", others[k % len(others)]):
            result = copy.deepcopy(whole)
            node: Any = result
            for key in path[:-1]:
                node = node[key]
            if change == "absent":
                del node[path[-1]]
            else:
                node[path[-1]] = change
            assert Page(render(result)).text, path
            assert parts(model_card(result, licence=None, base_model="a/b"))[1], path


def test_text_from_the_result_is_escaped() -> None:
    attack = "<script>alert(1)</script>\"'&"
    result = full_result()
    result["model"]["name"] = attack
    result["warnings"] = [attack]
    result["layers"][0]["name"] = attack
    result["layers"][0]["role"] = attack
    result["alpha"]["chosen"] = {attack: 0.5}
    result["alpha"]["loss_label"] = attack
    result["recipe"]["name"] = attack
    analysis = full_analysis()
    analysis["kernel"]["layers"][0]["role"] = attack
    analysis["model"]["name"] = attack
    for page in (render_report(result), render_analysis(analysis)):
        assert page.count("<script>") == 1
        assert "alert(1)" in Page(page).text
    card = model_card(result, licence=attack, base_model=attack)
    assert "<script>" not in card.split("---", 2)[2].replace("\\<", "")


def test_layer_table_sorts_by_value_not_by_what_is_shown() -> None:
    page = render_report(full_result())
    assert 'data-v="0.00030000000000000003"' in page
    assert re.search(r'data-v=""', page)  # no group size: sorted last


def test_write_replaces_whole_files_or_fails_with_one_line(tmp_path: Path) -> None:
    assert write_report(full_result(), tmp_path) == tmp_path / "report.html"
    assert write_analysis(full_analysis(), tmp_path / "a.html") == tmp_path / "a.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "report.html"]
    assert (tmp_path / "report.html").read_text("utf8") == render_report(full_result())
    with pytest.raises(WorkError, match=r"absent.*cannot be written") as failure:
        write_report(full_result(), tmp_path / "absent" / "r.html")
    assert "\n" not in str(failure.value)


# ---- model card


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_model_card_front_matter_and_body() -> None:
    front, body = parts(model_card(full_result(), licence="Apache-2.0", base_model="owner/tiny"))
    assert front == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["crossbit", "compressed-tensors", "quantized", "W8A8"],
        "license": "apache-2.0",
    }
    for words in (
        "2.00 times smaller",
        "**0.52 %** ± 0.04 %",
        "wikitext2; 40 windows of 2048 tokens, not overlapping",
        "exported integers",
        "2 checks",
        "vllm serve",
        "AutoModelForCausalLM",
        "same domain",
    ):
        assert words in body, words
    assert "\n\n\n" not in body
    assert "| original | 20.000 | 0.70 |" in body


def test_model_card_hides_local_paths_and_admits_what_is_unknown() -> None:
    for path in ("/home/someone/models/tiny", "./models/tiny/", "C:\\models\\tiny"):
        front, body = parts(model_card({}, licence=None, base_model=path))
        assert "base_model" not in front
        assert "license" not in front
        assert "someone" not in body
        assert "models" not in body.split("## How")[0]
        assert "# tiny" in body
    assert "Not evaluated" in body
    assert "was not run" in body
    front, _ = parts(model_card({}, licence="My Own Licence", base_model="a/b"))
    assert front["license"] == "other"
    assert front["license_name"] == "My Own Licence"


@pytest.mark.parametrize("kind", ["online", "research"])
def test_what_only_crossbit_loads_is_not_claimed_elsewhere(kind: str) -> None:
    """Neither page nor card: that of a plain result does say where it loads."""
    result = changed("kind", kind)
    result["recipe"]["weights"]["symmetric"] = False
    front, body = parts(model_card(result, licence=None, base_model="a/b"))
    assert front["library_name"] == "crossbit"
    assert front["tags"] == ["crossbit", "quantized", "W8A8"]
    page = Page(render_report(result)).text
    for words in (
        *("transformers", "vllm", "vLLM", "AutoModelForCausalLM", "a runtime that ignores"),
        *("compressed-tensors", "of the readers"),
    ):
        assert words not in body, words
        assert words not in page, words
    assert f"**{kind.capitalize()} result:**" in body
    assert f"{kind.capitalize()} result." in page
    assert "crossbit generate DIR" in body
    assert "loaded this folder in crossbit and found it" in body
    assert "\n\n\n" not in body
    # An online result is executed, not simulated.
    for told, simulated in ((body, "not of integer execution"), (page, "was simulated")):
        assert (simulated in told) is (kind == "research")
    _, plain = parts(model_card(full_result(), licence=None, base_model="a/b"))
    assert "vLLM" in plain
    assert "in transformers and found it" in plain
    assert "transformers" in Page(render_report(full_result())).text


def test_model_card_labels_research_failure_and_growth() -> None:
    body = model_card(changed("kind", "research"), licence=None, base_model="a/b")
    assert "**Research result:**" in body
    assert "not of integer execution" in body
    bad = model_card(changed("verify.passed", False), licence=None, base_model="a/b")
    assert "verify` failed" in bad
    larger = model_card(changed("size.file_bytes", 600_000_000), licence=None, base_model="a/b")
    assert "larger than its source" in larger
