"""Tasks of lm-evaluation-harness, run on crossbit's own execution of a folder.

The harness gets a finished model (``runtime.loader``) and tokenizer, so a quantized folder is
scored from its stored integers, research modes included. Tasks and their data are loaded before
the model: an unknown name or a missing file costs no waiting.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from crossbit.errors import InputError, WorkError
from crossbit.models.families import ends_with_bos, needs_bos
from crossbit.models.opening import open_tokenizer
from crossbit.models.quiet import quiet_transformers
from crossbit.positions import free_positions
from crossbit.runtime.loader import folder_prefix, load_model


def run_tasks(
    folder: Path,
    tasks: tuple[str, ...],
    *,
    dtype: torch.dtype | None,
    device: str,
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 1,
    quiet: bool = True,
) -> dict[str, dict[str, float]]:
    """Score a local folder, original or quantized, on tasks of lm-evaluation-harness.

    Args:
        folder: the model.
        tasks: names of tasks, groups or tags of the harness, or paths of task YAML files (which
            may name Python functions of files beside them, as the harness allows).
        dtype: of computation; None is the model's own.
        device: "cpu" or "cuda".
        limit: examples a task, from its start; None is all.
        include_path: a folder with more task YAML files.
        batch_size: sequences at once. Above 1 they are padded, which changes the column maxima of
            ``cross_dynamic`` activations.
        quiet: show no progress.

    Returns:
        {task: {metric: value, metric_stderr: value, "n": examples}}; groups that define a metric
        of their own are listed too. A standard error that the harness cannot give is left out.

    Raises:
        InputError: lm-eval is not installed, no or unknown tasks, or data that cannot be loaded.
        WorkError: the harness failed on a task.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give at least 1 example a task")
    with quiet_transformers() if quiet else nullcontext(), _errors_only():
        harness = _harness()
        specs, manager = _load_tasks(harness, tasks, include_path)
        lm = _language_model(harness, folder, dtype, device, batch_size)
        try:
            output = harness.simple_evaluate(
                model=lm,
                tasks=specs,
                task_manager=manager,  # or it reads all definitions again
                limit=limit,
                log_samples=False,
            )
        except Exception as error:
            raise WorkError(
                f"tasks {', '.join(tasks)}: lm-evaluation-harness failed ({_one_line(error)}); "
                "check the task's definition"
            ) from error
    return {name: _plain(values, output, name) for name, values in output["results"].items()}


def _harness() -> Any:
    """The ``lm_eval`` package, imported when it is needed: it takes seconds."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f'--tasks needs lm-evaluation-harness ({error}): pip install "crossbit[tasks]"'
        ) from error
    return lm_eval


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep logs to errors: the harness tells of every step, the hub of every retry."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_tasks(
    harness: Any, tasks: tuple[str, ...], include_path: str | None
) -> tuple[list[Any], Any]:
    """Task and group objects with their data loaded, and the manager that knows them."""
    names = [name.strip() for name in dict.fromkeys(tasks) if name.strip()]
    if not names:
        raise InputError("--tasks: no task named; give names such as arc_easy,hellaswag")
    files = {name: _task_file(name) for name in names}
    folders = [str(path.parent) for path in files.values() if path is not None]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"{include_path}: no such folder of task files")
        folders.append(include_path)
    # Reading the harness's own 14,000 definitions takes 10 s or more: only if a name needs them.
    manager = harness.tasks.TaskManager(
        include_path=list(dict.fromkeys(folders)),
        include_defaults=any(path is None for path in files.values()),
    )
    specs: list[Any] = []
    for name in names:
        path = files[name]
        if path is None and name not in manager.task_index:
            raise InputError(f"unknown task {name!r}{_nearest(name, manager.all_tasks)}")
        try:
            loaded = manager.load([name if path is None else _name_in(manager, path)])
        except Exception as error:
            raise InputError(
                f"task {name}: it or its data cannot be loaded ({_one_line(error)}); check the "
                "connection, or give a task file with local data_files"
            ) from error
        specs.extend(_top_level(loaded))
    try:
        manager.load(specs)
    except ValueError as error:
        raise InputError(f"--tasks: {_one_line(error)}; name it once") from error
    return specs, manager


def _task_file(name: str) -> Path | None:
    """The path of a task file, None for a name; InputError if the file is not there."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return None
    if not path.is_file():
        raise InputError(f"task file {path}: no such file")
    return path.resolve()


def _name_in(manager: Any, path: Path) -> str:
    """The name of the task or group that a file defines; the harness takes paths of tasks only."""
    for name, entry in manager.task_index.items():
        if entry.yaml_path is not None and Path(entry.yaml_path).resolve() == path:
            return str(name)
    return str(path)


def _top_level(loaded: Mapping[str, Any]) -> list[Any]:
    """What was asked for: the outermost groups, and tasks that are in no group."""
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    children = {child for names in loaded.get("group_map", {}).values() for child in names}
    everything = {**groups, **tasks}
    return [item for name, item in everything.items() if name not in children]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; nearest: {', '.join(close)}" if close else "; `lm-eval ls tasks` lists them"


def _language_model(
    harness: Any, folder: Path, dtype: torch.dtype | None, device: str, batch_size: int
) -> Any:
    tokenizer = open_tokenizer(folder)
    model: Any = load_model(folder, dtype=dtype, device=device)
    # The harness would set up transformers' own quantizer for it; our layers are in place.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    prefix = folder_prefix(folder)
    bos = needs_bos(model.config, prefix)
    if bos:
        _make_bos_start(tokenizer, folder)
    return harness.models.huggingface.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        # The harness reads it in the config by itself, which does not know of a prefix.
        max_length=free_positions(model.config, len(prefix)),
        # None: as the tokenizer itself does, the harness's default; but not a second one.
        add_bos_token=False if ends_with_bos(model.config, prefix) else bos or None,
    )


def _make_bos_start(tokenizer: Any, folder: Path) -> None:
    """The harness leaves BOS to the tokenizer, and not every tokenizer adds it by itself."""

    def starts() -> bool:
        ids = tokenizer.encode("a", add_special_tokens=True)
        return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id

    if not starts():
        tokenizer.add_bos_token = True
        if not starts():
            raise InputError(
                f"{folder}: the model needs a BOS token at the start, and its tokenizer has or "
                "adds none; set bos_token in tokenizer_config.json"
            )


def _plain(values: Mapping[str, Any], output: Mapping[str, Any], name: str) -> dict[str, float]:
    """The harness's ``metric,filter`` keys as metric names; filters are named where several are."""
    metrics: dict[str, list[tuple[str, float]]] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        # "N/A" stands for a missing standard error.
        if comma and isinstance(value, int | float) and math.isfinite(value):
            metrics.setdefault(metric, []).append((chosen, float(value)))
    result: dict[str, float] = {}
    for metric, found in metrics.items():
        for chosen, value in found:
            base = metric.removesuffix("_stderr")
            suffix = metric[len(base) :]
            result[metric if len(found) == 1 else f"{base}_{chosen}{suffix}"] = value
    counts = output.get("n-samples", {}).get(name, {})
    examples = counts.get("effective", values.get("sample_len"))
    if examples is not None:
        result["n"] = float(examples)
    return result


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
