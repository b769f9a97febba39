"""The loop: open -> train -> close, window by window.

A recipe that trains nothing has windows of one block, and closes a block as soon as it is open. One
that trains keeps the blocks of a window open together; those that leave it are closed, the others
go on into the next window with all that their training knows.

What is on disk when a window begins is all that it needs: the activations that enter its first
block after the quantized blocks before it, those that enter the first unopened block of the
original model, and the open blocks. Whatever is older goes once that is written, so a run that is
killed at any moment goes on from the window in work, and inside it from the training state that was
saved last.

Blocks after the last one that is quantized are written as they are: nothing needs what they make.
"""

from __future__ import annotations

from crossbit.compat import windows_of
from crossbit.engine.closing import close_block
from crossbit.engine.head import wants_head_hessian
from crossbit.engine.job import Job
from crossbit.engine.live import pack, unpack
from crossbit.engine.opening import open_block
from crossbit.engine.originals import embedded, through_original
from crossbit.engine.progress import Reporter, release_memory
from crossbit.engine.refine import open_name, refine
from crossbit.engine.sensitivity import measure_sensitivity, metric_name
from crossbit.engine.stream import Stream
from crossbit.engine.trained import TrainedBlock, layers_of, make_trainable
from crossbit.engine.window import (
    Interrupted,
    Streams,
    forget_training,
    interrupted_training,
    through_trained,
    train_window,
)
from crossbit.engine.workdir import (
    TARGET,
    WorkDir,
    part_name,
    stream_name,
    teacher_name,
    window_name,
)
from crossbit.errors import WorkError
from crossbit.runtime.attention import calibrating
from crossbit.solvers.rounding import reenter
from crossbit.windows import Window


def run_blocks(job: Job, work: WorkDir, reporter: Reporter) -> None:
    """Quantize every block that the work folder does not hold yet."""
    with calibrating():
        _run_blocks(job, work, reporter)


def _run_blocks(job: Job, work: WorkDir, reporter: Reporter) -> None:
    if job.recipe.trains:
        _run_windows(job, work, reporter)
        return
    total = job.shell.num_blocks
    first = work.next_block(streams=job.ids is not None)
    entering = None
    if job.ids is not None and first < total:
        entering = _entering(job, work, first)
    job.shell.free_outside()
    release_memory()
    if first:
        reporter.say(f"resuming at block {first} of {total}")
    rest = _untouched(job)
    for index in reporter.track(range(first, total), "quantizing blocks", total - first):
        # The activations that enter the first of the rest stay, for a run that is resumed there.
        entering = _one_block(job, work, index, entering if index < rest else None)


def _untouched(job: Job) -> int:
    """The first of the blocks at the end that nothing is done to, nor with what leaves them."""
    total = job.shell.num_blocks
    if job.recipe.end_to_end is not None or job.recipe.norms or wants_head_hessian(job):
        return total
    quantized = [index for index, plan in enumerate(job.plan.blocks) if plan.layers]
    return max(quantized) + 1


def _entering(job: Job, work: WorkDir, block: int) -> Stream:
    """Activations that enter ``block``: kept ones, or the embedding's."""
    kept = work.stream(block)
    if kept is not None:
        return kept
    if block:
        raise WorkError(f"{work.path}: the activations entering block {block} are missing")
    # Calibration text enters the blocks through the quantized embedding.
    job.round_embedding()
    return embedded(job, work, stream_name(0))


def _one_block(job: Job, work: WorkDir, index: int, entering: Stream | None) -> Stream | None:
    """A block that is not trained: closed as it was opened."""
    if entering is None:
        return close_block(job, work, index, open_block(job, index, None, None), None)
    with work.new_target((job.held_out, *entering.shape[1:]), entering.dtype) as target:
        opened = open_block(job, index, entering, target)
    release_memory()
    leaving = close_block(job, work, index, opened, entering)
    # What entered this block stays until the next is done: killed before that, a run needs it.
    work.drop_stream(index - 1)
    return leaving


# -- training ---------------------------------------------------------------------------------


def _run_windows(job: Job, work: WorkDir, reporter: Reporter) -> None:
    windows = windows_of(job.recipe, job.shell.num_blocks)
    first, streams, live = _resume(job, work, windows)
    rest = _untouched(job)
    left = [window for window in windows[first:] if window.start < rest]
    if job.recipe.objective.metric == "fisher" and left:
        measure_sensitivity(job, work, reporter, windows[first].start)
    if streams is None:
        # The teacher is the original model, its embedding included.
        teacher = embedded(job, work, teacher_name(0))
        streams = Streams(_entering(job, work, 0), teacher)
    job.shell.free_outside()
    release_memory()
    if first:
        reporter.say(f"resuming at window {first} of {len(windows)}")
    sizes = [len(window.blocks) for window in left]
    for window in reporter.track(left, "training windows", len(left), sizes):
        _one_window(job, work, window, streams, live, reporter)
    for index in range(rest, job.shell.num_blocks):
        if not work.has(part_name(index)):
            _one_block(job, work, index, None)
    if job.recipe.end_to_end is not None and not work.has("outside"):
        entering = work.stream(0)
        assert entering is not None
        refine(job, work, len(windows), entering, reporter)


def _resume(
    job: Job, work: WorkDir, windows: list[Window]
) -> tuple[int, Streams | None, dict[int, TrainedBlock]]:
    """The window to go on with, what enters it, and the blocks that are open then."""
    for name in reversed(work.names("window-")):
        tensors, record = work.load_state(name)
        entering = work.stream(record["start"])
        teacher = work.named(teacher_name(record["opened"]))
        if entering is not None and teacher is not None:
            live = {b.index: b for b in unpack(job, tensors, record)}
            return int(record["window"]), Streams(entering, teacher), live
    entering, teacher = work.stream(0), work.named(teacher_name(0))
    if entering is not None and teacher is not None:
        return 0, Streams(entering, teacher), {}
    return 0, None, {}


def _one_window(
    job: Job,
    work: WorkDir,
    window: Window,
    streams: Streams,
    live: dict[int, TrainedBlock],
    reporter: Reporter,
) -> None:
    """Open, train, close; ``streams`` and ``live`` become those of the next window."""
    known = interrupted_training(work, window)
    teacher = None if known is None else work.named(teacher_name(window.stop))
    interrupted = None
    if known is None or teacher is None:
        forget_training(work)  # one whose files are not all there
        reporter.status(f"opening blocks {window.start}-{window.stop - 1}")
        _open_window(job, work, window, streams, live)
    else:
        tensors, record = known
        live.update({b.index: b for b in unpack(job, tensors, record)})
        streams.teacher = teacher
        interrupted = Interrupted.of(tensors, record)
        del tensors
    blocks = [live[index] for index in window.blocks]
    report = train_window(job, work, window, blocks, streams, reporter, interrupted)
    del blocks
    for index in window.hardened:
        trained = live.pop(index)
        if job.recipe.end_to_end is not None:
            work.save_state(open_name(index), *pack([trained]))
        block = trained.hardened()
        block.target = through_original(job, work, index, streams.entering, TARGET, held=True)
        job.shell.place_block(index, block.module)
        leaving = close_block(job, work, index, block, streams.entering)
        assert leaving is not None
        streams.entering = leaving
    work.save_record(f"trained-{window.index:05d}", report)
    _save_window(job, work, window, live)


def _open_window(
    job: Job, work: WorkDir, window: Window, streams: Streams, live: dict[int, TrainedBlock]
) -> None:
    """Open the window's blocks that are not open yet, each on what the ones before it make."""
    length = streams.entering.shape[1]
    inner = streams.entering
    for index in window.blocks:
        block = live.get(index)
        if block is None:
            streams.teacher = through_original(
                job, work, index, streams.teacher, teacher_name(index + 1)
            )
            opened = open_block(job, index, inner, None)
            job.shell.free_block(index)
            block = make_trainable(
                index,
                opened,
                job.plan.blocks[index],
                job.shell.block_kwargs(length, job.dtype)[index],
                job.dtype,
                job.recipe.calibration.seed,
                let=job.recipe.let,
                norms=job.shell.structure.family.gain_offset if job.recipe.norms else None,
            )
            job.online.quantize(job.plan.blocks[index].structure, index, block.module)
            live[index] = block
            del opened
            release_memory()
        else:
            for _, layer in layers_of([block]):
                reenter(layer.state)
        if window.stop - 1 not in live:
            inner = through_trained(job, work, block, inner, f"inner-{index % 2}")
    for name in ("inner-0", "inner-1"):
        work.drop(name)


def _save_window(job: Job, work: WorkDir, window: Window, live: dict[int, TrainedBlock]) -> None:
    """What the next window begins with; nothing older is needed then."""
    start, opened = window.start + window.leaving, window.stop
    tensors, record = pack([live[index] for index in sorted(live)])
    place = {"window": window.index + 1, "start": start, "opened": opened}
    work.save_state(window_name(window.index + 1), tensors, {**record, **place})
    keep = {window_name(window.index + 1), teacher_name(opened), stream_name(start)}
    if job.recipe.end_to_end is not None:
        keep.add(stream_name(0))
    keep |= {metric_name(index) for index in range(start, job.shell.num_blocks)}
    forget_training(work)
    for prefix in ("window-", "teacher-", "stream-", "metric-"):
        for name in work.names(prefix):
            if name not in keep:
                work.drop(name)
