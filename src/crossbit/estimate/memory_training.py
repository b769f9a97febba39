"""Peak memory of blocks in training, and of closing them. See ``memory``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from crossbit.engine.fit import Task
from crossbit.engine.logits import TOKENS
from crossbit.engine.sensitivity import TOKENS as SENSED
from crossbit.estimate.disk import trained
from crossbit.estimate.memory_blocks import (
    DEQUANTIZE,
    FLOAT,
    batch_tokens,
    float32,
    forward,
    loading,
    loading_ends,
)
from crossbit.estimate.shapes import BlockShape, Description, LayerShape
from crossbit.objective import CHUNK_ELEMENTS
from crossbit.recipe import EndToEnd, Training

# Float32 copies of a chunk of logits in their divergence: both models', softmaxes, terms, one more.
DIVERGENCE = 6
# Float32 copies, at a decomposition's worst moment beyond its weight and its result, of the square
# of the weight's shorter side (LAPACK's space) and of the weight (its copy, factors before signs).
SVD_SQUARES, SVD_WEIGHTS = 4, 2


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
    return sum(FLOAT * layer.weights for layer in layers if layer.moves)


def _pulled(layers: Iterable[LayerShape]) -> float:
    """Of the worst layer: gradients; where the weight moves, that at it, and U^T G.

    With factors also the product of that gradient with the weight.
    """

    def numbers(layer: LayerShape) -> int:
        moves = layer.weights * (layer.moves + layer.factored)
        return layer.parameters + moves + layer.directions * layer.columns

    return float(FLOAT * max(map(numbers, layers), default=0))


def _decomposed(layer: LayerShape) -> float:
    """A singular value decomposition, beyond its weight and its result."""
    if not layer.directions:
        return 0.0
    return FLOAT * (SVD_SQUARES * min(layer.rows, layer.columns) ** 2 + SVD_WEIGHTS * layer.weights)


def _live(d: Description, block: BlockShape) -> float:
    turns = sum(group.turn for group in block.groups)
    return sum(map(_live_layer, block.layers)) + d.itemsize * block.other + turns


def live_beside(d: Description) -> float:
    """Other blocks of the window that are open while one is opened or closed."""
    if not d.recipe.trains:
        return 0.0
    return max(
        sum(sorted(_live(d, d.blocks[i]) for i in window.blocks)[1:]) for window in d.schedule
    )


def saved(d: Description, block: BlockShape, *, frozen: bool = False) -> float:
    """Bytes a token that a block keeps for its gradient.

    Args:
        d: the run.
        block: the block.
        frozen: it only passes gradients on: what its linear layers read is not needed for that,
            except what attention made, which attention itself keeps.
    """
    total = 2.0 * 2 * FLOAT * d.width  # two norms: float32 input and normalised value
    quantized = any(layer.input_bits for layer in block.layers)
    for g in block.groups:
        # What linear layers read; beside the unrounded input, where it is quantized.
        if not frozen:
            total += g.share * d.itemsize * g.columns * (2 if quantized and g.norm else 1)
        if g.norm:
            # Their outputs, and once more what the nonlinearity or the rotation makes of them.
            made = sum(layer.rows for layer in g.layers)
            total += g.share * d.itemsize * 1.5 * made
    cache = d.recipe.cache
    if cache is not None and cache.clip < 1 and not frozen:
        total += 2 * d.key_heads * d.head_width  # what the clip cut off, a byte each
    if frozen:
        total += d.itemsize * d.heads * d.head_width
    if d.eager:
        total += d.heads * d.length * (FLOAT + 2 * d.itemsize)
    return total


def _looking(d: Description, blocks: Sequence[BlockShape], tokens: int) -> tuple[float, float]:
    """Original blocks behind a window, held while it trains; what a step keeps of them.

    What leaves each, with its target and the gradient there, is kept too.
    """
    held = float(d.itemsize * sum(block.parameters for block in blocks))
    graph = tokens * sum(saved(d, block, frozen=True) for block in blocks)
    return held, graph + 3 * d.itemsize * tokens * d.width * len(blocks)


def training_tokens(d: Description, training: Training) -> int:
    """Tokens that go through a window at once (``engine.fit``)."""
    at_once = max(1, Task.tokens // d.length)
    return min(at_once, training.batch) * d.length


def _logits(d: Description, *, gradient: bool) -> float:
    """Of a few tokens at a time: both models' and their gradient (``engine.logits``)."""
    elements = min(TOKENS, d.length) * d.vocabulary
    chunk = min(elements, max(CHUNK_ELEMENTS, d.vocabulary))
    return float(d.itemsize * (3 if gradient else 2) * elements + DIVERGENCE * FLOAT * chunk)


def sensing(d: Description) -> float:
    """The original model forwards and backwards, and its head between (``engine.sensitivity``)."""
    tokens, outside = batch_tokens(d), d.itemsize * d.outside_weights
    metric = 3 * FLOAT * d.width**2  # the sum, a batch's part of it, scaled
    rows = tokens * d.width * (4 * d.itemsize + 2 * FLOAT)
    block = 0.0
    for b in dict.fromkeys(d.blocks):
        ran = tokens * saved(d, b, frozen=True) + forward(d, b, tokens, d.length, d.itemsize)
        block = max(block, loading(b, d.itemsize), d.itemsize * b.parameters + ran + rows + metric)
    # Logits, their float32, the likelihoods, what is drawn from, two gradients.
    logits = SENSED * d.vocabulary * (2 * d.itemsize + 4 * FLOAT)
    return outside + max(block, logits + 2 * d.itemsize * d.length * d.width)


def training(d: Description) -> float:
    """The worst window of blocks in training."""
    tokens, worst = training_tokens(d, d.recipe.training), 0.0
    for window in d.schedule:
        blocks = [d.blocks[i] for i in window.blocks]
        ahead = d.ahead(window)
        # Micro-batches may be smaller than a batch, and all of one look ahead.
        most = math.ceil(d.recipe.objective.ahead_share * d.recipe.training.batch)
        held, looking = _looking(d, ahead, min(tokens, most * d.length))
        alive = sum(_live(d, b) for b in blocks)
        layers = [layer for b in blocks for layer in b.planned]
        # Materialised weights and their gradients; Adam's two moments.
        weights = d.itemsize * sum(layer.weights * 2 for layer in layers)
        moments = 2 * FLOAT * sum(layer.parameters + layer.limits for layer in layers)
        graph = looking + tokens * sum(saved(d, b) for b in blocks)
        widest = max(forward(d, b, tokens, d.length, d.itemsize) for b in (*blocks, *ahead))
        pulled = _pulled(layers)
        logits = 0.0
        if d.recipe.objective.logits and window.stop == len(d.blocks):
            # The gradient of what leaves the last block is kept, and scaled.
            logits = d.itemsize * (d.outside_weights + 2 * tokens * d.width)
            logits += _logits(d, gradient=True)
        if d.sensing:
            held += FLOAT * d.width**2 * (len(ahead) + 1)
        step = weights + _moved(layers) + moments + max(graph + widest + logits, pulled)
        # Before: the blocks that make targets, one by one, then those that are held.
        originals = [*ahead, *(blocks if d.recipe.objective.homologous else ())]
        made = max((_original(d, b) for b in originals), default=0.0)
        reading = max(
            (loading(b, d.itemsize) - d.itemsize * b.parameters for b in ahead), default=0
        )
        if logits:
            made = max(made, loading_ends(d))
        worst = max(worst, alive + max(made, held + reading))
        worst = max(worst, alive + max([held + step, *map(_decomposed, layers)]))
    return worst


def tuning(d: Description, settings: EndToEnd) -> float:
    """All blocks in training at once, of which one runs at a time; then they are closed again."""
    read = max(_live(d, b) for b in d.blocks) if settings.hold else 0.0  # before its codes are held
    d = d.tuned
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
    tuned = alive + moments + d.itemsize * d.outside_weights
    # The best parameters come back from their file beside those in use.
    tuned += max(inputs + max(block, loss), held, sum(map(trained, d.blocks)))
    left, closed = alive, 0.0
    for b in d.blocks:
        left -= _live(d, b)
        closed = max(closed, left + closing(d, b))
    # A block is read for what it is put into, and embedding and head to begin with.
    reading = max(loading_ends(d), *(loading(b, d.itemsize) for b in dict.fromkeys(d.blocks)))
    return max(tuned, closed, alive + reading + read)


def _original(d: Description, block: BlockShape) -> float:
    """Sequences through a block of the original model, read for that."""
    ran = forward(d, block, batch_tokens(d), d.length, d.itemsize)
    return max(loading(block, d.itemsize), d.itemsize * block.parameters + ran)


def closing(d: Description, block: BlockShape) -> float:
    """Exported form of a block, what it makes of the stream, its target."""
    codes = sum(layer.weights for layer in block.planned)
    stored = sum(layer.stored for layer in block.planned)
    largest = max((layer.weights for layer in block.planned), default=0)
    whole = float32(block)
    if d.recipe.trains:
        whole = d.itemsize * block.other + _live(d, block)
    packing = 4.0 * largest
    if d.samples:
        packing = max(packing, (DEQUANTIZE + d.itemsize) * largest)
        run = _original(d, block)
        if d.recipe.trains:  # the original block makes the target before
            run += _live(d, block)
        return max(whole + codes + stored + packing, run + codes + stored)
    return whole + codes + stored + packing
