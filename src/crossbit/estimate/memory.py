"""Peak memory of every stage in bytes, beyond what the process holds before it begins.

Anonymous and shared memory only: pages of mapped files can be dropped by the kernel and do not
count. A formula lists what is alive at the stage's worst moment, in the terms of the code that it
names; numbers that no code states are constants with a word on what they stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crossbit.engine.fit import Task
from crossbit.engine.job import batch_of
from crossbit.engine.logits import TOKENS
from crossbit.engine.opening import FITTING_TOKENS, SAMPLE_TOKENS
from crossbit.engine.scale import SAMPLE_ROWS
from crossbit.estimate.disk import trained
from crossbit.estimate.shapes import (
    BlockShape,
    Description,
    GroupShape,
    LayerShape,
    OutsideShape,
    head_solver,
    wants_ranges,
    wants_sample,
)
from crossbit.evaluation import perplexity
from crossbit.export.artifact import ROWS as END_ROWS
from crossbit.objective import CHUNK_ELEMENTS
from crossbit.recipe import AwqScale, CrossFold, EndToEnd, Gptq, Smooth, Training
from crossbit.solvers.gptq import ROWS as GPTQ_ROWS
from crossbit.transforms.column_fit import MIN_TOKENS

FLOAT, DOUBLE = 4, 8
MIB = 1 << 20

# -- what no formula gives; measured on Linux with the versions of constraints.txt ----------------
# Code and tables of the libraries that are imported for finishing, and then for verification
# (transformers' model classes, compressed-tensors), beyond those of the loop.
FINISH_LIBRARIES = 25 * MIB
VERIFY_LIBRARIES = 100 * MIB
# Freed blocks that the allocator has not given back, and the small objects of the run itself.
SLACK = 24 * MIB
# Elements of a tensor that are looked at in one go by the check for NaN (models.checkpoint).
SCANNED = 1 << 22
# GPTQ's buffers of [K, GPTQ_ROWS]: target, working copy, codes, values, gradient and one product.
GPTQ_BUFFERS = 6
# K x K matrices beside H at GPTQ's worst moments: damped copy, factor, inverse and the float64 copy
# of its check; conditioned copy, factor and damped copy in the column loop.
FACTOR_MATRICES, LOOP_MATRICES = 5, 3
# Float32 copies of an element in flight: rounding on the grid and back in a search; a fold, whose
# product is made in float64; dequantization (values, values x scale).
ROUND_TRIP, FOLD, DEQUANTIZE = 13, 16, 8
# Elements as wide as the widest input that the fit of a factor keeps of a minibatch of tokens.
FIT_ROWS, FIT_BUFFERS = 896, 8
# Float32 copies of a chunk of logits in their divergence: both models', softmaxes, terms, one more.
DIVERGENCE = 6
# Float32 copies, at a decomposition's worst moment beyond its weight and its result, of the square
# of the weight's shorter side (LAPACK's space) and of the weight (its copy, factors before signs).
SVD_SQUARES, SVD_WEIGHTS = 4, 2

STAGES = (
    *("prepare", "open", "solve", "train", "close", "end to end", "head"),
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
    live = _live_beside(d)
    found = {
        "prepare": max(tokenise, SCANNED * (d.itemsize + DOUBLE)),
        "open": max(_enter(d), *(live + _open(d, b) for b in kinds)),
        "solve": max(live + _solve(d, b) for b in kinds),
        "close": max(live + _close(d, b) for b in kinds),
        "head": _head(d),
        "assemble": FINISH_LIBRARIES,
        "verify": FINISH_LIBRARIES + VERIFY_LIBRARIES + _verify(d),
    }
    if d.recipe.trains:
        found["train"] = _train(d)
    if d.end_to_end is not None:
        found["end to end"] = _refine(d, d.end_to_end)
    if d.windows:
        found["evaluate"] = FINISH_LIBRARIES + max(tokenise, _evaluate(d))
    return {stage: found[stage] + SLACK for stage in STAGES if stage in found}


# -- a block ------------------------------------------------------------------------------------


def _float32(d: Description, block: BlockShape) -> float:
    return FLOAT * block.parameters


def _tokens(d: Description) -> int:
    """Tokens that go through a block at once."""
    return min(d.samples, batch_of(d.length)) * d.length


def forward(d: Description, block: BlockShape, tokens: int, length: int, itemsize: int) -> float:
    """Activations alive at the widest place of a forward pass without gradients."""
    widest = max(
        (sum(layer.rows * layer.share for layer in g.layers) for g in block.groups if g.norm),
        default=0,
    )
    channels = max(g.columns * min(1.0, g.share) for g in block.groups)
    mlp = itemsize * (2 * widest + 2 * d.width)
    # A norm in float32: its input, the square or product, the result.
    norm = 3 * FLOAT * d.width
    total = max(mlp, norm)
    if any(layer.input_bits for layer in block.layers):
        # Codes of the input; integer products are int32, then float32.
        total += FLOAT * max(channels, widest) + FLOAT * channels
    if d.eager:
        total += d.heads * length * (2 * FLOAT + itemsize)
    return tokens * total


def _hessians(block: BlockShape) -> float:
    return sum(FLOAT * g.columns**2 for g in block.groups if g.hessian)


def _sample_rows(d: Description) -> int:
    if not wants_sample(d.recipe):
        return 0
    held = d.held * d.length
    return held // max(1, held // SAMPLE_TOKENS)


def _fits(d: Description) -> bool:
    return any(isinstance(t, CrossFold) and t.fit and t.alpha == "search" for t in d.recipe.folds)


def _fitting_rows(d: Description, group: GroupShape) -> int:
    if not _fits(d):
        return 0
    seen = (d.samples - d.held) * d.length
    wanted = max(FITTING_TOKENS, MIN_TOKENS * group.columns)
    return seen // max(1, -(-seen // wanted))


def _statistics(d: Description, block: BlockShape) -> float:
    """What stays of the inputs until the block is solved."""
    total = _hessians(block)
    for g in block.groups:
        rows = FLOAT * _sample_rows(d) + d.itemsize * _fitting_rows(d, g)
        total += g.share * g.columns * rows
    return total


def _enter(d: Description) -> float:
    """Embedding and head, loaded; the embedding is rounded a few rows at a time."""
    rows = END_ROWS * d.width * (FLOAT + DEQUANTIZE) if d.embedding.stored and d.samples else 0
    return d.itemsize * d.outside_weights + rows


def _open(d: Description, block: BlockShape) -> float:
    """load -> observe -> transform."""
    whole = _float32(d, block)
    checked = min(block.largest, SCANNED) * (FLOAT + DOUBLE)
    if not d.samples:
        return whole + checked
    copied = 2 * whole + d.itemsize * block.largest  # the copy that runs, before it is cast
    tokens = _tokens(d)
    channels = max(g.columns for g in block.groups)
    taken = 0.0
    if wants_ranges(d.recipe):
        # |x| in its dtype, in float32 and in float64.
        taken = tokens * channels * (d.itemsize + FLOAT + DOUBLE)
    if _hessians(block):
        taken = max(taken, tokens * channels * FLOAT)
    observed = (
        whole
        + d.itemsize * block.parameters
        + _statistics(d, block)
        + forward(d, block, tokens, d.length, d.itemsize)
        + taken
    )
    folded = whole + _statistics(d, block) + max((_fold(d, g) for g in block.groups), default=0.0)
    return max(copied, observed, folded if d.recipe.folds else 0.0)


def _fold(d: Description, group: GroupShape) -> float:
    """Search, fit and fold of a group's factor."""
    if not group.foldable or not any(layer.quantized for layer in group.layers):
        return 0.0
    rows = min(SAMPLE_ROWS, _sample_rows(d))
    columns = sum(layer.rows for layer in group.layers)
    largest = max(layer.weights for layer in group.layers)
    largest_rows = max(layer.rows for layer in group.layers)
    kept = FLOAT * group.columns * (2 * _sample_rows(d) + rows)
    if not any(isinstance(t, CrossFold | Smooth | AwqScale) for t in d.recipe.folds):
        return kept + FOLD * largest
    # References of all layers; a candidate's output, its difference and the float64 copy.
    search = FLOAT * rows * columns + ROUND_TRIP * largest
    search += rows * (largest_rows * (2 * FLOAT + DOUBLE) + group.columns * 5 * FLOAT)
    fit = 0.0
    if _fits(d):
        tokens = _fitting_rows(d, group)
        # Joined, gathered, and without the empty tokens; logarithms of all weights.
        kept += 2 * d.itemsize * tokens * group.columns
        fit = d.itemsize * tokens * group.columns + FLOAT * (group.weights + largest)
        fit += FIT_ROWS * group.columns * FIT_BUFFERS * FLOAT
    return kept + max(search, fit, FOLD * largest)


def _solve(d: Description, block: BlockShape) -> float:
    codes = sum(layer.weights + FLOAT * layer.scales for layer in block.planned)
    steps = [_solve_group(d, group) for group in block.groups]
    starts = 0.0
    for group in block.groups:
        for layer in group.layers:
            if layer.rounding is not None and isinstance(layer.solver, Gptq):
                starts += FLOAT * layer.weights
                # Dequantized, difference, product with H and quotient.
                steps.append(starts + 4 * FLOAT * layer.weights)
    # The starts are made when everything is solved; each peak is then one of the last group's.
    return _float32(d, block) + _statistics(d, block) + codes + max(steps, default=0.0)


def _solve_group(d: Description, group: GroupShape) -> float:
    peak = 0.0
    gptq = [layer for layer in group.layers if isinstance(layer.solver, Gptq)]
    for layer in group.layers:
        if layer.solver is None or layer in gptq:
            continue
        measured = DEQUANTIZE * layer.weights
        if wants_sample(d.recipe):
            measured += FLOAT * _sample_rows(d) * layer.rows * 2
        peak = max(peak, measured)
    if gptq:
        peak = max(peak, _gptq(group.columns, sum(x.rows for x in gptq), many=len(gptq) > 1))
        # The error: difference, its product with H and their product.
        peak = max(peak, 3 * FLOAT * max(x.weights for x in gptq))
    return peak


def _gptq(columns: int, rows: int, *, many: bool) -> float:
    """Beyond the weights and H: matrices of H's size, buffers of a part of the rows, errors."""
    square, weights = FLOAT * columns**2, columns * rows
    stacked = FLOAT * weights if many else 0.0
    part = FLOAT * GPTQ_BUFFERS * columns * min(rows, GPTQ_ROWS)
    loop = LOOP_MATRICES * square + part + weights
    # Dequantized (or zeros), difference, product with H; H's copies are still there.
    errors = LOOP_MATRICES * square + weights + 3 * FLOAT * weights
    # scale_fit and the factorisation come before there are codes.
    return stacked + max(FACTOR_MATRICES * square, loop, errors)


def _close(d: Description, block: BlockShape) -> float:
    codes = sum(layer.weights for layer in block.planned)
    stored = sum(layer.stored for layer in block.planned)
    largest = max((layer.weights for layer in block.planned), default=0)
    whole = _float32(d, block)
    if d.recipe.trains:
        whole = d.itemsize * block.other + _live(d, block)
    packing = 4.0 * largest
    if d.samples:
        packing = max(packing, (DEQUANTIZE + d.itemsize) * largest)
        run = d.itemsize * block.parameters + forward(d, block, _tokens(d), d.length, d.itemsize)
        if d.recipe.trains:  # the original block makes the target before
            run += _live(d, block)
        return max(whole + codes + stored + packing, run + codes + stored)
    return whole + codes + stored + packing


# -- training -----------------------------------------------------------------------------------


def _live_layer(layer: LayerShape) -> float:
    """A weight in training between windows: what is rounded, first codes, parameters, steps.

    And its singular directions, where it moves along them.
    """
    if not layer.quantized:
        return 0.0
    offset = layer.weights if layer.rounding is None else 0  # of a frozen layer, too
    parameters = offset + layer.parameters + layer.limits + layer.basis
    return FLOAT * layer.weights + layer.weights + FLOAT * (parameters + 2 * layer.scales)


def _moved(layers: Iterable[LayerShape]) -> float:
    """Float32 copies of the weights that move, kept while a step is made."""
    return sum(FLOAT * layer.weights for layer in layers if layer.directions)


def _pulled(layers: Iterable[LayerShape]) -> float:
    """Of the worst layer: gradients; where the weight moves, that at it, and U^T G."""

    def numbers(layer: LayerShape) -> int:
        moves = layer.weights if layer.directions else 0
        return layer.parameters + moves + layer.directions * layer.columns

    return float(FLOAT * max(map(numbers, layers), default=0))


def _decomposed(layer: LayerShape) -> float:
    """A singular value decomposition, beyond its weight and its result."""
    if not layer.directions:
        return 0.0
    return FLOAT * (SVD_SQUARES * min(layer.rows, layer.columns) ** 2 + SVD_WEIGHTS * layer.weights)


def _live(d: Description, block: BlockShape) -> float:
    return sum(map(_live_layer, block.layers)) + d.itemsize * block.other


def _live_beside(d: Description) -> float:
    """Other blocks of the window that are open while one is opened or closed."""
    if not d.recipe.trains:
        return 0.0
    return max(
        sum(sorted(_live(d, d.blocks[i]) for i in window.blocks)[1:]) for window in d.schedule
    )


def saved(d: Description, block: BlockShape) -> float:
    """Bytes a token that a block keeps for its gradient."""
    total = 2.0 * 2 * FLOAT * d.width  # two norms: float32 input and normalised value
    quantized = any(layer.input_bits for layer in block.layers)
    for g in block.groups:
        # What linear layers read; beside the unrounded input, where it is quantized.
        total += g.share * d.itemsize * g.columns * (2 if quantized and g.norm else 1)
        if g.norm:
            # Their outputs, and once more what the nonlinearity or the rotation makes of them.
            made = sum(layer.rows for layer in g.layers)
            total += g.share * d.itemsize * 1.5 * made
    if d.eager:
        total += d.heads * d.length * (FLOAT + 2 * d.itemsize)
    return total


def training_tokens(d: Description, training: Training) -> int:
    """Tokens that go through a window at once (``engine.fit``)."""
    at_once = max(1, Task.tokens // d.length)
    return min(at_once, training.batch) * d.length


def _logits(d: Description, *, gradient: bool) -> float:
    """Of a few tokens at a time: both models' and their gradient (``engine.logits``)."""
    elements = min(TOKENS, d.length) * d.vocabulary
    chunk = min(elements, max(CHUNK_ELEMENTS, d.vocabulary))
    return float(d.itemsize * (3 if gradient else 2) * elements + DIVERGENCE * FLOAT * chunk)


def _train(d: Description) -> float:
    tokens, worst = training_tokens(d, d.recipe.training), 0.0
    for window in d.schedule:
        blocks = [d.blocks[i] for i in window.blocks]
        alive = sum(_live(d, b) for b in blocks)
        layers = [layer for b in blocks for layer in b.planned]
        # Materialised weights and their gradients; Adam's two moments.
        weights = d.itemsize * sum(layer.weights * 2 for layer in layers)
        moments = 2 * FLOAT * sum(layer.parameters + layer.limits for layer in layers)
        graph = tokens * sum(saved(d, b) for b in blocks)
        widest = max(forward(d, b, tokens, d.length, d.itemsize) for b in blocks)
        pulled = _pulled(layers)
        logits = 0.0
        if d.recipe.objective.logits and window.stop == len(d.blocks):
            # The gradient of what leaves the last block is kept, and scaled.
            logits = d.itemsize * (d.outside_weights + 2 * tokens * d.width)
            logits += _logits(d, gradient=True)
        step = weights + _moved(layers) + moments + max(graph + widest + logits, pulled)
        worst = max(worst, alive + max([step, *map(_decomposed, layers)]))
    return worst


def _refine(d: Description, settings: EndToEnd) -> float:
    """All blocks in training at once, of which one runs at a time; then they are closed again."""
    alive = sum(_live(d, b) for b in d.blocks)
    layers = [layer for b in d.blocks for layer in b.planned]
    moved = [layer for layer in layers if layer.rounding is not None]
    moments = 2 * FLOAT * sum(layer.parameters + layer.limits for layer in moved)
    tokens = training_tokens(d, settings)
    batch = d.itemsize * d.width * min(settings.batch, d.samples - d.held) * d.length
    # What enters the blocks and leaves the last one, the target, the gradient.
    inputs = batch * (len(d.blocks) + 3)
    block = 0.0
    for b in dict.fromkeys(d.blocks):
        weights = 2 * d.itemsize * sum(layer.weights for layer in b.planned) + _moved(b.planned)
        ran = tokens * saved(d, b) + forward(d, b, tokens, d.length, d.itemsize)
        pulled = _pulled(b.planned)
        block = max(block, weights + max(ran, pulled))
    loss = _logits(d, gradient=True) + d.itemsize * tokens * d.width
    # An evaluation makes the weights of all blocks, and runs more sequences at a time.
    tokens = min(max(1, Task.tokens // d.length), d.held) * d.length
    ran = max(forward(d, b, tokens, d.length, d.itemsize) for b in dict.fromkeys(d.blocks))
    held = max(ran, _logits(d, gradient=False))
    held += d.itemsize * (sum(layer.weights for layer in layers) + 2 * tokens * d.width)
    tuning = alive + moments + d.itemsize * d.outside_weights
    # The best parameters come back from their file beside those in use.
    tuning += max(inputs + max(block, loss), held, sum(map(trained, d.blocks)))
    left, closing = alive, 0.0
    for b in d.blocks:
        left -= _live(d, b)
        closing = max(closing, left + _close(d, b))
    return max(tuning, closing)


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
        rows += _gptq(d.width, min(END_ROWS, last.rows), many=False)
    return total + codes + max(peak, rows)


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
    """Our own model in float32, then the one that transformers loads."""
    model = FLOAT * d.parameters
    last = d.blocks[-1]
    tokens = d.verify_length
    ran = tokens * d.heads * tokens * 3 * FLOAT + forward(d, last, tokens, tokens, FLOAT)
    logits = FLOAT * tokens * d.vocabulary
    own = max(
        _loading_outside(d, FLOAT),
        model + max(_loading_block(d, last, FLOAT), ran + 2 * logits),
    )
    # Theirs starts from the stored tensors; our logits are kept, and ours of a layer are made.
    head = d.head or d.embedding
    # Its weight; its output beside ours, their difference, and that in float64.
    compared = max(2 * logits, DEQUANTIZE * max(layer.weights for layer in last.layers))
    if head.stored is not None:
        compared = max(DEQUANTIZE * head.weights + logits, FLOAT * head.weights + 5 * logits)
    untied = FLOAT * d.embedding.weights if d.head is None and d.embedding.stored else 0
    theirs = model + untied + logits + max(compared, ran)
    return max(own, theirs)


def total(stages: Mapping[str, float]) -> tuple[str, float]:
    """The stage with the highest peak, and that peak."""
    stage = max(stages, key=lambda name: stages[name])
    return stage, stages[stage]
