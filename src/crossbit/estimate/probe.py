"""How long an operation of each kind takes here: small runs of the very functions, timed.

About a second in all for a small model, a few for blocks of hundreds of millions of weights. Only
the kinds that a run has are measured. ``work`` says what the kinds are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossbit.activations.grid import ActivationGrid
from crossbit.activations.static_step import search_step
from crossbit.engine.job import batch_of
from crossbit.engine.plan import LayerPlan, ModelPlan, choice_of
from crossbit.engine.progress import release_memory
from crossbit.engine.statistics import InputStatistics
from crossbit.errors import InputError
from crossbit.estimate.shapes import Description
from crossbit.estimate.work import KINDS, gptq_flops
from crossbit.estimate.work_passes import attention, flops
from crossbit.export.fingerprint import tensor_sha256
from crossbit.grid import Grid, QTensor
from crossbit.models.checkpoint import count_nonfinite
from crossbit.models.experts import Weights
from crossbit.models.shell import Shell
from crossbit.objective import logit_kl
from crossbit.packing import pack, unpack
from crossbit.products import fast_products
from crossbit.recipe import Gptq
from crossbit.runtime.causal_attention import causal_attention, is_fast
from crossbit.runtime.linear import QuantLinear
from crossbit.solvers.awq import awq_search_clip
from crossbit.solvers.expansion import singular_basis
from crossbit.solvers.gptq import gptq
from crossbit.solvers.hessian import HessianAccumulator, inverse_factor
from crossbit.solvers.rounding import fake_weight, pull_back, start_rounding
from crossbit.solvers.rtn import rtn
from crossbit.transforms.column_fit import ROWS, TOKENS, fit_factor
from crossbit.transforms.rotation import RotatedCheckpoint
from crossbit.transforms.search import FoldProblem, output_error, round_trip

SIDE = 1024  # of the matrices that are measured on: large enough for full speed
PROBE_FLOPS = 3e11  # of one forward pass at most, about a second of a core
CHARACTERS = 100_000  # of text that tokenising is timed on
WRITTEN = 1 << 25  # bytes of the file that writing and reading are timed on


def best(run: Callable[[], object], repeats: int = 2) -> float:
    """Seconds of the fastest of a few runs: the first one also sets up caches."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return max(1e-9, min(times))


def _let_go() -> None:
    """Take memory in pieces, and give it back: what is taken next has to be mapped again."""
    pieces = [torch.zeros(1 << 18) for _ in range(16)]  # 16 MiB, a small layer's temporaries
    del pieces
    release_memory()


class Probe:
    """Measures rates for one run; see ``rates``."""

    def __init__(
        self,
        description: Description,
        shell: Shell,
        checkpoint: Weights,
        plan: ModelPlan,
        dtype: torch.dtype,
        place: Path,
    ) -> None:
        self.d, self.shell, self.checkpoint = description, shell, checkpoint
        self.plan, self.dtype, self.place = plan, dtype, place
        sizes = [block.weights for block in description.blocks]
        self.index = sizes.index(max(sizes))
        layers = plan.blocks[self.index].layers or next(b.layers for b in plan.blocks if b.layers)
        self.layer: LayerPlan = max(
            layers.values(), key=lambda x: x.info.in_features * x.info.out_features
        )
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Float32 numbers."""
        return torch.randn(shape, generator=self.generator)

    # -- blocks -------------------------------------------------------------------------------

    def block(self, kinds: set[str]) -> dict[str, float]:
        """A real block: loading it, forward, forward and backward."""
        found: dict[str, float] = {}
        shape = self.d.blocks[self.index]
        rotated = self.checkpoint
        files = rotated.inner if isinstance(rotated, RotatedCheckpoint) else rotated
        block, taken = self._loaded(files)
        found["load"] = taken / shape.parameters
        if shape.turned:
            # Against another reading, which finds the files in memory too.
            plain, turned = (min(self._loaded(c)[1] for _ in range(2)) for c in (files, rotated))
            found["rotate"] = max(0.0, turned - plain) / shape.turned
        length = self.d.length if self.d.samples else self.d.window_length
        while length > 128 and length * flops(shape) > PROBE_FLOPS:
            length //= 2
        kwargs = self.shell.block_kwargs(length, self.dtype)[self.index]
        count = max(1, min(batch_of(length), int(PROBE_FLOPS / length / 2 / shape.weights)))
        x = self.normal(count, length, self.d.width).to(self.dtype)
        with torch.no_grad():
            taken = best(lambda: block(x, **kwargs))
        masked = any(name.endswith("mask") and isinstance(x, Tensor) for name, x in kwargs.items())
        found["evaluated"] = self._evaluated(length)
        found["attention"] = self._attention(length, masked)
        attending = found["evaluated"] * attention(self.d, length)
        tokens = count * length
        # At least a tenth, should the two have been measured under different loads.
        found["forward"] = max(taken / tokens - attending, 0.1 * taken / tokens) / flops(shape)
        found["quantized"] = found["forward"] * self._quantized(tokens)
        if "trained" in kinds:
            taken = self._trained(block, x[:1], kwargs) / length
            found["attended"] = self._attended(length, masked)
            taken = max(taken - found["attended"] * attention(self.d, length), 0.1 * taken)
            found["trained"] = taken / flops(shape)
        return found

    def _loaded(self, checkpoint: Weights) -> tuple[nn.Module, float]:
        """The block, and the seconds that reading it took."""
        began = time.perf_counter()
        block = self.shell.load_block(self.index, checkpoint, self.dtype)
        taken = time.perf_counter() - began
        self.shell.free_block(self.index)
        return block, taken

    def _heads(self, length: int) -> Iterator[Tensor]:
        """Queries, keys and values of a sequence."""
        shape = (1, self.d.heads, length, self.d.head_width)
        return (self.normal(*shape).to(self.dtype) for _ in range(3))

    def _attention(self, length: int, masked: bool) -> float:
        """In calibration."""
        q, k, v = self._heads(length)
        if masked or self.d.eager or not is_fast(q, k, v):
            return self._evaluated(length)
        taken = best(lambda: causal_attention(q, k, v, 1.0))
        return taken / (length * attention(self.d, length))

    def _evaluated(self, length: int) -> float:
        q, k, v = self._heads(length)
        taken = best(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return taken / (length * attention(self.d, length))

    def _attended(self, length: int, masked: bool) -> float:
        """In training: with a mask, or with scores that are capped, there is no faster way."""
        q, k, v = (x.requires_grad_(True) for x in self._heads(length))
        mask = torch.ones(length, length, dtype=torch.bool).tril() if masked else None
        fast = is_fast(q, k, v) and not masked and not self.d.eager

        def step() -> None:
            with torch.enable_grad():
                if fast:
                    out = causal_attention(q, k, v, 1.0)
                else:
                    out = F.scaled_dot_product_attention(
                        q, k, v, attn_mask=mask, is_causal=mask is None
                    )
                torch.autograd.backward(out, out.detach())
            for leaf in (q, k, v):
                leaf.grad = None

        return best(step) / (length * attention(self.d, length))

    def _trained(self, block: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> float:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(True)
        x = x.clone().requires_grad_(True)

        def step() -> None:
            with torch.enable_grad():
                out = block(x, **kwargs)
                out = out[0] if isinstance(out, tuple) else out
                out.float().square().mean().backward()
            for parameter in block.parameters():
                parameter.grad = None

        return best(step)

    def _quantized(self, tokens: int) -> float:
        """How much longer the layer takes with quantized inputs."""
        grid = self.layer.activations
        if grid is None:
            return 1.0
        columns, tokens = self.layer.info.in_features, min(tokens, 512)
        weight = self.normal(SIDE, columns)
        x = self.normal(1, tokens, columns).to(self.dtype)
        own = QuantLinear(
            rtn(weight, self._fitting(columns)),
            None,
            grid,
            dtype=self.dtype,
            static_scale=torch.tensor(0.05),
            columns=torch.ones(columns),
        )
        plain = weight.to(self.dtype)
        with torch.no_grad():
            # A fresh tensor each time: layers remember the last input that they quantized.
            quantized = best(lambda: own(x.clone()), 3)
            return max(0.1, quantized / best(lambda: F.linear(x.clone(), plain), 3))

    # -- solvers ------------------------------------------------------------------------------

    def _fitting(self, columns: int) -> Grid:
        """The layer's grid if it fits ``columns``, else the same with a scale a row."""
        grid = self.layer.weights
        try:
            grid.groups(columns)
        except InputError:
            return replace(grid, strategy="channel", group_size=None)
        return grid

    def products(self, kinds: set[str]) -> dict[str, float]:
        """Float32 products, the factorisation, X^T X."""
        found: dict[str, float] = {}
        a, b = self.normal(SIDE, SIDE), self.normal(SIDE, SIDE)
        found["float32"] = best(lambda: a @ b) / (2.0 * SIDE**3)
        if "judge" in kinds:
            with fast_products(a.device):
                found["judge"] = best(lambda: a @ b) / (2.0 * SIDE**3)
        if "thin" in kinds:
            inner = min(128, self._fitting(SIDE).group_size or 128)
            found["thin"] = best(lambda: a.addmm_(b[:, :inner], b[:inner], alpha=1e-9)) / (
                2.0 * SIDE**2 * inner
            )
        if "factor" in kinds:
            square = (b @ b.T).div_(SIDE).add_(torch.eye(SIDE))
            taken = best(lambda: inverse_factor(square, 0.05, "diagonal"))
            found["factor"] = taken / SIDE**3
        if "hessian" in kinds:
            tokens = min(SIDE, batch_of(self.d.length) * self.d.length)
            columns = min(2 * SIDE, max(g.columns for g in self.d.blocks[self.index].groups))
            x = self.normal(tokens, columns).to(self.dtype)
            sums = HessianAccumulator(columns)
            found["hessian"] = best(lambda: sums.add(x)) / (tokens * columns**2)
        return found

    def gptq(self, rates: dict[str, float]) -> dict[str, float]:
        """Steps of GPTQ's loops: what is left of two sizes when the products are subtracted."""
        solver = self.layer.solver
        assert isinstance(solver, Gptq)
        columns = SIDE // 2
        grid = self._fitting(columns)
        x = self.normal(SIDE, columns)
        hessian = x.T @ x / SIDE
        left = []
        for rows in (SIDE, SIDE // 4):
            weight = self.normal(rows, columns)
            taken = best(lambda w=weight: gptq(w, hessian, grid, **solver.options))  # type: ignore[misc]
            thin, large = gptq_flops(rows, columns, grid.groups(columns), solver)
            taken -= thin * rates["thin"] + large * rates["float32"]
            left.append(taken - columns**3 * rates["factor"])
        cell = max(0.0, left[0] - left[1]) / (columns * (SIDE - SIDE // 4))
        column = max(0.0, left[1] / columns - cell * (SIDE // 4))
        return {"cell": cell, "column": column}

    def weights(self, kinds: set[str]) -> dict[str, float]:
        """Passes over a weight: rounding, searching, packing, reading back."""
        rows, columns = 2 * SIDE, SIDE  # larger than a cache, as layers are
        weight, grid = self.normal(rows, columns), self._fitting(SIDE)
        count = float(rows * columns)
        known = rtn(weight, grid)
        found: dict[str, float] = {}

        def judged(q: QTensor) -> Tensor:
            return (weight - q.dequantize()).square().sum() / weight.square().sum()

        def packed() -> None:
            unpack(pack(known.codes, grid.bits), grid.bits, columns)

        runs: dict[str, Callable[[], object]] = {
            "round": lambda: judged(rtn(weight, grid)),
            "clip": lambda: judged(rtn(weight, grid, clip="mse")),
            "trip": lambda: round_trip(weight * weight[0], grid),
            "fold": lambda: weight.copy_(weight.double() * 1.0),
            "pack": lambda: pack(known.codes, grid.bits),
            "unpack": lambda: known.dequantize().to(self.dtype),
            "awq_clip": lambda: awq_search_clip(weight, weight, grid),
        }
        for kind in kinds & set(runs):
            found[kind] = best(runs[kind]) / count
        if "unpack" in found:
            # Half of the reading back starts from the packed form.
            found["unpack"] += 0.5 * max(0.0, best(packed) / count - found.get("pack", 0.0))
        return found

    def search(self, kinds: set[str], rates: dict[str, float]) -> dict[str, float]:
        """Judging a candidate of a search, and the fit of a factor."""
        found: dict[str, float] = {}
        rows = columns = SIDE
        grid, sample = self._fitting(columns), self.normal(2 * SIDE, columns)
        weight, ones = self.normal(rows, columns), torch.ones(columns)
        problem = FoldProblem(
            [weight], [grid], self.layer.activations, ones * 4, ones, sample, fitting=sample
        )
        if "sampled" in kinds:
            with fast_products(sample.device):
                wanted = [sample @ weight.T]
                taken = best(lambda: output_error(problem, ones, wanted))
            taken -= rates["judge"] * 4 * SIDE * rows * columns + rates["trip"] * rows * columns
            elements = 2 * SIDE * (rows + (columns if self.layer.activations else 0))
            found["sampled"] = max(0.0, taken) / elements
        if "fit" in kinds:
            times = [
                best(lambda n=n: fit_factor(sample, [weight], [grid], ones, divisor=127, steps=n))  # type: ignore[misc]
                for n in (2, 8)
            ]
            found["fit"] = max(0.0, times[1] - times[0]) / (6 * (TOKENS + ROWS) * columns)
        return found

    def ranges(self) -> dict[str, float]:
        """Maxima and means of an input."""
        statistics = InputStatistics(SIDE, tokens=SIDE)
        x = self.normal(SIDE, SIDE).to(self.dtype)
        return {"ranges": best(lambda: statistics.add(x)) / SIDE**2}

    def step(self) -> dict[str, float]:
        """The search of an input's static step."""
        x, grid = self.normal(SIDE // 2, SIDE), ActivationGrid(4, "per_tensor_static")
        taken = best(lambda: search_step(x, 4.0, grid, torch.bfloat16))
        return {"step": taken / x.numel()}

    def trained(self) -> dict[str, float]:
        """Passes over a weight in training."""
        rounding = next(
            layer.rounding
            for block in self.plan.blocks
            for layer in block.layers.values()
            if layer.rounding is not None
        )
        rows, columns = 2 * SIDE, SIDE  # larger than a cache, as layers are
        weight, grid = self.normal(rows, columns), self._fitting(SIDE)
        # Moves along singular directions are products, which are counted as such.
        choice = replace(choice_of(rounding), expansion=None)
        state = start_rounding(weight, rtn(weight, grid), choice)
        gradient = weight.to(self.dtype)
        parameter = nn.Parameter(self.normal(rows, columns))
        parameter.grad = torch.ones_like(parameter)
        optimiser = torch.optim.AdamW([parameter], weight_decay=0.0, fused=True)
        count = float(rows * columns)
        return {
            "soften": best(lambda: fake_weight(state, self.dtype)) / count,
            "pull": best(lambda: pull_back(state, gradient)) / count,
            "adam": best(optimiser.step) / count,
        }

    # -- the rest -----------------------------------------------------------------------------

    def losses(self, kinds: set[str]) -> dict[str, float]:
        """Losses over the vocabulary, from logits in the dtype of computation."""
        tokens = max(1, (1 << 22) // self.d.vocabulary)
        logits = self.normal(tokens, self.d.vocabulary).to(self.dtype)
        ids = torch.zeros(tokens, dtype=torch.long)
        found: dict[str, float] = {}
        if "logits" in kinds:
            taken = best(lambda: F.cross_entropy(logits.float(), ids))
            found["logits"] = taken / logits.numel()
        if "divergence" in kinds:
            own = logits.flip(0).requires_grad_()

            def step() -> None:
                with torch.enable_grad():
                    logit_kl(own, logits).backward()  # type: ignore[no-untyped-call]
                own.grad = None

            found["divergence"] = best(step) / logits.numel()
        return found

    def files(self) -> dict[str, float]:
        """Writing, reading, hashing, looking for NaN."""
        data = torch.zeros(WRITTEN, dtype=torch.uint8)
        view = data.numpy().data
        with tempfile.TemporaryFile(dir=self.place, buffering=0) as file:

            def write() -> None:
                file.seek(0)
                file.write(view)

            def read() -> None:
                file.seek(0)
                file.readinto(view)

            written, reading = best(write), best(read)
        part = self.normal(1 << 20).to(torch.bfloat16)
        return {
            "write": written / WRITTEN,
            "read": reading / WRITTEN,
            "hash": best(lambda: tensor_sha256("probe", data)) / WRITTEN,
            "release": best(_let_go, 3),
            "scan": best(lambda: count_nonfinite(part)) / part.nbytes,
        }


def rates(
    description: Description,
    kinds: Iterable[str],
    shell: Shell,
    checkpoint: Weights,
    plan: ModelPlan,
    dtype: torch.dtype,
    place: Path,
) -> dict[str, float]:
    """Seconds that an operation of each kind takes on this machine, with the threads of torch.

    Args:
        description: the run.
        kinds: those that it has.
        shell: the empty model; its embedding and head are loaded, a block for a moment.
        checkpoint: where they come from.
        plan: grids and solvers.
        dtype: of computation.
        place: an existing folder on the disk that the run will write to.

    Returns:
        Rates of all kinds; 0 for those that were not asked for. "characters" is not among what is
        measured here: see ``tokenising``.
    """
    wanted = set(kinds)
    probe = Probe(description, shell, checkpoint, plan, dtype, place)
    found = dict.fromkeys(KINDS, 0.0) | {"seconds": 1.0}
    shell.load_outside(checkpoint, dtype)
    try:
        found |= probe.block(wanted)
    finally:
        shell.free_outside()
        checkpoint.close()
    found |= probe.products(wanted)
    found |= probe.weights(wanted)
    found |= probe.files()
    if "cell" in wanted and isinstance(probe.layer.solver, Gptq):
        found |= probe.gptq(found)
    if wanted & {"sampled", "fit"}:
        found |= probe.search(wanted, found)
    if "ranges" in wanted:
        found |= probe.ranges()
    if "step" in wanted:
        found |= probe.step()
    if "soften" in wanted:
        found |= probe.trained()
    if "decompose" in wanted:
        weight = probe.normal(SIDE // 2, SIDE // 2)
        found["decompose"] = best(lambda: singular_basis(weight)) / (SIDE // 2) ** 3
    if wanted & {"logits", "divergence"}:
        found |= probe.losses(wanted)
    return found


def tokenising(text: str, tokenizer: Any) -> float:
    """Seconds a character, measured on the beginning of ``text``."""
    piece = text[:CHARACTERS]
    if not piece:
        return 0.0
    return best(lambda: tokenizer([piece], add_special_tokens=False, verbose=False), 1) / len(piece)
