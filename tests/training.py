"""Short runs that train windows of tiny models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines import custom, run, shorten

from crossbit import Recipe
from crossbit.engine import window
from crossbit.engine.fit import Progress

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


@contextmanager
def interrupted_at(moment: tuple[int, int]) -> Iterator[None]:
    """A run in here is interrupted in the window of that number after so many steps, and saved."""
    tick = window.StateKeeper.tick

    def stop(self: Any, progress: Progress, optimiser: Any) -> None:
        tick(self, progress, optimiser)
        if (self._window.index, progress.done) == moment:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "SAVE_SECONDS", 0.0)
        patch.setattr(window, "SAVE_SHARE", 0)
        patch.setattr(window.StateKeeper, "tick", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def killed_and_resumed(
    moment: tuple[int, int], model: Path, text: Path, out: Path, chosen: Recipe
) -> None:
    """Stop a run in a window after some steps, then go on."""
    with interrupted_at(moment):
        train(model, text, out, chosen)
    assert (out.with_name("out.crossbit-work") / "training.safetensors").exists()
    train(model, text, out, chosen, resume=True)


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def training_of(out: Path) -> list[dict[str, Any]]:
    """What crossbit.json says of the training, without the seconds that it took."""
    rows = json.loads((out / "crossbit.json").read_text("utf8"))["training"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def uninterrupted(out: Path, model: Path, text: Path, chosen: Recipe) -> Path:
    """The folder of a whole run, which leaves the model as it was."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        before = digests(model)
        train(model, text, out, chosen)
        assert digests(model) == before
    return out


# In the metric of the predictions; all blocks together afterwards, on the logits; norms too.
TUNED = recipe(
    objective={"window": 2, "overlap": 1, "metric": "fisher"},
    norms=True,
    end_to_end={"epochs": 2, "batch": 2},
)
# The same with steps alone in the end, from shares of ranges; coarse and with ranges fast enough
# for training to help in every window.
HELD = recipe(
    {"limits": "range", "start": {"kind": "rtn"}},
    weights={"bits": 3, "group": 16, "symmetric": False},
    embedding=None,
    head=None,
    training={"epochs": 2, "batch": 2, "range": 0.1},
    end_to_end={"epochs": 2, "batch": 2, "hold": True, "step": 0.003},
)
# Everything at once: overlapping windows, quantized inputs, both targets, logits.
WHOLE = recipe(
    activations=A8,
    objective={"window": 2, "overlap": 1, "homologous": 0.5, "kl": 0.1, "logits": 0.1},
)
# Windows 0, 01, 12, 2 of three blocks: the first hardens nothing, two end at the last block. Both
# targets, half of the sequences look ahead; from a start that training improves in every window.
EXPANDING = recipe(
    {"start": {"kind": "rtn"}},
    activations=A8,
    objective={
        "window": 1,
        "overlap": 0,
        "expand": "ends",
        "largest": 2,
        "homologous": 0.5,
        "ahead": [1.0, 0.5],
        "ahead_share": 0.5,
    },
)
