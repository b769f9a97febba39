"""What each part of CBQ is worth: one table, two seeds, a part changed at a time.

    python -m benchmarks.ablation --text wikitext2-test.txt --work DIR [--only "A;B"] [--seeds 0,1]

SmolLM2, W4A16 in groups of 64, 32 x 512 calibration tokens, 3 epochs, windows without overlap
unless a row says otherwise; perplexity of the exported integers over 40 windows of 2048 tokens of
the text, embedding and head in floating point. One result a row and seed, so that a stopped
benchmark goes on where it was. Rows beyond CBQ's own parts are run when they are named.
"""

from __future__ import annotations

from benchmarks.rows import Rows, Table, run

RTN = "solver.start={kind: rtn, clip: mse}"
BLOCKWISE = ("objective.window=1",)
ADAROUND = ("solver.mode=sigmoid", RTN)
LORA = ("solver.parameter=low_rank", RTN)
UNJUDGED = ("transforms=[{kind: cfp, activations: false, judge: false}]",)
LITERAL = ("solver.mode=sigmoid", "solver.base=zero", *LORA)

# Of the windows; the end-to-end stage has its own epochs.
SETTINGS = ("training.epochs=3", "objective.overlap=0")
# What the others change one thing of.
BASE = "windows of 2"

# Name -> preset, changes. The first rows build up from round to nearest.
PARTS: Rows = {
    "rtn": ("rtn-w4a16-g64", ("solver.clip=mse",)),
    "gptq": ("gptq-w4a16-g64", ()),
    "block-wise, from rtn": ("cbq-w4a16", (*BLOCKWISE, RTN)),
    "block-wise": ("cbq-w4a16", BLOCKWISE),
    BASE: ("cbq-w4a16", ()),
    "windows of 3": ("cbq-w4a16", ("objective.window=3",)),
    "windows of 4": ("cbq-w4a16", ("objective.window=4",)),
    "windows of 2, overlap 1": ("cbq-w4a16", ("objective.overlap=1",)),
    "windows of 4, overlap 2": ("cbq-w4a16", ("objective.window=4", "objective.overlap=2")),
    "expanding ends": ("cbq-w4a16", ("objective.expand=ends",)),
    "homologous": ("cbq-w4a16", ("objective.homologous=1.0",)),
    # The next three start from round to nearest too.
    "windows of 2, from rtn": ("cbq-w4a16", (RTN,)),
    "AdaRound": ("cbq-w4a16", ADAROUND),
    "LoRA-Rounding, straight-through": ("cbq-w4a16", LORA),
    "LoRA-Rounding, literal": ("cbq-w4a16", LITERAL),
    "CFP": ("cbq-w4a16", ("transforms=[{kind: cfp, activations: false}]",)),
    "CFP, unjudged": ("cbq-w4a16", UNJUDGED),
    "KL": ("cbq-w4a16", ("objective.kl=1.0",)),
    "steps fixed": ("cbq-w4a16", ("solver.steps=false",)),
}
# Beyond CBQ's parts: run when they are named. The full budget is a row of benchmarks.low_bits.
BEYOND: Rows = {
    "mean norm": ("cbq-w4a16", ("objective.norm=mean",)),
    "token norm": ("cbq-w4a16", ("objective.norm=token",)),
    "metric of the predictions": ("cbq-w4a16", ("objective.metric=fisher",)),
    "norms": ("cbq-w4a16", ("norms=true",)),
    "end to end": ("cbq-w4a16", ("end_to_end.epochs=1",)),
    "look-ahead of two": ("cbq-w4a16+cl", ()),
    "expansion": ("cbq-w4a16+sde", ()),
    "rotated": ("cbq-w4a16+rotate", ()),
    "8 bits, round to nearest": ("rtn-w8a16", ("embedding=null", "head=null")),
    "8 bits, CFP unjudged": ("rtn-w8a16", ("embedding=null", "head=null", *UNJUDGED)),
    "AWQ's scales": ("cbq-w4a16", ("transforms=[{kind: awq_scale}]",)),
    "everything at once": ("cbq-w4a16+union", ()),
}
ROWS: Rows = {**PARTS, **BEYOND}
LONG = tuple(BEYOND)


if __name__ == "__main__":
    run(Table("ablation", ROWS, samples=32, length=512, settings=SETTINGS, long=LONG), __doc__)
