"""What CQE+ adds to the methods that it plugs into, and each of its parts.

    python -m benchmarks.cqe --text wikitext2-test.txt --work DIR [--only "A;B"] [--seeds 0,1]

SmolLM2, 64 x 512 calibration tokens, 4 epochs of batches of two: 112 steps a block where the
presets' rates, constant, are for 20 epochs over eight times the tokens. The rates here are higher
and fall to zero, chosen on held-out calibration sequences for the first two blocks (``BUDGET``).
Perplexity over 40 windows of 2048 tokens of the text, embedding and head in floating point. Rows of
kind "online" are executed by crossbit's own loader. One result a row and seed, so that a stopped
benchmark goes on where it was. The rows with the original settings take hours and are run when they
are named.
"""

from __future__ import annotations

from benchmarks.rows import Rows, Table, run

BASES = ("omniquant-w2a16", "omniquant-w3a16", "omniquant-w4a4", "duquant-w4a4", "prefixquant-w4a4")
PARTS = "omniquant-w2a16"
ADDONS = ("", "+sde+cl")
# Of the weights themselves; the first is the best of the first two blocks, see ``BUDGET``.
RATES = ("3e-2", "1e-2", "1e-1")
LAYERS = 30
LONG = tuple(f"{PARTS}{addon}, original settings" for addon in ADDONS)
ORIGINAL = (
    *("calibration.samples=128", "calibration.length=2048"),
    *("training.epochs=20", "training.batch=1", "training.schedule=constant"),
    *("training.range=1e-2", "training.expansion=1e-2", "training.let=5e-3"),
)


def first(blocks: int) -> str:
    """The setting that leaves all blocks but the first ones as they are."""
    return f"ignore=[{', '.join(f'layers.{index}' for index in range(blocks, LAYERS))}]"


# The same for the first blocks alone, the others in floating point: an hour in place of fourteen.
FIRST = 2
FEW: Rows = {
    f"{PARTS}{addon}{how}, first {FIRST} blocks": (f"{PARTS}{addon}", (*changes, first(FIRST)))
    for how, changes in (("", ()), (", original settings (128 x 2048, 20 epochs)", ORIGINAL))
    for addon in ADDONS
}


def _wide(kind: str, width: int) -> tuple[str, ...]:
    return (f"solver.expansion={{kind: {kind}, width: {width}}}",)


# With fewer of the sequences ahead than the add-on sends: cheaper and noisier.
_FEWER = "objective.ahead_share=0.5"
HALF: Rows = {
    **{
        f"{base}{addon}, half ahead": (f"{base}{addon}", (_FEWER,))
        for base in BASES
        for addon in ("+cl", "+sde+cl")
    },
    f"{PARTS} band 32+cl, half ahead": (f"{PARTS}+cl", (*_wide("band", 32), _FEWER)),
}
# With all of them, as published: slower than what the add-on may cost.
ALL: Rows = {
    f"{base}{addon}, all ahead": (f"{base}{addon}", ("objective.ahead_share=1",))
    for base, addon in ((PARTS, "+cl"), *((base, "+sde+cl") for base in BASES))
}
# PrefixQuant's steps trained and nothing else: the preset trains the rounding of every weight too.
_SCALES = ("solver.parameter=none",)
SCALES: Rows = {
    f"prefixquant-w4a4{addon}, scales alone": (f"prefixquant-w4a4{addon}", _SCALES)
    for addon in ADDONS
}
# Steps of 4-bit weights are a fifth of those of 2-bit ones, whose rates ``BUDGET`` has: with these
# the first steps raise DuQuant's training loss five- to ninefold, and the rest make up for that.
LOWER_RATES = ("training.expansion=1e-2", "training.range=3e-2", "training.warmup=0.1")
LOWER: Rows = {
    f"duquant-w4a4{addon}, lower rates": (f"duquant-w4a4{addon}", LOWER_RATES) for addon in ADDONS
}
AHEAD = ("", ", half ahead", ", all ahead")
# A base, and what is compared with it: all that it has, and both add-ons.
PAIRS = (
    *((base, f"{base}{ADDONS[1]}{ahead}") for base in BASES for ahead in AHEAD),
    tuple(SCALES),
    # Against the base at its own rates as well as at the lower ones.
    ("duquant-w4a4", tuple(LOWER)[1]),
    tuple(LOWER),
    tuple(FEW)[: len(ADDONS)],
    tuple(FEW)[len(ADDONS) :],
)
# What the add-ons are worth comes first, then the parts, on 2-bit weights, where they have the most
# to do, then the weights themselves, trained with the same budget.
ROWS: Rows = {
    **{f"{base}{addon}": (f"{base}{addon}", ()) for base in BASES for addon in ADDONS},
    **SCALES,
    **LOWER,
    f"{PARTS}+sde": (f"{PARTS}+sde", ()),
    f"{PARTS}+cl": (f"{PARTS}+cl", ()),
    **{
        f"{PARTS}+weights, rate {rate}": (f"{PARTS}+weights", (f"training.rounding={rate}",))
        for rate in RATES
    },
    f"{PARTS}+weights+cl": (f"{PARTS}+weights+cl", (f"training.rounding={RATES[0]}",)),
    f"{PARTS}+lsi": (f"{PARTS}+lsi", ()),
    **{f"{PARTS} band {k}": (PARTS, _wide("band", k)) for k in (2, 4, 8, 16, 32, 128)},
    f"{PARTS}+cl111": (f"{PARTS}+cl111", ()),
    f"{PARTS}+cl001": (f"{PARTS}+cl001", ()),
    f"{PARTS}+aug": (f"{PARTS}+aug", ()),
    "omniquant-w4a4+weights": ("omniquant-w4a4+weights", (f"training.rounding={RATES[0]}",)),
    "prefixquant-w4a4-static": ("prefixquant-w4a4-static", ()),
    # The other bases with one add-on alone, and W4A4 with a scale a channel.
    **{f"{base}{addon}": (f"{base}{addon}", ()) for base in BASES[1:] for addon in ("+sde", "+cl")},
    **{
        f"{base}-channel{addon}": (f"{base}-channel{addon}", ())
        for base in BASES[2:]
        for addon in ADDONS
    },
    # As published: 20 epochs over eight times the tokens, at the presets' rates.
    **{row: (f"{PARTS}{addon}", ORIGINAL) for row, addon in zip(LONG, ADDONS, strict=True)},
    **FEW,
    **HALF,
    **ALL,
}
# Held-out losses of blocks 0 and 1, as ``crossbit quantize demo --recipe NAME --samples 64 --length
# 512 --set training.epochs=4 --set training.batch=2`` and rates print them: fake quantization, no
# look-ahead, rates falling to zero unless said otherwise.
#   omniquant-w2a16, ranges from 3e-2, constant: .0805, .0779; from 3e-2: .120, .126; 1e-1: .0756,
#   .0729; 2e-1: .0723, .0702. The others have ranges from 2e-1.
#   with a band of 8, from 1e-2: .0691, .0664; 3e-2: .0674, .0647; 1e-1: .0668, .0640
#   with a band of 32, from 3e-2: .0643, .0614; 1e-1: .0640, .0602
#   with a band of 128, from 1e-2: .0653, .0624; 3e-2: .0614, .0578; 1e-1: .0604, .0562
#   with all of B, from 3e-2: .0586, .0549; 1e-1: .0593, .0552; 3e-1: .0907, .101
#   with the weights themselves, from 1e-2: .0428, .0396; 3e-2: .0383, .0364
#   duquant-w4a4: .0212, .0209 (ranges from 3e-2: .0211, .0212)
#   with a band of 8, from 1e-2: .0208, .0204; 3e-2: .0207, .0202; 1e-1: .0213, .0206
#   with a band of 32, from 3e-2: .0203, .0199
#   with a band of 128, from 3e-2: .0199, .0192; 1e-1: .0207, .0257
#   with all of B, from 3e-2: .0194, .0185
# duquant-w4a4+sde+cl, with the look-ahead, another loss (block 0 before training: .0372):
#   from 3e-2, all sequences ahead: .0350, .0406; from 1e-2: .0325, .0396; from 3e-3: .0331, .0408
#   from 1e-2 with ranges from 3e-2: .0318, .0400; the same after a warm-up of .1: .0314, .0391
BUDGET = (
    *("training.epochs=4", "training.batch=2", "training.schedule=linear"),
    *("training.range=2e-1", "training.expansion=3e-2", "training.let=3e-2"),
)

if __name__ == "__main__":
    run(
        Table(
            "cqe", ROWS, samples=64, length=512, settings=BUDGET, long=(*LONG, *FEW, *HALF, *ALL)
        ),
        __doc__,
    )
