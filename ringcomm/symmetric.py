"""Arrays that all ranks of a communicator map: collectives read and write them where they are."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays import from_buffer, from_device_memory, item_bytes
from ringcomm.device import SIMT, device_name
from ringcomm.errors import SystemResourceError, UsageError
from ringcomm.meeting import descriptors_among

__all__ = ["allocate"]

_LEAST_DEVICE_BYTES = 16


def allocate(comm: Any, shape: int | Sequence[int], dtype: Any, device: Any) -> Any:
    """See :meth:`ringcomm.comm.Communicator.empty`."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        raise UsageError(f"shape: {shape!r}, expected whole numbers >= 0")
    num_bytes = math.prod(sizes) * item_bytes(dtype)
    name = device_name(device)
    if name is not None:
        return _on_device(comm, name, num_bytes, dtype, sizes)
    if comm.device == SIMT:
        raise UsageError(
            "empty: without a device it makes arrays of the host, and this communicator's are the emulated GPU's"
        )
    return _on_host(comm, num_bytes, dtype, sizes)


def _on_device(comm: Any, name: str, num_bytes: int, dtype: Any, sizes: Sequence[int]) -> Any:
    comm.use_device(name)
    region = comm._devices.allocate(
        max(num_bytes, _LEAST_DEVICE_BYTES), lambda wanted: _same_size(comm, wanted)
    )
    return from_device_memory(region, region.address, num_bytes, name, dtype, sizes)


def _on_host(comm: Any, num_bytes: int, dtype: Any, sizes: Sequence[int]) -> Any:
    fd, problem = -1, None
    try:
        if num_bytes > 0:
            fd = _core.create_segment(f"ringcomm-{comm.name}-array", num_bytes)
    except SystemResourceError as error:
        problem = error
    try:
        wanted = comm.all_gather(np.array([num_bytes, problem is not None]), tag="empty")
        _agree(comm, wanted, problem)
        region = _map(comm, fd, num_bytes) if num_bytes > 0 else bytearray()
    finally:
        if fd >= 0:
            os.close(fd)
    return from_buffer(region, dtype, sizes)


def _agree(comm: Any, wanted: Any, problem: SystemResourceError | None) -> None:
    """Raises on every rank what keeps one of them from having its segment."""
    if problem is not None:
        raise SystemResourceError(f"rank {comm.rank}: {problem}") from problem
    for rank, (num_bytes, failed) in enumerate(wanted.tolist()):
        if failed:
            error = SystemResourceError(
                f"empty: rank {rank} of group '{comm.name}' could not allocate {num_bytes} bytes of shared memory"
            )
            error.rank = rank
            raise error
    _same_size(comm, wanted[:, 0].tolist())


def _same_size(comm: Any, wanted: list[int]) -> None:
    for rank, num_bytes in enumerate(wanted):
        if num_bytes != wanted[0]:
            raise UsageError(
                f"empty: rank 0 of group '{comm.name}' asks for {wanted[0]} bytes, rank {rank} for {num_bytes}; "
                "every rank must ask for the same shape and dtype"
            )


def _map(comm: Any, fd: int, num_bytes: int) -> Any:
    with descriptors_among(comm, fd, num_bytes, "empty") as fds:
        return comm._core.map_symmetric(num_bytes, fds)
