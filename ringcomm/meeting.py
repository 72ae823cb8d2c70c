"""How ranks that share a communicator already meet once more: over a store, or to hand out descriptors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ringcomm.errors import SystemResourceError
from ringcomm.rendezvous import rendezvous
from ringcomm.store import TCPStore

__all__ = ["descriptors_among", "store_among"]


@contextmanager
def store_among(comm: Any, members: list[int], what: str) -> Iterator[TCPStore | None]:
    """A store that the first of ``members`` serves to the others; collective over ``comm``.

    Args:
        comm: The communicator through which the address travels.
        members: Ranks of it that meet, this one's among them (or none at all, to take part in the
            call only). Disjoint sets may meet at once.
        what: For errors and tags, at most 17 bytes.

    Yields:
        The store; None for less than two members. It ends with the context, which nobody may leave
        before all members have met.

    Raises:
        SystemResourceError: the first member cannot open a socket. Else as any collective.
    """
    server, port = None, 0
    try:
        if members[:1] == [comm.rank] and len(members) > 1:
            try:
                server = TCPStore(is_server=True, timeout=comm.timeout)
                port = server.port
            except (OSError, RuntimeError):  # the others must not wait for it
                port = -1
        ports = comm._gather(np.array([port]), f"{what} ports")
        if len(members) < 2:
            yield None
            return
        port = int(ports[members[0], 0])
        if port < 0:
            raise SystemResourceError(
                f"{what}: rank {members[0]} of group '{comm.name}' cannot open a socket on 127.0.0.1"
            )
        if server is not None:
            yield server
            return
        client = TCPStore(port=port, is_server=False, timeout=comm.timeout)
        try:
            yield client
        finally:
            client.close()
    finally:
        if server is not None:
            server.close()


@contextmanager
def descriptors_among(comm: Any, fd: int, num_bytes: int, what: str) -> Iterator[list[int]]:
    """The descriptors that all ranks of ``comm`` brought, by rank; collective.

    Args:
        comm: The communicator.
        fd: This rank's; borrowed.
        num_bytes: Of what the descriptors stand for, the same on all ranks.
        what: For errors and tags, at most 17 bytes.

    Yields:
        Descriptors of this process, which end with the context.

    Raises:
        SystemResourceError: no sockets or descriptors. Else as any collective.
    """
    with (
        store_among(comm, list(range(comm.world_size)), what) as store,
        rendezvous(
            store,
            comm.rank,
            comm.world_size,
            prefix=what,
            name=comm.name,
            timeout=comm.timeout,
            buffer_bytes=num_bytes,
            segment_fd=fd,
        ) as endpoints,
    ):
        yield endpoints.staging_fds
