"""Module names <-> the ``targets`` and ``ignore`` lists of a compressed-tensors config.

A target is an exact module name, a regular expression ("re:...", matched from the name's start) or
a class name. ``ignore`` beats every target; among targets an exact name beats an expression, and
that a class name. Experts are fused in memory, so readers give them the scheme of the first group
with an expression that mentions "experts".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from crossbit.models.experts import is_expert

EXPERTS = r"re:.*\.experts\..*"
LINEAR, EMBEDDING = "Linear", "Embedding"
_BLOCK = re.compile(r"\.(\d+)(?=\.|$)")


def compact(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Targets that match exactly ``names`` among ``universe``, sorted; one regex a layer kind.

    Names that differ only in their block number become one expression when all of their kind are
    wanted; the rest stay exact names.
    """
    kinds: dict[str, set[str]] = {}
    for name in universe:
        kinds.setdefault(_kind(name), set()).add(name)
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(_kind(name), set()).add(name)
    targets: list[str] = []
    for kind, members in wanted.items():
        if len(members) > 1 and members == kinds.get(kind, set()):
            targets.append(kind)
        else:
            targets.extend(members)
    return sorted(targets)


def matches(target: str, name: str, class_name: str) -> bool:
    """True if a target or ignore entry matches a module."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, class_name)


def resolve(
    groups: Mapping[str, Sequence[str]], ignore: Iterable[str], name: str, class_name: str
) -> str | None:
    """The config group whose scheme readers give a module; None if it stays dense.

    Args:
        groups: group name -> targets, in the config's order.
        ignore: the config's ignore list.
        name: the module's name (in the file).
        class_name: LINEAR or EMBEDDING.
    """
    if is_expert(name):
        return _expert_group(groups)
    if any(matches(entry, name, class_name) for entry in ignore):
        return None
    exact = [g for g, targets in groups.items() if name in targets]
    pattern = [
        (target, g)
        for g, targets in groups.items()
        for target in targets
        if target.startswith("re:") and matches(target, name, class_name)
    ]
    of_class = [g for g, targets in groups.items() if class_name in targets]
    if exact:
        return exact[0]
    if pattern:
        return min(pattern)[1]
    return of_class[0] if of_class else None


def _expert_group(groups: Mapping[str, Sequence[str]]) -> str | None:
    for group, targets in groups.items():
        if any(t.startswith("re:") and "experts" in t for t in targets):
            return group
    for group, targets in groups.items():
        if any(not t.startswith("re:") for t in targets):
            return group
    return next(iter(groups), None)


def _kind(name: str) -> str:
    """The expression for a name with its block number left open; the name if it has none."""
    numbers = list(_BLOCK.finditer(name))
    if not numbers:
        return name
    first = numbers[0]
    before, after = name[: first.start(1)], name[first.end(1) :]
    return f"re:{re.escape(before)}\\d+{re.escape(after)}$"
