"""``crossbit analyze``: quantization kernels, outliers, activation modes, the removal experiment.

One pass over the blocks: each is loaded once, the calibration text runs through it and is
observed, then every variant of the model runs through it on the evaluation text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import crossbit
from crossbit.analysis.inputs import layer_inputs, watching
from crossbit.analysis.modes import ORIGINAL, WEIGHTS_ONLY, Mode, accuracy_modes
from crossbit.analysis.observe import Observer, kernel_settings
from crossbit.analysis.removal import (
    PROPORTIONS,
    check_proportions,
    removal_curve,
    removal_point,
)
from crossbit.analysis.streams import Remove, Stream, advance, losses
from crossbit.analysis.table import print_analysis as print_analysis
from crossbit.cache import atomic_write
from crossbit.corpora import Corpus, calibration_windows, evaluation_windows, load_text
from crossbit.device import check_device
from crossbit.engine.progress import Reporter
from crossbit.errors import InputError, WorkError
from crossbit.models.checkpoint import Checkpoint, check_finite
from crossbit.models.families import needs_bos
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.shell import Shell
from crossbit.models.source import ModelFolder, resolve_model
from crossbit.positions import check_length
from crossbit.products import widened_products
from crossbit.report.html import write_analysis
from crossbit.run import evaluation_length
from crossbit.runtime.loader import BlockSource, own_dtype

KERNEL_BITS = (8, 6, 4)  # counted besides the widths of the accuracy table
ALPHAS = (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
PAPER_ALPHA = 0.15
WINDOW_LENGTH = 2048


@dataclass(frozen=True)
class _Text:
    """A text cut into windows int64 [W, L]; ``corpus`` None and no windows: left out."""

    corpus: Corpus | None
    ids: Tensor


@widened_products()
def analyze(
    model: str,
    *,
    calibration: str | None = None,
    samples: int = 16,
    length: int = 1024,
    seed: int = 0,
    bits: Sequence[int] = (8, 4),
    alphas: Sequence[float] = ALPHAS,
    alpha: float = PAPER_ALPHA,
    text: str | None = None,
    windows: int = 4,
    window_length: int | None = None,
    weights: Literal["int8", "original"] = "int8",
    proportions: Sequence[float] = PROPORTIONS,
    tolerance: float = 0.01,
    out: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quiet: bool = True,
) -> dict[str, Any]:
    """Where a model's activations lose information, and what that costs.

    Kernels and outliers are those of the original activations on the calibration text, which
    also gives the static column maxima and the removal's thresholds. Perplexities are measured
    on the evaluation text, all of them on the same windows.

    Args:
        model: hub name, local folder, GGUF file, or an embedded model ("demo"); not quantized.
        calibration: text name or file; None is the embedded calibration text.
        samples: calibration sequences.
        length: tokens of each.
        seed: of the choice of calibration windows.
        bits: activation widths of the accuracy table; kernels are counted at 8, 6, 4 and these.
        alphas: CrossQuant's exponents whose kernels are counted; 1 (per token) always is.
        alpha: CrossQuant's exponent in the accuracy table.
        text: evaluation text; None is the embedded one.
        windows: evaluation windows; 0 leaves out the accuracy table and the removal experiment.
        window_length: tokens of each; None is 2048, or the model's limit if that is less.
        weights: of the accuracy table: "int8" per output channel, or "original".
        proportions: shares of the activations to remove; empty leaves the experiment out.
        tolerance: loss (perplexity / original - 1) that defines the removal's threshold.
        out: folder for analysis.json and analysis.html, created if absent.
        revision: of a hub model.
        dtype: of computation; None is the model's own.
        device: "cpu" or "cuda".
        quiet: print nothing.

    Returns:
        The content of analysis.json; `crossbit.report.analysis` states its keys.

    Raises:
        InputError: bad input, found before work starts. WorkError: a failure after that.
    """
    reporter = Reporter(quiet)
    settings = kernel_settings([*KERNEL_BITS, *bits], alphas)
    observer = Observer(settings)
    modes = accuracy_modes(bits, alpha, int8=weights == "int8")
    removed = check_proportions(proportions)
    if windows < 0:
        raise InputError(f"--windows {windows}: give 0 (no perplexities) or more")
    check_device(device)
    target = _checked_out(out)
    folder = resolve_model(model, revision=revision, dtype=dtype)
    config = open_config(folder.path)
    checkpoint = Checkpoint(folder.path)
    shell = Shell(config, device=device)
    shell.check(checkpoint)
    observed, evaluated = _texts(
        folder, config, calibration, samples, length, seed, text, windows, window_length
    )
    source = BlockSource(shell, checkpoint, dtype or own_dtype(config))
    table = _table(modes) if windows else []
    streams = _streams(shell, evaluated.ids, table, removed) if windows else []
    unseen = _run(source, observed.ids, streams, observer, reporter)

    result: dict[str, Any] = {
        "crossbit": crossbit.__version__,
        "model": {
            "name": folder.name,
            "origin": folder.origin,
            "note": folder.note,
            "fingerprint": folder.fingerprint,
            "architecture": shell.structure.family.model_type,
        },
        "calibration": _record(observed) | {"samples": samples, "length": length, "seed": seed},
        "kernel": observer.kernel(),
        "outliers": observer.outliers(),
    }
    if windows:
        reporter.say("perplexities")
        measured = [losses(source, s, evaluated.ids) for s in streams]
        result |= _accuracy(table, removed, streams, measured, tolerance)
        result["evaluation"] = _record(evaluated) | {
            "windows": len(evaluated.ids),
            "length": evaluated.ids.shape[1],
            "bos": needs_bos(config),
            "dtype": str(source.dtype).removeprefix("torch."),
        }
    result["warnings"] = _warnings(folder, observed, evaluated, unseen)
    if target is not None:
        _write(result, target)
        reporter.say(f"wrote {target / 'analysis.html'}")
    return result


def _checked_out(out: str | Path | None) -> Path | None:
    """The output folder; InputError if it cannot be one. Nothing is created yet."""
    if out is None:
        return None
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise InputError(f"--out {target}: exists and is not a folder; choose another")
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {target}: {existing} cannot be written; choose another folder")
    return target


def _texts(
    folder: ModelFolder,
    config: Any,
    calibration: str | None,
    samples: int,
    length: int,
    seed: int,
    text: str | None,
    windows: int,
    window_length: int | None,
) -> tuple[_Text, _Text]:
    """Calibration and evaluation windows; the latter empty without an evaluation."""
    size = window_length or evaluation_length(config, WINDOW_LENGTH)
    check_length(config, length)
    check_length(config, size, what="windows", option="--window-length")
    tokenizer = open_tokenizer(folder.path)
    bos = needs_bos(config)
    corpus = load_text(calibration, split="calibration", tokenizer=tokenizer)
    ids = calibration_windows(corpus, tokenizer, samples=samples, length=length, seed=seed, bos=bos)
    observed = _Text(corpus, ids)
    if not windows:
        return observed, _Text(None, ids[:0])
    other = load_text(text, split="evaluation", tokenizer=tokenizer)
    return observed, _Text(
        other, evaluation_windows(other, tokenizer, length=size, windows=windows, bos=bos)
    )


def _table(modes: Sequence[Mode]) -> list[Mode]:
    return [ORIGINAL, WEIGHTS_ONLY, *modes]


def _streams(
    shell: Shell, ids: Tensor, table: Sequence[Mode], removed: Sequence[float]
) -> list[Stream]:
    """One stream a row of the table, then one a proportion."""
    hidden = _embedded(shell, ids)
    return [Stream(m.name, m.int8, m.change, hidden.clone()) for m in table] + [
        Stream(f"{100 * p:g} % removed", True, Remove(p), hidden.clone()) for p in removed
    ]


def _embedded(shell: Shell, ids: Tensor) -> Tensor:
    """Hidden states [W, L, D] before the first block."""
    return torch.cat([shell.embed(ids[i : i + 1]) for i in range(len(ids))])


@torch.no_grad()
def _run(
    source: BlockSource,
    ids: Tensor,
    streams: Sequence[Stream],
    observer: Observer,
    reporter: Reporter,
) -> list[str]:
    """Observe calibration windows int64 [S, L], advance the streams; names of unseen inputs."""
    shell, unseen = source.shell, []
    hidden = _embedded(shell, ids)
    kwargs = shell.block_kwargs(ids.shape[1], source.dtype)
    for index in reporter.track(range(shell.num_blocks), "analyzing blocks", shell.num_blocks):
        block = source.load(index)
        structure = shell.structure.blocks[index]
        for key, parameter in block.named_parameters():
            check_finite(f"{structure.name}.{key}", parameter)
        inputs = layer_inputs(structure, index)
        with watching(block, inputs, observer.take):
            for i in range(len(hidden)):
                sequence = hidden[i : i + 1]
                sequence.copy_(shell.run_block(index, sequence, kwargs[index]))
        known = observer.calibrated(inputs)
        unseen += [p.name for p in inputs if known[p.name].ratios is None]
        advance(shell, index, streams, inputs, known)
        source.free(index)
    return unseen


def _accuracy(
    table: Sequence[Mode],
    removed: Sequence[float],
    streams: Sequence[Stream],
    measured: Sequence[list[float]],
    tolerance: float,
) -> dict[str, Any]:
    """The ``modes`` and ``remove_kernel`` parts from the streams' losses, in `_streams`' order."""
    original, count = measured[0], len(table)
    result: dict[str, Any] = {
        "modes": [
            mode.row(found, original, stream.tally)
            for mode, stream, found in zip(table, streams[:count], measured[:count], strict=True)
        ]
    }
    if removed:
        points = [
            removal_point(p, found, original, stream.tally)
            for p, stream, found in zip(removed, streams[count:], measured[count:], strict=True)
        ]
        result["remove_kernel"] = removal_curve(points, original, tolerance)
    return result


def _record(text: _Text) -> dict[str, Any]:
    assert text.corpus is not None
    return {
        "text": text.corpus.name,
        "name": text.corpus.name,
        "source": text.corpus.source,
        "tokens": int(text.ids.numel()),
        "sha256": text.corpus.sha256,
    }


def _warnings(
    folder: ModelFolder, observed: _Text, evaluated: _Text, unseen: Sequence[str]
) -> list[str]:
    lines = [] if folder.note is None else [folder.note]
    if unseen:
        lines.append(
            f"no calibration token reached {len(unseen)} inputs of experts (the first: "
            f"{unseen[0]}): no kernel, per token in the static modes, nothing removed"
        )
    if evaluated.corpus is not None:
        if observed.corpus is not None and observed.corpus.sha256 == evaluated.corpus.sha256:
            lines.append("calibrated on the evaluation text: the static modes look too good")
        if len(evaluated.ids) < 2:
            lines.append("one evaluation window: no standard errors")
    return lines


def _write(result: dict[str, Any], target: Path) -> None:
    """analysis.json and analysis.html, each whole or as it was before."""
    content = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        atomic_write(target / "analysis.json", content + "\n")
    except OSError as error:
        raise WorkError(
            f"{target}: cannot be written ({error.strerror}); check the folder and free space"
        ) from None
    write_analysis(result, target)
