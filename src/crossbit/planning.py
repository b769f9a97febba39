"""``crossbit plan``: what ``quantize`` would need with the same options, before anything starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from crossbit.compat import check_recipe
from crossbit.corpora import load_text
from crossbit.engine.prepare import open_model
from crossbit.engine.progress import release_memory
from crossbit.estimate.describe import describe
from crossbit.estimate.machine import existing, held_memory
from crossbit.estimate.probe import rates, tokenising
from crossbit.estimate.verdict import Room, estimate, gib, hint
from crossbit.estimate.work import operations
from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.source import resolve_model
from crossbit.output import OutputFolder, companion_bytes
from crossbit.pipeline import with_options
from crossbit.positions import check_length
from crossbit.products import widened_products
from crossbit.recipe import LOADS, Recipe
from crossbit.runtime.loader import own_dtype


@widened_products()
def plan(
    model: str,
    recipe: str | Path | Recipe = "crossquant-w8a8",
    *,
    out: str | Path = "out",
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    settings: Sequence[str] = (),
    work: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    allow_pickle: bool = False,
    age: float = 0.0,
) -> dict[str, Any]:
    """Predict memory, disk and time of ``quantize`` on the CPU; writes nothing.

    The model is found (a hub's is downloaded) and the texts are read, but not made into tokens.
    Speeds are measured here in a few seconds, with the threads that torch has now.

    Args:
        model, recipe, calibration, samples, length, settings, revision, dtype, dequantize,
            allow_pickle: as for ``quantize``.
        out, work: where it would write; the disks' free space is looked at.
        age: seconds that this process took to get here, which are counted as the run's own.

    Returns:
        "kind" of the result: plain, online or research; "notes" that ``quantize`` would begin with;
        "stages": a list of {"stage", "memory" in bytes, "seconds"}, memory being the process's
        anonymous and shared memory; "memory" {"peak", "stage", "available"}; "disk" {"work",
        "output", "available", "available_output"}; "seconds"; "fits"; "lacks", a phrase a lack;
        "advice", None if it fits; "operations" and "rates", from which the seconds come.

    Raises:
        InputError: what ``quantize`` would refuse, too.
    """
    began = time.monotonic()
    chosen = with_options(Recipe.load(recipe, settings), calibration, samples, length, None)
    check_recipe(chosen)
    output = OutputFolder(Path(out), Path(work) if work else None)
    folder = resolve_model(
        model, revision=revision, dtype=dtype, dequantize=dequantize, allow_pickle=allow_pickle
    )
    config = open_config(folder.path)
    tokenizer = open_tokenizer(folder.path)
    dtype = dtype or own_dtype(config)
    opened_model = open_model(folder, config, chosen, "cpu", dtype)
    shell, planned, weights = opened_model.shell, opened_model.plan, opened_model.weights
    described = describe(
        shell,
        planned,
        chosen,
        dtype,
        source_bytes=weights.nbytes,
        companions=companion_bytes(folder.path),
        rotation=opened_model.rotation,
    )
    if described.calibrated:
        check_length(config, chosen.calibration.length, len(chosen.named_prefix))
    texts = ["", ""]
    if described.calibrated:
        texts[0] = load_text(chosen.calibration.text, split="calibration", tokenizer=tokenizer).text
    if described.windows:
        texts[1] = load_text(chosen.evaluation.text, split="evaluation", tokenizer=tokenizer).text
    characters = (len(texts[0]), len(texts[1]))
    held = held_memory()
    opened = age + time.monotonic() - began
    work_done = operations(described, characters=characters)
    kinds = {kind for amounts in work_done.values() for kind in amounts}
    speeds = rates(described, kinds, shell, weights, planned, dtype, existing(output.work.parent))
    speeds["characters"] = tokenising(texts[0] or texts[1], tokenizer)
    release_memory()
    found = estimate(described, held=held, rates=speeds, characters=characters)
    assert found.seconds is not None
    # Opening has just been done: it takes the run as long.
    found.seconds["prepare"] += opened
    room = Room.here(output.work, output.final)
    lacks = room.lacks(found)
    result = found.to_dict()
    result["memory"]["available"] = room.memory
    result["disk"] |= {"available": room.work, "available_output": room.output}
    return {
        "model": model,
        "recipe": chosen.name,
        "kind": opened_model.recipe.kind,
        "notes": opened_model.told,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": described.parameters,
        **result,
        "fits": not lacks,
        "lacks": lacks,
        "advice": hint(described, room, held) if lacks else None,
        "rates": speeds,
    }


def print_plan(result: dict[str, Any], console: Console) -> None:
    """A table of the stages, totals, what this machine has, the kind, notes, and the verdict."""
    table = Table("stage", "memory", "time")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result["stages"]:
        memory, taken = row["memory"], row["seconds"]
        table.add_row(
            row["stage"],
            "" if memory is None else gib(memory),
            "" if taken is None else duration(taken),
        )
    table.add_section()
    table.add_row("all", gib(result["memory"]["peak"]), duration(result["seconds"]))
    console.print(table)
    disk, memory = result["disk"], result["memory"]
    totals = Table.grid(padding=(0, 2))
    totals.add_row("memory", gib(memory["peak"]), f"{gib(memory['available'])} available")
    totals.add_row("work folder", gib(disk["work"]), f"{gib(disk['available'])} free")
    apart = disk["available_output"]
    totals.add_row(
        "result", gib(disk["output"]), "moved there" if apart is None else f"{gib(apart)} free"
    )
    totals.add_row("time", duration(result["seconds"]), f"{result['parameters']:,} parameters")
    totals.add_row("kind", result["kind"], LOADS[result["kind"]])
    console.print(totals)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    if result["fits"]:
        console.print("it fits")
    else:
        console.print(f"it does not fit: {'; '.join(result['lacks'])}", soft_wrap=True)
        console.print(result["advice"], soft_wrap=True)


def duration(taken: float) -> str:
    """Seconds as people read them."""
    if taken < 120:
        return f"{taken:.1f} s"
    return f"{taken / 60:.0f} min" if taken < 7200 else f"{taken / 3600:.1f} h"
