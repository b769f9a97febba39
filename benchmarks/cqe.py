"""What CQE+ adds to the methods that it plugs into, and each of its parts.

    python -m benchmarks.cqe --text wikitext2-test.txt --work DIR [--only "A;B"] [--seeds 0,1]

SmolLM2, 64 x 512 calibration tokens, 4 epochs, at three times the presets' rates, which are those
of 20 epochs over four times the tokens; perplexity over 40 windows of 2048 tokens of the text,
embedding and head in floating point. Rows of kind "online" are executed by crossbit's own
loader. One result a row and seed, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

from benchmarks.rows import Rows, Table, run

BASES = (
    "omniquant-w4a4",
    "omniquant-w4a4-channel",
    "duquant-w4a4",
    "duquant-w4a4-channel",
    "prefixquant-w4a4",
    "prefixquant-w4a4-channel",
    "omniquant-w3a16",
    "omniquant-w2a16",
)
ADDONS = ("", "+sde", "+cl", "+sde+cl")
PARTS = "omniquant-w2a16"


def _wide(kind: str, width: int) -> tuple[str, ...]:
    return (f"solver.expansion={{kind: {kind}, width: {width}}}",)


ROWS: Rows = {
    **{f"{base}{addon}": (f"{base}{addon}", ()) for base in BASES for addon in ADDONS},
    # The parts, on 2-bit weights, where they have the most to do.
    f"{PARTS}+lsi": (f"{PARTS}+lsi", ()),
    **{f"{PARTS} band {k}": (PARTS, _wide("band", k)) for k in (2, 4, 16, 32)},
    f"{PARTS} blocks 16": (PARTS, _wide("blocks", 16)),
    f"{PARTS} square 128": (PARTS, _wide("square", 128)),
    f"{PARTS} all of B": (PARTS, _wide("full", 0)),
    f"{PARTS} ahead 1,1,1": (PARTS, ("objective.ahead=[1, 1, 1]",)),
    f"{PARTS} ahead 0,0,1": (PARTS, ("objective.ahead=[0, 0, 1]",)),
    f"{PARTS} ahead 1,1": (PARTS, ("objective.ahead=[1, 1]",)),
    # The weights themselves, trained with the same budget.
    f"{PARTS} all weights": (PARTS, ("solver.parameter=full", "solver.reach=100")),
    f"{PARTS} all weights+cl": (
        f"{PARTS}+cl",
        ("solver.parameter=full", "solver.reach=100"),
    ),
}
BUDGET = (
    "training.epochs=4",
    *("training.range=3e-2", "training.expansion=3e-2", "training.let=15e-3"),
)

if __name__ == "__main__":
    run(
        Table("cqe", ROWS, samples=64, length=512, settings=BUDGET),
        __doc__,
    )
