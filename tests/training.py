"""Short runs that train windows of tiny models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.pipelines import custom, run

from crossbit import Recipe

A8, A4 = {"bits": 8, "kind": "per_token"}, {"bits": 4, "kind": "per_token"}
GPTQ = {"start": {"kind": "gptq"}}


def recipe(solver: dict[str, Any] | None = None, **data: Any) -> Recipe:
    """Two epochs of two steps, no evaluation."""
    return custom(
        **{
            "solver": {"kind": "rounding", **(solver or {})},
            "training": {"epochs": 2, "batch": 2},
            "evaluation": {"windows": 0},
            **data,
        }
    )


def train(model: Path, text: Path, out: Path, chosen: Any = None, **options: Any) -> dict[str, Any]:
    result = run(model, text, out, chosen or recipe(), settings=(), **options)
    research = Recipe.load(chosen).research if chosen else False
    assert result["verify"].get("passed", research) is True
    return result


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# All blocks together afterwards, on the logits.
TUNED = recipe(objective={"window": 2, "overlap": 1}, end_to_end={"epochs": 2, "batch": 2})
# Everything at once: overlapping windows, quantized inputs, both targets, logits.
WHOLE = recipe(
    activations=A8,
    objective={"window": 2, "overlap": 1, "homologous": 0.5, "kl": 0.1, "logits": 0.1},
)
