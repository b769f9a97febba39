"""Recipes of CQE+ and the methods that it plugs into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.pipelines import custom
from tests.training import A4, recipe

import crossbit

FLOAT_ENDS: dict[str, Any] = {"embedding": None, "head": None}
TURN = [{"kind": "smooth", "strength": 0.6}, {"kind": "duquant", "block": 16, "steps": 8}]
DUQUANT: dict[str, Any] = {"activations": A4, "transforms": TURN, **FLOAT_ENDS}
TURNED = custom(**DUQUANT, solver={"kind": "gptq"})
TURNED_AND_TRAINED = recipe(**DUQUANT, cache={"bits": 8}, objective={"window": 2, "overlap": 1})
KEYS = {"kind": "rotate", "residual": False, "heads": False, "keys": True}


def perplexity(folder: Path) -> float:
    found = crossbit.evaluate(str(folder), text="embedded", length=32, windows=2)
    return float(found["perplexity"]["value"])


def cached(cache: dict[str, Any] | None, **data: Any) -> crossbit.Recipe:
    """8 bits of everything else, which lose next to nothing."""
    weights = {"bits": 8, "group": 16, "scale_dtype": "float32"}
    return custom(**{"weights": weights, "cache": cache, **FLOAT_ENDS, **data})
