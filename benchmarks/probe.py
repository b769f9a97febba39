"""What a change is worth in the first blocks, before hours go into a row of a table.

    python -m benchmarks.probe --work DIR [--only "RECIPE SETTING SETTING;RECIPE"] [--seeds 0]

SmolLM2, the budget of ``benchmarks.cqe``, the first 8 of 30 blocks quantized and the others in
floating point; loss over 12 windows of 2048 tokens of the embedded evaluation text, which no table
is about, so that settings may be chosen on it. Exported integers. A row is a recipe and settings;
those that were tried are listed here, others can be named. One result a row and seed.
"""

from __future__ import annotations

from benchmarks.cqe import BUDGET, PARTS, first
from benchmarks.rows import Table, run, split

BLOCKS = 8
_PLAIN = 'transforms=[] activations={"bits":8}'
_AWQ, _DUQUANT = '{"kind":"awq_scale"}', '{"kind":"duquant"}'
_TURNED = f'activations={{"bits":8}} transforms=[{_DUQUANT}]'
_ROTATED = 'activations={"bits":8} transforms=[{"kind":"rotate"}]'
ROWS = (
    # The parts of CQE+ on 2-bit weights, where they have the most to do; then the weights
    # themselves, trained with the same budget.
    *(f"{PARTS}{addon}" for addon in ("", "+sde", "+cl", "+sde+cl", "+lsi")),
    *(f'{PARTS} solver.expansion={{"kind":"band","width":{k}}}' for k in (2, 4, 8, 16, 32)),
    f"{PARTS}+cl111",
    f"{PARTS}+cl001",
    f"{PARTS}+cl objective.ahead_share=1",
    f"{PARTS}+aug",
    *(f"{PARTS}+weights training.rounding={rate}" for rate in ("3e-2", "1e-2")),
    f"{PARTS}+weights+cl training.rounding=3e-2",
    *(f"cbq-w2a16{addon} training.epochs=2" for addon in ("", "+sde", "+weights")),
    # All that trains at once, and windows of blocks alone.
    "best-w4a4 training.epochs=2",
    "best-w4a4+union training.epochs=2",
    # DuQuant: what training does to it, what its 4-bit inputs cost, other settings of the add-ons.
    "duquant-w4a4",
    "duquant-w4a4 training.epochs=0",
    "duquant-w4a4 activations.bits=8 training.epochs=0",
    *(
        f"duquant-w4a4+sde+cl{how}"
        for how in ("", " objective.ahead_share=1", " training.expansion=1e-2")
    ),
    "prefixquant-w4a4",
    "prefixquant-w4a4+cl001",
    "prefixquant-w4a4 solver.parameter=none",
    "prefixquant-w4a4+sde+cl solver.parameter=none",
    "cbq-w3a16 training.epochs=2",
    "cbq-w3a16+cl training.epochs=2",
    # CrossQuant's fold with and without training, and neither.
    *(f"cbq-w4a8 training.epochs={epochs}" for epochs in (0, 2)),
    f"cbq-w4a8 training.epochs=2 {_PLAIN}",
    "crossquant-w4a8-g64",
    f"crossquant-w4a8-g64 {_PLAIN}",
    # What lowers outliers at 4 bits, at 8.
    "best-w4a4-plain training.epochs=2 activations.bits=8",
    f"best-w4a4-plain training.epochs=2 {_ROTATED}",
    "best-w4a4 training.epochs=2 activations.bits=8",
    f"best-w4a8 training.epochs=2 {_TURNED}",
    # Rotations and scales of 2-bit weights, and of 3.
    "cbq-w2a16+rotate training.epochs=2",
    f"cbq-w2a16 training.epochs=2 transforms=[{_AWQ}]",
    f"cbq-w2a16 training.epochs=2 transforms=[{_DUQUANT}]",
    f"cbq-w2a16 training.epochs=2 transforms=[{_AWQ},{_DUQUANT}]",
    f"cbq-w3a16 training.epochs=2 transforms=[{_AWQ},{_DUQUANT}]",
)
TABLE = Table(
    "probe",
    {row: split(row) for row in ROWS},
    samples=64,
    length=512,
    settings=(*BUDGET, first(BLOCKS)),
    windows=12,
    embedded=True,
)

if __name__ == "__main__":
    run(TABLE, __doc__)
