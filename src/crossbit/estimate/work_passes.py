"""What a pass of sequences through a block, or reading one, adds to the operations of a stage."""

from __future__ import annotations

from collections import defaultdict

from crossbit.estimate.shapes import BlockShape, Description


def flops(block: BlockShape) -> float:
    """Of a token through the products of a block."""
    return 2.0 * block.active


def attention(d: Description, length: int) -> float:
    """Flops of a token's causal attention in a sequence of ``length``."""
    return 2.0 * length * d.heads * d.head_width


def run_through(
    work: defaultdict[str, float],
    kind: str,
    d: Description,
    block: BlockShape,
    sequences: int,
    length: int,
    attending: str = "attention",
) -> None:
    """Sequences through a block."""
    tokens = float(sequences) * length
    work[kind] += tokens * flops(block)
    work["attended" if kind == "trained" else attending] += tokens * attention(d, length)


def read_block(work: defaultdict[str, float], block: BlockShape, times: int = 1) -> None:
    """A block from the checkpoint."""
    work["load"] += times * block.parameters
    if block.turned:
        work["rotate"] += times * block.turned


def read_ends(work: defaultdict[str, float], d: Description, times: int = 1) -> None:
    """Embedding, head and norms from the checkpoint."""
    work["load"] += times * d.outside_weights
    if d.turned:
        work["rotate"] += times * sum(end.weights for end in d.turned)


def run_and_return(
    work: defaultdict[str, float], d: Description, block: BlockShape, sequences: float
) -> None:
    """Sequences through a frozen block, and gradients back through it to its input."""
    tokens = float(sequences) * d.length
    work["forward"] += 2 * tokens * flops(block)
    work["attended"] += tokens * attention(d, d.length)


def kind_of(block: BlockShape) -> str:
    """The kind of a pass through a block as it will be."""
    return "quantized" if any(layer.input_bits for layer in block.layers) else "forward"
