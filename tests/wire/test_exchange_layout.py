"""Where the data of a gather, scatter or all_to_all lies: golden places, nothing lost, no overlap."""

import random
from itertools import pairwise

import pytest

from ringcomm import _core

INLINE = 32 * 1024
CACHE_LINE = 64


def test_golden_places_beside_the_flag() -> None:
    """Change these numbers only together with SHARED_LAYOUT_VERSION."""
    is_inline, lanes = _core.exchange_layout([3, 5, 0, 7], 4, 1, INLINE, 4096)
    assert is_inline
    # Behind two rows of four counts; rank 1 keeps its own 5 elements.
    assert lanes == [(64, [(0, 12)]), (76, [(0, 0)]), (76, [(0, 0)]), (76, [(0, 28)])]


def test_golden_places_in_the_staging_buffers() -> None:
    is_inline, lanes = _core.exchange_layout([1, 9000, 0, 25_000], 1, 2, 1024, 16 * 1024)
    assert not is_inline
    # 34001 bytes, three cache lines to spare: three segments.
    assert lanes == [
        (0, [(0, 1), (1, 1), (1, 1)]),
        (64, [(0, 3008), (3008, 6016), (6016, 9000)]),
        (64 + 3008, [(0, 0), (0, 0), (0, 0)]),
        (64 + 3008, [(0, 8384), (8384, 16768), (16768, 25000)]),
    ]


def test_what_just_fits_is_inline_and_one_byte_more_is_not() -> None:
    room = INLINE - 16 * 2
    assert _core.exchange_layout([9, room], 1, 0, INLINE, 4096)[0]
    is_inline, lanes = _core.exchange_layout([9, room + 1], 1, 0, INLINE, 1 << 20)
    assert not is_inline
    assert len(lanes[1][1]) == 2  # never one: the last segment must stand in a result buffer


@pytest.mark.parametrize("seed", range(60))
def test_every_byte_has_one_place(seed: int) -> None:
    dice = random.Random(seed)
    world_size = dice.choice([2, 3, 4, 8, 64, 128])
    rank = dice.randrange(world_size)
    elem_bytes = dice.choice([1, 2, 4, 8])
    buffer_bytes = dice.choice([4096, 65536, 512 * 1024])
    buffer_bytes = max(buffer_bytes, 4096 * -(-CACHE_LINE * world_size // 4096))
    counts = [
        dice.choice([0, 1, 63, 64, 65, 1000, 40_000, dice.randrange(500_000)])
        for _ in range(world_size)
    ]
    if seed % 10 == 0:
        counts[dice.randrange(world_size)] = 2**40
        buffer_bytes = 1 << 32
    is_inline, lanes = _core.exchange_layout(counts, elem_bytes, rank, INLINE, buffer_bytes)
    num_segments = len(lanes[0][1])
    assert num_segments == 1 if is_inline else num_segments >= 2
    for dest, (_, ranges) in enumerate(lanes):
        wanted = 0 if dest == rank else counts[dest] * elem_bytes
        assert ranges[0][0] == 0
        assert ranges[-1][1] == wanted
        assert all(a[1] == b[0] and a[0] <= a[1] for a, b in pairwise(ranges))
    room = INLINE if is_inline else buffer_bytes
    for segment in range(num_segments) if num_segments < 1000 else (0, 1, num_segments - 1):
        end = 16 * world_size if is_inline else 0
        for offset, ranges in lanes:
            begin, stop = ranges[segment]
            assert is_inline or offset % CACHE_LINE == 0
            if begin == stop:
                continue
            assert offset >= end
            end = offset + stop - begin
        assert end <= room
