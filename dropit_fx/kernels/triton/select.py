"""Which elements of a block are kept, and their codes one behind the other.

The k-th largest key of a row is found bit by bit, from the highest on: one count for each bit of a
magnitude, 15 for 16-bit dtypes and 31 for float32.
"""

# Kernel arguments have no types that a type checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(key, valid, k, KEY_BITS: tl.constexpr):
    """The k greatest valid keys of each row (uint32 below 2**KEY_BITS), of equal ones the first."""
    key = tl.where(valid, key, 0)
    low = k.to(tl.uint32) * 0
    for i in range(KEY_BITS):
        candidate = low | (tl.full((), 1, tl.uint32) << (KEY_BITS - 1 - i))
        reached = tl.sum((key >= candidate[:, None]).to(tl.int32), 1) >= k
        low = tl.where(reached, candidate, low)
    above = valid & (key > low[:, None])
    equal = valid & (key == low[:, None])
    room = k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _join(left_group, left_word, right_group, right_word):
    return right_group, tl.where(left_group == right_group, left_word, 0) | right_word


@triton.jit
def store_kept_codes(ptr, codes, kept, rank, k, BITS: tl.constexpr):
    """As `store_codes`, of the kept codes alone: code of rank r takes bits [r*BITS, (r+1)*BITS).

    Args:
        ptr: (ROWS,) where each stream starts.
        codes: (ROWS, LANES).
        kept: (ROWS, LANES) bool.
        rank: (ROWS, LANES): how many kept ones lie before, itself not counted; -1 before the first.
        k: (ROWS,) how many are kept.
        BITS: 1..8.
    """
    if BITS == 8:
        tl.store(ptr[:, None] + rank, codes.to(tl.uint8), mask=kept)
    else:
        PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8  # codes that fill whole bytes
        group = tl.where(rank < 0, -1, rank // PER)
        word = tl.where(kept, codes, 0).to(tl.int32 if PER * BITS < 32 else tl.int64)
        word = word << (tl.maximum(rank, 0) % PER * BITS).to(word.dtype)
        _, word = tl.associative_scan((group, word), 1, _join)
        last = kept & ((rank % PER == PER - 1) | (rank == k[:, None] - 1))
        for j in tl.static_range((PER * BITS) // 8):
            at = group * (PER * BITS // 8) + j
            within = last & (at < ((k * BITS + 7) // 8)[:, None])
            tl.store(ptr[:, None] + at, ((word >> (8 * j)) & 0xFF).to(tl.uint8), mask=within)
