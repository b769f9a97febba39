"""Hadamard rotations: an orthogonal change of channels that spreads outliers over all of them.

H_n is an n x n matrix of +-1 with H H^T = n I, so Hn = H / sqrt(n) is orthonormal: (W Hn)(Hn^T x)
is W x, and a channel of x that sticks out is divided among n channels (QuaRot, arXiv 2404.00456).

Every order here is p m with H = H_p (x) H_m: p a power of two (Sylvester's matrix) and m = 1 or an
order of Paley (R. Paley, On Orthogonal Matrices, J. Math. Phys. 12, 1933, 311-320). With chi the
quadratic character of GF(q) and Q[i, j] = chi(a_i - a_j):

    Paley I    order q + 1,   q = 3 mod 4    H = I + [[0, 1], [-1, Q]]
    Paley II   order 2q + 2,  q = 1 mod 4    H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
                                             with C = [[0, 1], [1, Q]]

The matrices are generated, none is stored. Applying one never builds H_n: a Kronecker product acts
on x as its factors do, one after the other on the axes of x seen as a grid.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from crossbit.errors import InputError

# A factor that is applied in one product. Measured on one thread at widths of 576 to 14336: steps
# of 16 take half the time of steps of 64 and no more than sums and differences of two; the last
# axis, which is contiguous, wants a few more columns than that. Up to _DENSE columns the whole
# matrix in one product is no slower than two steps.
_STEP = 16
_LAST = 32
_DENSE = 64
# Elements that take part at a time: all steps of a chunk find it in the cache, and no temporary of
# the size of x comes and goes.
_CHUNK = 1 << 18


def order_parts(n: int) -> tuple[int, int]:
    """Split an order into the power of two and the rest: n = p m, H_n = H_p (x) H_m.

    Args:
        n: number of channels, >= 1.

    Returns:
        (p, m), p a power of two. m is 1 or the smallest order that leaves a power of two and that
        Paley's constructions reach (12, 20, 28, 36, ...), alone or, for orders out of reach of
        any one of them, as a product.

    Raises:
        InputError: no such m exists. Orders other than 1 and 2 must be multiples of 4, and not all
            of those are reached (92 is the first that is not).
    """
    parts = _parts(n)
    if parts is None:
        block = max((d for d in range(1, n // 2 + 1) if n % d == 0 and _parts(d)), default=1)
        advice = f"rotate blocks of {block} channels" if block > 1 else "leave them unrotated"
        raise InputError(
            f"no Hadamard matrix is known here for {n} channels (a power of two times 1 or an "
            f"order of Paley is needed): {advice}, or choose a transform without rotation"
        )
    return parts


def hadamard_matrix(n: int) -> Tensor:
    """The matrix H_n itself, for small orders and for comparisons.

    Returns:
        float64 [n, n] of +-1 with H H^T = n I; a new tensor at each call. H is the matrix that
        `apply_hadamard` multiplies by, times sqrt(n). It is symmetric where n is a power of two,
        not in general.

    Raises:
        InputError: as `order_parts`.
    """
    p, m = order_parts(n)
    matrix = _sylvester(p)
    for order in _paley_orders(m):
        matrix = torch.kron(matrix, _factor(1, order, torch.float64, torch.device("cpu")))
    return matrix


def apply_hadamard(x: Tensor, *, transpose: bool = False, block: int | None = None) -> Tensor:
    """Rotate the last axis: x Hn, with Hn = H / sqrt(n) orthonormal.

    Args:
        x: [..., n], any float dtype, any strides; not modified.
        transpose: x Hn^T instead, which undoes x Hn.
        block: rotate each run of `block` channels by itself (x diag(Hb, ..., Hb)); a head width
            gives the rotation of every head. Default: all n channels together.

    Returns:
        A new contiguous tensor of the shape and dtype of x, computed in float64 for float64 and in
        float32 for all others, rounded once. Autograd applies the transposed rotation to the
        gradient and keeps nothing of x for it.

    Raises:
        InputError: x is not of a float dtype or has no axis; n is no multiple of block; or there
            is no matrix of that order (`order_parts`).
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise InputError(
            f"cannot rotate a tensor of {x.dtype} with shape {tuple(x.shape)}: "
            "pass floats with the channels on the last axis"
        )
    width = _block_width(x.shape[-1], block)
    _steps(width)  # an impossible order is refused even where x has no rows
    rotated: Tensor = _Rotate.apply(x, width, transpose)  # type: ignore[no-untyped-call]
    return rotated


def random_signs(n: int, seed: int) -> Tensor:
    """Signs that make a rotation random: float64 [n] of +-1, the same for the same n and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1


@torch.no_grad()
def rotate_columns(weight: Tensor, signs: Tensor | None = None, block: int | None = None) -> Tensor:
    """W R, R = diag(signs) Hn: for a layer whose input becomes x R (x as rows).

    Args:
        weight: [N, K], any float dtype; not modified. A bias or another vector b [K] of what is
            rotated is one row: b[None].
        signs: [K] of +-1 as of `random_signs`; default: all +1.
        block: as `apply_hadamard`, R = diag(signs) diag(Hb, ..., Hb).

    Returns:
        [N, K], computed in float64 a few rows at a time; float32 where the weight is float32, else
        float64. 16-bit weights are not rounded back: when to do so is for the caller to say.

    Raises:
        InputError: weight has not two axes; signs has another length or other values; or as
            `apply_hadamard`.
    """
    _check_matrix(weight)
    width = weight.shape[1]
    if signs is not None:
        if signs.shape != (width,) or not bool((signs.abs() == 1).all()):
            raise InputError(
                f"the signs of a rotation of {width} channels must be {width} values of +1 or -1, "
                f"got shape {tuple(signs.shape)}: take them from random_signs({width}, seed)"
            )
        signs = signs.to(weight.device, torch.float64)
    kept = torch.float32 if weight.dtype == torch.float32 else torch.float64
    out = torch.empty_like(weight, dtype=kept)
    rows = max(1, _CHUNK // max(1, width))
    for part, rotated in zip(torch.split(weight, rows), torch.split(out, rows), strict=True):
        wide = part.double() if signs is None else part.double() * signs
        rotated.copy_(apply_hadamard(wide, block=block))
    return out


def rotate_rows(weight: Tensor, signs: Tensor | None = None, block: int | None = None) -> Tensor:
    """R^T W, R = diag(signs) Hn [N, N]: for a layer whose output becomes y R (y as rows).

    Arguments, result and errors are those of `rotate_columns`, with signs [N] and blocks of rows.
    A bias of the layer, b [N], becomes `rotate_columns(b[None], signs, block)[0]`.
    """
    _check_matrix(weight)
    return rotate_columns(weight.mT, signs, block).mT


class _Rotate(torch.autograd.Function):
    """x -> x Hn in blocks; the gradient g of the result gives g Hn^T, whatever x was."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, width: int, transpose: bool
    ) -> Tensor:
        ctx.how = (width, transpose)  # type: ignore[attr-defined]
        return _rotated(x, width, transpose)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        width, transpose = ctx.how  # type: ignore[attr-defined]
        # The function again and not `_rotated`: the gradient has a gradient, too.
        return _Rotate.apply(grad, width, not transpose), None, None  # type: ignore[no-untyped-call]


def _rotated(x: Tensor, width: int, transpose: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = [_factor(*step, dtype, x.device) for step in _steps(width)]
    if not transpose:
        # All but the last act from the left, on an axis before the last: x H is H^T x there.
        factors = [f.mT for f in factors[:-1]] + factors[-1:]
    else:
        factors[-1] = factors[-1].mT
    scale = 1 / math.sqrt(width)
    source = x.reshape(-1, width)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    rows = max(1, _CHUNK // width)
    for part, rotated in zip(torch.split(source, rows), torch.split(out, rows), strict=True):
        y, inner = part.to(dtype), width
        for factor in factors[:-1]:
            inner //= factor.shape[0]
            y = torch.matmul(factor, y.reshape(-1, factor.shape[0], inner))
        y = torch.matmul(y.reshape(-1, inner), factors[-1]).view(-1, width)
        torch.mul(y, scale, out=rotated)
    return out.view(x.shape)


@lru_cache(maxsize=256)
def _steps(n: int) -> tuple[tuple[int, int], ...]:
    """How H_n is applied: factors (power of two p, order m of Paley or 1), each H_p (x) H_m.

    Their Kronecker product, first to last, is H_n of `hadamard_matrix`.
    """
    p, m = order_parts(n)
    *first, last = _paley_orders(m) or (1,)
    if n <= _DENSE and not first:
        return ((p, last),)
    # The last factor takes powers of two as long as its product stays small; the rest is split
    # into as few steps as there can be, as even as they can be.
    joined = 1
    while joined < p and joined * 2 * last <= _LAST:
        joined *= 2
    bits = (p // joined).bit_length() - 1
    count = -(-bits // (_STEP.bit_length() - 1))
    powers = [2 ** ((bits + i) // count) for i in range(count)]
    return (*((power, 1) for power in powers), *((1, order) for order in first), (joined, last))


# Both parts of a factor are small: p at most _DENSE, and m at most a few hundred for the widths of
# language models. Whole matrices are not kept.
@lru_cache(maxsize=32)
def _factor(p: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H_p (x) H_m as [p m, p m] for one order m of Paley (or 1); shared, so never written to."""
    matrix = _sylvester(p) if m == 1 else torch.kron(_sylvester(p), _paley(m))
    return matrix.to(device, dtype)


def _check_matrix(weight: Tensor) -> None:
    if weight.ndim != 2:
        raise InputError(
            f"cannot rotate a weight of shape {tuple(weight.shape)}: pass a matrix [N, K]"
        )


def _block_width(n: int, block: int | None) -> int:
    if block is None:
        return n
    if block < 1 or n % block:
        raise InputError(
            f"{n} channels cannot be rotated in blocks of {block}: take a divisor of {n}"
        )
    return block


def _parts(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    twos = n & -n
    odd = n // twos
    if odd == 1:
        return n, 1
    m = odd
    while m <= n:
        if _paley_orders(m):
            return n // m, m
        m *= 2
    return None


@lru_cache(maxsize=4096)
def _paley_orders(m: int) -> tuple[int, ...]:
    """Orders of Paley with the product m, one if possible; none for 1 and where there are none."""
    if m % 4:
        return ()
    if _field(m - 1, 3) or _field(m // 2 - 1, 1):
        return (m,)
    for a in range(4, math.isqrt(m) + 1, 4):
        if m % a == 0 and (first := _paley_orders(a)) and (second := _paley_orders(m // a)):
            return first + second
    return ()


def _field(q: int, residue: int) -> tuple[int, int] | None:
    """(prime p, k) with q = p^k, where q is a prime power and q % 4 == residue; else None."""
    if q < 3 or q % 4 != residue:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = 0
    rest = q
    while rest % p == 0:
        rest //= p
        k += 1
    return (p, k) if rest == 1 else None


def _sylvester(p: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while matrix.shape[0] < p:
        matrix = torch.kron(matrix, two)
    return matrix


def _paley(m: int) -> Tensor:
    """H_m of one of Paley's two constructions; [m, m] float64. m is known to be such an order."""
    if field := _field(m - 1, 3):
        core = _bordered(*field)
        core[1:, 0] = -1
        return core + torch.eye(m, dtype=torch.float64)
    field = _field(m // 2 - 1, 1)
    assert field is not None
    core = _bordered(*field)
    signs = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(core, signs) + torch.kron(torch.eye(m // 2, dtype=torch.float64), diagonal)


def _bordered(p: int, k: int) -> Tensor:
    """[[0, 1], [1, Q]] of GF(p^k), [q + 1, q + 1] float64; symmetric for q = 1 mod 4."""
    q = p**k
    chi = torch.zeros(q, dtype=torch.float64)
    for element, log in enumerate(_logarithms(p, k)):
        if log is not None:
            chi[element] = 1 - 2 * (log % 2)  # squares are the even powers of a generator
    elements = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for j in range(k):
        digit = elements // p**j % p
        difference += (digit[:, None] - digit[None, :]) % p * p**j
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = core[1:, 0] = 1
    core[1:, 1:] = chi[difference]
    return core


def _logarithms(p: int, k: int) -> list[int | None]:
    """Logarithms in GF(p^k) to the base of a generator; an element is its digits in base p.

    The field is GF(p)[x] modulo x^k = c_0 + c_1 x + ..., with the first c for which the powers of
    x run through all p^k - 1 elements that are not 0. Then each of these has an inverse, so the
    polynomial needs no other test of being irreducible, and x is the generator.
    """
    q = p**k
    for reversed_c in product(range(p), repeat=k):
        c = reversed_c[::-1]  # c_0 runs fastest: with c_0 = 0 there is no field
        logs: list[int | None] = [None] * q
        element = (1,) + (0,) * (k - 1)
        for power in range(q - 1):
            code = sum(digit * p**j for j, digit in enumerate(element))
            if code == 0 or logs[code] is not None:
                break
            logs[code] = power
            top = element[-1]
            shifted = (0, *element[:-1])
            element = tuple((s + top * d) % p for s, d in zip(shifted, c, strict=True))
        else:
            return logs
    raise AssertionError(f"GF({q}) has a generator")
