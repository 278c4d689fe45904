"""Which elements of a block are kept, and their codes one behind the other.

The k-th largest key of a row is found by bisection between the row's least and greatest key: one
count a step. Keys of 16-bit dtypes are counted two at a time, in the halves of one integer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _countable(key, KEY_BITS: tl.constexpr):
    """What `_count` takes: pairs of keys of 15 bits, each with a bit above it."""
    if KEY_BITS == 15:
        PAIRS: tl.constexpr = key.shape[1] // 2
        left, right = tl.split(tl.reshape(key, (key.shape[0], PAIRS, 2)))
        keys = (left | (right << 16)) | 0x80008000
    else:
        keys = key
    return keys


@triton.jit
def _count(keys, least, KEY_BITS: tl.constexpr):
    """How many keys of each row are at least `least`."""
    if KEY_BITS == 15:  # the bit above a key stays where it is not less
        reached = ((keys - (least * 0x10001)[:, None]) >> 15) & 0x10001
        both = tl.sum(reached.to(tl.int32), 1)
        count = (both & 0xFFFF) + (both >> 16)
    else:
        count = tl.sum((keys >= least[:, None]).to(tl.int32), 1)
    return count


@triton.jit
def select(key, valid, k, KEY_BITS: tl.constexpr):
    """The k greatest valid keys of each row (uint32 below 2**KEY_BITS), of equal ones the first.

    Returns:
        (ROWS, LANES) bool, and how many of a row are kept up to each element, itself counted.
    """
    LANES: tl.constexpr = key.shape[1]
    key = tl.where(valid, key, 0)
    keys = _countable(key, KEY_BITS)
    # At least `low` are `reached` keys, k or more of them; above `high` are `above`, less than k
    none = tl.full(k.shape, 2**KEY_BITS - 1, tl.uint32)
    low = tl.where(k > 0, tl.min(key, 1), none)
    high = tl.where(k > 0, tl.max(key, 1), none)
    reached = tl.zeros_like(k) + LANES
    above = tl.zeros_like(k)
    while tl.max(((low < high) & (reached > k)).to(tl.int32), 0) > 0:
        middle = high - ((high - low) >> 1)
        count = _count(keys, middle, KEY_BITS)
        enough = count >= k
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, count, reached)
        high = tl.where(enough, high, middle - 1)
        above = tl.where(enough, above, count)
    room = tl.where(reached == k, LANES, k - above)[:, None]
    greater = valid & (key > low[:, None])
    equal = valid & (key == low[:, None])
    # One scan counts both
    before = tl.cumsum(tl.where(greater, 1, tl.where(equal, 0x10000, 0)), 1)
    ties = before >> 16
    return greater | (equal & (ties <= room)), (before & 0xFFFF) + tl.minimum(ties, room)


@triton.jit
def _join(left, right):
    """Of bytes in the order of a stream, each below its number: what lies in the same one."""
    return tl.where((left ^ right) < 256, left | right, right)


@triton.jit
def store_kept_codes(ptr, codes, kept, rank, k, BITS: tl.constexpr):
    """As `store_codes`, of the kept codes alone: the r-th code takes bits [(r-1)*BITS, r*BITS).

    Eight neighbours put their codes one behind the other, and complete the bytes that they reach
    the end of; a byte begun before has what the neighbours before them left in it.

    Args:
        ptr: (ROWS,) where each stream starts.
        codes: (ROWS, LANES).
        kept: (ROWS, LANES) bool.
        rank: (ROWS, LANES): how many are kept up to each, itself counted.
        k: (ROWS,) how many are kept.
        BITS: 1..8.
    """
    if BITS == 8:
        tl.store(ptr[:, None] + (rank - 1), codes.to(tl.uint8), mask=kept)
    else:
        ROWS: tl.constexpr = codes.shape[0]
        GROUPS: tl.constexpr = codes.shape[1] // 8
        WORD: tl.constexpr = tl.int32 if BITS < 4 else tl.int64  # 8 codes behind up to 7 bits
        member = tl.arange(0, 8)[None, None, :]
        taken = tl.reshape(kept.to(tl.int32), (ROWS, GROUPS, 8))
        rank = tl.reshape(rank, (ROWS, GROUPS, 8))
        codes = tl.reshape(tl.where(kept, codes, 0), (ROWS, GROUPS, 8))
        before = rank - taken
        start = tl.sum(tl.where(member == 0, before, 0), 2) * BITS
        end = tl.sum(tl.where(member == 7, rank, 0), 2) * BITS
        first = start >> 3
        last = end >> 3  # the byte that the next ones begin in
        if BITS <= 4:
            shift = before * BITS - start[:, :, None]
            word = tl.sum(codes.to(tl.uint32) << shift.to(tl.uint32), 2).to(WORD)
        else:
            shift = (before * BITS - start[:, :, None]).to(WORD)
            word = tl.sum(codes.to(WORD) << shift, 2)
        word = word << (start & 7).to(WORD)
        rest = (word >> ((last - first) * 8).to(WORD)).to(tl.int32) & 0xFF
        head = (first << 8) | (word.to(tl.int32) & 0xFF)
        tail = (last << 8) | tl.where(last > first, rest, 0)
        ends = tl.reshape(tl.join(head, tail), (ROWS, 2 * GROUPS))
        ends = tl.associative_scan(ends, 1, _join)
        head, tail = tl.split(tl.reshape(ends, (ROWS, GROUPS, 2)))
        at = ptr[:, None] + first
        tl.store(at, (head & 0xFF).to(tl.uint8), mask=last > first)
        for j in tl.static_range(1, BITS):
            byte = ((word >> (8 * j)) & 0xFF).to(tl.uint8)
            tl.store(at + j, byte, mask=last > first + j)
        final = (end == (k * BITS)[:, None]) & (start < end) & ((end & 7) != 0)
        tl.store(ptr[:, None] + last, (tail & 0xFF).to(tl.uint8), mask=final)
