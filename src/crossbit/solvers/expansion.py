"""A weight moved along its singular directions: LSI and SDE, one parametrisation.

With W = U diag(S) V^T and r = min(N, K), what is trained is a matrix B [r, r] that starts at zero:

    W' = W + U B V^T

The mask that B is supported on makes the methods of the literature:

* ``diagonal``: one increment a singular value (LSI, arXiv 2406.16299);
* ``band``: |i - j| <= k, the diagonal expanded (SDE of CQE+, arXiv 2407.15508);
* ``blocks``: blocks of equal size along the diagonal;
* ``square``: the diagonal and a square at its upper left, where the large singular values are (LSI
  on grouped grids);
* ``full``: all of B, which learns any change within the directions.

A rank keeps the leading directions alone. W' folds into the weight, so inference costs nothing.

The delta is added to W rather than W built anew from changed singular values: at B = 0 the weight
is the old one bit for bit, and the round-off of a decomposition cannot flip a code. B's meaning
depends on U and V down to their signs, which is why the decomposition is made reproducible here;
still, what should be kept of a training is the folded weight, or U and V beside B.

There is no autograd here: ``expand`` makes U B V^T, ``pull_back_expansion`` turns a gradient at it
into gradients of the parameters. Each costs one product of the size of W: B V^T and its transpose
go through B in panels, which hold a few rows of B and the columns that the mask leaves of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crossbit.errors import InputError, WorkError
from crossbit.products import fast_products

Kind = Literal["diagonal", "band", "blocks", "square", "full"]

# Rows of B in a panel of a band. Taller panels multiply more zeros, lower ones make more calls. The
# other way, 2k + 1 scaled additions of shifted rows, is bound by memory and slower from k = 8 on.
_PANEL = 32
_ROWS = 256  # of a gradient at once: none of its size is converted


@dataclass(frozen=True)
class ExpansionChoice:
    """Which entries of B are trained.

    Attributes:
        kind: see the module's text.
        width: k of ``band`` (0 is ``diagonal``), the side of the blocks of ``blocks`` and of the
            square of ``square``; ``diagonal`` and ``full`` have none and ignore it.
        rank: leading singular directions that B acts on, or None for all of them.
    """

    kind: Kind = "band"
    width: int = 8
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank: {self.rank} is below 1; use 1 or more, or none for all")
        if self.kind == "band" and self.width < 0:
            raise InputError(f"width: a band of {self.width} is below 0; 0 is the diagonal alone")
        if self.kind in ("blocks", "square") and self.width < 1:
            raise InputError(f"width: {self.kind} of {self.width} is below 1; use 1 or more")

    def check_shape(self, rows: int, columns: int) -> int:
        """Number r' of directions that B has for a weight [rows, columns].

        Raises:
            InputError: the weight has fewer directions than the rank, or r' is too small for the
                width.
        """
        directions = _directions(rows, columns, self.rank)
        self._check_width(directions)
        return directions

    def _check_width(self, directions: int) -> None:
        largest = {"band": directions - 1, "blocks": directions, "square": directions}
        if self.width > largest.get(self.kind, self.width):
            raise InputError(
                f"width: {self.kind} of {self.width} does not fit {directions} singular"
                f" directions; use {largest[self.kind]} or less"
            )


@dataclass
class Basis:
    """Leading singular directions of a weight [N, K].

    Attributes:
        u: float32 [N, r'], orthonormal columns.
        vt: float32 [r', K], orthonormal rows.
        s: float32 [r'], the singular values, largest first: for reports, nothing here needs them.
    """

    u: Tensor
    vt: Tensor
    s: Tensor


class NotDecomposedError(WorkError):
    """The decomposition of a weight did not converge."""


def singular_basis(weight: Tensor, rank: int | None = None) -> Basis:
    """Decompose a weight; the same weight gives the same basis, signs included.

    Args:
        weight: [N, K], any float dtype.
        rank: directions to keep, or None for min(N, K).

    Raises:
        InputError: the rank is larger than min(N, K).
        WorkError: the weight is not finite.
        NotDecomposedError: the decomposition did not converge, in float64 either.
    """
    rows, columns = weight.shape
    directions = _directions(rows, columns, rank)
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise WorkError(
            f"singular values of a weight [{rows}, {columns}]: it holds values that are not finite;"
            " check the checkpoint"
        )
    found = _decompose(weight) or _decompose(weight.double())
    if found is None:
        raise NotDecomposedError(
            f"singular values of a weight [{rows}, {columns}]: the decomposition did not converge;"
            " leave this layer's expansion out"
        )
    u, s, vt = (t.float() for t in found)
    u, vt = u[:, :directions], vt[:directions]
    # A pair (u, v) is as good as (-u, -v): the largest component of u decides.
    largest = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(largest < 0, -1.0, 1.0)
    return Basis(
        (u * sign).contiguous(), (vt * sign.unsqueeze(1)).contiguous(), s[:directions].clone()
    )


def start_expansion(basis: Basis, choice: ExpansionChoice) -> dict[str, Tensor]:
    """Parameters at B = 0, in the dtype of the basis (float32).

    Returns:
        "expansion": for ``diagonal`` and ``band`` [2k + 1, r'], where row d + k holds B[i, i + d]
        at i; for ``blocks`` [ceil(r' / b), b, b]; for ``square`` the diagonal [1, r']; for ``full``
        [r', r']. And "square" [n, n] for ``square``: what the square has besides the diagonal,
        which is "expansion" there too. Entries that stand for nothing (a band beyond the matrix,
        the last block's padding, the diagonal of "square") are zero, are never read, and have zero
        gradients, with which an optimiser leaves them.

    Raises:
        InputError: the basis is not of the choice's rank, or too small for its width.
    """
    r = basis.u.shape[1]
    if choice.rank not in (None, r):
        raise InputError(
            f"rank: the basis has {r} directions and the choice {choice.rank}; make the basis with"
            " the choice's rank"
        )
    choice._check_width(r)
    return {name: basis.u.new_zeros(shape) for name, shape in stored_shapes(choice, r).items()}


def stored_shapes(choice: ExpansionChoice, directions: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what ``start_expansion`` makes for so many directions."""
    r, b = directions, choice.width
    shapes: dict[Kind, dict[str, tuple[int, ...]]] = {
        "diagonal": {"expansion": (1, r)},
        "band": {"expansion": (2 * b + 1, r)},
        "blocks": {"expansion": (-(-r // b) if b else 0, b, b)},
        "square": {"expansion": (1, r), "square": (b, b)},
        "full": {"expansion": (r, r)},
    }
    return shapes[choice.kind]


def expand(basis: Basis, choice: ExpansionChoice, parameters: dict[str, Tensor]) -> Tensor:
    """U B V^T [N, K] in the dtype of the basis (float32): what is added to the weight.

    At B = 0 every element is -0.0, the one number that changes nothing it is added to: with 0.0
    the zeros of a weight would lose their signs.
    """
    if not any(bool(p.any()) for p in parameters.values()):
        return basis.u.new_full((basis.u.shape[0], basis.vt.shape[1]), -0.0)
    inner = torch.empty_like(basis.vt)
    with fast_products(basis.u.device):
        for panel in _panels(choice, basis.vt.shape[0]):
            some = _read(choice, parameters, panel)
            torch.mm(some, basis.vt[panel.columns], out=inner[panel.rows])
        return basis.u @ inner


def pull_back_expansion(
    basis: Basis, choice: ExpansionChoice, gradient: Tensor
) -> dict[str, Tensor]:
    """Gradients of the parameters from ``gradient`` [N, K], the loss's at ``expand``.

    They do not depend on B, in which the delta is linear: dL/dB[i, j] = <(U^T G)_i, (V^T)_j>.

    Args:
        gradient: any float dtype; it is left as it is.

    Returns:
        Gradients in the dtype of the basis under the names of ``start_expansion``.
    """
    found = start_expansion(basis, choice)
    inner = torch.zeros_like(basis.vt)
    with fast_products(basis.u.device):
        for top in range(0, gradient.shape[0], _ROWS):
            rows = slice(top, top + _ROWS)
            inner.addmm_(basis.u[rows].t(), gradient[rows].to(inner.dtype))
        for panel in _panels(choice, basis.vt.shape[0]):
            _write(choice, found, panel, inner[panel.rows] @ basis.vt[panel.columns].t())
    return found


def entries(choice: ExpansionChoice, directions: int) -> int:
    """How many numbers of B [r', r'] are trained, r' being ``directions``."""
    r, b = directions, choice.width
    if choice.kind == "band":
        return (2 * b + 1) * r - b * (b + 1)
    if choice.kind == "blocks":
        return r // b * b * b + (r % b) ** 2
    if choice.kind == "square":
        return r + b * b - b
    return r if choice.kind == "diagonal" else r * r


def learning_rate_scale(choice: ExpansionChoice, directions: int) -> float:
    """Factor on the learning rate with which a step moves W as far as one of the diagonal alone.

    Adam moves each number by about the learning rate, and U B V^T has the Frobenius norm of B, so
    W moves with the root of their number: 1 / sqrt(mean trained numbers a row of B), which is
    1 / sqrt(2k + 1) for a narrow band.
    """
    return math.sqrt(directions / entries(choice, directions))


def dense(choice: ExpansionChoice, parameters: dict[str, Tensor], directions: int) -> Tensor:
    """B [r', r'] of the parameters, zero off the mask."""
    out = parameters["expansion"].new_zeros(directions, directions)
    for panel in _panels(choice, directions):
        out[panel.rows, panel.columns] = _read(choice, parameters, panel)
    return out


# -- the decomposition ----------------------------------------------------------------------------


def _directions(rows: int, columns: int, rank: int | None) -> int:
    """r' of a weight [rows, columns]."""
    most = min(rows, columns)
    if rank is None:
        return most
    if not 1 <= rank <= most:
        raise InputError(
            f"rank: {rank} is not possible for a weight [{rows}, {columns}]; use 1 to {most}"
        )
    return rank


def _decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, S, V^T in the weight's dtype, or None where the routine gave up.

    On one thread: the last bits depend on the number of threads, which a resumed run may have
    another of, and a decomposition's many small steps gain nothing from a second one, which only
    makes them wait for each other on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    finally:
        torch.set_num_threads(threads)
    return (u, s, vt) if all(bool(torch.isfinite(t).all()) for t in (u, s, vt)) else None


# -- panels of B ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """Rows of B [top, bottom), and the columns [left, right) outside which they are zero."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)


def _panels(choice: ExpansionChoice, directions: int) -> Iterator[_Panel]:
    """Panels that cover the rows of B once, and with them every trained number once."""
    banded_from = 0
    if choice.kind in ("full", "square"):
        banded_from = directions if choice.kind == "full" else choice.width
        yield _Panel(0, banded_from, 0, banded_from)
    height = choice.width if choice.kind == "blocks" else _PANEL
    beyond = choice.width if choice.kind == "band" else 0
    for top in range(banded_from, directions, height):
        bottom = min(top + height, directions)
        yield _Panel(top, bottom, max(0, top - beyond), min(directions, bottom + beyond))


def _read(choice: ExpansionChoice, parameters: dict[str, Tensor], panel: _Panel) -> Tensor:
    """The panel of B [bottom - top, right - left]."""
    expansion = parameters["expansion"]
    size = panel.bottom - panel.top
    if choice.kind == "full":
        return expansion
    if choice.kind == "blocks":
        return expansion[panel.top // choice.width, :size, :size]
    if _is_square(choice, panel):
        square = parameters["square"].clone()
        square.diagonal().copy_(expansion[0, :size])
        return square
    beyond = expansion.shape[0] // 2
    padded = expansion.new_zeros(size, size + 2 * beyond)
    _band(padded).copy_(expansion[:, panel.rows].t())
    return padded[:, _inside(panel, beyond)]


def _write(
    choice: ExpansionChoice, found: dict[str, Tensor], panel: _Panel, product: Tensor
) -> None:
    """Put the gradient at a panel of B into those of the parameters."""
    expansion = found["expansion"]
    size = panel.bottom - panel.top
    if choice.kind == "full":
        expansion.copy_(product)
    elif choice.kind == "blocks":
        expansion[panel.top // choice.width, :size, :size] = product
    elif _is_square(choice, panel):
        expansion[0, :size] = product.diagonal()
        found["square"].copy_(product).fill_diagonal_(0.0)
    else:
        beyond = expansion.shape[0] // 2
        padded = product.new_zeros(size, size + 2 * beyond)
        padded[:, _inside(panel, beyond)] = product
        expansion[:, panel.rows] = _band(padded).t()


def _is_square(choice: ExpansionChoice, panel: _Panel) -> bool:
    return choice.kind == "square" and panel.top == 0


def _inside(panel: _Panel, beyond: int) -> slice:
    """Columns of B within those of a panel padded as if B went on beyond its edges."""
    first = panel.top - beyond
    return slice(panel.left - first, panel.right - first)


def _band(padded: Tensor) -> Tensor:
    """View [n, 2k + 1] of a contiguous [n, n + 2k]: row i from column i on, which is its band."""
    size, width = padded.shape
    return padded.as_strided((size, width - size + 1), (width + 1, 1))
