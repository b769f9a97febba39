"""Packing against big-integer arithmetic and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossbit import packing
from crossbit.errors import InputError
from crossbit.packing import pack, unpack, words_per_row

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


def packed_by_hand(codes: Tensor, bits: int) -> list[list[int]]:
    """Each row as one big little-endian integer, cut into signed 32-bit words."""
    rows = []
    for row in codes.tolist():
        stream = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
        rows.append([w - (1 << 32) if w >> 31 else w for w in words])
    return rows


@settings(deadline=None, max_examples=150)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_words_are_the_little_endian_bit_stream(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == packed_by_hand(codes, bits)
    assert torch.equal(unpack(words, bits, columns), codes)


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([0, 1]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_both_ways_like_compressed_tensors(
    bits: int, dim: int, rows: int, columns: int, seed: int
) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack(codes, bits, dim)
    theirs = pack_to_int32(codes, bits, packed_dim=dim)
    assert torch.equal(words, theirs)
    assert words.is_contiguous()
    back = unpack(theirs, bits, codes.shape[dim], dim)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)
    shape = torch.Size((rows, columns))
    assert torch.equal(unpack_from_int32(words, bits, shape, packed_dim=dim), codes)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_and_views(bits: int) -> None:
    half = 1 << (bits - 1)
    ends = torch.tensor([[-half, half - 1, 0, -1, half - 1]] * 3, dtype=torch.int8)
    for codes in (ends, ends.t(), ends[:, ::2], ends[1:2]):
        assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)
    lowest = torch.full((2, 64), -half, dtype=torch.int8)
    assert not pack(lowest, bits).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_chunks_of_rows_join(bits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(rows, 37, bits)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_ROWS_AT_ONCE", 3)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 37), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_wrong_number_of_words_is_refused(bits: int, dim: int) -> None:
    codes = random_codes(33, 33, bits)
    words = pack(codes, bits, dim)
    fewer = words.narrow(dim, 0, words.shape[dim] - 1)
    more = torch.cat((words, words.narrow(dim, 0, 1)), dim)
    for wrong in (fewer, more):
        with pytest.raises(InputError, match=rf"{words.shape[dim]} expected") as caught:
            unpack(wrong, bits, 33, dim)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        unpack(words, bits, 33 + 32, dim)


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_that_do_not_fit_are_refused(bits: int) -> None:
    half = 1 << (bits - 1)
    for bad in (half, -half - 1, 127, -128):
        codes = torch.zeros(3, 5, dtype=torch.int8)
        codes[2, 4] = bad
        for dim in (0, 1):
            with pytest.raises(InputError, match=rf"\[{-half}, {half - 1}\].*{bits}"):
                pack(codes, bits, dim)


@pytest.mark.parametrize(
    ("columns", "bits", "words"), [(8, 4, 1), (9, 4, 2), (32, 3, 3), (33, 3, 4), (5, 8, 2)]
)
def test_words_per_row(columns: int, bits: int, words: int) -> None:
    assert words_per_row(columns, bits) == words
    assert pack(random_codes(2, columns, bits), bits).shape == (2, words)


def test_no_rows() -> None:
    empty = torch.zeros(0, 10, dtype=torch.int8)
    for bits in BITS:
        words = pack(empty, bits)
        assert words.shape == (0, words_per_row(10, bits))
        assert unpack(words, bits, 10).shape == (0, 10)
