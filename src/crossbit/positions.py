"""How many tokens a model takes: its positions, less those of a prefix."""

from __future__ import annotations

from typing import Any

from crossbit.errors import InputError


def free_positions(config: Any, prefix: int = 0) -> int | None:
    """Tokens that a model has positions for after a prefix; None if its config names no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if not limit else int(limit) - prefix


def check_length(
    config: Any,
    length: int,
    prefix: int = 0,
    *,
    what: str = "sequences",
    option: str | None = "--length",
) -> None:
    """Refuse more tokens than the model has positions for.

    Args:
        config: the model's.
        length: tokens of a sequence.
        prefix: tokens before each.
        what: names the sequences to the user.
        option: what makes them shorter; None where nothing but another text does.

    Raises:
        InputError: they do not fit.
    """
    free = free_positions(config, prefix)
    if free is None or length <= free:
        return
    after = f" after a prefix of {prefix}" if prefix else ""
    raise InputError(
        f"{what} of {length} tokens{after} are longer than the model's {free + prefix} positions; "
        + ("give a shorter text" if option is None else f"give {option} {free} or less")
    )
