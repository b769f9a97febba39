"""What a GGUF file says about itself: metadata and how its tensors are stored."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from crossbit.errors import InputError

# Arrays with one entry a token: long, and of no use beyond the tokenizer.
_LONG_ARRAYS = {
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
}

# Bits a weight of the storage types without quantization error, by name.
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class GgufTensorInfo:
    """One tensor: its GGUF name, storage type (``Q4_1``) and number of elements."""

    name: str
    type: str
    elements: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of a GGUF file, without tensor data.

    Attributes:
        metadata: key -> value; of the token arrays only the vocabulary size (``vocab``) is kept.
        tensors: every tensor in file order.
        vocab: number of tokens in the file's tokenizer.
        rope_factors: contents of ``rope_freqs.weight`` [rotary_dim / 2], or None.
    """

    metadata: dict[str, Any]
    tensors: tuple[GgufTensorInfo, ...]
    vocab: int
    rope_factors: tuple[float, ...] | None

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, e.g. ``llama`` or ``gemma3``."""
        return str(self.metadata["general.architecture"])

    def get(self, suffix: str) -> Any:
        """Value of ``<architecture>.<suffix>``, or None."""
        return self.metadata.get(f"{self.architecture}.{suffix}")

    def type_counts(self) -> dict[str, int]:
        """Number of tensors of each storage type, the most elements first."""
        elements: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            elements[tensor.type] += tensor.elements
            counts[tensor.type] += 1
        return {kind: counts[kind] for kind, _ in elements.most_common()}

    def note(self) -> str:
        """One line saying on which grids the weights stand already."""
        quantized = [t for t in self.tensors if t.type not in _FLOAT_TYPES]
        table = ", ".join(f"{n} x {kind}" for kind, n in self.type_counts().items())
        if not quantized:
            return f"converted from GGUF ({table})"
        elements: Counter[str] = Counter()
        for tensor in quantized:
            if tensor.name.startswith("blk."):
                elements[tensor.type] += tensor.elements
        main = (elements or Counter({quantized[0].type: 1})).most_common(1)[0][0]
        bits = _nominal_bits(main)
        article = "an" if bits == 8 else "a"
        grid = f"{article} {bits}-bit grid" if bits else "a coarse grid"
        return f"dequantized from GGUF {main}: weights stand on {grid} already ({table})"


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: not a GGUF file, truncated (tensor data included), no architecture, or one
            part of a split file.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
    try:
        # The reader maps every tensor, so a file shorter than its own table fails here.
        reader = gguf.GGUFReader(str(path))
    except Exception as error:
        raise InputError(
            f"{path}: truncated or corrupt GGUF ({_one_line(error)}); download it again"
        ) from error
    metadata = {
        key: field.contents() for key, field in reader.fields.items() if key not in _LONG_ARRAYS
    }
    if not isinstance(metadata.get("general.architecture"), str):
        raise InputError(f"{path}: the GGUF metadata names no architecture (general.architecture)")
    if int(metadata.get("split.count") or 1) > 1:
        raise InputError(
            f"{path}: one of {metadata['split.count']} parts of a split GGUF; join them first "
            "with llama-gguf-split --merge"
        )
    if not reader.tensors:
        raise InputError(f"{path}: the GGUF holds no tensors")
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    factors = next((t for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    return GgufHeader(
        metadata=metadata,
        tensors=tuple(
            GgufTensorInfo(t.name, t.tensor_type.name, math.prod(int(n) for n in t.shape))
            for t in reader.tensors
        ),
        vocab=len(tokens.data) if tokens is not None else 0,
        rope_factors=tuple(float(x) for x in factors.data) if factors is not None else None,
    )


def _nominal_bits(kind: str) -> int | None:
    """Bits of the integer codes of a storage type: 4 for Q4_1, Q4_K and IQ4_XS."""
    digits = kind.lstrip("IQT")[:1]
    return int(digits) if digits.isdigit() else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:160]
