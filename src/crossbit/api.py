"""Python functions beside ``quantize``: the same names and defaults as the commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from crossbit.corpora import evaluation_windows, load_text
from crossbit.device import check_device
from crossbit.engine.progress import Reporter
from crossbit.errors import InputError
from crossbit.evaluation.run import estimate, losses_of
from crossbit.evaluation.statistics import paired_loss, perplexity
from crossbit.export.research import is_research
from crossbit.models.families import needs_bos
from crossbit.models.opening import open_tokenizer
from crossbit.models.source import resolve_model
from crossbit.models.validate import read_config
from crossbit.output import RESULT_FILE
from crossbit.positions import check_length
from crossbit.products import widened_products
from crossbit.runtime.linear import Execution
from crossbit.runtime.loader import folder_config, folder_prefix, own_dtype


def local_folder(model: str, revision: str | None = None) -> Path:
    """The local folder behind a model name; a folder that crossbit wrote is taken as it is."""
    path = Path(model)
    if path.is_dir() and (path / "config.json").is_file():
        described = read_config(path)
        if (
            is_research(described)
            or (path / RESULT_FILE).is_file()
            or "quantization_config" in described
        ):
            return path
    return resolve_model(model, revision=revision).path


def result_kind(folder: Path) -> str | None:
    """Plain, online or research, for a folder that crossbit quantized; None for any other."""
    config = read_config(folder)
    if is_research(config):
        return str(config.get("crossbit_kind", "research"))
    ours = (folder / RESULT_FILE).is_file() and "quantization_config" in config
    return "plain" if ours else None


@widened_products()
def evaluate(
    model: str,
    *,
    text: str | None = None,
    length: int = 2048,
    windows: int | None = None,
    against: str | None = None,
    tasks: tuple[str, ...] = (),
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    execution: Execution = "auto",
    divisor: float | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Perplexity of a model, original or quantized, with its standard error.

    Non-overlapping windows of ``length`` tokens, mean negative log-likelihood over length - 1
    predictions each, the last partial window left out; windows are the sampling unit of the error.

    Args:
        model: hub name, folder, GGUF file, embedded model, or a folder that crossbit wrote.
        text: name or file; None is the embedded evaluation text.
        length: tokens a window.
        windows: number of windows; None is all.
        against: another model; adds the paired difference on the same windows.
        tasks: names of lm-evaluation-harness tasks.
        revision: of a hub model.
        dtype: of computation; None is each model's own.
        device: "cpu" or "cuda".
        execution: "fake", "integer" or "auto" (see ``QuantLinear``).
        divisor: overrides the divisor of activation grids (127: vLLM's kernels).
        quiet: print nothing.

    Returns:
        {"kind", "perplexity": {"text", "tokens", "value", "stderr", ...}, "against", "paired",
        "tasks"}; the kind is that of a result of crossbit's (plain, online or research), else None.

    Raises:
        InputError: bad input. WorkError: a loss that is not finite.
    """
    if length < 2:
        raise InputError(f"--length {length}: a window needs at least 2 tokens")
    if windows is not None and windows < 1:
        raise InputError(f"--windows {windows}: give at least 1")
    if divisor is not None and not (math.isfinite(divisor) and divisor > 0):
        raise InputError(f"--divisor {divisor}: give a positive number")
    check_device(device)
    reporter = Reporter(quiet)
    folder = local_folder(model, revision)
    config: Any = folder_config(folder)
    other = local_folder(against) if against is not None else None
    bos = True
    for one in (folder, *([] if other is None else [other])):
        described, prefix = folder_config(one), folder_prefix(one)
        check_length(described, length, len(prefix))
        bos = bos and needs_bos(described, prefix)
    tokenizer = open_tokenizer(folder)
    corpus = load_text(text, split="evaluation", tokenizer=tokenizer)
    ids = evaluation_windows(corpus, tokenizer, length=length, windows=windows, bos=bos)
    if other is not None and folder_config(other).vocab_size != config.vocab_size:
        raise InputError(f"--against {against}: another vocabulary; the two cannot be compared")
    start = None if bos else tokenizer.bos_token_id
    scores: dict[str, Any] = {}
    if tasks:
        # First: an unknown task or missing data is found before any work.
        from crossbit.evaluation.tasks import run_tasks

        scores = run_tasks(folder, tasks, dtype=dtype, device=device, quiet=quiet)
    losses = losses_of(
        folder,
        ids,
        start=start,
        dtype=dtype,
        device=device,
        execution=execution,
        divisor=divisor,
        reporter=reporter,
    )
    value = perplexity(losses)
    result: dict[str, Any] = {
        "model": model,
        "kind": result_kind(folder),
        "perplexity": {
            "text": corpus.name,
            "tokens": int(ids.numel()),
            "windows": len(ids),
            "length": length,
            "bos": bos,
            "dtype": str(dtype or own_dtype(config)).removeprefix("torch."),
            "value": value.value,
            "stderr": estimate(value, "value")["stderr"],
            "losses": losses,
        },
    }
    if other is not None:
        reference = losses_of(
            other,
            ids,
            start=start,
            dtype=dtype,
            device=device,
            reporter=reporter,
            title="evaluating --against",
        )
        result["against"] = {
            "model": against,
            "kind": result_kind(other),
            **estimate(perplexity(reference), "value"),
        }
        result["against"]["losses"] = reference
        result["paired"] = estimate(paired_loss(losses, reference), "loss")
    if tasks:
        result["tasks"] = scores
    return result


@widened_products()
def generate(
    folder: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    chat: bool = False,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> str:
    """The continuation of a prompt, decoded greedily (sampled if ``seed`` is given).

    Plain folders run in transformers, research and online folders in crossbit's own layers.

    Raises:
        InputError: not a model folder, an empty prompt, or no chat template with ``chat``.
    """
    from crossbit.runtime.generation import generate_text

    if not prompt:
        raise InputError("the prompt is empty; give some text")
    check_device(device)
    return generate_text(
        local_folder(str(folder)),
        prompt,
        tokens=tokens,
        chat=chat,
        seed=seed,
        dtype=dtype,
        device=device,
    )
