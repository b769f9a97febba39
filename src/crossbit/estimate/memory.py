"""Peak memory of every stage in bytes, beyond what the process holds before it begins.

Anonymous and shared memory only: pages of mapped files can be dropped by the kernel and do not
count. A formula lists what is alive at the stage's worst moment, in the terms of the code that it
names; numbers that no code states are constants with a word on what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping

from crossbit.estimate.memory_blocks import (
    DEQUANTIZE,
    DOUBLE,
    FLOAT,
    SCANNED,
    entering,
    forward,
    gptq_memory,
    loading_ends,
    opening,
    solving,
)
from crossbit.estimate.memory_training import closing, live_beside, sensing, training, tuning
from crossbit.estimate.shapes import BlockShape, Description, OutsideShape, head_solver
from crossbit.evaluation import perplexity
from crossbit.export.artifact import ROWS as END_ROWS

MIB = 1 << 20

# -- what no formula gives; measured on Linux with the versions of constraints.txt ----------------
# Code and tables of the libraries that are imported for finishing, and then for verification
# (transformers' model classes, compressed-tensors), beyond those of the loop.
FINISH_LIBRARIES = 25 * MIB
VERIFY_LIBRARIES = 100 * MIB
# Freed blocks that the allocator has not given back, and the small objects of the run itself.
SLACK = 24 * MIB

STAGES = (
    *("prepare", "open", "solve", "sensitivity", "train", "close", "end to end", "head"),
    *("assemble", "evaluate", "verify"),
)


def peak_by_stage(description: Description, *, tokenise: float = 0.0) -> dict[str, float]:
    """Bytes that each stage needs at its worst moment, beyond those before the run.

    Args:
        description: the run.
        tokenise: bytes that tokenising the texts takes, if that is still to come.
    """
    d = description
    kinds = list(dict.fromkeys(d.blocks))
    live = live_beside(d)
    found = {
        "prepare": max(tokenise, SCANNED * (d.itemsize + DOUBLE)),
        "open": max(entering(d), *(live + opening(d, b) for b in kinds)),
        "solve": max(live + solving(d, b) for b in kinds),
        "close": max(live + closing(d, b) for b in kinds),
        "head": _head(d),
        "assemble": FINISH_LIBRARIES,
        "verify": FINISH_LIBRARIES + VERIFY_LIBRARIES + _verify(d),
    }
    if d.sensing:
        found["sensitivity"] = sensing(d)
    if d.recipe.trains:
        found["train"] = training(d)
    if d.end_to_end is not None:
        found["end to end"] = tuning(d, d.end_to_end)
    if d.windows:
        found["evaluate"] = FINISH_LIBRARIES + max(tokenise, _evaluate(d))
    return {stage: found[stage] + SLACK for stage in STAGES if stage in found}


# -- outside the blocks -------------------------------------------------------------------------


def _head(d: Description) -> float:
    """Embedding and head in their exported form."""
    total = float(d.itemsize * d.outside_weights)
    ends = [end for end in (d.embedding, d.head) if end is not None]
    codes = sum(end.weights for end in ends if end.stored)
    peak = max((end.weights for end in ends if end.stored), default=0)  # joining the parts
    solver = head_solver(d.recipe)
    rows = float(END_ROWS * d.width * (FLOAT + DEQUANTIZE))
    if solver is not None and d.samples:
        last = d.head or d.embedding
        rows = FLOAT * d.width**2 + FLOAT * END_ROWS * d.width
        rows += gptq_memory(d.width, min(END_ROWS, last.rows), many=False)
    return max(loading_ends(d), total + codes + max(peak, rows))


def _reloaded(end: OutsideShape, itemsize: int, *, twice: bool) -> float:
    """Reading an embedding or head of the export; a tied one is compared with its twin."""
    if end.stored is None:
        return float(itemsize * end.weights)
    return float(DEQUANTIZE + (FLOAT if twice else 0)) * end.weights


def _loading_outside(d: Description, itemsize: int) -> float:
    """Worst moment of loading what is outside the blocks from the export."""
    first = _reloaded(d.embedding, itemsize, twice=d.head is None)
    if d.head is None:
        return max(first, (FLOAT + itemsize) * d.embedding.weights)
    return max(first, itemsize * d.embedding.weights + _reloaded(d.head, itemsize, twice=False))


def _loading_block(d: Description, block: BlockShape, itemsize: int) -> float:
    """Reading a block of the export and installing its layers, beyond the finished block."""
    unpacked = sum(layer.weights for layer in block.planned)
    largest = max((layer.weights for layer in block.planned), default=0)
    return unpacked + (DEQUANTIZE + itemsize) * largest


def _evaluate(d: Description) -> float:
    outside = d.itemsize * d.outside_weights
    hidden = d.itemsize * d.windows * d.window_length * d.width
    tokens = max(1, perplexity.TOKENS_AT_ONCE // d.window_length) * d.window_length
    tokens = min(tokens, d.windows * d.window_length)
    block = 0.0
    for b in dict.fromkeys(d.blocks):
        own = d.itemsize * b.parameters
        ran = forward(d, b, tokens, d.window_length, d.itemsize)
        block = max(block, own + max(_loading_block(d, b, d.itemsize), ran))
    held = min(perplexity.LOGITS_AT_ONCE, d.window_length * d.vocabulary)
    logits = held * (d.itemsize + 2 * FLOAT)
    return max(
        _loading_outside(d, d.itemsize),
        outside + 2 * hidden,
        outside + hidden + block,
        outside + hidden + logits,
    )


def _verify(d: Description) -> float:
    """Our own model in float32, a block at a time, then the one that transformers loads."""
    tokens = d.verify_length
    logits = float(FLOAT * tokens * d.vocabulary)
    outside = float(FLOAT * d.outside_weights)
    ran, block = 0.0, 0.0
    for b in dict.fromkeys(d.blocks):
        passing = float(FLOAT * tokens * d.width + tokens * d.heads * tokens * 3 * FLOAT)
        passing += forward(d, b, tokens, tokens, FLOAT)
        block = max(block, FLOAT * b.parameters + max(_loading_block(d, b, FLOAT), passing))
        ran = max(ran, passing)
    own = max(_loading_outside(d, FLOAT), outside + block, outside + 2 * logits)
    if d.recipe.kind != "plain":
        return own
    # Theirs as it is stored, and our logits; its layers are made dense one at a time.
    head = d.head or d.embedding
    kept = float(logits + FLOAT * d.outside)
    for end in (d.embedding, d.head):
        if end is not None:
            kept += FLOAT * end.weights if end.stored is None else end.stored
    if d.head is None and d.embedding.stored is not None:
        kept += FLOAT * d.embedding.weights  # of a tied one, both copies
    kept += sum(_reloaded_block(d, b) for b in d.blocks)
    layer = DEQUANTIZE * max(b.largest for b in d.blocks)
    last = DEQUANTIZE * head.weights if head.stored is not None else 0
    # Its output beside ours, their difference, and that in float64.
    return max(
        own, kept + max(ran + layer, last, 2 * logits, FLOAT * last / DEQUANTIZE + 5 * logits)
    )


def _reloaded_block(d: Description, block: BlockShape) -> float:
    """What transformers keeps of a block: integers, and all else as float32.

    Dense are packed weights with zero points and experts, which are one tensor there.
    """
    total = float(FLOAT * block.unplanned)
    for layer in block.planned:
        dense = layer.share < 1 or (layer.packed and not d.recipe.weights.symmetric)
        total += FLOAT * layer.weights if dense else layer.stored + FLOAT * layer.scales
    return total


def total(stages: Mapping[str, float]) -> tuple[str, float]:
    """The stage with the highest peak, and that peak."""
    stage = max(stages, key=lambda name: stages[name])
    return stage, stages[stage]
