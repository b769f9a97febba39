"""SHA-256 of tensors: name, dtype, shape and bytes."""

from __future__ import annotations

import hashlib

from torch import Tensor

from crossbit.safetensors_format import raw_bytes


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """Hex digest of one named tensor; independent of its device and strides.

    The bytes are those of the contiguous tensor in row-major order, as safetensors stores them.
    """
    digest = hashlib.sha256()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = "x".join(map(str, tensor.shape))
    digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()
