"""Which inputs LET and DuQuant pass by in a model, and why: a note for each, before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crossbit.engine import let, turn
from crossbit.engine.plan import BlockPlan
from crossbit.errors import InputError
from crossbit.models.structure import InputGroup
from crossbit.recipe import Recipe


def left_out_notes(blocks: Sequence[BlockPlan], recipe: Recipe) -> list[str]:
    """One note for each of the recipe's transforms that leaves out inputs; others go without.

    Raises:
        InputError: DuQuant would rotate no input at all.
    """
    notes = []
    if (config := recipe.let) is not None:

        def untrained(plan: BlockPlan, group: InputGroup) -> str:
            return let.left_out(plan, group) if let.wanted(plan, group, config.down) else ""

        found = _inputs(blocks, untrained)
        pairs = [let.query_key_left_out(plan, config) for plan in blocks]
        _add(found, "queries and keys", [reason for reason in pairs if reason])
        if found:
            notes.append(f"let: no trained factors of {_listed(found, len(blocks))}")
    if (duquant := recipe.duquant) is not None:

        def unturned(plan: BlockPlan, group: InputGroup) -> str:
            return turn.left_out(plan, group, duquant) if turn.wanted(plan, group) else ""

        if found := _inputs(blocks, unturned):
            note = f"duquant: no rotation of {_listed(found, len(blocks))}"
            groups = ((plan, group) for plan in blocks for group in plan.structure.groups)
            if not any(turn.turned(plan, group, duquant) for plan, group in groups):
                raise InputError(f"{note}; leave it out of the recipe")
            notes.append(note)
    return notes


# reason, number of blocks -> inputs
_Found = dict[tuple[str, int], list[str]]


def _inputs(
    blocks: Sequence[BlockPlan], reason_of: Callable[[BlockPlan, InputGroup], str]
) -> _Found:
    """The inputs of quantized layers that ``reason_of`` has a reason for."""
    reasons: dict[str, list[str]] = {}
    for plan in blocks:
        own = set()  # experts of a block are many, and alike
        for group in plan.structure.groups:
            if not any(name in plan.layers for name in group.consumers):
                continue
            roles = dict.fromkeys(plan.structure.linears[name].role for name in group.consumers)
            what, reason = f"the input of {', '.join(roles)}", reason_of(plan, group)
            if reason and (what, reason) not in own:
                own.add((what, reason))
                reasons.setdefault(what, []).append(reason)
    found: _Found = {}
    for what, given in reasons.items():
        _add(found, what, given)
    return found


def _add(found: _Found, what: str, reasons: Sequence[str]) -> None:
    for reason in dict.fromkeys(reasons):
        found.setdefault((reason, reasons.count(reason)), []).append(what)


def _listed(found: _Found, blocks: int) -> str:
    parts = []
    for (reason, count), inputs in found.items():
        where = "" if count == blocks else f" in {count} of {blocks} blocks"
        parts.append(f"{' and '.join(inputs)}{where} ({reason})")
    return "; ".join(parts)
