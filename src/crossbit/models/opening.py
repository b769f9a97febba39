"""Opening a folder's config and tokenizer, without ever running code that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from crossbit.errors import InputError
from crossbit.models.quiet import quiet_transformers
from crossbit.models.validate import check_tokenizer_present, read_config


def open_config(path: Path) -> Any:
    """The folder's ``transformers.PretrainedConfig``.

    Raises:
        InputError: missing or damaged config.json, or an architecture that this transformers
            does not have (code in the folder is never run).
    """
    content = read_config(path)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        if content.get("auto_map"):
            raise InputError(
                f"{path}: {content['model_type']} needs code of its own (auto_map), which is "
                "never run; use a version of the model that transformers has built in"
            ) from error
        raise InputError(
            f"{path / 'config.json'}: transformers cannot read it ({_one_line(error)})"
        ) from error


def open_tokenizer(path: Path) -> Any:
    """The folder's tokenizer (``transformers.PreTrainedTokenizerBase``).

    Raises:
        InputError: missing or damaged tokenizer files.
    """
    check_tokenizer_present(path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise InputError(
            f"{path}: the tokenizer cannot be opened ({_one_line(error)}); "
            "copy it again from the original model"
        ) from error
    if len(tokenizer) == 0:
        raise InputError(f"{path}: the tokenizer is empty; copy it from the original model")
    return tokenizer


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
