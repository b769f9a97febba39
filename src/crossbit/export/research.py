"""Folders of research and online recipes: integers on disk, and what only crossbit executes.

Their config.json says ``model_type: crossbit``, which every other reader refuses at once; the
model's own config (with the quantization_config of the weights), the activation grids and the
run-time operations stand inside. Unknown quantization methods would not do: readers skip them with
a warning and load the codes as if they were weights.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from crossbit.activations.grid import ActivationGrid
from crossbit.errors import InputError
from crossbit.models.validate import read_config

MODEL_TYPE = "crossbit"
COLUMNS = "input_columns"  # calibrated column maxima, float32 [K]
ROTATION = "input_rotation_"  # and "first", "permutation", "second" of a DuRotation
CLIP = "input_clip"  # factor of the row maximum, float32 [1]


def wrap(
    config: dict[str, Any],
    activations: dict[str, ActivationGrid],
    kind: str = "research",
    online: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a folder that only crossbit runs.

    Args:
        config: the model's config, quantization_config included.
        activations: module name in the file -> grid of its input.
        kind: "research", or "online" where all but the run-time operations is plain.
        online: those (``runtime.online.Online.to_json``).
    """
    kinds: list[ActivationGrid] = []
    for grid in activations.values():
        if grid not in kinds:
            kinds.append(grid)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["CrossbitResearchModel"],
        "crossbit_kind": kind,
        "crossbit_config": config,
        "crossbit_online": online or {},
        "crossbit_activation_grids": [asdict(grid) for grid in kinds],
        "crossbit_activations": {n: kinds.index(g) for n, g in sorted(activations.items())},
    }


def is_research(config: dict[str, Any]) -> bool:
    """True for the config.json of a folder that only crossbit runs: research or online."""
    return config.get("model_type") == MODEL_TYPE


def model_config(folder: Path) -> dict[str, Any]:
    """The model's own config.json content, research and online folders unwrapped.

    Raises:
        InputError: no readable config.
    """
    config = read_config(folder)
    if not is_research(config):
        return config
    inner = config.get("crossbit_config")
    if not isinstance(inner, dict):
        raise InputError(f"{folder / 'config.json'}: damaged, crossbit_config is missing")
    return inner


def online_content(folder: Path) -> dict[str, Any]:
    """What happens at run time, as ``wrap`` was given it; empty for other folders."""
    config = read_config(folder)
    if not is_research(config):
        return {}
    found = config.get("crossbit_online", {})
    lacks = not found and config.get("crossbit_kind") == "online"
    return found if isinstance(found, dict) and not lacks else {"damaged": found}


def activation_grids(folder: Path) -> dict[str, ActivationGrid]:
    """Module name in the file -> grid of its input; empty for other folders."""
    config = read_config(folder)
    if not is_research(config):
        return {}
    try:
        grids = [ActivationGrid(**fields) for fields in config["crossbit_activation_grids"]]
        return {name: grids[i] for name, i in config["crossbit_activations"].items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise InputError(f"{folder / 'config.json'}: damaged activation grids") from None
