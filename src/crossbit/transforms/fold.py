"""Fold: move a column factor of an input group into its weights and the layer before.

Every consumer of the input x [..., K] gets W' = W diag(f), and what produces x gets 1/f: the gain
and bias of a norm, or the output rows and bias of a linear layer. W' (x / f) = W x, so the block's
function stays the same while the input that will be quantized becomes x / f (SmoothQuant's
migration, arXiv 2211.10438; CrossQuant's fold has f = c^(1 - alpha)).

Rounding. A gain is stored in few bits and never quantized, so the *stored* quotient defines the
factor: f = g / stored(g / f), exact again for the consumers, which are quantized later. A norm's
bias cannot be exact with the same f; what its rounding leaves over goes to the consumers' biases,
where they have them. Rows of a linear layer have one f for many elements, so no single quotient can
define it: in float32 and float64 they are simply divided (their rounding is far below that of the
quantization that follows), in 16-bit storage f is first rounded to a power of two, with which
neither division nor product rounds.

A shift d of the input is moved likewise (``shift``): what produces x gives x - d, and the biases of
its readers take up W d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossbit.errors import WorkError
from crossbit.models.structure import InputGroup, NormSource, RowSource

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def fold(
    block: nn.Module,
    group: InputGroup,
    f: Tensor,
    *,
    stored: torch.dtype | None = None,
) -> Tensor:
    """Fold the column factor f of an input group into the block's weights, in place.

    Args:
        block: the block that the group belongs to, parameters materialised in any float dtype.
        group: which weights read the input, and where 1/f goes.
        f: [K], finite and > 0. The input becomes x / f. Channels that come from the same source row
            (grouped heads) get one factor, the largest asked for.
        stored: dtype in which norm gains and biases will be stored in the end, where it is narrower
            than the dtype they have in `block` now (a bfloat16 model folded in float32); default:
            their present dtype.

    Returns:
        The factor that was really applied, float64 [K]: shared and rounded as said above. It may
        differ much from f only where g / f cannot be stored (underflow of a gain).

    Raises:
        WorkError: f has another length, or values that are not finite or not > 0; the group has no
            source; the source is not finite everywhere; a folded weight would overflow its dtype.
            The block is unchanged then.
    """
    f = _checked(group, f)
    source = group.source
    # Everything that can be refused is computed before anything is written.
    if isinstance(source, NormSource):
        norm = block.get_submodule(source.module)
        gain, bias, f = norm_quotients(norm, source, f, stored)
        _refuse_overflow(block, group, f)
        if bias is not None:
            old = _parameter(norm, "bias")
            _absorb(block, group, old.double() - f * bias.double())
            old.copy_(bias)
        _parameter(norm, "weight").copy_(gain)
    else:
        assert isinstance(source, RowSource)
        linear = block.get_submodule(source.linear)
        f = _shared(f.to(_parameter(linear, "weight").device), source.rows)
        if _parameter(linear, "weight").dtype in _HALF:
            f = power_of_two(f)
        _refuse_overflow(block, group, f)
        _divide_rows(group, linear, source.rows, f)
    for weight in _weights(block, group):
        weight.copy_(weight.double() * f)
    return f


@torch.no_grad()
def shift(
    block: nn.Module, group: InputGroup, d: Tensor, *, stored: torch.dtype | None = None
) -> Tensor:
    """Shift the input of a group in place: it becomes x - d, and the biases of its readers b + W d.

    Behind rows of values this is exact because the shares of attention add up to one.

    Args:
        block: as in ``fold``.
        group: its source, and all that reads the input, have a bias.
        d: [K]; channels that come from one source row have one shift.
        stored: dtype in which a norm's bias will be stored, as in ``fold``.

    Returns:
        The shift that was really applied, float64 [K]: what a norm's bias lost, rounded.
    """
    source, d = group.source, d.double()
    assert source is not None
    name = source.module if isinstance(source, NormSource) else source.linear
    bias = _parameter(block.get_submodule(name), "bias")
    if isinstance(source, NormSource):
        left = (bias.double() - d).to(stored or bias.dtype)
        d = bias.double() - left.double()
        bias.copy_(left)
    else:
        bias.copy_(bias.double().index_put((source.rows,), bias[source.rows].double() - d))
    _absorb(block, group, d)
    return d


def power_of_two(f: Tensor) -> Tensor:
    """The power of two nearest to each f > 0 on the log scale: [K] -> [K].

    With such factors products and quotients of floating-point weights do not round (underflow and
    overflow aside).
    """
    return torch.exp2(torch.round(torch.log2(f)))


def shared_factor(group: InputGroup, f: Tensor) -> Tensor:
    """f [K] with channels of one source row given their largest: `fold`'s factor before rounding.

    Raises:
        WorkError: as `fold`, for f and the group.
    """
    f = _checked(group, f)
    return _shared(f, group.source.rows) if isinstance(group.source, RowSource) else f


def _checked(group: InputGroup, f: Tensor) -> Tensor:
    if group.source is None:
        raise WorkError(f"no factor folds into the input of {group.consumers[0]}: {group.reason}")
    if f.shape != (group.width,):
        raise WorkError(
            f"the factor of {group.consumers[0]} has shape {tuple(f.shape)}, "
            f"its input has {group.width} channels"
        )
    f = f.detach().double()
    bad = ~(torch.isfinite(f) & (f > 0))
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise WorkError(
            f"the factor of {group.consumers[0]} is {float(f[channel])} in channel {channel}; "
            "factors must be finite and > 0"
        )
    return f


def _shared(f: Tensor, rows: Tensor) -> Tensor:
    rows = rows.to(f.device)
    per_row = f.new_zeros(int(rows.max()) + 1).scatter_reduce(0, rows, f, "amax")
    return per_row[rows]


def norm_quotients(
    norm: nn.Module, source: NormSource, f: Tensor, stored: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A norm divided by f [K]: new weight [K], new bias [K] or None, realised f float64 [K].

    ``stored``: dtype of the new ones, None is the norm's own.
    """
    weight = _parameter(norm, "weight")
    f = f.to(weight.device)
    old = _gain(weight, source.gain_offset)
    if not torch.isfinite(old).all():
        raise WorkError(f"the gain of norm {source.module} is not finite everywhere; bad weights")
    quotient = (old / f - source.gain_offset).to(stored or weight.dtype)
    new_weight = _keep_alive(quotient, old, source.gain_offset)
    new = _gain(new_weight, source.gain_offset)
    zero = old == 0
    # A channel with a gain of 0 is its bias, and b / f carries f exactly as a gain would; without a
    # bias it is nothing at all, and any f will do: leave the weights alone.
    realised = torch.where(zero, torch.ones_like(f), old / torch.where(zero, 1.0, new))
    if not source.has_bias:
        return new_weight, None, realised
    bias = _parameter(norm, "bias")
    b = bias.double()
    if not torch.isfinite(b).all():
        raise WorkError(f"the bias of norm {source.module} is not finite everywhere; bad weights")
    narrow = stored or bias.dtype
    rounded = _keep_alive((b / f).to(narrow), b, 0).double()
    by_bias = zero & (b != 0)
    realised = torch.where(by_bias, b / torch.where(by_bias, rounded, 1.0), realised)
    return new_weight, (b / realised).to(narrow), realised


def _gain(weight: Tensor, offset: int) -> Tensor:
    """The gain as the norm computes it, as float64: offset + weight, added in float32 at least."""
    if offset == 0 or weight.dtype == torch.float64:
        return weight.double() + offset
    return (weight.float() + offset).double()


def _keep_alive(weight: Tensor, old: Tensor, offset: int) -> Tensor:
    """Replace stored values whose gain underflows to 0, overflows, or changes sign.

    Such a quotient would make the realised factor infinite or negative. Each is replaced by the
    storable value nearest to it whose gain is finite, not 0 and of the old gain's sign.
    """
    limit = torch.finfo(weight.dtype).max
    weight = weight.clamp(-limit, limit)
    sign = torch.sign(old)
    dead = torch.sign(_gain(weight, offset)) != sign
    # The neighbour of -offset in the gain's direction. 1 + w is exact in float32 for w near -1
    # (Sterbenz), so its gain is not 0. Channels with a gain of 0 keep exactly 0.
    toward = torch.where(sign == 0, -float(offset), sign * float("inf")).to(weight.dtype)
    neighbour = torch.nextafter(torch.full_like(weight, -float(offset)), toward)
    return torch.where(dead, neighbour, weight)


def _absorb(block: nn.Module, group: InputGroup, rest: Tensor) -> None:
    """Add W rest to the consumers' biases: what was taken from their input.

    `rest` [K] is in units of the input that their weights, as they are now, belong to.
    """
    for name in group.consumers:
        linear = block.get_submodule(name)
        bias = getattr(linear, "bias", None)
        if bias is not None:
            bias.copy_(bias.double() + _parameter(linear, "weight").double() @ rest)


def _weights(block: nn.Module, group: InputGroup) -> list[Tensor]:
    """Weights [*, K] of everything that reads the group's input."""
    names = (*group.consumers, *group.readers)
    return [_parameter(block.get_submodule(n), "weight") for n in names]


def _refuse_overflow(block: nn.Module, group: InputGroup, f: Tensor) -> None:
    names = (*group.consumers, *group.readers)
    for name, weight in zip(names, _weights(block, group), strict=True):
        largest = (weight.abs().amax(0).double() * f).amax()
        if not largest <= torch.finfo(weight.dtype).max:
            raise WorkError(
                f"{name} would hold {float(largest):.3g} after the fold, more than "
                f"{weight.dtype} can (or it is not finite now); fold in float32"
            )


def _divide_rows(group: InputGroup, linear: nn.Module, rows: Tensor, f: Tensor) -> None:
    """Divide the source's rows (weight and bias) by the factor of the channels they feed."""
    weight = _parameter(linear, "weight")
    divisor = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    divisor[rows.to(weight.device)] = f  # one f a row: `_shared` has seen to that
    quotient = (weight.double() / divisor[:, None]).to(weight.dtype)
    if not torch.isfinite(quotient).all():
        raise WorkError(
            f"weights that feed {group.consumers[0]} are not finite, or would overflow "
            f"{weight.dtype} in the fold; fold in float32"
        )
    weight.copy_(quotient)
    bias = getattr(linear, "bias", None)
    if bias is not None:
        bias.copy_(bias.double() / divisor)


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, Tensor)
    return parameter
