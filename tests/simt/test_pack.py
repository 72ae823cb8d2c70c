"""pack and unpack move every byte, and no other, whatever the sizes and addresses; the CPU's twin does the same.

The detector reports what is read or written outside of a piece, twice, or before it is there.
"""

import itertools

import numpy as np
import pytest

from tests.simt.emulator import PLANS, Emulator, EmulatorError, Plan
from tests.simt.packing import Pieces

TILE_BYTES = 16 * 4 * 256  # of a block; on the emulator three of them go round
PER_LAUNCH = 240
SIZES = {
    "none": (),
    "empty": (0, 0, 0),
    "one byte": (1,),
    "of all lengths": tuple(range(70)),
    "elements": (4, 8, 2, 16, 12, 6, 1, 0, 20),
    "one tile": (TILE_BYTES,),
    "across tiles": (TILE_BYTES - 16, 48, 3 * TILE_BYTES + 7, 1, 0, 3000, TILE_BYTES),
    "one huge": (3, 100_000, 5, 0, 17),
    "a launch": (16,) * PER_LAUNCH,
    "two launches": (*range(PER_LAUNCH), 40, 0, 5),
    "three launches": (5,) * (2 * PER_LAUNCH + 1),
}
# In bytes; of pieces in turn.
SHIFTS = {
    "aligned": (0,),
    "by element": (8, 4, 2, 1),
    "odd": (1, 3, 7, 15),
    "mixed": (0, 4, 0, 1, 12),
}


@pytest.mark.parametrize("shifts", SHIFTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_byte_gets_to_its_place(simt: Emulator, sizes: str, shifts: str) -> None:
    plans = itertools.cycle(PLANS)
    for seed in range(2):
        pieces = Pieces(simt, SIZES[sizes], SHIFTS[shifts], seed)
        for on_cpu in (True, False):
            reports, buffer = pieces.packed(plan := next(plans), on_cpu)
            assert reports == [], plan
            assert buffer.tobytes() == pieces.buffer.tobytes(), (plan, on_cpu)
            reports, arrays = pieces.unpacked(plan := next(plans), on_cpu)
            assert reports == [], plan
            for array, values in zip(arrays, pieces.values, strict=True):
                assert array.tobytes() == values.tobytes(), (plan, on_cpu)
            simt.release_all()


@pytest.mark.parametrize("plan", PLANS)
def test_all_schedules_give_the_same_bytes(simt: Emulator, plan: Plan) -> None:
    pieces = Pieces(simt, (5, 50_000, 0, 33, TILE_BYTES, 1), (0, 2, 1))
    reports, buffer = pieces.packed(plan)
    assert reports == []
    assert buffer.tobytes() == pieces.buffer.tobytes()
    reports, arrays = pieces.unpacked(plan)
    assert reports == []
    assert b"".join(map(bytes, arrays)) == b"".join(map(bytes, pieces.values))


def test_what_is_beside_a_piece_is_not_touched(simt: Emulator) -> None:
    """Pieces that lie side by side: the last access of one must not reach into the next."""
    whole = simt.array(np.full(64, 0xA5, np.uint8), "neighbours")
    arrays = [whole[1:6], whole[6:30], whole[33:60]]
    pieces = Pieces(simt, [array.size for array in arrays], (0,))
    pieces.call(False, arrays, simt.array(pieces.buffer, "buffer"))
    assert simt.run() == []
    for array, values in zip(arrays, pieces.values, strict=True):
        assert array.tobytes() == values.tobytes()
    untouched = [*whole[:1], *whole[30:33], *whole[60:]]
    assert untouched == [0xA5] * len(untouched)


def test_a_buffer_out_of_line_is_refused(simt: Emulator) -> None:
    pieces = Pieces(simt, (5,), (0,))
    buffer = simt.array(np.zeros(16, np.uint8), "buffer", shift=8)
    with pytest.raises(EmulatorError, match="the buffer must lie at a multiple of 16 bytes"):
        pieces.call(True, pieces.arrays(True), buffer)
