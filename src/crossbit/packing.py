"""Packing of signed codes into int32 words, both ways (the layout of compressed-tensors).

A row of K codes of b bits is a little-endian bit stream: code 0 sits in the lowest bits of
word 0, and a code may cross a word boundary (3, 5, 6, 7 bits). Codes are stored with the offset
2^(b-1), so they are unsigned in the file. A row takes ceil(K * b / 32) words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossbit.errors import InputError

_ROWS_AT_ONCE = 4096  # bounds the unpacked bits held at once (b bytes a code)


def words_per_row(columns: int, bits: int) -> int:
    """Number of int32 words that a row of ``columns`` codes takes."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack codes int8 [N, K] into int32 words along ``dim``.

    Returns:
        int32 [N, ceil(K b / 32)] for dim 1, [ceil(N b / 32), K] for dim 0.

    Raises:
        InputError: a code lies outside [-2^(b-1), 2^(b-1) - 1].
    """
    if dim == 0:
        return pack(codes.t(), bits).t().contiguous()
    half = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise InputError(f"codes outside [{-half}, {half - 1}] do not fit into {bits} bits")
    rows, columns = codes.shape
    words = words_per_row(columns, bits)
    out = np.zeros((rows, words), dtype="<i4")
    source = codes.contiguous().cpu().numpy()
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = (source[start : start + _ROWS_AT_ONCE].astype(np.int16) + half).astype(np.uint8)
        stream: Any
        if bits == 8:
            stream = part
        elif bits == 4:
            part = np.pad(part, ((0, 0), (0, columns % 2)))
            stream = part[:, 0::2] | (part[:, 1::2] << 4)
        else:
            flat = np.unpackbits(part[:, :, None], axis=2, count=bits, bitorder="little")
            stream = np.packbits(flat.reshape(len(part), -1), axis=1, bitorder="little")
        padded = np.pad(stream, ((0, 0), (0, words * 4 - stream.shape[1])))
        out[start : start + len(part)] = np.ascontiguousarray(padded).view("<i4")
    return torch.from_numpy(out)


def unpack(words: Tensor, bits: int, columns: int, dim: int = 1) -> Tensor:
    """Invert ``pack``: int32 words to codes int8 with ``columns`` codes along ``dim``.

    Raises:
        InputError: the number of words does not match ``columns``.
    """
    if dim == 0:
        return unpack(words.t(), bits, columns).t().contiguous()
    rows, count = words.shape
    if count != words_per_row(columns, bits):
        raise InputError(
            f"{count} words a row do not hold {columns} codes of {bits} bits "
            f"({words_per_row(columns, bits)} expected): the file does not match its shape"
        )
    half = 1 << (bits - 1)
    out = np.empty((rows, columns), dtype=np.int8)
    source = words.contiguous().cpu().numpy().astype("<i4", copy=False)
    for start in range(0, rows, _ROWS_AT_ONCE):
        stream = np.ascontiguousarray(source[start : start + _ROWS_AT_ONCE]).view(np.uint8)
        if bits == 8:
            part = stream[:, :columns]
        elif bits == 4:
            part = np.stack((stream & 15, stream >> 4), axis=2).reshape(len(stream), -1)
            part = part[:, :columns]
        else:
            flat = np.unpackbits(stream, axis=1, count=columns * bits, bitorder="little")
            flat = flat.reshape(len(stream), columns, bits)
            part = np.packbits(flat, axis=2, bitorder="little")[:, :, 0]
        out[start : start + len(part)] = (part.astype(np.int16) - half).astype(np.int8)
    return torch.from_numpy(out)
