"""The layers that run quantized weights: two executions of the same integers, shared inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crossbit.activations.grid import ActivationGrid
from crossbit.grid import Grid, QTensor
from crossbit.models.structure import BlockStructure, InputGroup, LinearInfo, NormSource
from crossbit.runtime.install import QuantizedLayer, install
from crossbit.runtime.linear import QuantLinear, SharedInput, integer_path
from crossbit.solvers.rtn import rtn
from crossbit.transforms.fold import fold

A8 = ActivationGrid(8)


def weight_of(rows: int, columns: int, grid: Grid, seed: int = 0) -> QTensor:
    return rtn(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), grid)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 50
    return x


def float64_layer(
    x: Tensor, qtensor: QTensor, bias: Tensor | None, grid: ActivationGrid | None
) -> Tensor:
    """Row by row in float64 from the definitions; the input's scale is float32, as stored."""
    zero = 0 if qtensor.zero_point is None else qtensor.zero_point.double()
    codes = qtensor.codes.double().reshape(*qtensor.scale.shape, -1)
    zero = zero if isinstance(zero, int) else zero[..., None]
    weight = ((codes - zero) * qtensor.scale.double()[..., None]).reshape(qtensor.codes.shape)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.float64)
    for i, row in enumerate(rows):
        values = row.double()
        if grid is not None:
            step = row.float().abs().max() / ((2**grid.bits - 1) / 2)
            half = 2 ** (grid.bits - 1)
            values = (row.float() / step).round().clamp(-half, half - 1).double() * step.double()
        out[i] = weight @ values
    if bias is not None:
        out += bias.double()
    return out.reshape(*x.shape[:-1], -1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# -- two executions -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([4, 8]),
    st.sampled_from(["channel", "tensor"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(2, 70), st.integers(1, 40)),
)
def test_integers_and_fake_quantization_agree(
    bits: int,
    acts: int,
    strategy: Any,
    dtype: torch.dtype,
    bias: bool,
    signed: bool,
    shape: tuple[int, ...],
) -> None:
    """In float32 to 1e-6: the integer path loses nothing that the other keeps."""
    batch, tokens, columns, rows = shape
    grid_ = Grid(bits, True, strategy, scale_dtype=dtype, signed=signed)
    qtensor = weight_of(rows, columns, grid_)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(2)) if bias else None
    grid, x = ActivationGrid(acts), inputs(batch, tokens, columns)
    layers = {
        how: QuantLinear(qtensor, b, grid, dtype=torch.float32, execution=how)
        for how in ("fake", "integer")
    }
    wanted = float64_layer(x, qtensor, b, grid)
    for layer in layers.values():
        assert layer(x).shape == (batch, tokens, rows)
    # An output that cancels is compared with the size of what was added up.
    size = float64_layer(x.abs(), absolute(qtensor), None if b is None else b.abs(), None).norm()
    for layer in layers.values():
        assert float((layer(x).double() - wanted).norm() / size) < 1e-6
    difference = (layers["integer"](x) - layers["fake"](x)).double().norm()
    assert float(difference / size) < 1e-6


def absolute(qtensor: QTensor) -> QTensor:
    codes = qtensor.codes.short().abs().clamp(max=127).to(torch.int8)
    return QTensor(codes, qtensor.scale.abs(), None, qtensor.grid)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, True, "group", 16),
        Grid(4, False, "group", 16),
        Grid(8, False, "channel"),
        Grid(3, True, "channel"),
        Grid(2, True, "group", 16, signed=True),
    ],
    ids=Grid.describe,
)
@pytest.mark.parametrize("activations", [None, A8, ActivationGrid(4)])
def test_fake_execution_is_the_definition(grid: Grid, activations: ActivationGrid | None) -> None:
    qtensor, x = weight_of(24, 64, grid), inputs(2, 5, 64)
    layer = QuantLinear(qtensor, None, activations, dtype=torch.float32, execution="fake")
    assert relative(layer(x), float64_layer(x, qtensor, None, activations)) < 1e-6


def test_other_activation_kinds() -> None:
    qtensor, x = weight_of(8, 16, Grid(8)), inputs(5, 16)
    columns = x.abs().amax(0) * 1.1
    step = torch.tensor(0.25)
    static = QuantLinear(
        qtensor,
        None,
        ActivationGrid(8, "per_tensor_static"),
        dtype=torch.float32,
        static_scale=step,
    )
    values = (x / step).round().clamp(-128, 127) * step
    torch.testing.assert_close(static(x), values @ qtensor.dequantize().T)
    cross = ActivationGrid(8, "cross_static", alpha=0.5)
    layer = QuantLinear(qtensor, None, cross, dtype=torch.float32, columns=columns)
    factor = columns.double().sqrt()
    scaled = x.double() / factor
    steps = scaled.abs().amax(1, keepdim=True) / 127.5
    values = ((scaled / steps).round().clamp(-128, 127) * steps * factor).float()
    torch.testing.assert_close(layer(x), values @ qtensor.dequantize().T, rtol=1e-4, atol=1e-4)


def test_which_execution_is_chosen() -> None:
    channel, group = weight_of(8, 32, Grid(8)), weight_of(8, 32, Grid(4, True, "group", 16))
    asymmetric = weight_of(8, 32, Grid(8, False))
    static = ActivationGrid(8, "per_tensor_static")

    def chosen(qtensor: QTensor, grid: ActivationGrid | None, dtype: torch.dtype) -> str:
        return QuantLinear(qtensor, None, grid, dtype=dtype).execution

    assert chosen(channel, A8, torch.bfloat16) == "integer"
    assert chosen(channel, A8, torch.float32) == "fake"
    one = weight_of(8, 1, Grid(8))  # on which torch._int_mm gives garbage
    cases = ((group, A8), (asymmetric, A8), (channel, None), (channel, static), (one, A8))
    for qtensor, grid in cases:
        assert not integer_path(qtensor, grid)
        assert chosen(qtensor, grid, torch.bfloat16) == "fake"
        with pytest.raises(ValueError, match="integer path"):
            QuantLinear(qtensor, None, grid, dtype=torch.float32, execution="integer")


def test_half_precision_inputs() -> None:
    qtensor, x = weight_of(24, 64, Grid(8)), inputs(3, 7, 64).bfloat16()
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3))
    wanted = float64_layer(x, qtensor, bias.bfloat16(), A8)
    for how in ("integer", "fake"):
        layer = QuantLinear(qtensor, bias, A8, dtype=torch.bfloat16, execution=how)
        assert layer(x).dtype == torch.bfloat16
        assert relative(layer(x), wanted) < (4e-3 if how == "integer" else 1e-2)


# -- a folded layer -------------------------------------------------------------------------------


class Block(nn.Module):
    """norm -> two linear layers."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        rng = torch.Generator().manual_seed(4)
        self.norm = nn.RMSNorm(columns)
        self.a, self.b = nn.Linear(columns, 12), nn.Linear(columns, 20, bias=False)
        self.requires_grad_(False)
        self.norm.weight.copy_(torch.exp(torch.randn(columns, generator=rng)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.a(y), self.b(y)


def block_structure(block: Block) -> BlockStructure:
    columns = block.a.in_features
    linears = {n: LinearInfo(n, n, columns, getattr(block, n).out_features, n == "a") for n in "ab"}
    group = InputGroup("ab", ("a", "b"), columns, NormSource("norm", 0, False))
    return BlockStructure("block", linears, [group])


@pytest.mark.parametrize("execution", ["fake", "integer"])
def test_folded_is_the_fake_quantization_of_the_folded_model(execution: Any) -> None:
    """y = Q_x(X / f) Q_w(W f)^T + b, from the unfolded float model."""
    block = Block(32)
    structure = block_structure(block)
    x = inputs(40, 32)
    normed = block.norm(x)
    f = normed.abs().amax(0) ** 0.85
    weights = {n: getattr(block, n).weight.clone() for n in "ab"}
    bias = block.a.bias.clone()
    realised = fold(block, structure.groups[0], f)
    torch.testing.assert_close(realised.float(), f, rtol=1e-6, atol=0)
    grid = Grid(8, scale_dtype=torch.float32)
    layers = {n: QuantizedLayer(rtn(getattr(block, n).weight, grid), A8) for n in "ab"}
    install(block, structure, layers, torch.float32, execution)
    outputs = dict(zip("ab", block(x), strict=True))
    for name, output in outputs.items():
        folded = rtn((weights[name].double() * realised).float(), grid)
        assert torch.equal(folded.codes, layers[name].qtensor.codes)
        divided = block.norm(x)
        torch.testing.assert_close(divided, normed / realised.float(), rtol=1e-5, atol=1e-6)
        wanted = float64_layer(divided, folded, bias if name == "a" else None, A8)
        assert relative(output, wanted) < 1e-6


def test_install_shares_one_quantized_input(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(32)
    structure = block_structure(block)
    layers = {
        n: QuantizedLayer(weight_of(getattr(block, n).out_features, 32, Grid(8)), A8) for n in "ab"
    }
    install(block, structure, layers, torch.bfloat16)
    assert isinstance(block.a, QuantLinear)
    assert block.a.bias is not None
    assert isinstance(block.b, QuantLinear)
    assert block.b.bias is None
    calls: list[int] = []
    import crossbit.runtime.linear as module

    real: Callable[..., Any] = module.per_token_codes
    monkeypatch.setattr(
        module, "per_token_codes", lambda x, *rest: (calls.append(1), real(x, *rest))[1]
    )
    block.to(torch.bfloat16)
    for step in (1, 2):
        block(inputs(6, 32, seed=step).bfloat16())
        assert len(calls) == step


# -- the shared input -----------------------------------------------------------------------------


def double(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x * 2


def test_the_last_input_is_remembered() -> None:
    shared, x = SharedInput(), inputs(3, 4)
    first = shared.get(x, "a", double(x))
    assert shared.get(x, "a", lambda: pytest.fail("computed again")) is first
    assert shared.get(x, "b", lambda: "other tag") == "other tag"
    assert torch.equal(shared.get(x, "a", double(x)), x * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x[0].zero_(),
        lambda x: x.view(-1).mul_(3),
        lambda x: x.detach().copy_(torch.ones_like(x)),
        lambda x: torch.nn.functional.relu_(x),
    ],
)
def test_a_changed_input_is_computed_again(change: Callable[[Tensor], Any]) -> None:
    shared, x = SharedInput(), inputs(3, 4)
    shared.get(x, "a", double(x))
    with torch.no_grad():
        change(x)
    assert torch.equal(shared.get(x, "a", double(x)), x * 2)


def test_equal_inputs_are_different_inputs() -> None:
    shared, x = SharedInput(), inputs(3, 4)
    shared.get(x, "a", lambda: "mine")
    assert shared.get(x.clone(), "a", lambda: "clone") == "clone"
    assert shared.get(x.view(3, 4), "a", lambda: "view") == "view"


def test_a_new_tensor_at_an_old_address() -> None:
    """The key is the object, not its id or its memory: both are used again at once."""
    shared = SharedInput()
    seen: set[tuple[int, int]] = set()
    again = 0
    for i in range(200):
        x = torch.full((4,), float(i))
        key = (id(x), x.data_ptr())
        again += key in seen
        seen.add(key)
        assert float(shared.get(x, "a", double(x))[0]) == 2.0 * i
        del x
    assert again  # the test has met what it is about


def test_memory_is_dropped_with_the_input() -> None:
    shared, x = SharedInput(), inputs(3, 4)
    shared.get(x, "a", double(x))
    del x
    gc.collect()
    assert shared._value is None


def test_autograd_and_inference_are_not_remembered() -> None:
    shared = SharedInput()
    x = inputs(3, 4).requires_grad_()
    assert shared.get(x, "a", lambda: 1) == 1
    assert shared.get(x, "a", lambda: 2) == 2
    with torch.inference_mode():
        y = inputs(3, 4)
        assert shared.get(y, "a", lambda: 1) == 1
        y.zero_()
        assert shared.get(y, "a", lambda: 2) == 2


def test_an_error_leaves_nothing_behind() -> None:
    shared, x, y = SharedInput(), inputs(3, 4), inputs(3, 4, seed=9)
    shared.get(x, "a", double(x))

    def broken() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        shared.get(y, "a", broken)
    assert torch.equal(shared.get(y, "a", double(y)), y * 2)
    assert torch.equal(shared.get(x, "a", double(x)), x * 2)
