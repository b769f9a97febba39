"""The command line: thin over the Python functions, errors as one line and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from crossbit.errors import CrossbitError, InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training quantization of causal language models, with proof of what it cost.",
)

_PLAIN = "cbq-w4a4"  # a preset that every add-on goes with
ModelArg = Annotated[str, typer.Argument(help="hub name, folder, GGUF file, or 'demo'")]
Json = Annotated[Path | None, typer.Option("--json", help="write the result as JSON")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]
RecipeOption = Annotated[str, typer.Option(help="preset name or YAML file")]
Calibration = Annotated[str | None, typer.Option(help="text name or file")]
Samples = Annotated[int | None, typer.Option(help="calibration sequences")]
Length = Annotated[int | None, typer.Option(help="tokens of each")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, changes the recipe; repeatable")
]
Work = Annotated[Path | None, typer.Option(help="work folder")]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="accept a model that is quantized already")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="accept .bin/.pt checkpoints")]


@app.command()
def quantize(
    model: ModelArg,
    recipe: RecipeOption = "crossquant-w8a8",
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("out"),
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Annotated[int | None, typer.Option(help="of the calibration windows")] = None,
    set_: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a killed run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the folder")] = False,
    work: Work = None,
    revision: Revision = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    dequantize: Dequantize = False,
    allow_pickle: AllowPickle = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="start even if memory or disk seem too small")
    ] = False,
    json_: Json = None,
) -> None:
    """Quantize a model into a folder that runtimes load, verify and evaluate it."""
    from crossbit.pipeline import quantize as run

    _check_json(json_)
    result = run(
        model,
        recipe,
        out=out,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        settings=tuple(set_ or ()),
        resume=resume,
        overwrite=overwrite,
        work=work,
        revision=revision,
        dtype=_dtype(dtype),
        device=device,
        dequantize=dequantize,
        allow_pickle=allow_pickle,
        check=not no_check,
        quiet=False,
    )
    _write_json(json_, result)
    _print_quantized(result, out)


@app.command()
def plan(
    model: ModelArg,
    recipe: RecipeOption = "crossquant-w8a8",
    out: Annotated[Path, typer.Option(help="folder that quantize would write")] = Path("out"),
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    set_: Settings = None,
    work: Work = None,
    revision: Revision = None,
    dtype: DtypeOption = None,
    dequantize: Dequantize = False,
    allow_pickle: AllowPickle = False,
    json_: Json = None,
) -> None:
    """Memory, disk and time that quantize would need with the same options."""
    import psutil

    from crossbit.planning import plan as run
    from crossbit.planning import print_plan

    age = time.time() - psutil.Process().create_time()
    _check_json(json_)
    result = run(
        model,
        recipe,
        out=out,
        calibration=calibration,
        samples=samples,
        length=length,
        settings=tuple(set_ or ()),
        work=work,
        revision=revision,
        dtype=_dtype(dtype),
        dequantize=dequantize,
        allow_pickle=allow_pickle,
        age=age,
    )
    _write_json(json_, result)
    print_plan(result, Console())


@app.command()
def evaluate(
    model: ModelArg,
    text: Annotated[str | None, typer.Option(help="text name or file")] = None,
    length: Annotated[int, typer.Option(help="tokens a window")] = 2048,
    windows: Annotated[int | None, typer.Option(help="number of windows; all by default")] = None,
    against: Annotated[str | None, typer.Option(help="another model, compared pairwise")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks: t1,t2")] = None,
    execution: Annotated[str, typer.Option(help="auto, fake or integer")] = "auto",
    divisor: Annotated[
        float | None, typer.Option(help="divisor of activation grids (127: vLLM's kernels)")
    ] = None,
    revision: Revision = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = None,
) -> None:
    """Perplexity with its standard error; with --against, the paired difference."""
    from crossbit.api import evaluate as run

    _check_json(json_)
    if execution not in ("auto", "fake", "integer"):
        raise InputError(f"--execution {execution}: give auto, fake or integer")
    result = run(
        model,
        text=text,
        length=length,
        windows=windows,
        against=against,
        tasks=tuple(t for t in (tasks or "").split(",") if t),
        revision=revision,
        dtype=_dtype(dtype),
        device=device,
        execution=execution,  # type: ignore[arg-type]
        divisor=divisor,
        quiet=False,
    )
    _write_json(json_, result)
    _print_evaluation(result)


@app.command()
def analyze(
    model: ModelArg,
    calibration: Calibration = None,
    samples: Annotated[int, typer.Option(help="calibration sequences")] = 16,
    length: Annotated[int, typer.Option(help="tokens of each")] = 1024,
    seed: Annotated[int, typer.Option(help="of the calibration windows")] = 0,
    text: Annotated[str | None, typer.Option(help="evaluation text name or file")] = None,
    windows: Annotated[int, typer.Option(help="evaluation windows; 0: no perplexities")] = 4,
    window_length: Annotated[
        int | None, typer.Option(help="tokens of each; 2048 or the model's limit by default")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for analysis.html and JSON")] = None,
    revision: Revision = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    json_: Json = None,
) -> None:
    """The quantization kernel, the remove-kernel experiment, outliers, activation modes."""
    from crossbit.analysis.run import analyze as run
    from crossbit.analysis.run import print_analysis

    _check_json(json_)
    result = run(
        model,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        text=text,
        windows=windows,
        window_length=window_length,
        out=out,
        revision=revision,
        dtype=_dtype(dtype),
        device=device,
        quiet=False,
    )
    _write_json(json_, result)
    print_analysis(result, Console())


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a folder that quantize wrote")],
    device: Device = "cpu",
    json_: Json = None,
) -> None:
    """Reload the folder and compare it with what was evaluated.

    In transformers; folders that only crossbit loads (online, research) in crossbit.
    """
    from crossbit.verification import verify as run

    _check_json(json_)
    report = run(folder, device=device)
    _write_json(json_, report.to_dict())
    table = Table("check", "result", "value", "bound", "detail")
    for check in report.checks:
        shown = ["" if v is None else f"{v:.3g}" for v in (check.value, check.bound)]
        table.add_row(check.name, "passed" if check.passed else "FAILED", *shown, check.detail)
    Console().print(table)
    if not report.passed:
        failed = next(c for c in report.checks if not c.passed)
        raise CrossbitError(f"{folder}: not what was evaluated ({failed.name}: {failed.detail})")


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="a folder that quantize wrote, or any model")],
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="use the chat template")] = False,
    seed: Annotated[int | None, typer.Option(help="sample with this seed")] = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
) -> None:
    """Continue a prompt."""
    from crossbit.api import generate as run

    text = run(
        folder, prompt, tokens=tokens, chat=chat, seed=seed, dtype=_dtype(dtype), device=device
    )
    typer.echo(text)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="show this recipe as YAML: NAME, or NAME+ADDON")
    ] = None,
) -> None:
    """List the recipes, or show one with its kind and where it comes from."""
    import yaml

    from crossbit.compat import check_recipe
    from crossbit.recipe import LOADS, Recipe, preset_names
    from crossbit.recipe_files import addon_names, addon_summary, recipe_text

    if name is not None:
        text = recipe_text(name)
        recipe = Recipe.parse(yaml.safe_load(text), name)
        check_recipe(recipe)
        typer.echo(f"# {recipe.kind}: {LOADS[recipe.kind]}\n{text}", nl=False)
        return
    table = Table("recipe", "kind", "weights", "activations", "what it is")
    table.columns[0].no_wrap = True  # a name cut short cannot be typed
    for preset in preset_names():
        recipe = Recipe.load(preset)
        grid, acts = recipe.weights, recipe.activations
        weights = f"{grid.bits} bits, {grid.group}"
        activations = "float" if acts is None else f"{acts.bits} bits, {acts.kind}"
        table.add_row(preset, recipe.kind, weights, activations, recipe.summary)
    Console().print(table)
    table = Table("add-on", "kind", "what it adds: RECIPE+NAME, several in a row")
    for addon in addon_names():
        kind = Recipe.load(f"{_PLAIN}+{addon}").kind
        table.add_row(f"+{addon}", "as it was" if kind == "plain" else kind, addon_summary(addon))
    Console().print(table)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a folder that quantize wrote")]) -> None:
    """Rebuild report.html from crossbit.json."""
    from crossbit.output import read_result
    from crossbit.report.html import write_report

    typer.echo(str(write_report(read_result(folder), folder)))


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return None
    if name not in known:
        raise InputError(f"--dtype {name}: give {', '.join(known)}")
    return known[name]


def _check_json(path: Path | None) -> None:
    """Find out before the work that the result cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--json {path}: is a folder; give a file name")
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--json {path}: {existing} cannot be written; give another file")


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    from crossbit.cache import atomic_write

    try:
        atomic_write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CrossbitError(f"--json {path}: cannot be written ({error.strerror})") from None


def _print_quantized(result: dict[str, Any], out: Path) -> None:
    size, evaluation = result["size"], result.get("evaluation")
    table = Table.grid(padding=(0, 2))
    table.add_row("folder", str(out))
    table.add_row(
        "size",
        f"{size['file_bytes'] / 1e6:.1f} MB, {size['bytes_per_parameter']:.3f} bytes a parameter "
        f"(source {size['source_bytes'] / 1e6:.1f} MB)",
    )
    if evaluation:
        original, quantized = evaluation["original"], evaluation["quantized"]
        paired = evaluation["paired"]
        table.add_row(
            "perplexity",
            f"{original['perplexity']:.3f} -> {quantized['perplexity']:.3f}, loss "
            f"{100 * paired['loss']:+.2f} % +- {100 * (paired['stderr'] or 0):.2f} "
            f"({evaluation['text']}, {evaluation['windows']} x {evaluation['length']}, "
            f"{evaluation['path']})",
        )
    verified = "yes" if result["verify"].get("passed") else "not run"
    elsewhere = "" if result["kind"] == "plain" else f" ({result['kind']}: loads in crossbit only)"
    table.add_row("verified", verified + elsewhere)
    table.add_row("time", f"{result['time']['total']:.0f} s")
    table.add_row("memory", f"{result['memory']['peak_rss'] / 2**30:.2f} GiB at the peak")
    table.add_row("report", str(out / "report.html"))
    Console().print(table)
    for warning in result["warnings"]:
        typer.echo(f"note: {warning}", err=True)


def _print_evaluation(result: dict[str, Any]) -> None:
    found = result["perplexity"]
    table = Table("model", "perplexity", "standard error")
    error = found["stderr"]
    table.add_row(_with_kind(result), f"{found['value']:.4f}", _number(error))
    if "against" in result:
        other = result["against"]
        table.add_row(_with_kind(other), f"{other['value']:.4f}", _number(other["stderr"]))
    console = Console()
    console.print(table)
    if "paired" in result:
        paired = result["paired"]
        stderr = paired["stderr"]
        console.print(
            f"loss {100 * paired['loss']:+.3f} % "
            f"+- {'?' if stderr is None else f'{100 * stderr:.3f}'} (paired over windows)"
        )
    console.print(
        f"{found['text']}: {found['windows']} windows of {found['length']} tokens, "
        f"{found['dtype']}{', BOS first' if found['bos'] else ''}"
    )
    for task, metrics in result.get("tasks", {}).items():
        console.print(f"{task}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def _with_kind(row: dict[str, Any]) -> str:
    """The name of a model; what crossbit quantized is called plain, online or research."""
    return str(row["model"]) + ("" if row["kind"] is None else f" ({row['kind']})")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C arrived: no error, so that nothing on the way handles it as one."""


def _on_stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped


def main() -> None:
    """Entry point of the ``crossbit`` command."""
    # Ctrl-C too: typer turns a KeyboardInterrupt into a silent exit.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_stop)
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except CrossbitError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, _Stopped, typer.Abort):
        again = shlex.join(sys.argv[1:])
        hint = ""
        if sys.argv[1:2] == ["quantize"]:
            resume = "" if "--resume" in sys.argv else " --resume"
            hint = f"; go on with: crossbit {again}{resume}"
        _fail(f"stopped{hint}", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            message = error.format_message().rstrip(".") or "no command given"
            _fail(f"{message}; see crossbit --help", 2)
        if os.environ.get("CROSSBIT_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _fail(f"{type(error).__name__}: {first} (a bug; set CROSSBIT_DEBUG=1 to see where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"crossbit: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
