"""Low-bit recipes against the peers: same model, calibration tokens, grids and evaluator.

    python -m benchmarks.low_bits --text wikitext2-test.txt --work DIR --peer .venv-peer/bin/python

Settings are bits, group and symmetry of the blocks' linear layers; embedding and head stay in
float on every side. One result a row, so that a stopped benchmark goes on where it was: with ours
in the middle of a row too. A peer that fails is a result as well. The machine must be idle if the
seconds are to mean anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import measure
from benchmarks.peer_folders import activations, bits_per_weight, folder_losses
from benchmarks.quantizing import cleaned, failure, quantized
from benchmarks.store import once, once_among
from crossbit.corpora import calibration_windows, evaluation_windows, load_text
from crossbit.errors import CrossbitError
from crossbit.evaluation.statistics import paired_loss, perplexity
from crossbit.models.opening import open_tokenizer
from crossbit.models.source import resolve_model

EVALUATION_LENGTH = 2048


@dataclass(frozen=True)
class Setting:
    """The grids of the blocks' linear layers; ``group`` 0 is one scale a channel."""

    bits: int
    act_bits: int = 16
    group: int = 64
    symmetric: bool = True

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes a recipe of crossbit have these weights."""
        group = f"weights.group={self.group or 'channel'}"
        symmetric = f"weights.symmetric={str(self.symmetric).lower()}"
        return (f"weights.bits={self.bits}", group, symmetric)


SETTINGS = {
    "w4a16": Setting(4),
    "w3a16": Setting(3, symmetric=False),
    "w2a16": Setting(2, symmetric=False),
    "w4a8": Setting(4, act_bits=8),
    "w4a4-g64": Setting(4, act_bits=4),
    "w4a4": Setting(4, act_bits=4, group=0),
}

# Setting -> our methods: name -> preset and the settings beside those of ``Setting.overrides``.
_Methods = dict[str, tuple[str, tuple[str, ...]]]
_WEIGHTS: _Methods = {
    "rtn": ("rtn-w4a16-g64", ()),
    "gptq": ("gptq-w4a16-g64", ()),
    "awq-gptq": ("awq-gptq-w4a16-g64", ()),
}
_AWQ = "transforms=[{kind: awq_scale}]"
_TURNED = "transforms=[{kind: duquant}]"
_A4 = ("activations.bits=4",)
# Twice as many steps as one epoch has, each larger: 2 bits excepted, whose preset has its own.
_TUNED = ("end_to_end.epochs=2", "end_to_end.rounding=2e-3", "end_to_end.step=1e-3")
# The codes of the windows stay, their steps learn. Held-out divergence of logits, fake
# quantization, SmolLM2, embedded text, ``crossbit quantize demo --recipe cbq-w2a16+e2e --samples 64
# --length 512 --set objective.overlap=0 --set training.epochs=6 --set training.step=1e-3`` and
# these: .901 -> .822; ``_TUNED``: no lower; step 1e-2: not below it after one epoch.
_HELD = ("end_to_end.epochs=2", "end_to_end.hold=true", "end_to_end.step=3e-3")
_ONCE = ("objective.overlap=0", "training.step=1e-3")
# Where the steps' rate of ``_HELD`` ended above the start, and the stage was refused.
_GENTLY = ("end_to_end.epochs=2", "end_to_end.hold=true", "end_to_end.step=1e-3")
OURS: dict[str, _Methods] = {
    "w4a16": {
        **_WEIGHTS,
        "gptq-kv8": ("gptq-w4a16-g64+kv8", ()),
        "gptq-kv4": ("gptq-w4a16-g64+kv4", ()),
        "cbq": ("cbq-w4a16", ()),
        "cbq-overlap": ("cbq-w4a16", ("objective.overlap=1",)),
        "cbq-e2e-hold": ("cbq-w4a16+e2e", _HELD),
        "cbq-fisher": ("cbq-w4a16", ("objective.metric=fisher", "objective.overlap=1")),
        "cbq-overlap-cl": ("cbq-w4a16+cl", ("objective.overlap=1",)),
        "cbq-overlap-rotate": ("cbq-w4a16+rotate", ("objective.overlap=1",)),
        "cbq-overlap-e2e-hold-cl": ("cbq-w4a16+e2e+cl", ("objective.overlap=1", *_HELD)),
        "cbq-overlap-awq": ("cbq-w4a16", ("objective.overlap=1", _AWQ)),
        "best": ("best-w4a16", ()),
    },
    "w3a16": {
        **_WEIGHTS,
        "cbq": ("cbq-w3a16", ()),
        "cbq-no-overlap": ("cbq-w3a16", ("objective.overlap=0",)),
        "cbq-no-overlap-e2e": ("cbq-w3a16+e2e", ("objective.overlap=0", *_TUNED)),
        "cbq-e2e": ("cbq-w3a16+e2e", _TUNED),
        "cbq-e2e-hold": ("cbq-w3a16+e2e", _HELD),
        "cbq-no-overlap-e2e-hold": ("cbq-w3a16+e2e", (*_ONCE, *_HELD)),
        "cbq-no-overlap-e2e-hold-cl": ("cbq-w3a16+e2e+cl", (*_ONCE, *_HELD)),
        "cbq-no-overlap-e2e-hold-cl-awq": ("cbq-w3a16+e2e+cl", (*_ONCE, *_HELD, _AWQ)),
        "best": ("cbq-w3a16+e2e", (*_ONCE, *_HELD, _TURNED)),
    },
    "w2a16": {
        **_WEIGHTS,
        "cbq": ("cbq-w2a16", ()),
        "cbq-e2e": ("cbq-w2a16+e2e", ("end_to_end.epochs=2", "end_to_end.step=3e-4")),
        "cbq-e2e-hold": ("cbq-w2a16+e2e", _HELD),
        "cbq-no-overlap-e2e-hold": ("cbq-w2a16+e2e", (*_ONCE, *_HELD)),
        "cbq-e2e-norms": (
            "cbq-w2a16+e2e",
            ("end_to_end.epochs=2", "end_to_end.step=3e-4", "norms=true"),
        ),
        "cbq-e2e-hold-cl": ("cbq-w2a16+e2e+cl", _HELD),
        "cbq-e2e-hold-sde": ("cbq-w2a16+e2e+sde", _HELD),
        "cbq-e2e-hold-awq": ("cbq-w2a16+e2e", (*_HELD, _AWQ)),
        "best": ("cbq-w2a16+e2e", (*_HELD, _TURNED)),
    },
    "w4a8": {
        "rtn": ("rtn-w4a8-g64", ()),
        "crossquant": ("crossquant-w4a8-g64", ()),
        "cbq": ("cbq-w4a8", ()),
        "cbq-no-crossquant": ("cbq-w4a8", ("activations={bits: 8}", "transforms=[]")),
        "cbq-e2e-hold": ("cbq-w4a8+e2e", _HELD),
        # Scales of either sign, which kernels for other runtimes do not take at these widths.
        "cbq-no-crossquant-signed": (
            "cbq-w4a8",
            ("activations={bits: 8}", "transforms=[]", "weights.signed=true"),
        ),
        "best-plain": ("best-w4a8-plain", ()),
        "best-plain-signed": ("best-w4a8-plain", ("weights.signed=true",)),
        "best": ("best-w4a8", ()),
        "best-no-fold": ("best-w4a8", ("activations={bits: 8}", _TURNED)),
        "best-e2e-gently": ("best-w4a8+e2e", _GENTLY),
    },
    "w4a4-g64": {
        "rtn": ("rtn-w4a8-g64", _A4),
        "crossquant": ("crossquant-w4a8-g64", _A4),
        "cbq": ("cbq-w4a4", ()),
        "quarot": ("quarot-w4a4", ()),
        "kv4": ("w4a4kv4", ()),
        "duquant": ("duquant-w4a4", ("training.epochs=4",)),
        "best-plain": ("best-w4a4-plain", ()),
        "best-plain-e2e-hold": ("best-w4a4-plain+e2e", _HELD),
        "best": ("best-w4a4", ()),
        "union": ("best-w4a4+union", ()),
        "best-e2e-hold": ("best-w4a4+e2e", _HELD),
    },
    "w4a4": {
        "rtn": ("rtn-w4a4", ()),
        "crossquant": ("crossquant-w4a4-channel", ()),
        "cbq": ("cbq-w4a4-channel", ()),
        "quarot": ("quarot-w4a4-channel", ()),
        "duquant": ("duquant-w4a4-channel", ("training.epochs=4",)),
        "best-plain": ("best-w4a4-channel-plain", ()),
        "best-plain-e2e-hold": ("best-w4a4-channel-plain+e2e", _HELD),
        "best": ("best-w4a4-channel", ()),
        "best-e2e-hold": ("best-w4a4-channel+e2e", _HELD),
    },
}
_PEERS_WEIGHTS = ("llmcompressor-gptq", "llmcompressor-awq", "autoround")
_PEERS_INPUTS = ("llmcompressor-gptq", "llmcompressor-smoothquant-gptq", "autoround")


def peers(setting: Setting) -> tuple[str, ...]:
    """The peers' methods that are compared at a setting."""
    return _PEERS_WEIGHTS if setting.act_bits == 16 else _PEERS_INPUTS


def peer_command(args: argparse.Namespace, method: str, setting: Setting) -> list[str]:
    """Script and grid of a peer, without the files."""
    symmetric = "--symmetric" if setting.symmetric else "--no-symmetric"
    if method == "autoround":
        grid = f"--bits {setting.bits} --group {setting.group} --act-bits {setting.act_bits}"
        tuning = f"--iters {args.iters} --batch 8"
        return f"benchmarks/peers/autoround.py {grid} {symmetric} {tuning}".split()
    grid = f"--scheme W{setting.bits}A{setting.act_bits} --group-size {setting.group} {symmetric}"
    how = f"--method {method.removeprefix('llmcompressor-')}"
    return f"benchmarks/peers/llmcompressor_gptq.py {how} {grid}".split()


def run_peer(args: argparse.Namespace, method: str, setting: Setting, out: Path) -> dict[str, Any]:
    """Quantize with a peer; {"failed": message} if it does not get through."""
    described, log = (out.with_name(f"{out.name}.{kind}") for kind in ("json", "log"))
    described.unlink(missing_ok=True)
    command = peer_command(args, method, setting)
    files = ["--model", str(resolve_model("demo").path), "--ids", str(ids_file(args))]
    files += ["--out", str(out), "--json", str(described)]
    threads = ["--threads", str(torch.get_num_threads())]
    found = measure([args.peer, *command, *files, *threads], log=log)
    if found.exit_code or not described.exists():
        return {"failed": failure(found, log), "command": " ".join(command)}
    made = json.loads(described.read_text("utf8"))
    made["warnings"] = [cleaned(line) for line in made.get("warnings", [])]
    return {
        "command": " ".join(command),
        "seconds": made["seconds"]["quantize"] + made["seconds"]["save"],
        "process_seconds": found.wall_seconds,
        "peak_rss": found.peak_rss_bytes,
        "scale_bits": made["settings"]["scale_bits"],
        "load_before": found.load_before,
        "peer": made,
    }


def run_ours(
    args: argparse.Namespace, recipe: str, settings: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """Quantize with crossbit."""
    budget = (args.samples, args.length)
    took, _ = quantized("demo", recipe, settings, out, budget=budget, resume=True)
    return {**took, "scale_bits": None}


def ids_file(args: argparse.Namespace) -> Path:
    """The calibration tokens that ``crossbit quantize`` cuts by itself, for the peers."""
    path: Path = args.work / f"ids-{args.samples}x{args.length}.safetensors"
    if not path.exists():
        corpus = load_text(None, split="calibration")
        tokenizer = open_tokenizer(resolve_model("demo").path)
        ids = calibration_windows(
            corpus, tokenizer, samples=args.samples, length=args.length, seed=0, bos=False
        )
        save_file({"input_ids": ids}, str(path))
    return path


def text_windows(args: argparse.Namespace) -> torch.Tensor:
    """The evaluation windows int64 [W, L]."""
    tokenizer = open_tokenizer(resolve_model("demo").path)
    corpus = load_text(args.text, split="evaluation", tokenizer=tokenizer)
    return evaluation_windows(
        corpus, tokenizer, length=EVALUATION_LENGTH, windows=args.windows, bos=False
    )


def scored(losses: list[float], original: list[float]) -> dict[str, Any]:
    """Perplexity and paired loss with their standard errors."""
    value, paired = perplexity(losses), paired_loss(losses, original)
    return {
        "perplexity": value.value,
        "stderr": value.stderr,
        "loss": paired.value,
        "loss_stderr": paired.stderr,
        "losses": losses,
    }


def measured(
    args: argparse.Namespace,
    about: dict[str, str],
    quantize: Callable[[Path], dict[str, Any]],
    ids: torch.Tensor,
    original: list[float],
) -> dict[str, Any]:
    """Quantize into a folder of the work folder, evaluate it, remove it.

    A run of ours that was stopped goes on from its own work folder, a peer's begins anew.
    """
    name = f"low-bits-{about['setting']}-{about['method']}-{args.samples}x{args.length}"
    out: Path = args.work / name
    shutil.rmtree(out, ignore_errors=True)
    budget = {"samples": args.samples, "length": args.length, "windows": len(ids)}
    made = {**about, **budget, **quantize(out)}
    if "failed" in made:
        return made
    try:
        made |= scored(folder_losses(out, ids), original)
        made["bits_per_weight"] = bits_per_weight(out, made["scale_bits"])
        described = activations(out)
        if described is not None:
            # What readers of compressed-tensors would execute, beside what the peer tuned for.
            made["activations"] = described
            made["per_token"] = scored(folder_losses(out, ids, kind="per_token"), original)
    except CrossbitError as error:
        made["failed"] = cleaned(str(error))
    if not args.keep:
        shutil.rmtree(out)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, help="WikiText-2 raw test, as a file or wikitext2")
    parser.add_argument("--work", type=Path, required=True, help="folder for quantized models")
    parser.add_argument("--peer", help="the peers' python; their rows are left out without")
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings")
    parser.add_argument("--methods", help="methods; default: all of a setting")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 2048")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps a block")
    parser.add_argument("--keep", action="store_true", help="keep the quantized folders")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = args.methods.split(",") if args.methods else None
    ids = text_windows(args)
    command = "python -m benchmarks.low_bits"
    source = resolve_model("demo").path
    # The name of benchmarks/quality.py's row: the same losses where the windows are the same.
    original = once(
        f"demo-original-{args.windows}", command, lambda: {"losses": folder_losses(source, ids)}
    )["losses"]
    for name in args.only.split(","):
        setting = SETTINGS[name]
        jobs: dict[str, Callable[[Path], dict[str, Any]]] = {}
        for method, (recipe, extra) in OURS[name].items():
            changed = (*setting.overrides, *extra)
            jobs[f"ours-{method}"] = partial(run_ours, args, recipe, changed)
        if args.peer:
            for method in peers(setting):
                jobs[method] = partial(run_peer, args, method, setting)
        for method, job in jobs.items():
            if wanted and method not in wanted and method.removeprefix("ours-") not in wanted:
                continue
            about = {"setting": name, "method": method}
            result = f"low-bits-{name}-{method}-{args.samples}x{args.length}"
            row = once_among(
                args.work,
                result,
                f"{command} --only {name} --methods {method} --samples {args.samples} "
                f"--length {args.length} --windows {args.windows}",
                partial(measured, args, about, job, ids, original),
            )
            if row is None:
                continue
            loss = row.get("failed") or f"{row['perplexity']:.3f}, loss {100 * row['loss']:+.2f} %"
            print(f"{name} {method}: {loss}", flush=True)


if __name__ == "__main__":
    main()
