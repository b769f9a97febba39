"""Tables of recipes and changes: a row is quantized, evaluated on a text, and removed.

One result a row and seed, so that a stopped benchmark goes on where it was: in the middle of a row
too, from what its work folder holds.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import crossbit
from benchmarks.peer_folders import bits_per_weight
from benchmarks.quantizing import quantized
from benchmarks.store import once, once_among
from crossbit.evaluation.statistics import paired_loss, perplexity

WINDOWS = 40
# What a row is: a preset (add-ons included), and settings.
Rows = Mapping[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Table:
    """Rows with a common budget.

    Attributes:
        name: of the table, the beginning of its results' names.
        rows: its rows.
        samples, length: calibration sequences and their tokens, unless a row says otherwise.
        settings: of every row.
        model: that is quantized.
        windows: of 2048 tokens, that are evaluated.
        long: rows that are run only when they are named, of which some take hours.
        embedded: evaluated on the embedded text, so that settings may be chosen; rows that are not
            listed can be named then, as a preset and settings.
    """

    name: str
    rows: Rows
    samples: int
    length: int
    settings: tuple[str, ...] = ()
    model: str = "demo"
    windows: int = WINDOWS
    long: tuple[str, ...] = ()
    embedded: bool = False

    @property
    def original(self) -> str:
        """The name of the result of the model as it is."""
        text = "embedded-" if self.embedded else ""
        return f"{self.model}-original-{text}{self.windows}"

    def row(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Preset and settings of a row.

        Raises:
            KeyError: not listed.
        """
        return split(name) if self.embedded else self.rows[name]


def split(row: str) -> tuple[str, tuple[str, ...]]:
    """Preset and settings of a row that is named by them."""
    preset, *changes = row.split()
    return preset, tuple(changes)


def result_name(table: str, row: str, seed: int) -> str:
    """The name of a row's result, and of its folder while it is made."""
    return f"{table}-{re.sub(r'[^a-z0-9.+]+', '-', row.lower()).strip('-')}-seed{seed}"


def measure(args: argparse.Namespace, table: Table, row: str, seed: int) -> dict[str, Any]:
    """Quantize, evaluate the folder, remove it."""
    preset, changes = table.row(row)
    out: Path = args.work / result_name(table.name, row, seed)
    # Settings, so that a row can have its own.
    budget = (f"calibration.samples={table.samples}", f"calibration.length={table.length}")
    # Work that is refused stays where it is: the message says what to do, and it may be hours.
    settings = (*budget, *table.settings, *changes)
    took, made = quantized(table.model, preset, settings, out, seed=seed, resume=True)
    found = crossbit.evaluate(str(out), text=args.text, windows=table.windows)["perplexity"]
    bits = bits_per_weight(out)
    shutil.rmtree(out)
    return {
        "row": row,
        "seed": seed,
        "model": table.model,
        "recipe": preset,
        "kind": made["kind"],
        "settings": [*table.settings, *changes],
        "samples": made["recipe"]["calibration"]["samples"],
        "length": made["recipe"]["calibration"]["length"],
        "bits_per_weight": bits,
        "resumed": took["resumed"],
        "losses": found["losses"],
        "perplexity": found["value"],
        "stderr": found["stderr"],
        "seconds": took["seconds"],
        "cpu_seconds": took["cpu_seconds"],
        "peak_rss": took["peak_rss"],
        "load_before": took["load_before"],
        "windows": [
            {key: window[key] for key in ("blocks", "before", "after", "events", "seconds")}
            for window in made["training"]
        ],
    }


def run(table: Table, doc: str | None) -> None:
    """The command line of a table."""
    parser = argparse.ArgumentParser(description=doc)
    if not table.embedded:
        helped = "WikiText-2 raw test, as a file or wikitext2"
        parser.add_argument("--text", required=True, help=helped)
    parser.add_argument("--work", type=Path, required=True, help="folder for quantized models")
    parser.add_argument("--only", help="rows, separated by semicolons; default: all")
    parser.add_argument("--seeds", default="0" if table.embedded else "0,1")
    parser.set_defaults(text=None)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    original = once(
        table.original,
        f"crossbit evaluate {table.model} --windows {table.windows}",
        lambda: crossbit.evaluate(table.model, text=args.text, windows=table.windows)["perplexity"],
    )["losses"]
    usual = [row for row in table.rows if row not in table.long]
    for seed in map(int, args.seeds.split(",")):
        for row in args.only.split(";") if args.only else usual:
            name = result_name(table.name, row, seed)
            command = f"python -m benchmarks.{table.name}"
            found = once_among(args.work, name, command, partial(measure, args, table, row, seed))
            if found is None:
                continue
            paired = paired_loss(found["losses"], original)
            value = perplexity(found["losses"]).value
            print(
                f"{row} (seed {seed}): {value:.3f}, {100 * paired.value:+.2f} % "
                f"+- {100 * paired.stderr:.2f}, {found['seconds']:.0f} s",
                flush=True,
            )
