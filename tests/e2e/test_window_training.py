"""Training windows of a real model: what the method promises, on the first blocks of SmolLM2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

import crossbit
from crossbit.models.checkpoint import Checkpoint
from crossbit.models.source import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BLOCKS = 4
FLOAT_ENDS = ["embedding=null", "head=null", "evaluation.windows=0", "calibration.holdout=0.25"]
BLOCKWISE = ["objective.window=1", "objective.overlap=0"]
SHARING = ["objective.window=2", "objective.overlap=1"]
RTN = ["solver.start={kind: rtn, clip: mse}"]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's first blocks, as a model of its own."""
    source = resolve_model("demo").path
    folder = tmp_path_factory.mktemp("beginning") / "model"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text("utf8"))
    config["num_hidden_layers"] = BLOCKS
    for key in ("layer_types",):
        if config.get(key):
            config[key] = config[key][:BLOCKS]
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            shutil.copyfile(path, folder / path.name)
    with Checkpoint(source) as checkpoint:
        later = tuple(f"model.layers.{i}." for i in range(BLOCKS, config["num_hidden_layers"] + 99))
        kept = [n for n in checkpoint.names if not n.startswith(later)]
        save_file({n: checkpoint.tensor(n).clone() for n in kept}, folder / "model.safetensors")
    return folder


def last_error(model: Path, out: Path, seed: int, settings: list[str]) -> float:
    """Held-out loss at the end of the last blocks, against the original model."""
    made = crossbit.quantize(
        str(model),
        "cbq-w4a16",
        out=out,
        samples=48,
        length=512,
        seed=seed,
        settings=[*FLOAT_ENDS, "training.batch=2", *settings],
    )
    assert made["verify"]["passed"] is True
    return float(made["training"][-1]["after"])


@pytest.mark.parametrize("seed", [0, 1])
def test_each_step_of_the_method_helps(beginning: Path, tmp_path: Path, seed: int) -> None:
    """Round to nearest, single blocks, windows that share one: each lowers the error on sequences
    that training did not see, and so does the start from GPTQ's codes.

    From round to nearest, on so little text, single blocks end lower than windows: their order is
    asserted from GPTQ's codes, where the presets start.
    """

    def error(name: str, *settings: str) -> float:
        return last_error(beginning, tmp_path / name, seed, list(settings))

    rounded = error("rounded", *BLOCKWISE, *RTN, "training.epochs=0")
    blockwise = error("blockwise", *BLOCKWISE, *RTN)
    windows = error("windows", *RTN, *SHARING)
    blockwise_from_gptq = error("blockwise-from-gptq", *BLOCKWISE)
    from_gptq = error("from-gptq", *SHARING)
    assert blockwise < 0.95 * rounded
    assert windows < 0.95 * rounded
    assert from_gptq < blockwise_from_gptq
    assert from_gptq < windows
