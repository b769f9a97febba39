"""What a run will need: how estimates move with settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.estimating import MIB, MOVES, TRAINED, TUNED, TURNS, description, recipe_of, room
from tests.pipelines import run, shorten, write_text
from tests.tiny import FAMILIES, tiny_folder

from crossbit.estimate.describe import with_recipe
from crossbit.estimate.disk import disk, outside, part, stream_bytes
from crossbit.estimate.memory import STAGES, peak_by_stage
from crossbit.estimate.memory_blocks import forward, loading
from crossbit.estimate.memory_training import saved, training_tokens
from crossbit.estimate.shapes import Description
from crossbit.estimate.verdict import advice, changed, estimate
from crossbit.estimate.work import KINDS, operations, seconds
from crossbit.estimate.work_passes import flops
from crossbit.recipe import Recipe

ROTATED = "transforms=[{kind: rotate}]"
RATES = dict.fromkeys(KINDS, 1e-9)


@pytest.mark.parametrize("base", [TRAINED, "gptq-w4a16", "crossquant-w8a8"], ids=str)
def test_more_calibration_never_needs_less(base: Any) -> None:
    before: dict[str, float] = {}
    for samples, length in ((8, 64), (8, 256), (32, 256), (64, 512)):
        sized = (f"calibration.samples={samples}", f"calibration.length={length}")
        found = estimate(description(recipe_of(*sized, base=base)), held=0, rates=RATES)
        assert found.time is not None
        now = {**found.memory, "disk": found.disk.work, "time": found.time}
        assert all(now[key] >= value for key, value in before.items()), sized
        assert now["disk"] > before.get("disk", 0)
        assert now["time"] > before.get("time", 0)
        before = now


def test_a_window_of_more_blocks_needs_more() -> None:
    found = []
    for window in (1, 2, 3):
        settings = (f"objective.window={window}", f"objective.overlap={window - 1}")
        d = description(recipe_of(*settings))
        found.append((peak_by_stage(d)["train"], disk(d).work))
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_a_larger_batch_needs_more_until_it_is_split() -> None:
    def train(batch: int) -> float:
        sized = (f"training.batch={batch}", "calibration.length=1024")
        return peak_by_stage(description(recipe_of(*sized)))["train"]

    assert train(1) < train(2) < train(4) == train(8)


LET = "transforms=[{kind: let}]"


def test_low_rank_needs_less_than_full() -> None:
    full, low = (
        description(recipe_of(f"solver.parameter={name}")) for name in ("full", "low_rank")
    )
    assert peak_by_stage(low)["train"] < peak_by_stage(full)["train"]
    assert disk(low).work < disk(full).work
    # Deduced from the other description, it is the same.
    assert with_recipe(full, low.recipe) == low


@pytest.mark.parametrize("name", [name for name in MOVES if name != "ranges"])
def test_moving_along_singular_directions_takes_more(name: str) -> None:
    """Memory, disk and time: directions, B and its moments, the moved weight, decompositions."""
    settings = MOVES[name]
    still = tuple(s for s in settings if "expansion" not in s)
    one, other = (description(recipe_of(*s)) for s in (still, settings))
    layer = other.blocks[0].planned[0]
    plain = one.blocks[0].planned[0]
    assert layer.basis == layer.directions * (layer.rows + layer.columns + 1) > 0
    moments = 2 * 4 * sum(x.parameters for x in other.blocks[0].planned)
    kept = 4 * sum(x.basis + x.weights for x in other.blocks[0].planned)
    extra = kept + moments - 2 * 4 * sum(x.parameters for x in one.blocks[0].planned)
    # Of a window of two blocks.
    assert peak_by_stage(other)["train"] - peak_by_stage(one)["train"] >= 2 * extra
    assert disk(other).work > disk(one).work
    assert layer.parameters > plain.parameters
    before, after = (operations(d) for d in (one, other))
    shorter = [min(x.rows, x.columns) * x.weights for b in other.blocks for x in b.planned]
    assert after["open"]["decompose"] == sum(shorter)
    assert "decompose" not in before["open"]
    assert after["train"]["float32"] > before["train"].get("float32", 0)
    # Deduced from the other description, it is the same.
    assert with_recipe(one, other.recipe) == other
    # Tuning all blocks counts it too.
    tuned = [description(recipe_of(*s, *TUNED)) for s in (still, settings)]
    assert peak_by_stage(tuned[1])["end to end"] > peak_by_stage(tuned[0])["end to end"]


def test_factors_of_inputs_keep_a_moved_copy_of_each_weight() -> None:
    plain, moved = (description(recipe_of(*settings)) for settings in ((), (LET,)))
    factored = [layer for layer in moved.blocks[0].planned if layer.factored]
    # All but the layer behind the nonlinearity: the values' rows make the input of o_proj.
    assert len(factored) == len(moved.blocks[0].planned) - 1
    extra = 4 * sum(layer.weights for layer in factored)
    # Of a window of two blocks.
    assert peak_by_stage(moved)["train"] - peak_by_stage(plain)["train"] >= 2 * extra
    with_down = description(recipe_of("transforms=[{kind: let, down: true}]"))
    assert all(layer.factored for layer in with_down.blocks[0].planned)


def test_looking_ahead_takes_blocks_streams_and_passes() -> None:
    """Of two original blocks behind each window of one: held, run, and their targets made."""
    alone = ("objective.window=1", "objective.overlap=0", "calibration.samples=8")
    one, two, far = (
        description(recipe_of(*alone, f"objective.ahead={ahead}"))
        for ahead in ("[1]", "[1,0,1]", "[1,0,0,0,0,0,0,0,1]")
    )
    count = len(one.blocks)
    assert [len(two.ahead(w)) for w in two.schedule] == [2] * (count - 2) + [1, 0]
    assert [len(far.ahead(w)) for w in far.schedule] == [*range(count - 1, -1, -1)]
    held = 4 * sum(b.parameters for b in two.blocks[1:3])
    graph = peak_by_stage(two)["train"] - peak_by_stage(one)["train"] - held
    tokens = training_tokens(two, two.recipe.training)
    # What frozen blocks keep for gradients is less than what those in training keep.
    assert 0 < graph < 2 * tokens * (saved(two, two.blocks[1]) + 12 * two.width)
    assert saved(two, two.blocks[1], frozen=True) < saved(two, two.blocks[1])
    assert 0 < disk(two).work - disk(one).work <= 2 * stream_bytes(two, 8)
    assert disk(far).work > disk(two).work
    before, after = (operations(d) for d in (one, two))
    passed = [b for w in two.schedule for b in two.ahead(w)]
    loaded = after["train"]["load"] - before["train"].get("load", 0)
    assert loaded == 2 * sum(b.parameters for b in passed)
    # All sequences once for the target; of an epoch forward and back, and twice to judge.
    epochs, fitting = two.recipe.training.epochs, two.samples - two.held
    sequences = two.samples + 2 * epochs * fitting + (epochs + 1) * two.held
    forward = after["train"]["forward"] - before["train"]["forward"]
    assert forward == pytest.approx(sequences * two.length * sum(map(flops, passed)))
    assert {k: v for k, v in after.items() if k != "train"} == {
        k: v for k, v in before.items() if k != "train"
    }
    half = description(recipe_of(*alone, "objective.ahead=[1,0,1]", "objective.ahead_share=0.5"))
    shorter = after["train"]["forward"] - operations(half)["train"]["forward"]
    assert shorter == pytest.approx(epochs * fitting * two.length * sum(map(flops, passed)))
    assert peak_by_stage(one)["train"] < peak_by_stage(half)["train"] < peak_by_stage(two)["train"]


def test_looking_less_far_is_proposed_where_it_would_fit() -> None:
    small = ("training.batch=1", "solver.parameter=low_rank", "calibration.length=128")
    d = description(recipe_of(*small, "objective.ahead=[1,0,0,1]"))
    d = replace(d, verify_length=1, windows=0)
    one = with_recipe(d, changed(d.recipe, {"objective": {"ahead": [1.0]}}))
    assert one.ahead(one.schedule[0]) == ()
    option = advice(d, room(work=estimate(one, held=0).disk.work), 0)
    assert option == '--set "objective.ahead=[1]"'
    assert Recipe.load(d.recipe, ["objective.ahead=[1]"]) == one.recipe


def test_rotated_tensors_are_made_in_float64_each_time_that_they_are_read() -> None:
    plain, turned = (description(recipe_of(*s, base="rtn-w4a16")) for s in ((), (ROTATED,)))
    block = turned.blocks[0]
    # The residual stream turns all of them, heads turn what v gives and what o reads.
    by_head = [x for x in block.layers if x.by_head]
    assert sorted(x.turns for x in block.layers) == [1] * 5 + [2] * 2
    assert len(by_head) == 2
    assert block.turned == block.weights + sum(x.weights for x in by_head)
    assert plain.blocks[0].turned == 0
    assert loading(block, 4) == 4 * block.parameters + 12 * block.largest
    assert loading(plain.blocks[0], 4) == 4 * block.parameters
    assert peak_by_stage(turned)["open"] > peak_by_stage(plain)["open"]
    before, after = (operations(d) for d in (plain, turned))
    assert after["open"].pop("rotate") == sum(b.turned for b in turned.blocks)
    ends = turned.embedding.weights + (turned.head.weights if turned.head else 0)
    assert after["head"].pop("rotate") == 2 * ends
    assert after == before


def test_the_untied_head_of_a_rotated_model_is_one_matrix_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    model = tiny_folder(tmp_path / "model", "llama", tied=True)
    text = write_text(tmp_path / "text.txt", 1)
    found: list[Description] = []
    monkeypatch.setattr("crossbit.pipeline.refuse", lambda d, *_, **__: found.append(d))
    settings = ("evaluation.windows=0", "weights.group=32")
    for name, more in (("plain", ()), ("turned", (ROTATED,))):
        out = tmp_path / name
        run(model, text, out, "rtn-w4a16", settings=(*settings, *more))
        found_size = (out / "model.safetensors").stat().st_size
        stored = outside(found[-1]) + sum(part(found[-1], b) for b in found[-1].blocks)
        assert found_size == pytest.approx(stored, rel=0.35)
    plain, turned = found
    assert plain.head is None
    assert turned.head is not None
    assert turned.outside_weights - plain.outside_weights == turned.embedding.weights
    assert turned.turned == (turned.embedding, turned.head)


def test_rotations_of_inputs_take_samples_and_searches() -> None:
    held = TURNS["shared"][:1]
    plain, shared, each = (description(recipe_of(*s)) for s in (held, *TURNS.values()))
    group = shared.blocks[0].groups[0]
    assert group.turn == 2 * 4 * 16 * 16 + 8 * group.columns
    assert each.blocks[0].groups[0].turn == 2 * 4 * 16 * group.columns + 8 * group.columns
    for key in ("open", "solve", "train", "close"):
        first, second, third = (peak_by_stage(d)[key] for d in (plain, shared, each))
        assert first < second < third, key
    assert disk(plain).work < disk(shared).work < disk(each).work
    before, after = (operations(d)["open"] for d in (plain, shared))
    assert after["float32"] > before.get("float32", 0)


def test_quantized_keys_and_a_prefix_are_counted() -> None:
    base = "rtn-w8a16"
    plain, cached = (description(recipe_of(*s, base=base)) for s in ((), ("cache.bits=4",)))
    # Where attention is wider than the rest of the block.
    wide = [replace(d, key_heads=16, head_width=512) for d in (plain, cached)]
    widths = [forward(d, d.blocks[0], 64, 64, 4) for d in wide]
    assert widths[1] > widths[0]
    given, searched = (
        description(recipe_of(f"prefix={p}", base=base)) for p in ("{tokens: [1]}", "{}")
    )
    first, second, third = (peak_by_stage(d)["open"] for d in (plain, given, searched))
    assert first <= second < third
    before, one, other = (operations(d)["open"] for d in (plain, given, searched))
    assert one["load"] == 2 * before["load"]
    assert other["forward"] > 0


def test_the_search_of_static_steps_keeps_a_sample_and_takes_its_elements() -> None:
    sized = ("calibration.samples=8", "calibration.length=64", "calibration.holdout=0.25")
    static = "activations={bits: 8, kind: per_tensor_static, step: %s}"
    taken, searched = (
        description(recipe_of(*sized, static % step, base="rtn-w8a8"))
        for step in ("maximum", "search")
    )
    before, after = (operations(d)["open"] for d in (taken, searched))
    assert "step" not in before
    columns = sum(group.columns for block in searched.blocks for group in block.groups)
    assert after["step"] == 2 * 64 * columns
    assert peak_by_stage(searched)["open"] > peak_by_stage(taken)["open"]


def test_ranges_are_two_numbers_where_a_step_is_one() -> None:
    d = description(recipe_of(*MOVES["ranges"]))
    layer = d.blocks[0].planned[0]
    assert (layer.limits, layer.parameters, layer.basis) == (2 * layer.scales, 0, 0)
    steps = description(recipe_of("solver.parameter=none"))
    assert steps.blocks[0].planned[0].limits == layer.scales
    assert peak_by_stage(steps)["train"] < peak_by_stage(d)["train"]


def test_windows_are_saved_inside_an_epoch_only_where_training_takes_long() -> None:
    d = description(recipe_of("training.epochs=1", "calibration.samples=8"))
    slow = estimate(d, held=0, rates=dict.fromkeys(KINDS, 1.0))
    fast = estimate(d, held=0, rates=dict.fromkeys(KINDS, 1e-15))
    assert fast.disk.work < slow.disk.work == estimate(d, held=0).disk.work


def test_stages_are_those_of_the_run() -> None:
    trained = estimate(description(recipe_of()), held=0, rates=RATES)
    plain = estimate(description(recipe_of(base="rtn-w8a8")), held=0, rates=RATES)
    silent = description(recipe_of("evaluation.windows=0", base="rtn-w8a8"))
    sensed = ("objective.metric=fisher", *TUNED)
    tuned = estimate(description(recipe_of(*sensed)), held=0, rates=RATES)
    untrained = estimate(description(recipe_of(*TUNED, base="rtn-w8a8")), held=0, rates=RATES)
    assert list(tuned.memory) == list(STAGES)
    assert set(STAGES) - set(trained.memory) == {"sensitivity", "end to end"}
    trains = {"sensitivity", "train", "end to end"}
    assert set(STAGES) - set(plain.memory) == trains
    assert set(STAGES) - set(peak_by_stage(silent)) == {*trains, "evaluate"}
    # Nothing is trained, so there is nothing to tune.
    assert untrained.memory == plain.memory
    assert untrained.disk == plain.disk
    for found in (tuned, trained, plain):
        assert found.seconds is not None
        assert set(found.seconds) == set(found.memory)
    assert trained.peak == max(((m, s) for s, m in trained.memory.items()))[::-1]


def test_what_the_process_holds_is_added() -> None:
    d = description(recipe_of(base="rtn-w8a8"))
    without, with_some = estimate(d, held=0), estimate(d, held=MIB)
    assert with_some.peak[1] - without.peak[1] == pytest.approx(MIB)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["rtn-w4a16", "crossquant-w8a8", TRAINED], ids=str)
def test_every_family_has_finite_estimates(family: str, base: Any) -> None:
    found = estimate(description(recipe_of(base=base), family, large=False), held=0)
    assert all(math.isfinite(v) and v > 0 for v in (*found.memory.values(), found.disk.work))
    assert {kind for work in found.work.values() for kind in work} <= set(KINDS)


def test_experts_count_for_the_tokens_that_reach_them() -> None:
    d = description(recipe_of(base="rtn-w8a16"), "mixtral", large=False)
    experts = [layer for layer in d.blocks[0].layers if layer.share < 1]
    assert len(experts) == 12
    assert {layer.share for layer in experts} == {0.5}
    assert d.blocks[0].active < d.blocks[0].weights


def test_seconds_are_operations_times_rates() -> None:
    work = {"open": {"load": 3.0, "forward": 2.0}, "head": {"seconds": 1.5}}
    rates = {"load": 2.0, "forward": 0.5, "seconds": 1.0}
    assert seconds(work, rates) == {"open": 7.0, "head": 1.5}


def test_gptq_takes_operations_that_rounding_does_not() -> None:
    rounded = operations(description(recipe_of(base="rtn-w4a16")))["solve"]
    solved = operations(description(recipe_of(base="gptq-w4a16")))["solve"]
    assert {"factor", "cell", "column", "thin"} <= set(solved)
    assert set(rounded) == {"round", "release"}


def test_tuning_all_blocks_needs_more() -> None:
    plain, tuned, twice = (
        estimate(description(recipe_of(*settings)), held=0, rates=RATES)
        for settings in ((), TUNED, ("end_to_end.epochs=2",))
    )
    assert plain.disk.work < tuned.disk.work == twice.disk.work
    assert all(tuned.memory[stage] == need for stage, need in plain.memory.items())
    assert tuned.memory["end to end"] == twice.memory["end to end"] > tuned.memory["train"]
    before, once, more = (found.seconds or {} for found in (plain, tuned, twice))
    assert {stage: taken for stage, taken in once.items() if stage != "end to end"} == before
    assert 0 < once["end to end"] < more["end to end"]


@pytest.mark.parametrize(
    "sizes",
    [
        [f"end_to_end.batch={n}" for n in (4, 16, 64)],
        [f"calibration.length={n}" for n in (1024, 4096, 16384)],
        ["solver.parameter=low_rank", "solver.parameter=full"],
    ],
)
def test_memory_of_tuning_grows_with(sizes: list[str]) -> None:
    found = [peak_by_stage(description(recipe_of(*TUNED, s)))["end to end"] for s in sizes]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_held_codes_need_no_offsets() -> None:
    """Steps alone in training: 12 bytes a weight less in memory, offsets and their moments."""
    found = {}
    for hold in (False, True):
        d = description(recipe_of(*TUNED, f"end_to_end.hold={str(hold).lower()}"))
        found[hold] = estimate(d, held=0, rates=RATES)
    weights = sum(layer.weights for block in d.blocks for layer in block.planned)
    saved = found[False].memory["end to end"] - found[True].memory["end to end"]
    assert saved > 0.8 * 12 * weights
    assert found[True].disk.work < found[False].disk.work
    seconds = [found[hold].seconds for hold in (True, False)]
    assert seconds[0] is not None
    assert seconds[1] is not None
    assert seconds[0]["end to end"] < seconds[1]["end to end"]
    for stage in ("train", "close", "head"):
        assert found[True].memory[stage] == found[False].memory[stage]
