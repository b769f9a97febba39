"""Operations of blocks in training: what ``work`` counts for the stages that train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from crossbit.estimate.disk import FLOAT, packed, part, stream_bytes, trained
from crossbit.estimate.shapes import BlockShape, Description, LayerShape
from crossbit.estimate.work_passes import (
    kind_of,
    read_block,
    read_ends,
    run_and_return,
    run_through,
)
from crossbit.recipe import EndToEnd


def count_closing(d: Description, block: BlockShape, work: defaultdict[str, float]) -> None:
    """Writing a block in its exported form, and the calibration text through it."""
    weights = sum(layer.weights for layer in block.planned)
    work["pack"] += weights
    work["release"] += 1
    work["write"] += part(d, block)
    if d.samples:
        work["unpack"] += weights
        run_through(work, kind_of(block), d, block, d.samples, d.length)
        work["read"] += stream_bytes(d, d.samples)
        work["write"] += stream_bytes(d, d.samples) + stream_bytes(d, d.held)


def count_sensitivity(d: Description, work: defaultdict[str, float]) -> None:
    """The model forwards, with the labels that it predicts, and backwards."""
    tokens = float(d.sensing) * d.length
    stream = stream_bytes(d, d.sensing)
    for block in d.blocks:
        read_block(work, block, 2)
        run_through(work, "forward", d, block, d.sensing, d.length)
        run_and_return(work, d, block, d.sensing)
        work["hessian"] += tokens * d.width**2
        work["write"] += 2 * stream + FLOAT * d.width**2
        work["read"] += 3 * stream
    work["divergence"] += tokens * d.vocabulary
    work["forward"] += 2.0 * 2 * tokens * d.vocabulary * d.width


def count_training(d: Description, counts: Mapping[str, defaultdict[str, float]]) -> None:
    """The windows: opening their blocks, training and closing them."""
    training, opened = d.recipe.training, 0
    opening, closing, work = counts["open"], counts["close"], counts["train"]
    fitting, stream = d.samples - d.held, stream_bytes(d, d.samples)
    steps = training.epochs * -(-fitting // training.batch)
    for window in d.schedule:
        blocks = [d.blocks[i] for i in window.blocks]
        for index, block in zip(window.blocks, blocks, strict=True):
            if index >= opened:  # the teacher's activations
                read_block(opening, block)
                run_through(opening, "forward", d, block, d.samples, d.length)
                opening["write"] += stream
                for layer in block.planned:
                    if layer.directions:
                        shorter = min(layer.rows, layer.columns)
                        opening["decompose"] += float(layer.weights) * shorter
            if index < window.stop - 1 and window.stop > opened:  # what the next block begins with
                run_through(opening, "forward", d, block, d.samples, d.length)
                opening["soften"] += sum(layer.weights for layer in block.planned)
                opening["write"] += stream
            if d.recipe.objective.homologous:
                run_through(work, "forward", d, block, d.samples, d.length)
                read_block(work, block)
                work["write"] += stream
            run_through(work, kind_of(block), d, block, (training.epochs + 1) * d.held, d.length)
            run_through(work, "trained", d, block, training.epochs * fitting, d.length)
            for layer in block.planned:
                made = steps + training.epochs + 1
                work["soften"] += made * layer.weights
                work["float32"] += (made + steps) * _along(layer)
                if layer.rounding is not None:
                    work["pull"] += steps * layer.weights
                    work["adam"] += steps * (layer.parameters + layer.limits)
                    work["write"] += (training.epochs + 1) * 4 * layer.parameters
        for block in d.ahead(window):
            read_block(work, block, 2)  # the target's; the one that is held
            run_through(work, "forward", d, block, d.samples, d.length)
            work["write"] += stream
            run_through(work, "forward", d, block, (training.epochs + 1) * d.held, d.length)
            share = d.recipe.objective.ahead_share
            run_and_return(work, d, block, training.epochs * fitting * share)
        if d.recipe.objective.logits and window.stop == len(d.blocks):
            read_ends(work, d)
            _divergence(d, work, training.epochs * fitting, training.epochs + 1)
        for index in window.hardened:
            read_block(closing, d.blocks[index])
            run_through(closing, "forward", d, d.blocks[index], d.held, d.length)
        staying = range(window.hardened.stop, window.stop)
        work["write"] += sum(packed(d, d.blocks[i]) for i in staying)
        opened = window.stop


def _along(layer: LayerShape) -> float:
    """Flops of a weight's move along its singular directions; as many for its gradient."""
    return 2.0 * layer.directions * layer.columns * (layer.rows + layer.inner_width)


def count_tuning(d: Description, settings: EndToEnd, work: defaultdict[str, float]) -> None:
    """Keep the blocks open, train them together, close them again."""
    fitting, evaluations = d.samples - d.held, settings.epochs + 1
    steps = settings.epochs * -(-fitting // settings.batch)
    seen = settings.epochs * fitting
    left = sum(packed(d, b) for b in d.blocks)  # by the windows
    d = d.tuned
    opened, best = sum(packed(d, b) for b in d.blocks), sum(map(trained, d.blocks))
    read_ends(work, d)
    for block in d.blocks:
        read_block(work, block, 2)  # what it is put into; the target's
        run_through(work, kind_of(block), d, block, seen + evaluations * d.held, d.length)
        run_through(work, "trained", d, block, seen, d.length)  # runs again, and backward
        for layer in block.planned:
            # Made twice a step, and once more to be closed.
            made = 2 * steps + evaluations + 1
            work["soften"] += made * layer.weights
            work["float32"] += (made + steps) * _along(layer)
            if layer.rounding is not None:
                work["pull"] += steps * layer.weights
                work["adam"] += steps * (layer.parameters + layer.limits)
        run_through(work, "forward", d, block, d.held, d.length)
        count_closing(d, block, work)
    _divergence(d, work, seen, evaluations)
    # The open blocks; the best parameters, and a state in training after each epoch; the result.
    work["write"] += left + opened + evaluations * best + settings.epochs * (opened + 2 * best)
    work["read"] += left + best


def _divergence(
    d: Description, work: defaultdict[str, float], sequences: int, evaluations: int
) -> None:
    """Logits of two models: of sequences that are trained on, and of those that judge."""
    judged = evaluations * d.held
    tokens = float(sequences + judged) * d.length
    work["divergence"] += tokens * d.vocabulary
    # Two products with the head; a third one brings the gradient back through it.
    products = (3 * sequences + 2 * judged) * d.length
    work["forward"] += 2.0 * products * d.vocabulary * d.width
