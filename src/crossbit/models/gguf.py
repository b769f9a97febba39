"""A GGUF file as a Hugging Face folder: dequantized once through transformers, then cached."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crossbit.errors import CrossbitError, InputError
from crossbit.models.built import build_once
from crossbit.models.gguf_header import GgufHeader, read_gguf_header
from crossbit.models.gguf_repair import (
    drop_invented_tokens,
    repair_config,
    repair_pre_tokenizer,
)
from crossbit.models.opening import open_tokenizer
from crossbit.models.quiet import quiet_transformers

log = logging.getLogger(__name__)

# Raised whenever what is written changes, so that folders of earlier versions are not used.
_FORMAT = 1
SOURCE_FILE = "crossbit-source.json"
LICENCE_NAME = re.compile(r"^(licen[cs]e|notice|copying|.*terms)([._-].*)?$", re.IGNORECASE)


def convert_gguf(
    name: str,
    sha256: str,
    file: Callable[[Path], Path],
    *,
    dtype: torch.dtype,
    licences: Iterable[Path],
    source_bytes: int,
) -> tuple[Path, str]:
    """Return the dense folder of a GGUF file, converting it on the first call.

    The folder holds config.json, generation_config.json, safetensors, tokenizer, chat template
    (if the file has one), the licence files and ``crossbit-source.json``.

    Args:
        name: file name of the GGUF, for messages and the folder's name.
        sha256: digest of its contents; with ``dtype`` the cache key.
        file: returns the path of the GGUF; called only when converting, with a scratch folder
            it may build it in.
        dtype: dtype of the dense weights.
        licences: files to copy along.
        source_bytes: size of the GGUF.

    Returns:
        The folder and a note saying on which grids the weights stand.

    Raises:
        InputError: truncated, corrupt or unsupported file.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name.removesuffix(".gguf"))[:60]
    dtype_name = str(dtype).removeprefix("torch.")
    key = f"gguf-{stem}-{sha256[:16]}-{dtype_name}-v{_FORMAT}"

    def build(folder: Path) -> None:
        scratch = folder / ".scratch"
        scratch.mkdir()
        source = file(scratch)
        header = read_gguf_header(source)
        log.info("converting %s to %s safetensors (once, about a minute)", name, dtype_name)
        _convert(source, header, folder, dtype)
        shutil.rmtree(scratch)
        for licence in licences:
            shutil.copyfile(licence, folder / licence.name)
        (folder / SOURCE_FILE).write_text(
            json.dumps(
                {
                    "file": name,
                    "sha256": sha256,
                    "bytes": source_bytes,
                    "dtype": dtype_name,
                    "tensor_types": header.type_counts(),
                    "note": header.note(),
                },
                indent=2,
            )
            + "\n"
        )

    folder = build_once(key, build)
    note = str(json.loads((folder / SOURCE_FILE).read_text())["note"])
    return folder, note


def _convert(source: Path, header: GgufHeader, folder: Path, dtype: torch.dtype) -> None:
    """Write the dense model and tokenizer of ``source`` into ``folder``."""
    parent, file_name = str(source.parent), source.name
    try:
        with quiet_transformers():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                parent,
                gguf_file=file_name,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                **_dense(),
            )
            tokenizer = AutoTokenizer.from_pretrained(
                parent, gguf_file=file_name, local_files_only=True
            )
    except CrossbitError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{source}: transformers cannot load this GGUF: {reason}") from error
    _check_complete(model, loaded, header, source)
    repair_config(model.config, header, str(source))
    repair_pre_tokenizer(tokenizer.backend_tokenizer, header)
    _write_model(model, folder)
    _write_tokenizer(tokenizer, header, folder)
    _check_tokenizer(open_tokenizer(folder), header, source)


def _dense() -> dict[str, Any]:
    """Ask for dense weights where transformers would keep the GGUF blocks packed (5.20 on)."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_complete(
    model: torch.nn.Module, loaded: dict[str, Any], header: GgufHeader, source: Path
) -> None:
    """Every tensor of the file has to have arrived, and every parameter to come from the file.

    The loader passes over tensors it has no name for, so the elements are counted.
    """
    missing = sorted(loaded.get("missing_keys") or ())
    if missing:
        raise InputError(
            f"{source}: the GGUF lacks {len(missing)} tensors of the model, e.g. {missing[0]}"
        )
    unique = {id(p): p for p in model.parameters()}
    found = sum(p.numel() for p in unique.values())
    stored = sum(t.elements for t in header.tensors if t.name != "rope_freqs.weight")
    if found != stored:
        raise InputError(
            f"{source}: the GGUF holds {stored} weights and transformers loaded {found} "
            "(unsupported tensors in it); use the original safetensors model"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{source}: corrupt GGUF, {name} holds NaN or infinity")


def _check_tokenizer(tokenizer: Any, header: GgufHeader, source: Path) -> None:
    if header.vocab and len(tokenizer) != header.vocab:
        raise InputError(
            f"{source}: transformers read {len(tokenizer)} tokens where the GGUF has "
            f"{header.vocab}; use the original safetensors model"
        )


def _write_model(model: Any, folder: Path) -> None:
    # The weights are dense now; the marks of the quantized source would forbid saving and make
    # every reader look for packed weights.
    model.hf_quantizer = None
    model.is_quantized = False
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    # The loader stores the GGUF's title here, and readers would take it for a path.
    model.config.__dict__.pop("_model_name_or_path", None)
    with quiet_transformers():
        model.save_pretrained(folder)
    for written in folder.glob("*.safetensors"):
        written.chmod(0o644)


def _write_tokenizer(tokenizer: Any, header: GgufHeader, folder: Path) -> None:
    context = header.get("context_length")
    if context is not None:
        tokenizer.model_max_length = int(context)
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if header.vocab:
        drop_invented_tokens(folder / "tokenizer.json", config, header.vocab)
    if config.get("tokenizer_class") == "TokenizersBackend":
        # The same class under the name that transformers 4 and other runtimes know too.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
