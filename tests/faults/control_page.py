"""A look into what a group shares, and a way to damage it. Offsets: csrc/wire/shared_layout.h."""

import mmap
import os
import struct
import time
from typing import Any

from ringcomm import Communicator, _core, bootstrap, comm

FAULT_STATE = 64
RANKS = 1088
RANK_BYTES = 192
ENTERED_SEQ = 72

_pages: dict[int, mmap.mmap] = {}  # by process
_slabs: dict[int, list[mmap.mmap]] = {}  # by process, then by rank
_wanted: set[int] = set()  # processes that want the slabs of their next communicator
_original = comm.rendezvous


def _keep_page(*args: Any, **kwargs: Any) -> Any:
    endpoints = _original(*args, **kwargs)
    _pages[os.getpid()] = _map(endpoints.control_fd)
    if (
        os.getpid() in _wanted
    ):  # a descriptor each, so only for the communicator that they are wanted of
        _wanted.remove(os.getpid())
        _slabs[os.getpid()] = [_map(fd) for fd in endpoints.staging_fds]
    return endpoints


def _map(fd: int) -> mmap.mmap:
    copy = os.dup(fd)
    try:
        return mmap.mmap(copy, os.fstat(copy).st_size)
    finally:
        os.close(copy)


def keep_pages(slabs: bool = False) -> None:
    """From now on :func:`page` finds the page of this process's newest communicator.

    ``slabs``: :func:`wait_until_inside` finds the staging slabs of its next one.
    """
    comm.rendezvous = _keep_page
    if slabs:
        _wanted.add(os.getpid())


def page() -> mmap.mmap:
    return _pages[os.getpid()]


def entered_seq(rank: int) -> int:
    return int(struct.unpack_from("<I", page(), RANKS + RANK_BYTES * rank + ENTERED_SEQ)[0])


def step(rank: int) -> int:
    """How far ``rank`` has come inside staged collectives."""
    return int(struct.unpack_from("<I", page(), RANKS + RANK_BYTES * rank)[0])


def wait_until_entered(comm: Communicator, rank: int, seq: int, seconds: float = 20) -> None:
    """Returns once ``rank`` is inside collective number ``seq``."""
    until = time.monotonic() + seconds
    while entered_seq(rank) != seq:
        assert time.monotonic() < until, f"rank {rank} never entered #{seq}"
        time.sleep(0.001)


def wait_until_inside(comm: Communicator, rank: int, seq: int, seconds: float = 20) -> None:
    """Returns once ``rank`` is inside collective number ``seq``, or sleeps until a message comes."""
    table = _core.shared_layout(comm.world_size, bootstrap._buffer_bytes())
    until = time.monotonic() + seconds
    while entered_seq(rank) != seq and not _slabs[os.getpid()][rank][table["doorbell"]]:
        assert time.monotonic() < until, f"rank {rank} waits for nothing"
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
