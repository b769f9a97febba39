"""Who may import whom: the layers of the package, and that the code keeps to them.

The table below is the one in docs/architecture.md. A module belongs to the entry that names it
most exactly ("engine.plan" before "engine"). It may import any lower layer and its own package;
two packages of one layer do not know each other. Imports inside functions and under
``TYPE_CHECKING`` count: they too are knowledge of another module.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "crossbit"
MAX_LINES = 500

# Lowest first.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "cache"),
    (
        *("grid", "packing", "windows", "objective", "positions", "safetensors_format"),
        *("products", "recipe_training", "recipe_files", "rotations"),
    ),
    ("activations", "recipe_transforms", "device"),
    ("recipe", "models", "corpora", "solvers", "report", "engine.progress"),
    (
        *("transforms", "compat", "engine.plan", "runtime.linear", "runtime.install"),
        *("runtime.online", "runtime.attention", "runtime.causal_attention"),
    ),
    ("engine", "export", "run"),
    ("runtime", "output"),
    ("evaluation", "verification"),
    ("analysis", "finish", "estimate"),
    ("pipeline",),
    ("api", "planning"),
    ("cli",),
    ("__main__",),
)

# One choice on an axis a file: besides the files named here, choices do not import each other.
CHOICES = {
    "transforms": {"search", "column_fit"},
    "activations": {"grid", "quantize", "kernel"},
    "solvers": {"hessian", "rtn", "expansion", "rounding_state"},
    "report": {"values", "plots", "analysis", "html"},
}


def module_name(path: Path) -> str:
    """ "engine.plan" for src/crossbit/engine/plan.py; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the package that ``tree`` imports anywhere, relative to the package."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer; write the full name"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full.removeprefix("crossbit.") in known else base)
    own = {name.removeprefix("crossbit.") for name in found if name.startswith("crossbit.")}
    return own & known


def graph() -> dict[str, set[str]]:
    """Module -> modules it imports; the root, whose imports are lazy, has a test of its own."""
    known = set(MODULES)
    return {
        name: imported(ast.parse(path.read_text("utf8")), known) - {name}
        for name, path in MODULES.items()
        if name
    }


def layer_of(module: str) -> int | None:
    """Index of the layer whose entry names the module most exactly."""
    matches = [
        (len(entry), index)
        for index, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or module.startswith(f"{entry}.")
    ]
    return max(matches)[1] if matches else None


def violation(module: str, target: str) -> str | None:
    """Why ``module`` may not import ``target``, or None."""
    here, there = layer_of(module), layer_of(target)
    if here is None or there is None:
        return f"{module if here is None else target} has no layer: give it one in LAYERS"
    if there > here:
        return f"{module} (layer {here + 1}) imports {target} (layer {there + 1}), which is above"
    if there == here and module.partition(".")[0] != target.partition(".")[0]:
        return f"{module} imports {target}: packages of one layer do not know each other"
    return None


def test_lower_layers_never_import_upper_ones() -> None:
    wrong = [violation(m, t) for m, targets in graph().items() for t in targets]
    assert not [w for w in wrong if w], "\n".join(sorted(w for w in wrong if w))


def test_every_module_has_a_layer_and_every_entry_a_module() -> None:
    assert [m for m in MODULES if m and layer_of(m) is None] == []
    stale = [e for entries in LAYERS for e in entries if e not in MODULES]
    assert stale == []


def test_no_import_circles() -> None:
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")
    assert set(order) == set(MODULES) - {""}


@pytest.mark.parametrize("package", CHOICES)
def test_choices_of_an_axis_do_not_import_each_other(package: str) -> None:
    shared = {f"{package}.{name}" for name in CHOICES[package]}
    assert shared <= set(MODULES)
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets - shared
        if module.startswith(f"{package}.") and target.startswith(f"{package}.")
    ]
    assert wrong == []


def test_the_root_imports_nothing_when_it_is_imported() -> None:
    tree = ast.parse(MODULES[""].read_text("utf8"))
    guarded = [n for n in tree.body if isinstance(n, ast.If)]
    assert [ast.unparse(n.test) for n in guarded] == ["TYPE_CHECKING"]
    tree.body = [n for n in tree.body if not isinstance(n, ast.If)]
    assert imported(tree, set(MODULES)) == set()


def test_the_checks_can_fail() -> None:
    assert violation("grid", "recipe") is not None
    assert violation("recipe", "grid") is None
    assert violation("solvers.gptq", "solvers.rtn") is None
    assert "do not know each other" in (violation("models.shell", "solvers.rtn") or "")
    assert "no layer" in (violation("surprise", "grid") or "")
    assert layer_of("engine.plan") != layer_of("engine.loop")
    known = {"models", "models.shell", "recipe"}
    source = "def f():\n from crossbit.models import shell\n import crossbit.recipe\nimport json"
    assert imported(ast.parse(source), known) == {"models.shell", "recipe"}


def test_the_document_states_the_same_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    stated = tuple(tuple(re.findall(r"`([\w.]+)`", cells)) for _, cells in rows)
    assert [int(number) for number, _ in rows] == list(range(1, len(LAYERS) + 1))
    assert stated == LAYERS


def test_no_file_is_longer_than_the_limit() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text("utf8").splitlines())
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".j2")
    }
    assert sizes
    assert {name: lines for name, lines in sizes.items() if lines > MAX_LINES} == {}
