"""What fits the positions of a model, and how a refusal reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crossbit.errors import InputError
from crossbit.positions import check_length, free_positions

CONFIG = SimpleNamespace(max_position_embeddings=512)
ENDLESS = (SimpleNamespace(), SimpleNamespace(max_position_embeddings=None))


def test_what_fits() -> None:
    check_length(CONFIG, 512)
    check_length(CONFIG, 510, 2)
    assert free_positions(CONFIG) == 512
    assert free_positions(CONFIG, 2) == 510


@pytest.mark.parametrize("config", ENDLESS)
def test_a_model_that_names_no_limit_has_none(config: Any) -> None:
    check_length(config, 10**9, 2)
    assert free_positions(config, 2) is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (513,),
            {},
            "sequences of 513 tokens are longer than the model's 512 positions; "
            "give --length 512 or less",
        ),
        (
            (511, 2),
            {"what": "windows", "option": "--window-length"},
            "windows of 511 tokens after a prefix of 2 are longer than the model's 512 positions; "
            "give --window-length 510 or less",
        ),
        (
            (511, 2),
            {"what": "a prompt", "option": None},
            "a prompt of 511 tokens after a prefix of 2 are longer than the model's 512 "
            "positions; give a shorter text",
        ),
    ],
)
def test_what_does_not_fit(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError) as found:
        check_length(CONFIG, *arguments, **options)
    assert str(found.value) == message
