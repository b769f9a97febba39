"""What the documents say is true of the code: commands, recipes, keys, links, snippets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tests.tiny import tiny_folder

from crossbit import recipe as recipes
from crossbit.cli import app
from crossbit.compat import check_recipe
from crossbit.models.families import FAMILIES
from crossbit.recipe import Recipe, preset_names
from crossbit.recipe_files import addon_names

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "README.md",
    "docs/architecture.md",
    "docs/cbq.md",
    "docs/cqe.md",
    "docs/crossquant.md",
    "docs/recipes.md",
    "benchmarks/README.md",
]
TEXTS = {name: (ROOT / name).read_text("utf8") for name in NAMES}


class Block(NamedTuple):
    """A fenced block: where it stands, its language, the words after it, its text."""

    where: str
    language: str
    marks: str
    text: str


def blocks() -> list[Block]:
    found = []
    for name, text in TEXTS.items():
        for match in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(f"{name}:{line}", match[1], match[2].strip(), match[3]))
    return found


BLOCKS = blocks()
YAML = [b for b in BLOCKS if b.language == "yaml"]
PYTHON = [b for b in BLOCKS if b.language == "python"]


def where(value: Any) -> str:
    return str(value.where) if isinstance(value, Block) else ""


# -- commands -------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, list[str]]]:
    """(place, words after "crossbit") of every command line, in shell blocks and between ticks."""
    found = []
    for block in BLOCKS:
        if block.language in ("sh", "console"):
            joined = block.text.replace("\\\n", " ")
            found += [
                (block.where, line) for line in joined.splitlines() if line.startswith("crossbit ")
            ]
    for name, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [(name, m) for m in re.findall(r"`(crossbit [^`\n]+)`", prose)]
        # Indented code, as in benchmarks/README.md.
        found += [(name, m) for m in re.findall(r"^    (crossbit [^\n\\]+)$", prose, re.MULTILINE)]
    return [(place, shlex.split(line, comments=True)[1:]) for place, line in found]


COMMANDS = command_lines()


def shown(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=shown)
def test_command_lines_parse(place: str, words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    name, arguments = words[0], words[1:]
    if name == "COMMAND":
        assert arguments == ["--help"], place
        return
    assert name in group.commands, f"{place}: no command {name}"
    command = group.commands[name]
    if not arguments:  # a mention of the command
        return
    context = command.make_context(name, list(arguments))  # raises on what it does not know
    if name != "quantize" or context.params["recipe"].partition("+")[0] not in preset_names():
        return
    check_recipe(Recipe.load(context.params["recipe"], context.params["set_"] or ()))


def test_the_readme_lists_every_command() -> None:
    group: Any = typer.main.get_command(app)
    section = TEXTS["README.md"].partition("## Commands")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `crossbit (\w+)", section, re.MULTILINE)
    assert sorted(listed) == sorted(group.commands)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    prose = " ".join(TEXTS.values())
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)(?=[`\s])", prose, re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    assert named <= targets


# -- recipes --------------------------------------------------------------------------------------


def recipe_table() -> str:
    """The README's table of presets."""
    rows = ["| recipe | kind | weights | activations | what it is |", "|---|---|---|---|---|"]
    for name in preset_names():
        recipe = Recipe.load(name)
        grid, acts = recipe.weights, recipe.activations
        weights = f"{grid.bits} bits, {'groups of ' * isinstance(grid.group, int)}{grid.group}"
        activations = "float" if acts is None else f"{acts.bits} bits, {acts.kind}"
        kinds = f"{recipe.kind} | {weights} | {activations}"
        rows.append(f"| `{name}` | {kinds} | {recipe.summary} |")
    return "\n".join(rows)


def between(text: str, marker: str) -> str:
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    assert text.count(begin) == 1
    assert text.count(end) == 1
    return text.partition(begin)[2].partition(end)[0].strip()


def test_every_addon_is_told_of() -> None:
    told = re.findall(r"`\+([\w]+)`", TEXTS["docs/cbq.md"] + TEXTS["docs/cqe.md"])
    assert set(told) == set(addon_names())


def test_recipe_table_is_that_of_the_presets() -> None:
    expected = recipe_table()
    assert between(TEXTS["README.md"], "recipes") == expected, f"the table now is:\n{expected}"


def test_place_for_results_is_marked() -> None:
    assert between(TEXTS["README.md"], "results")


@pytest.mark.parametrize("block", YAML, ids=where)
def test_yaml_blocks(block: Block) -> None:
    data = yaml.safe_load(block.text)
    if block.marks == "recipe":
        check_recipe(Recipe.parse(data, "example"))


def test_there_are_recipe_examples() -> None:
    marked = [b for b in YAML if b.marks == "recipe"]
    assert len(marked) >= 4
    assert any("overrides" in yaml.safe_load(b.text) for b in marked)


SECTIONS: dict[str, type[BaseModel]] = {
    "## Top level": recipes.Recipe,
    "## Weights, embedding, head": recipes.WeightGrid,
    "## Activations": recipes.Activations,
    "### cross_fold": recipes.CrossFold,
    "### smooth": recipes.Smooth,
    "### awq_scale": recipes.AwqScale,
    "## Solver: rounding": recipes.TrainedRounding,
    "## Expansion": recipes.Expansion,
    "## Objective": recipes.Objective,
    "## Training": recipes.Training,
    "## End to end": recipes.EndToEnd,
    "### cfp": recipes.Cfp,
    "### rotate": recipes.Rotate,
    "### duquant": recipes.DuQuant,
    "### let": recipes.Let,
    "## Cache": recipes.KvCache,
    "## Prefix": recipes.Prefix,
    "## Solver: rtn": recipes.Rtn,
    "## Solver: gptq": recipes.Gptq,
    "## Overrides": recipes.Override,
    "## Calibration": recipes.Calibration,
    "## Evaluation": recipes.Evaluation,
}


def default_of(model: type[BaseModel], key: str) -> Any:
    value = model.model_fields[key].default
    if isinstance(value, BaseModel):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | value.model_dump(exclude_defaults=True)
    return list(value) if isinstance(value, tuple) else value


def key_table(text: str) -> dict[str, str]:
    """key -> default as written, of the first table with such columns in ``text``."""
    table = text.partition("| key | default | meaning |\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_documented_with_its_default(heading: str) -> None:
    model, text = SECTIONS[heading], TEXTS["docs/recipes.md"]
    assert text.count(f"\n{heading}\n") == 1
    section = text.partition(f"\n{heading}\n")[2]
    stated = key_table(re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0])
    assert list(stated) == list(model.model_fields)
    for key, written in stated.items():
        expected = default_of(model, key)
        if expected is PydanticUndefined:
            assert written == "required", key
        else:
            assert yaml.safe_load(written.strip("`")) == expected, key


def test_every_recipe_class_has_a_section() -> None:
    classes = {
        c
        for c in vars(recipes).values()
        if isinstance(c, type)
        and issubclass(c, BaseModel)
        and c.__module__.startswith(recipes.__name__)
        and c.model_fields  # or it is their base
    }
    assert classes == set(SECTIONS.values())


@pytest.mark.parametrize("field", ["kind"])
def test_every_activation_kind_is_explained(field: str) -> None:
    section = TEXTS["docs/recipes.md"].partition("\n## Activations\n")[2].partition("\n## ")[0]
    kinds = recipes.Activations.model_json_schema()["properties"][field]["enum"]
    listed = re.findall(r"^\| `(\w+)` \| [^|]+\|$", section, re.MULTILINE)
    assert sorted(listed) == sorted(kinds)


def test_every_architecture_is_named() -> None:
    prose = re.sub(r"[^a-z0-9]", "", TEXTS["README.md"].lower())
    missing = [f for f in FAMILIES if re.sub(r"[^a-z0-9]|_text", "", f) not in prose]
    assert missing == []


# -- links and paths ------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return kept.replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf8"), flags=re.MULTILINE | re.DOTALL)
    return {anchor(h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        assert not fragment or fragment in anchors(file), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    """`engine/loop.py` and the like are files of the package, of the repository, or beside it."""
    homes = (ROOT, ROOT / "src" / "crossbit", (ROOT / name).parent)
    for path in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py)`", TEXTS[name]):
        found = any((home / path).is_file() for home in homes)
        assert found or any((ROOT / "src").rglob(path)), f"{name}: {path}"
    for path in re.findall(r"`((?:src|tests|docs)/[\w./-]*)`", TEXTS[name]):
        assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_not_endless(name: str) -> None:
    """Prose is wrapped, so that a change of a word is a change of a line."""
    written = r"<!-- results:begin -->.*<!-- results:end -->"  # by the benchmarks
    prose = re.sub(rf"^```.*?^```$|{written}", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert len(lines) > 20
    assert [line for line in lines if len(line) > 120] == []


# -- Python ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=where)
def test_python_blocks_compile(block: Block) -> None:
    code = compile(block.text, block.where, "exec")
    assert code.co_names, "a block that names nothing shows nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the snippets name."""
    path = tmp_path_factory.mktemp("snippets")
    tiny_folder(path / "my-model", "llama")
    words = "one and two and three are few words of a text that is long enough to be cut. "
    lines = [f"{i} {words}" for i in range(400)]
    (path / "my-text.txt").write_text("".join(lines), "utf8")
    return path


@pytest.mark.parametrize("block", [b for b in PYTHON if b.marks == "run"], ids=where)
def test_python_blocks_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    exec(compile(block.text, block.where, "exec"), {"__name__": "snippet"})
    made = set(folder.iterdir()) - before
    assert made
    assert all((new / "crossbit.json").is_file() for new in made)


def test_some_snippets_run() -> None:
    assert sum(block.marks == "run" for block in PYTHON) >= 2
