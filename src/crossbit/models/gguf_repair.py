"""What transformers' GGUF loader loses or leaves inexact, put right from the file's metadata.

Reference for the metadata keys: the GGUF specification and llama.cpp's ``convert_hf_to_gguf.py``;
for the pre-tokenizers: ``llama-vocab.cpp``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from crossbit.errors import InputError
from crossbit.models.gguf_header import GgufHeader

# Vocabularies whose merges were learned with every digit alone, then GPT-2's split.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

# GGUF key -> attribute of the transformers config that has to agree with it.
_SHAPES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
}


def repair_config(config: Any, header: GgufHeader, where: str) -> None:
    """Correct a transformers config that was read from a GGUF, in place.

    Epsilon is stored as float32 (1e-05 arrives as 9.999999747e-06) and is written as the decimal
    it stood for. Rope scaling, which the loader drops, is restored. Gemma-3's 27B query scale is
    restored.

    Raises:
        InputError: the config disagrees with the file, or the file uses a rope variant that
            cannot be restored.
    """
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        value = getattr(config, name, None)
        if isinstance(value, float):
            setattr(config, name, shortest_float32(value))
    scaling = rope_scaling(header, where)
    if scaling is not None:
        parameters = config.rope_parameters
        # Gemma-3 keeps one set for each kind of layer and scales the full-attention one only.
        target = parameters.get("full_attention", parameters)
        target.update(scaling)
    if header.architecture == "gemma3" and header.get("block_count") == 62:
        # Only the 27B divides by sqrt(width / heads) in place of sqrt(head_dim).
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    check_config(config, header, where)


def check_config(config: Any, header: GgufHeader, where: str) -> None:
    """Compare shapes, rope base and token ids of ``config`` with the file.

    Raises:
        InputError: naming the first disagreement.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for key, attribute in _SHAPES.items():
        stated = header.get(key)
        if isinstance(stated, (int, float)) and hasattr(config, attribute):
            pairs.append((key, stated, getattr(config, attribute)))
    for token in ("bos", "eos"):
        stated = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if stated is not None:
            pairs.append((f"{token}_token_id", stated, getattr(config, f"{token}_token_id", None)))
    base = header.get("rope.freq_base")
    if base is not None:
        parameters = getattr(config, "rope_parameters", None) or {}
        found = parameters.get("full_attention", parameters).get("rope_theta")
        pairs.append(("rope.freq_base", base, found))
    for key, stated, found in pairs:
        agrees = found is not None and math.isclose(float(stated), float(found), rel_tol=1e-6)
        # A window of None means full attention, which is what a model without sliding layers has.
        if not agrees and not (key == "attention.sliding_window" and found is None):
            raise InputError(
                f"{where}: transformers read {key} as {found} where the GGUF says {stated}; "
                "use the original safetensors model"
            )


def rope_scaling(header: GgufHeader, where: str) -> dict[str, Any] | None:
    """The ``rope_parameters`` entries that the file's scaling stands for, or None without one.

    Raises:
        InputError: a variant whose parameters are not in the file.
    """
    if any(t.name.startswith("rope_factors_") for t in header.tensors):
        raise InputError(
            f"{where}: longrope factors in a GGUF are not supported; "
            "use the original safetensors model"
        )
    if header.rope_factors is not None:
        return _llama3_scaling(header, where)
    kind = header.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    factor = header.get("rope.scaling.factor")
    if kind == "linear" and factor is not None:
        return {"rope_type": "linear", "factor": float(factor)}
    original = header.get("rope.scaling.original_context_length")
    if kind == "yarn" and factor is not None and original is not None:
        return {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise InputError(
        f"{where}: rope scaling {kind} of this GGUF is not supported; "
        "use the original safetensors model"
    )


def _llama3_scaling(header: GgufHeader, where: str) -> dict[str, Any]:
    """Find the Llama-3 parameters that reproduce ``rope_freqs.weight``.

    The file holds the divisor of each rotary frequency, not the four parameters; every published
    Llama 3.1 - 3.3 uses low 1, high 4, original context 8192, so only the factor is open and it
    is the largest divisor. The divisors are computed again and have to come out the same.
    """
    assert header.rope_factors is not None
    base = float(header.get("rope.freq_base") or 10000.0)
    factor = max(header.rope_factors)
    parameters = {
        "rope_type": "llama3",
        "factor": shortest_float32(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    half = len(header.rope_factors)
    for i, stated in enumerate(header.rope_factors):
        wavelength = 2 * math.pi * base ** (i / half)
        if wavelength < 8192 / 4.0:
            expected = 1.0
        elif wavelength > 8192 / 1.0:
            expected = factor
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if not math.isclose(stated, expected, rel_tol=1e-3):
            raise InputError(
                f"{where}: the rope divisors in this GGUF are not Llama-3's; "
                "use the original safetensors model"
            )
    return parameters


def repair_pre_tokenizer(backend: Tokenizer, header: GgufHeader) -> None:
    """Split digits one by one where the vocabulary was trained so; the loader's GPT-2 split
    otherwise glues spaces to them ("a  2" becomes Ġ Ġ 2 in place of ĠĠ 2)."""
    if (
        header.metadata.get("tokenizer.ggml.model") == "gpt2"
        and header.metadata.get("tokenizer.ggml.pre") in _DIGITS_ALONE
    ):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )


def drop_invented_tokens(tokenizer_json: Path, config: dict[str, Any], vocab: int) -> None:
    """Take out of a written tokenizer the tokens that the file does not have.

    The loader's byte-level class brings <|endoftext|> of GPT-2 along and gives it the first id
    beyond the vocabulary where there is none, for which the model has no embedding.

    Args:
        tokenizer_json: rewritten in place.
        config: parsed tokenizer_config.json; special tokens taken out are removed from it.
        vocab: number of tokens in the GGUF.
    """
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    invented = {t["content"] for t in content["added_tokens"] if t["id"] >= vocab}
    if not invented:
        return
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < vocab]
    tokenizer_json.write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for key in [k for k, v in config.items() if isinstance(v, str) and v in invented]:
        del config[key]


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32 (9.999999747e-06 -> 1e-05)."""
    return float(str(np.float32(value)))
