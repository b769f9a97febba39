"""The estimate of a run, whether it fits here, and which setting would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossbit.engine.window import SAVE_SECONDS
from crossbit.errors import InputError
from crossbit.estimate.describe import with_recipe
from crossbit.estimate.disk import Disk, disk
from crossbit.estimate.machine import available_disk, available_memory, held_memory, same_disk
from crossbit.estimate.memory import STAGES, peak_by_stage, total
from crossbit.estimate.shapes import Description
from crossbit.estimate.work import Work, operations, seconds
from crossbit.recipe import Recipe, TrainedRounding

GIB = 1 << 30
SHORTEST, FEWEST = 128, 4  # calibration that is still proposed: tokens a sequence, sequences


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        memory: peak bytes of the process by stage, what it holds before included.
        work: operations by stage and kind.
        seconds: by stage, None where nothing was measured.
        disk: bytes at the worst moment.
    """

    memory: dict[str, float]
    work: Work
    seconds: dict[str, float] | None
    disk: Disk

    @property
    def peak(self) -> tuple[str, float]:
        """The stage with the highest peak, and that peak in bytes."""
        return total(self.memory)

    @property
    def time(self) -> float | None:
        """Seconds of the whole run."""
        return None if self.seconds is None else sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        times = self.seconds or {}
        names = dict.fromkeys([*STAGES, *self.memory, *times])
        stage, peak = self.peak
        return {
            "stages": [
                {"stage": n, "memory": self.memory.get(n), "seconds": times.get(n)}
                for n in names
                if n in self.memory or n in times
            ],
            "memory": {"peak": peak, "stage": stage},
            "disk": {"work": self.disk.work, "output": self.disk.output},
            "seconds": self.time,
            "operations": self.work,
        }


@dataclass(frozen=True)
class Room:
    """What there is: bytes of memory for the process, bytes on the disks of work and output.

    ``output`` is None where both are on one disk, which then holds one copy of the result.
    """

    memory: float
    work: float
    output: float | None

    @classmethod
    def here(cls, work: Path, out: Path) -> Room:
        """Of this machine, with these folders, which need not exist."""
        apart = None if same_disk(work, out) else float(available_disk(out))
        return cls(float(available_memory()), float(available_disk(work)), apart)

    def lacks(self, estimate: Estimate) -> list[str]:
        """One phrase for each thing that does not fit."""
        found = []
        stage, peak = estimate.peak
        if peak > self.memory:
            found.append(
                f"needs {gib(peak)} of memory (stage {stage}), {gib(self.memory)} are available"
            )
        if estimate.disk.work > self.work:
            found.append(
                f"needs {gib(estimate.disk.work)} of disk in the work folder, "
                f"{gib(self.work)} are free"
            )
        if self.output is not None and estimate.disk.output > self.output:
            found.append(
                f"needs {gib(estimate.disk.output)} of disk for the result, "
                f"{gib(self.output)} are free"
            )
        return found


def estimate(
    description: Description,
    *,
    held: float | None = None,
    rates: Mapping[str, float] | None = None,
    characters: tuple[int, int] = (0, 0),
) -> Estimate:
    """What a run needs.

    Args:
        description: the run.
        held: bytes that the process holds before it; None is what this one holds now.
        rates: seconds an operation of each kind takes; None estimates no time.
        characters: of the calibration and of the evaluation text, where they are still to be read.
    """
    held = held_memory() if held is None else held
    work = operations(description, characters=characters)
    times = None if rates is None else seconds(work, rates)
    longest = max(characters, default=0)
    peaks = peak_by_stage(description, tokenise=TOKENISE_BYTES * longest)
    saves = True
    if times is not None and description.recipe.trains:
        # The state of a window is saved inside an epoch only where its training takes this long.
        saves = times["train"] / len(description.schedule) > SAVE_SECONDS
    return Estimate(
        {stage: held + peak for stage, peak in peaks.items()},
        work,
        times,
        disk(description, saves=saves),
    )


# Bytes a character that tokenising takes: the text, its tokens as Python numbers, their offsets.
TOKENISE_BYTES = 40


Change = dict[str, dict[str, Any] | None]


def changes(recipe: Recipe) -> Iterator[tuple[str, Change]]:
    """Settings that need less, as an option and as changes by section; smallest change first.

    A section that is None is left out.
    """
    if recipe.trains:
        batch, window = recipe.training.batch, recipe.objective.window
        while batch > 1:
            batch //= 2
            yield f"--set training.batch={batch}", {"training": {"batch": batch}}
        if recipe.end_to_end is not None:
            batch = recipe.end_to_end.batch
            while batch > 1:
                batch //= 2
                yield f"--set end_to_end.batch={batch}", {"end_to_end": {"batch": batch}}
            yield "--set end_to_end=null", {"end_to_end": None}
        solver = recipe.solver
        if isinstance(solver, TrainedRounding) and solver.parameter == "full":
            yield "--set solver.parameter=low_rank", {"solver": {"parameter": "low_rank"}}
        if len(recipe.objective.ahead) > 1:
            yield '--set "objective.ahead=[1]"', {"objective": {"ahead": [1.0]}}
        while window > 1 and recipe.objective.largest is None:
            window -= 1
            overlap = min(recipe.objective.overlap, window - 1)
            option = f"--set objective.window={window}"
            if overlap != recipe.objective.overlap:
                option += f" --set objective.overlap={overlap}"
            yield option, {"objective": {"window": window, "overlap": overlap}}
    samples, length = recipe.calibration.samples, recipe.calibration.length
    while samples // 2 >= FEWEST:
        samples //= 2
        yield f"--samples {samples}", {"calibration": {"samples": samples}}
    while length // 2 >= SHORTEST:
        length //= 2
        yield f"--length {length}", {"calibration": {"length": length}}
    windows = recipe.evaluation.windows
    if windows > 1:
        yield "--set evaluation.windows=1", {"evaluation": {"windows": 1}}
        yield "--set evaluation.windows=0", {"evaluation": {"windows": 0}}


def changed(recipe: Recipe, *updates: Change) -> Recipe:
    """A recipe with sections changed as ``changes`` says."""
    data = recipe.model_dump(mode="json")
    for update in updates:
        for section, values in update.items():
            if values is None:
                data[section] = None
            else:
                data[section].update(values)
    return Recipe.parse(data, recipe.name)


def advice(description: Description, room: Room, held: float) -> str | None:
    """The option, or the options, with which a run fits; None if none of those tried does."""

    def fits(*updates: Change) -> bool:
        recipe = changed(description.recipe, *updates)
        return not room.lacks(estimate(with_recipe(description, recipe), held=held))

    options = list(changes(description.recipe))
    if not description.calibrated:
        options = [o for o in options if "calibration" not in o[1]]
    for option, update in options:
        if fits(update):
            return option
    # No setting alone: the least of each kind together.
    last = {
        tuple((section, *(values or ())) for section, values in update.items()): (option, update)
        for option, update in options
    }
    kept = list(last.values())
    if not kept or not fits(*(update for _, update in kept)):
        return None
    for item in list(kept):
        rest = [other for other in kept if other is not item]
        if fits(*(update for _, update in rest)):
            kept = rest
    return " ".join(option for option, _ in kept)


def refuse(
    description: Description, name: str, work: Path, out: Path, *, memory: bool = True
) -> None:
    """Refuse a run that does not fit.

    Args:
        description: the run.
        name: of the model, for the message.
        work: the work folder.
        out: the output folder.
        memory: look at memory too; False where tensors are on another device.

    Raises:
        InputError: what does not fit, and which setting would.
    """
    room, held = Room.here(work, out), held_memory()
    if not memory:
        room = replace(room, memory=math.inf)
    found = room.lacks(estimate(description, held=held))
    if found:
        help_ = hint(description, room, held)
        raise InputError(f"{name}: {'; '.join(found)}; {help_}, or start anyway with --no-check")


def hint(description: Description, room: Room, held: float) -> str:
    """What to do about a run that does not fit."""
    need = estimate(description, held=held)
    option = advice(description, room, held)
    found = [] if option is None else [f"it would fit with {option}"]
    if need.disk.work > room.work:
        found.append(f"give --work on a disk with {gib(need.disk.work)} free")
    if need.peak[1] > room.memory and option is None:
        found.append(
            f"no setting would make it fit: use a machine with {gib(need.peak[1])} of free memory"
        )
    if room.output is not None and need.disk.output > room.output:
        found.append(f"give --out on a disk with {gib(need.disk.output)} free")
    return ", or ".join(found)


def gib(size: float) -> str:
    """A size as people read it."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
