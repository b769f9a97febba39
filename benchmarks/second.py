"""The best recipes on a second model, Gemma-3-270M, against round to nearest and GPTQ there.

    python -m benchmarks.second --text wikitext2-test.txt --work DIR [--only "A;B"] [--seeds 0]

64 x 512 calibration tokens; perplexity over 16 windows of 2048 tokens of the text (a vocabulary of
262144 makes them slow), embedding and head in floating point. Its norms after o_proj and down_proj
keep the residual stream from being rotated: the recipes get what is exact on it. One result a row
and seed.
"""

from __future__ import annotations

from benchmarks.rows import Rows, Table, run

MODEL = "demo-gemma"
_A4 = ("activations.bits=4",)
ROWS: Rows = {
    "W4A16 rtn": ("rtn-w4a16-g64", ()),
    "W4A16 gptq": ("gptq-w4a16-g64", ()),
    "W4A16 cbq": ("cbq-w4a16", ()),
    "W4A16 best": ("best-w4a16", ()),
    "W4A4 rtn": ("rtn-w4a8-g64", _A4),
    "W4A4 gptq": ("gptq-w4a16-g64", ("activations={bits: 4}",)),
    "W4A4 crossquant": ("crossquant-w4a8-g64", _A4),
    "W4A4 cbq": ("cbq-w4a4", ()),
    "W4A4 best-plain": ("best-w4a4-plain", ()),
    "W4A4 best": ("best-w4a4", ()),
    "W4A4 best-e2e": ("best-w4a4-e2e", ()),
}

if __name__ == "__main__":
    run(Table("second", ROWS, samples=64, length=512, model=MODEL, windows=16), __doc__)
