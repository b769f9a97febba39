"""Chat messages to text, through the model's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crossbit.corpora.corpus import one_line
from crossbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_to_text(messages: object, tokenizer: PreTrainedTokenizerBase | None, *, where: str) -> str:
    """Render one conversation as the model reads it.

    Args:
        messages: a list of ``{"role": str, "content": ...}``, as in transformers.
        tokenizer: the model's tokenizer, which carries the template.
        where: file and line, for the messages of errors.

    Raises:
        InputError: no tokenizer, a tokenizer without template, or messages it does not take.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "messages" is not a list with at least one message in it')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f'{where}: each of the messages needs a "role" and a "content"')
    if tokenizer is None:
        raise InputError(
            f"{where}: chat messages need the model's tokenizer and there is none; "
            'use lines with a "text" field'
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{where}: chat messages need a chat template and the model's tokenizer has none; "
            'use lines with a "text" field, or the instruction-tuned model'
        )
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever its author wrote
        raise InputError(
            f"{where}: the model's chat template refuses these messages ({one_line(error)})"
        ) from error
    return str(text)
