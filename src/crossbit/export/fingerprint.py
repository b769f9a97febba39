"""SHA-256 of tensors (name, dtype, shape and bytes) and of whole sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """Hex digest of one named tensor; independent of its device and strides.

    The bytes are those of the contiguous tensor in row-major order, as safetensors stores them.
    """
    digest = hashlib.sha256()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = "x".join(map(str, tensor.shape))
    digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(data.numpy().data)
    return digest.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Hex digest of a whole checkpoint from the digests of its tensors (by sorted name)."""
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(f"{name}\0{digests[name]}\n".encode())
    return digest.hexdigest()
