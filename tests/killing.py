"""Runs that are killed (SIGKILL) at a moment, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

When = Literal["before", "after"]

ROOT = Path(__file__).parents[1]

# A parent that has imported everything and used no thread forks one child a moment of death. The
# child counts renames to a name: every file of the work folder comes to be by one, so "before" is a
# file whose temporary is written in part, and "after" the boundary of a step.
KILLER = """
import json, os, signal, sys
import torch
import crossbit.finish, crossbit.pipeline, crossbit.engine.window
from pathlib import Path

from crossbit.models.opening import open_config, open_tokenizer
from crossbit.models.shell import Shell
from crossbit.recipe import Recipe

deaths = json.loads(sys.argv[1])
folder = Path(deaths[0]["options"]["model"])
Shell(open_config(folder))  # imports what the children would import one by one
open_tokenizer(folder)
crossbit.engine.window.SAVE_SECONDS = 0.0
crossbit.engine.window.SAVE_SHARE = 0
crossbit.pipeline.gc.collect = lambda: 0
rename = os.replace

def deadly(name, when, count):
    left = count
    def replace(source, target):
        nonlocal left
        left -= Path(target).name == name
        hit = Path(target).name == name and left == 0
        if hit and when == "before":
            os.truncate(source, os.path.getsize(source) // 2)
        else:
            rename(source, target)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace

for death in deaths:
    child = os.fork()
    if child == 0:
        os.replace = deadly(death["name"], death["when"], death["count"])
        torch.set_num_threads(1)
        options = death["options"]
        if not isinstance(options["recipe"], str):
            options["recipe"] = Recipe.parse(options["recipe"], "custom")
        crossbit.pipeline.quantize(**options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (death, status)
"""


@dataclass(frozen=True)
class Death:
    """A run, and the rename to a file's name that it dies at.

    Attributes:
        name: of the file.
        when: "before" the rename, the temporary file written in part, or "after" it.
        options: of ``crossbit.quantize``, as JSON; the recipe by name or content.
        count: of the renames to this name, which one.
    """

    name: str
    when: When
    options: dict[str, Any]
    count: int = 1


def kill(deaths: Sequence[Death], seconds: float) -> None:
    """Run and kill all, of one model; a run that lives on, or takes too long, fails."""
    subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps([asdict(death) for death in deaths])],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=seconds,
    )
