"""DuQuant's rotation (arXiv 2406.01721): spread outlier channels over blocks, then within them.

G = R1 P R2 is orthogonal: R1 and R2 are block-diagonal, P permutes channels. X W^T is
(X G)(W G)^T, so the weight takes its part once, and the input of the layer is multiplied by G at
run time. R1 flattens each block, but a block that holds many outliers stays larger than the others;
P deals the channels out so that the blocks are alike, and R2 flattens these. Smoothing comes
before, elsewhere.

Rotations are built from a sample of activations: column maxima do not say which channels are large
together, and with which signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError

BLOCK = 128
STEPS = 256

_SMALLEST_POWER = 32
# Rows that a search looks at; the time of a step is proportional to them.
SEARCH_ROWS = 4096
# Rows of a weight that are rotated at a time: folding needs memory for their float64 copies.
FOLD_ROWS = 1024
# Rounding to float32 leaves 1e-7 of R R^T - I, to 16 bits more than this.
_ORTHOGONAL_TO = 1e-4
PARTS = ("first", "permutation", "second")  # names of what is stored


def block_size_for(width: int, wanted: int = BLOCK) -> int:
    """The block size for inputs of `width` channels: a divisor of it, > 1.

    The largest power of two <= `wanted` that divides, if it is at least 32 (or the largest one <=
    `wanted`, where that is less); else the largest divisor <= 2 * `wanted`. 576 takes 64, 1536
    takes 128, 100 takes 100.

    Raises:
        InputError: `wanted` < 2, or `width` has no such divisor.
    """
    if wanted < 2:
        raise InputError(f"a rotation block has {wanted} channels; give at least 2")
    smallest = min(_SMALLEST_POWER, 1 << (wanted.bit_length() - 1))
    divisors = [n for n in range(min(2 * wanted, width), 1, -1) if width % n == 0]
    powers = [n for n in divisors if smallest <= n <= wanted and n.bit_count() == 1]
    if divisors:
        return (powers or divisors)[0]
    raise InputError(
        f"{width} channels cannot be split into rotation blocks of 2 to {2 * wanted} channels; "
        "ask for larger blocks"
    )


def greedy_rotation(
    sample: Tensor, *, block: int, steps: int = STEPS, seed: int = 0, shared: bool = True
) -> Tensor:
    """The rotation of blocks with a small peak |x R|, built greedily (section 3.2 of the paper).

    Each step brings the channel with the largest |x| to the front and multiplies by an orthogonal
    matrix whose first row is 1/sqrt(n), the others random: that channel is spread evenly. Of the
    products of the first 0, 1, ... `steps` steps the one with the smallest peak is returned: the
    peak over the sample never grows.

    Args:
        sample: activations [T, K], any float dtype; computed in float64 if they are, else float32.
        block: n, a divisor of K.
        steps: >= 0; 0 gives the identity.
        seed: of the random rows.
        shared: one matrix for all blocks, which is what is cheap to apply; False: one for each.

    Returns:
        float64 [n, n], or [K / n, n, n] if not `shared`; on the device of the sample.

    Raises:
        InputError: `block` does not divide K, `steps` < 0.
        WorkError: the sample is not a matrix with rows, or not finite.
    """
    blocks = _blocks_of(sample, block)
    if steps < 0:
        raise InputError(f"a rotation takes {steps} steps; give at least 0")
    work = sample.detach().to(torch.promote_types(sample.dtype, torch.float32))
    split = work.reshape(-1, blocks, block)
    everything = split.reshape(1, -1, block) if shared else split.transpose(0, 1)
    rows = _rows_that_matter(everything)
    found = _search(rows, steps, torch.Generator().manual_seed(seed))
    if rows.shape[1] < everything.shape[1]:
        # The search did not see all rows; what it found must hold for them too.
        rotated = everything @ found.to(work.dtype)
        smaller = rotated.abs().amax((1, 2)) < everything.abs().amax((1, 2))
        found = torch.where(smaller[:, None, None], found, torch.eye(block).to(found))
    return found[0] if shared else found


def zigzag_permutation(maxima: Tensor, blocks: int) -> Tensor:
    """Channels sorted by descending maximum, dealt to the blocks 1..B, B..1, 1..B, ...

    Of each B channels next to each other in rank every block gets one, and the means of `maxima`
    over any two blocks differ by at most (largest - smallest) / (K / B).

    Args:
        maxima: [K], max |x| of each channel; equal ones keep their order.
        blocks: B, a divisor of K.

    Returns:
        int64 [K], a bijection: channel p[i] becomes channel i; the first K / B are block 1.

    Raises:
        InputError: `blocks` does not divide K.
        WorkError: `maxima` is not a vector of finite values.
    """
    if maxima.dim() != 1 or not torch.isfinite(maxima).all():
        raise WorkError(f"maxima {tuple(maxima.shape)} of channels must be a finite vector")
    width = maxima.shape[0]
    if blocks < 1 or width % blocks:
        raise InputError(f"{width} channels cannot be dealt into {blocks} equal blocks")
    dealt = maxima.argsort(descending=True, stable=True).reshape(-1, blocks)
    backwards = torch.arange(dealt.shape[0], device=dealt.device) % 2 == 1
    return torch.where(backwards[:, None], dealt.flip(1), dealt).T.reshape(-1)


@dataclass(frozen=True, eq=False)
class DuRotation:
    """G = R1 P R2 for inputs of K channels, as its three factors.

    Attributes:
        first: R1, float [n, n] for all blocks or [K / n, n, n] for each, orthogonal.
        permutation: P, int64 [K], as `zigzag_permutation` returns it.
        second: R2, shaped as `first` may be.

    Raises InputError for shapes that do not belong together, or a permutation that is none.
    """

    first: Tensor
    permutation: Tensor
    second: Tensor

    def __post_init__(self) -> None:
        width, n = self.permutation.numel(), (self.first.shape or (0,))[-1]
        for name, matrix in (("first", self.first), ("second", self.second)):
            shapes = ((n, n), (width // n if n else 0, n, n))
            if tuple(matrix.shape) not in shapes or not matrix.is_floating_point():
                raise InputError(
                    f"the {name} rotation of {width} channels has shape {tuple(matrix.shape)} and "
                    f"dtype {matrix.dtype}; floats of shape {shapes[0]} or {shapes[1]} are needed"
                )
        if n == 0 or width == 0 or width % n:
            raise InputError(f"rotation blocks of {n} channels do not divide {width} channels")
        p = self.permutation
        # `equal` is false for another shape too.
        bijection = torch.equal(p.long().sort().values, torch.arange(width, device=p.device))
        if p.dtype != torch.int64 or not bijection:
            raise InputError(f"a permutation is int64 [K] and names each of {width} channels once")

    @property
    def width(self) -> int:
        """K, the number of channels."""
        return self.permutation.numel()

    @property
    def block(self) -> int:
        """The number of channels in a block, n."""
        return self.first.shape[-1]

    @cached_property
    def _inverse(self) -> Tensor:
        return self.permutation.argsort()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DuRotation:
        """The rotation on a device, its matrices in `dtype`: `apply` then converts nothing."""
        first, second = (matrix.to(device, dtype) for matrix in (self.first, self.second))
        return DuRotation(first, self.permutation.to(device), second)

    def apply(self, x: Tensor) -> Tensor:
        """X G: [..., K] -> [..., K], in the dtype of x, differentiable in x.

        Half dtypes are computed in float32, so that the result is rounded once. The device is that
        of x. WorkError where x has not K channels.
        """
        y = self._checked(x)
        y = _block_product(y, self.first).index_select(-1, self.permutation.to(y.device))
        return _block_product(y, self.second).to(x.dtype)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """X G^T, the inverse of `apply`: [..., K] -> [..., K], computed and refused as there."""
        y = self._checked(x)
        y = _block_product(y, self.second.mT).index_select(-1, self._inverse.to(y.device))
        return _block_product(y, self.first.mT).to(x.dtype)

    @torch.no_grad()
    def fold(self, weight: Tensor) -> Tensor:
        """W G of a linear layer's weight [N, K], the counterpart of `apply` on its input.

        Computed in float64. Returned in float64 if the weight is, else in float32: what is
        quantized next should not be rounded to a half dtype first. WorkError as `apply`.
        """
        stored = torch.promote_types(weight.dtype, torch.float32)
        pieces = [weight[i : i + FOLD_ROWS] for i in range(0, weight.shape[0], FOLD_ROWS)]
        return torch.cat([self.apply(piece.double()).to(stored) for piece in pieces])

    def tensors(self) -> dict[str, Tensor]:
        """What safetensors can store, by the names that `from_tensors` reads."""
        return {name: getattr(self, name).contiguous() for name in PARTS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DuRotation:
        """The rotation that `tensors` stored; other names are ignored.

        Raises InputError where a tensor is missing or a matrix not orthogonal: a damaged file.
        """
        missing = [name for name in PARTS if name not in tensors]
        if missing:
            raise InputError(f"a stored rotation lacks {', '.join(missing)}; export it again")
        rotation = cls(*(tensors[name] for name in PARTS))
        for name in ("first", "second"):
            matrix = tensors[name].double()
            identity = torch.eye(rotation.block).to(matrix)
            # Not `>`: a NaN must be refused too.
            if not (matrix @ matrix.mT - identity).abs().amax() <= _ORTHOGONAL_TO:
                raise InputError(f"the stored {name} rotation is not orthogonal; export it again")
        return rotation

    def _checked(self, x: Tensor) -> Tensor:
        """x in the dtype of computation."""
        if x.dim() == 0 or x.shape[-1] != self.width:
            raise WorkError(f"a rotation of {self.width} channels cannot take {tuple(x.shape)}")
        return x.to(torch.promote_types(x.dtype, torch.float32))


def choose_rotation(
    sample: Tensor,
    *,
    block: int,
    steps: int = STEPS,
    permute: bool = True,
    seed: int = 0,
    shared: bool = True,
) -> DuRotation:
    """R1 from a sample [T, K] of (smoothed) inputs, P from what R1 makes of it, R2 from the rest.

    `permute=False` leaves P the identity; both rotations stay. The other arguments, dtypes and
    errors are those of `greedy_rotation`.
    """
    blocks = _blocks_of(sample, block)
    x = sample.detach().to(torch.promote_types(sample.dtype, torch.float32))
    first = greedy_rotation(x, block=block, steps=steps, seed=seed, shared=shared)
    x = _block_product(x, first)
    permutation = torch.arange(x.shape[1], device=x.device)
    if permute:
        permutation = zigzag_permutation(x.abs().amax(0), blocks)
        x = x.index_select(1, permutation)
    # With the first's random matrices the second would begin where the first left off.
    second = greedy_rotation(x, block=block, steps=steps, seed=seed + 1, shared=shared)
    return DuRotation(first, permutation, second)


@torch.no_grad()
def outlier_gain(x: Tensor, rotation: DuRotation) -> dict[str, float]:
    """How much the rotation flattens inputs x [..., K], for the report.

    `peak_*` is max |x|; `row_peak_*` the mean over tokens of max |x| / RMS of x, which is what a
    step per token is lost to (about 3 for 576 normal values, sqrt(K) if one channel holds all).
    `*_before` is of x, `*_after` of X G. Rows of zeros do not count. WorkError where x has not K
    channels, or no rows.
    """
    after = rotation.apply(x.to(torch.promote_types(x.dtype, torch.float32)))
    if x.numel() == 0:
        raise WorkError("the gain of a rotation needs at least one row of activations")
    figures = {}
    for name, values in (("before", x.to(after.dtype)), ("after", after)):
        largest, rms = values.abs().amax(-1), values.square().mean(-1).sqrt()
        counted = rms > 0
        figures[f"peak_{name}"] = float(largest.amax())
        ratios = largest[counted] / rms[counted]
        figures[f"row_peak_{name}"] = float(ratios.mean()) if counted.any() else 0.0
    return figures


def _blocks_of(sample: Tensor, block: int) -> int:
    """The number of blocks of a sample [T, K] that a rotation can be made from."""
    if sample.dim() != 2 or sample.numel() == 0:
        raise WorkError(f"a rotation needs a sample [T, K] with rows, not {tuple(sample.shape)}")
    if not torch.isfinite(sample).all():
        raise WorkError("the sample for a rotation is not finite")
    width = sample.shape[1]
    if block < 1 or width % block:
        raise InputError(f"rotation blocks of {block} channels do not divide {width} channels")
    return width // block


def _block_product(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., K] times blockdiag(R), R [n, n] or [K / n, n, n]: [..., K] in the dtype of x."""
    rotation = rotation.to(x.device, x.dtype)
    n = rotation.shape[-1]
    if rotation.dim() == 2:
        return (x.reshape(-1, n) @ rotation).reshape(x.shape)
    split = x.reshape(-1, x.shape[-1] // n, n).transpose(0, 1)
    return torch.bmm(split, rotation).transpose(0, 1).reshape(x.shape)


def _rows_that_matter(x: Tensor) -> Tensor:
    """The rows of each group that can hold its peak: [G, R, n] -> [G, at most 4096, n].

    |x R| is at most the norm of x and somewhere at least norm / sqrt(n), whatever R is: a row with
    less than 1 / sqrt(n) of the largest norm never does. Of the others those of largest norm.
    """
    norms = x.norm(dim=-1)
    # The margin is for rounding: rows of equal norm must all stay.
    needed = norms >= norms.amax(1, keepdim=True) * ((1 - 1e-3) / x.shape[-1] ** 0.5)
    count = min(int(needed.sum(1).amax()), SEARCH_ROWS)
    chosen = norms.topk(count, dim=1).indices
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def _search(rows: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """`greedy_rotation` of each group: [G, R, n] -> float64 [G, n, n]."""
    groups, _, n = rows.shape
    product = torch.eye(n, dtype=torch.float64, device=rows.device).repeat(groups, 1, 1)
    channels = torch.arange(n, device=rows.device).repeat(groups, 1)
    best, maxima = product, rows.abs().amax(1)
    smallest = maxima.amax(1)
    for _ in range(steps):
        largest = maxima.argmax(1, keepdim=True)
        swap = channels.scatter(1, largest, 0)
        swap[:, :1] = largest
        product = product.gather(2, swap[:, None, :].expand(-1, n, -1))
        product = product @ _spreading(n, generator).to(rows.device)
        # From the sample itself each time, so that rounding does not pile up over the steps.
        maxima = (rows @ product.to(rows.dtype)).abs().amax(1)
        peak = maxima.amax(1)
        better = peak < smallest
        best = torch.where(better[:, None, None], product, best)
        smallest = torch.where(better, peak, smallest)
    return best


def _spreading(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix with the first row 1/sqrt(n), float64 [n, n], on the CPU."""
    columns = torch.randn(n, n, dtype=torch.float64, generator=generator)
    columns[:, 0] = 1.0
    q, r = torch.linalg.qr(columns)
    # QR is unique, and the other rows uniformly random, once the diagonal of R is positive.
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows
