"""Proof that a quantized folder is what was evaluated, and that another library reads it so.

Each check is a row with a measured value and its bound:

    tensors   every stored tensor has the digest recorded when the model was evaluated
    files     so has every other recorded file (config.json and the like)
    reload    transformers loads the folder with nothing missing, unexpected or mismatched
    weights   its dequantized weights equal codes x scale of our own reader, bit for bit
    layers    given the same input, its linear layers give what ours give
    logits    its float32 eager logits are those of our own model
    recorded  they are also the ones recorded at evaluation

Research and online folders do something at run time that only crossbit does: there our own model is
compared with the record, and transformers must refuse the folder (row "refused").

Ours is run block by block. The other library's is in memory as it is stored, and its layers are
made dense, compared and dropped as the forward pass reaches them (but not where it can only
make all of them dense while it loads: packed integers with zero points).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from crossbit.device import check_device
from crossbit.engine.progress import release_memory
from crossbit.errors import InputError
from crossbit.export.comparison import Check, LayerComparison, compare_experts, some
from crossbit.export.fingerprint import tensor_sha256
from crossbit.export.reader import QuantizedCheckpoint
from crossbit.export.reload import dense_in_turn, reload_model, rounds_inputs
from crossbit.export.research import is_research
from crossbit.models.quiet import quiet_transformers
from crossbit.models.validate import read_config
from crossbit.products import widened_products
from crossbit.runtime.loader import open_blocks

RECORD_FILE = "crossbit.json"
RECORD_KEY = "verify"
LOGITS_BOUND = 1e-4  # largest difference in standard deviations of the logits
# Float sums differ between processors; a quantized input may then round to the neighbouring code.
RECORDED_BOUND = {False: 1e-4, True: 5e-2}
_SKETCH_POSITIONS, _SKETCH_TOKENS = 32, 8


@dataclass(frozen=True)
class VerifyReport:
    """All rows, in the order they were checked."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class VerifyRecord:
    """What crossbit.json says about the evaluated model.

    Attributes:
        tensors: stored tensor name -> digest.
        token_ids: real text that the logits are compared on.
        files: other file name -> SHA-256 of its bytes.
        logits: see ``sketch_logits``; None if not recorded.
    """

    tensors: dict[str, str]
    token_ids: list[int]
    files: dict[str, str] = field(default_factory=dict)
    logits: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The value of the key "verify" in crossbit.json."""
        return asdict(self)


@widened_products()
def verify(folder: Path | str, *, device: str = "cpu") -> VerifyReport:
    """Check a folder that ``quantize`` wrote.

    Args:
        folder: the quantized folder with its crossbit.json.
        device: where the models run.

    Returns:
        The report; a check that fails is a row in it, not an exception.

    Raises:
        InputError: no such folder, no record in it, or a folder that our own reader refuses.
    """
    folder = Path(folder)
    check_device(device)
    record = read_record(folder)
    checkpoint = QuantizedCheckpoint(folder)
    checks = [check_tensors(checkpoint, record.tensors), check_files(folder, record.files)]
    ids = torch.tensor([record.token_ids], dtype=torch.long)
    try:
        own = own_logits(folder, ids, device)
    except InputError as error:
        if all(check.passed for check in checks):
            raise
        # The changes found above broke the model; they are the news.
        checks.append(Check("open", False, None, None, str(error)))
        return VerifyReport(folder, tuple(checks))
    if is_research(read_config(folder)):
        checks.append(check_refused(folder))
        if record.logits is not None:
            checks.append(check_recorded(own, record.logits, True))
        return VerifyReport(folder, tuple(checks))
    model, reloaded = reload_model(folder, checkpoint, device)
    checks.append(reloaded)
    if model is not None:
        comparison = LayerComparison(model, checkpoint)
        # dense_in_turn after the comparison, whose hooks must see a layer before it is dropped.
        with comparison, quiet_transformers(), dense_in_turn(model), torch.no_grad():
            logits = model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()
        compare_experts(model, checkpoint, comparison)
        checks += comparison.rows()
        checks.append(check_logits(logits, own))
        if record.logits is not None:
            checks.append(check_recorded(logits, record.logits, rounds_inputs(checkpoint)))
    return VerifyReport(folder, tuple(checks))


# -- the record -----------------------------------------------------------------------------------


def read_record(folder: Path) -> VerifyRecord:
    """The record of a folder.

    Raises:
        InputError: no folder, no crossbit.json, or no usable record in it.
    """
    path = folder / RECORD_FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that 'crossbit quantize' wrote")
    if not path.is_file():
        raise InputError(
            f"{folder}: no {RECORD_FILE}; give a folder that 'crossbit quantize' wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = content[RECORD_KEY]
        result = VerifyRecord(
            tensors={str(k): str(v) for k, v in record["tensors"].items()},
            token_ids=[int(token) for token in record["token_ids"]],
            files={str(k): str(v) for k, v in (record.get("files") or {}).items()},
            logits=record.get("logits"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: no usable {RECORD_KEY!r} record ({type(error).__name__}: {error}); "
            "quantize the model again"
        ) from error
    if not result.tensors or len(result.token_ids) < 2 or min(result.token_ids) < 0:
        raise InputError(f"{path}: the {RECORD_KEY!r} record is empty; quantize the model again")
    return result


def file_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of small files of a folder, by name."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def sketch_logits(logits: Tensor) -> dict[str, Any]:
    """A small part of the logits [T, V] that identifies them: the largest at spread positions.

    Returns:
        std (of all), positions [P], tokens [P][k] and values [P][k].
    """
    count = min(_SKETCH_POSITIONS, logits.shape[0])
    positions = torch.linspace(0, logits.shape[0] - 1, count).round().long()
    values, tokens = logits[positions].float().topk(min(_SKETCH_TOKENS, logits.shape[1]), dim=-1)
    return {
        "std": float(logits.float().std()),
        "positions": positions.tolist(),
        "tokens": tokens.tolist(),
        "values": values.tolist(),
    }


# -- checks of the files --------------------------------------------------------------------------


def check_tensors(checkpoint: QuantizedCheckpoint, expected: Mapping[str, str]) -> Check:
    """Every stored tensor is recorded, and has the recorded digest; the value counts the others."""
    stored = checkpoint.stored
    changed = [
        name
        for name in stored.names
        if tensor_sha256(name, stored.tensor(name)) != expected.get(name)
    ]
    missing = sorted(set(expected) - set(stored.names))
    wrong = changed + missing
    detail = f"{len(stored.names)} tensors" if not wrong else f"differ: {some(wrong)}"
    return Check("tensors", not wrong, len(wrong), 0, detail)


def check_files(folder: Path, expected: Mapping[str, str]) -> Check:
    """Every recorded file is there with the recorded bytes; the value counts the others."""
    wrong = [
        name
        for name, digest in sorted(expected.items())
        if not (folder / name).is_file() or file_digests(folder, [name])[name] != digest
    ]
    detail = f"{len(expected)} files" if not wrong else f"differ: {some(wrong)}"
    return Check("files", not wrong, len(wrong), 0, detail)


# -- the two models -------------------------------------------------------------------------------


def own_logits(folder: Path, ids: Tensor, device: str) -> Tensor:
    """Float32 eager logits [T, V] of our own model on token ids [1, T]."""
    source = open_blocks(folder, dtype=torch.float32, attn="eager", device=device, execution="fake")
    vocabulary = int(source.shell.model.get_input_embeddings().weight.shape[0])
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"{folder / RECORD_FILE}: token {int(ids.max())} is outside the vocabulary of "
            f"{vocabulary}; the record belongs to another model"
        )
    with torch.no_grad():
        logits: Tensor = source.shell.logits(source.hidden(ids, batch=1))[0].float().cpu()
    del source
    release_memory()  # another model follows
    return logits


def check_refused(folder: Path) -> Check:
    """A folder that only crossbit loads must not load as something else in transformers."""
    try:
        with quiet_transformers():
            transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        detail = f"loads in crossbit only; transformers refuses it ({type(error).__name__})"
        return Check("refused", True, None, None, detail)
    return Check("refused", False, None, None, "transformers opens it, and knows no part of it")


# -- logits ---------------------------------------------------------------------------------------


def check_logits(theirs: Tensor, ours: Tensor) -> Check:
    """Largest difference of logits [T, V] in standard deviations of ours."""
    if theirs.shape != ours.shape:
        detail = f"shapes {list(theirs.shape)} and {list(ours.shape)}"
        return Check("logits", False, None, LOGITS_BOUND, detail)
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True))
    # max() of Python drops NaN: a model that gives NaN must not pass.
    finite = bool(torch.isfinite(theirs).all()) and bool(torch.isfinite(ours).all())
    value = largest / float(ours.std()) if finite else float("nan")
    detail = f"{ours.shape[0]} tokens, float32 eager, largest difference in standard deviations"
    return Check("logits", value <= LOGITS_BOUND, value, LOGITS_BOUND, detail)


def check_recorded(theirs: Tensor, sketch: Mapping[str, Any], rounds: bool) -> Check:
    """Root mean square difference from the recorded part, in standard deviations.

    Args:
        theirs: logits [T, V].
        sketch: see ``sketch_logits``.
        rounds: the model quantizes inputs, so another processor may flip single codes.
    """
    bound = RECORDED_BOUND[rounds]
    try:
        positions = torch.tensor(sketch["positions"], dtype=torch.long)
        tokens = torch.tensor(sketch["tokens"], dtype=torch.long)
        values = torch.tensor(sketch["values"], dtype=torch.float64)
        found = theirs[positions].gather(1, tokens).double()
        value = float((found - values).square().mean().sqrt()) / float(sketch["std"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        detail = f"the recorded logits do not fit the model ({type(error).__name__})"
        return Check("recorded", False, None, bound, detail)
    detail = f"{values.numel()} logits recorded at evaluation, root mean square difference"
    return Check("recorded", value <= bound, value, bound, detail)
