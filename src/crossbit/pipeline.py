"""The main job: open, calibrate, quantize block by block, write, evaluate, verify, report."""

from __future__ import annotations

import errno
import gc
import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import crossbit
from crossbit.compat import check_recipe
from crossbit.corpora import Corpus, calibration_windows, evaluation_windows, load_text
from crossbit.device import check_device, computing_on
from crossbit.engine.head import head_hessian
from crossbit.engine.job import Job, needs_calibration
from crossbit.engine.loop import run_blocks
from crossbit.engine.prefix import choose_prefix, outlier_tokens, prefix_tokens, starts_with_bos
from crossbit.engine.prepare import OpenModel, open_model
from crossbit.engine.progress import Reporter, peak_memory, release_memory
from crossbit.engine.workdir import PREFIX, WorkDir
from crossbit.errors import InputError, WorkError, unwritable
from crossbit.estimate.describe import describe
from crossbit.estimate.shapes import Description
from crossbit.estimate.verdict import refuse
from crossbit.export.artifact import block_tensors, quantize_outside, round_embedding
from crossbit.models.checkpoint import scan_finite
from crossbit.models.families import needs_bos
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.shell import Shell
from crossbit.models.source import ModelFolder, resolve_model
from crossbit.output import OutputFolder, companion_bytes, read_result
from crossbit.positions import check_length
from crossbit.products import widened_products
from crossbit.recipe import Calibration, Gptq, Prefix, Recipe, first_solver
from crossbit.run import Run, evaluation_length
from crossbit.runtime.install import QuantizedLayer
from crossbit.runtime.loader import own_dtype
from crossbit.runtime.online import Online, PrefixTokens

# What a disk that takes no more says; any other failure of a file is no such thing.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked before work starts."""

    folder: ModelFolder
    recipe: Recipe
    config: Any
    model: OpenModel
    dtype: torch.dtype
    calibration: dict[str, Any] | None
    ids: Tensor | None
    notes: list[str]
    windows: int

    @property
    def description(self) -> Description:
        """The numbers of the run, for an estimate."""
        return describe(
            self.model.shell,
            self.model.plan,
            self.recipe,
            self.dtype,
            windows=self.windows,
            source_bytes=self.model.files.nbytes,
            companions=companion_bytes(self.folder.path),
            rotation=self.model.rotation,
        )


@widened_products()
def quantize(
    model: str,
    recipe: str | Path | Recipe = "crossquant-w8a8",
    *,
    out: str | Path,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    work: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    dequantize: bool = False,
    allow_pickle: bool = False,
    check: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """Quantize a causal language model into the folder ``out``.

    Args:
        model: hub name, local folder, GGUF file, or an embedded model ("demo").
        recipe: preset name, YAML file or ``Recipe``.
        out: the folder to write; it appears only when everything, verification included, passed.
        calibration: text name or file; None is the recipe's.
        samples: calibration sequences; None is the recipe's.
        length: tokens of each; None is the recipe's.
        seed: of the choice of calibration windows; None is the recipe's.
        settings: "key=value" changes to the recipe.
        resume: go on with an interrupted run; a finished matching ``out`` returns at once.
        overwrite: replace an existing ``out``.
        work: the work folder; default ``out`` + ".crossbit-work".
        revision: of a hub model.
        dtype: of computation and unquantized tensors; None is the model's own.
        device: "cpu" or "cuda".
        dequantize: accept a model that is quantized already, and dequantize it.
        allow_pickle: accept pickle-only checkpoints.
        check: refuse to start where memory or disk will not fit (see ``crossbit.plan``).
        quiet: print nothing.

    Returns:
        The content of ``out``/crossbit.json.

    Raises:
        InputError: bad input, found before work starts. WorkError: a failure after that.
    """
    reporter = Reporter(quiet)
    started = time.monotonic()
    chosen = with_options(Recipe.load(recipe, settings), calibration, samples, length, seed)
    check_recipe(chosen)
    output = OutputFolder(Path(out), Path(work) if work else None)
    output.check(overwrite=overwrite, resume=resume)
    check_device(device)
    if device != "cpu" and chosen.trains:
        raise InputError(
            f"--device {device}: recipe {chosen.name} trains, which runs on the CPU; "
            "leave out --device"
        )
    folder = resolve_model(
        model, revision=revision, dtype=dtype, dequantize=dequantize, allow_pickle=allow_pickle
    )
    given = [Path(model).expanduser()] if folder.origin in ("local", "gguf") else []
    output.check_apart(folder.path, *given)
    prepared = _prepare(folder, chosen, dtype, device)
    manifest = _manifest(prepared)
    if resume:
        known = _finished(output.final, manifest, overwrite)
        if known is not None:
            reporter.say(f"{output.final}: finished already, nothing to do")
            return known
    if check:
        refuse(prepared.description, model, output.work, output.final, memory=device == "cpu")
        prepared.model.weights.close()
    directory = WorkDir(output.work)
    versions = {
        "torch version": str(torch.__version__),
        "transformers version": transformers.__version__,
    }
    machines = directory.begin(
        {**manifest, **versions}, resume=resume, machine=computing_on(device)
    )
    if len(machines) > 1:
        note = f"computed in parts on {'; '.join(machines)}: bytes may differ from those of one run"
        prepared = replace(prepared, notes=[*prepared.notes, note])
    for note in prepared.notes:
        reporter.say(f"note: {note}")
    try:
        return _work(prepared, directory, output, reporter, manifest, device, started)
    except InputError as error:
        # Whatever was overlooked above: work has started, so the exit code says so.
        raise WorkError(str(error)) from error
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        path = error.filename2 or error.filename or output.work
        raise unwritable(Path(path), error) from error


def _work(
    prepared: Prepared,
    directory: WorkDir,
    output: OutputFolder,
    reporter: Reporter,
    manifest: dict[str, Any],
    device: str,
    started: float,
) -> dict[str, Any]:
    """Quantize the blocks, then finish the folder; the content of its crossbit.json."""
    clock = time.monotonic()
    stages: dict[str, float] = {"prepare": clock - started}
    online = _run(prepared, directory, reporter)
    stages["quantize"] = time.monotonic() - clock
    peak = {"quantize": peak_memory()}
    run = Run(
        folder=prepared.folder,
        recipe=prepared.recipe,
        kind=prepared.model.recipe.kind,
        config=prepared.config,
        tokenizer=open_tokenizer(prepared.folder.path),
        structure=prepared.model.shell.structure,
        plan=prepared.model.plan,
        online=online,
        dtype=prepared.dtype,
        device=device,
        manifest=manifest,
        calibration=prepared.calibration,
        notes=prepared.notes,
        stages=stages,
        peak=peak,
        started=started,
    )
    # Only now: reading, plotting and verifying need libraries that the loop has no memory for.
    from crossbit.finish import finish

    result = finish(run, directory, output, reporter)
    shutil.rmtree(output.work, ignore_errors=True)
    return result


def with_options(
    recipe: Recipe,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
) -> Recipe:
    """A recipe with what was asked for in place of its own calibration settings."""
    options = {"text": calibration, "samples": samples, "length": length, "seed": seed}
    given = {k: v for k, v in options.items() if v is not None}
    if not given:
        return recipe
    data = recipe.model_dump(mode="json")
    data["calibration"].update(given)
    return Recipe.parse(data, recipe.name)


def _finished(final: Path, manifest: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What ``final`` holds if it is the result of this very work, None if work is to be done."""
    if not final.is_dir() or not any(final.iterdir()):
        return None
    try:
        known = read_result(final)
    except InputError:
        if overwrite:
            return None
        raise
    if known.get("manifest") == manifest:
        return known
    if not overwrite:
        raise InputError(
            f"{final}: holds the result of other work; give another --out or --overwrite"
        )
    return None


def _prepare(
    folder: ModelFolder, recipe: Recipe, dtype: torch.dtype | None, device: str
) -> Prepared:
    config = open_config(folder.path)
    tokenizer = open_tokenizer(folder.path)
    dtype = dtype or own_dtype(config)
    opened = open_model(folder, config, recipe, device, dtype)
    shell = opened.shell
    calibration = ids = None
    windows = 0
    settings = recipe.calibration
    if needs_calibration(recipe):
        check_length(config, settings.length, len(recipe.named_prefix))
        corpus = load_text(settings.text, split="calibration", tokenizer=tokenizer)
        ids = calibration_windows(
            corpus,
            tokenizer,
            samples=settings.samples,
            length=settings.length,
            seed=settings.seed,
            bos=starts_with_bos(config, recipe.prefix),
        )
        check_vocabulary(ids, shell)
        calibration = _calibration_record(settings, corpus, ids)
        del corpus
    if recipe.evaluation.windows:
        # Found now rather than after the work: a text that cannot be read or is too short.
        found = evaluation_windows(
            load_text(recipe.evaluation.text, split="evaluation", tokenizer=tokenizer),
            tokenizer,
            length=evaluation_length(config, recipe.evaluation.length),
            windows=None,
            bos=starts_with_bos(config, recipe.prefix),
        )
        check_vocabulary(found, shell)
        windows = len(found)
        del found
    del tokenizer
    gc.collect()
    release_memory()  # what tokenising the texts left behind
    scan_finite(opened.files)
    opened.files.close()
    return Prepared(
        folder=folder,
        recipe=recipe,
        config=config,
        model=opened,
        dtype=dtype,
        calibration=calibration,
        ids=ids,
        notes=opened.told,
        windows=windows,
    )


def check_vocabulary(ids: Tensor, shell: Shell) -> None:
    """InputError if the tokenizer made ids that the model has no embedding for."""
    highest = int(ids.max())
    rows = int(shell.model.get_submodule(shell.structure.embedding).weight.shape[0])
    if highest >= rows:
        raise InputError(
            f"the tokenizer makes token {highest} of the text and the model's vocabulary ends at "
            f"{rows - 1}: tokenizer and model do not belong together; use the model's own tokenizer"
        )


def _run(prepared: Prepared, directory: WorkDir, reporter: Reporter) -> Online:
    """Quantize everything; what happens at run time beside it."""
    opened, dtype = prepared.model, prepared.dtype
    shell, weights = opened.shell, opened.weights
    shell.load_outside(weights, dtype)
    release_memory()
    online = opened.online
    if prepared.recipe.prefix is not None:
        online = replace(online, prefix=_prefix(prepared, directory, prepared.recipe.prefix))
        online.dress(shell)

    def write(index: int, block: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
        plan = opened.plan.blocks[index]
        family = shell.structure.family
        return block_tensors(family, plan, block, layers, dtype)

    job = Job(
        shell,
        weights,
        opened.plan,
        prepared.recipe,
        prepared.ids,
        dtype,
        write,
        partial(round_embedding, shell, opened.plan),
        online,
    )
    run_blocks(job, directory, reporter)
    if not directory.has("outside"):
        # Last, for GPTQ's sake: the head is solved for what leaves the quantized blocks.
        hessian = head_hessian(job, directory)
        solver = first_solver(prepared.recipe.solver)
        shell.load_outside(weights, dtype)
        directory.save_part(
            "outside",
            quantize_outside(
                shell, opened.plan, dtype, hessian, solver if isinstance(solver, Gptq) else None
            ),
            {"head solver": "rtn" if hessian is None else "gptq"} if opened.plan.head else {},
        )
        shell.free_outside()
        release_memory()
    return online


def _prefix(prepared: Prepared, directory: WorkDir, config: Prefix) -> PrefixTokens:
    """The prefix of the model: found once, and kept in the work folder."""
    opened = prepared.model
    if not directory.has(PREFIX):
        tokens = config.tokens
        if tokens is None:
            assert prepared.ids is not None
            ids = prepared.ids[: config.sequences]
            first = getattr(prepared.config, "bos_token_id", None)
            if first is not None and needs_bos(prepared.config):
                # The windows have none, for the prefix will; here it is not there yet.
                ids = torch.cat((torch.full((len(ids), 1), first), ids), dim=1)
            original = Shell(prepared.config, device=str(opened.shell.device))
            original.load_outside(opened.files, prepared.dtype)
            outliers = outlier_tokens(original, opened.files, ids, config)
            tokens = tuple(choose_prefix(ids, outliers, first, config))
            del original
        if prepared.ids is not None:
            check_length(prepared.config, prepared.ids.shape[1], len(tokens))
        found = prefix_tokens(opened.shell, opened.weights, tokens, prepared.dtype)
        directory.save_part(PREFIX, found.tensors(), {"tokens": list(tokens)})
    stored = dict(directory.tensors(PREFIX))
    return PrefixTokens.from_tensors(stored, opened.shell.num_blocks)


def _manifest(prepared: Prepared) -> dict[str, Any]:
    ids = prepared.ids
    digest = "none" if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return {
        "crossbit version": crossbit.__version__,
        "model": prepared.folder.fingerprint,
        "recipe": prepared.recipe.digest,
        "calibration text": digest,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }


def _calibration_record(settings: Calibration, corpus: Corpus, ids: Tensor) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "source": corpus.source,
        "samples": settings.samples,
        "length": settings.length,
        "seed": settings.seed,
        "tokens": ids.numel(),
        "sha256": corpus.sha256,
    }
