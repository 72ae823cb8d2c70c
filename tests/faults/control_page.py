"""A look into a group's control page, and a way to damage it. Offsets: csrc/wire/shared_layout.h."""

import mmap
import os
import struct
import time
from typing import Any

from ringcomm import Communicator, comm

FAULT_STATE = 64
RANKS = 1088
RANK_BYTES = 128
ENTERED_SEQ = 72

_pages: dict[int, mmap.mmap] = {}  # by process
_original = comm.rendezvous


def _keep_page(*args: Any, **kwargs: Any) -> Any:
    endpoints = _original(*args, **kwargs)
    copy = os.dup(endpoints.control_fd)
    _pages[os.getpid()] = mmap.mmap(copy, os.fstat(copy).st_size)
    os.close(copy)
    return endpoints


def keep_pages() -> None:
    """From now on :func:`page` finds the page of this process's newest communicator."""
    comm.rendezvous = _keep_page


def page() -> mmap.mmap:
    return _pages[os.getpid()]


def entered_seq(rank: int) -> int:
    return int(struct.unpack_from("<I", page(), RANKS + RANK_BYTES * rank + ENTERED_SEQ)[0])


def wait_until_entered(comm: Communicator, rank: int, seq: int, seconds: float = 20) -> None:
    """Returns once ``rank`` is inside collective number ``seq``."""
    until = time.monotonic() + seconds
    while entered_seq(rank) != seq:
        assert time.monotonic() < until, f"rank {rank} never entered #{seq}"
        time.sleep(0.001)


def wait_for_fault(seconds: float = 20) -> None:
    """Returns once somebody has reported a failure."""
    until = time.monotonic() + seconds
    while not page()[FAULT_STATE + 3] & 0x80:
        assert time.monotonic() < until, "nobody reported a failure"
        time.sleep(0.001)


def claim_fault(rank: int) -> None:
    """The state of the fault record while ``rank`` writes its text."""
    struct.pack_into("<I", page(), FAULT_STATE, rank + 1)
