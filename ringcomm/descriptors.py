"""Descriptors of shared memory and processes, and how they travel from rank to rank.

A message is 4 bytes of length and a JSON object; descriptors ride along (``SCM_RIGHTS``). What comes
from the other side is bounded before it is read, and its descriptors are closed if it is refused.
"""

import array
import contextlib
import json
import os
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from ringcomm import errors

__all__ = [
    "Endpoints",
    "Message",
    "raise_if_error",
    "receive",
    "receive_endpoints",
    "send",
    "send_endpoints",
]

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE = 64 * 1024
_FDS_PER_MESSAGE = 64  # the kernel takes 253


@dataclass
class Endpoints:
    """A group's shared memory, processes and settings. A context manager that closes descriptors."""

    control_fd: int
    staging_fds: list[int]
    pidfds: list[int]  # -1 where the kernel has no pidfd
    pids: list[int]
    global_ranks: list[int] = field(default_factory=list)  # in the job, of every rank
    limits: list[tuple[int, int]] = field(default_factory=list)  # rank 0's, see ringcomm.tuning
    _closed: bool = field(default=False, repr=False)

    def __enter__(self) -> "Endpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._closed:
            self._closed = True
            for fd in {self.control_fd, *self.staging_fds, *self.pidfds} - {-1}:
                os.close(fd)


def raise_if_error(message: Message) -> None:
    """Raises the error that a message carries, if any: the same class, sentence and rank."""
    if "error" not in message:
        return
    error: errors.RingcommError = getattr(errors, message["class"])(message["error"])
    error.rank = message["rank"]
    raise error


def send(connection: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """Sends a message and copies of ``fds``, at most 64."""
    body = json.dumps(message).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(body)) + body], fds or [])


def receive(connection: socket.socket) -> tuple[Message, list[int]]:
    """The next message and its descriptors, which are the caller's to close."""
    space = socket.CMSG_SPACE(_FDS_PER_MESSAGE * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        if flags & socket.MSG_CTRUNC:
            raise errors.SystemResourceError(
                "descriptors of shared memory got lost: this process may not open more files (ulimit -n)"
            )
        while len(data) < _LENGTH.size:
            data += _read_some(connection, _LENGTH.size - len(data))
        (length,) = _LENGTH.unpack(data)
        if length > _MAX_MESSAGE:
            raise errors.WireError(f"a set-up message claims {length} bytes")
        body = b""
        while len(body) < length:
            body += _read_some(connection, length - len(body))
        message = json.loads(body)
        if not isinstance(message, dict):
            raise errors.WireError("a set-up message is not an object")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, list(fds)


def _read_some(connection: socket.socket, num_bytes: int) -> bytes:
    piece = connection.recv(num_bytes)
    if not piece:
        raise errors.WireError("the connection ended")
    return piece


def send_endpoints(connection: socket.socket, endpoints: Endpoints, deadline: float) -> None:
    """Sends all of ``endpoints``, in as many messages as their number takes."""
    connection.settimeout(max(1.0, deadline - time.monotonic()))
    has_pidfd = [fd >= 0 for fd in endpoints.pidfds]
    fds = [
        endpoints.control_fd,
        *endpoints.staging_fds,
        *(fd for fd in endpoints.pidfds if fd >= 0),
    ]
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # it died: its pidfd tells everyone
        for first in range(0, len(fds), _FDS_PER_MESSAGE):
            message = {
                "pids": endpoints.pids,
                "has_pidfd": has_pidfd,
                "num_fds": len(fds),
                "global_ranks": endpoints.global_ranks,
                "limits": endpoints.limits,
            }
            send(connection, message, fds[first : first + _FDS_PER_MESSAGE])


def receive_endpoints(connection: socket.socket) -> Endpoints:
    """What the other side's :func:`send_endpoints` sent, or the error that it sent instead."""
    fds: list[int] = []
    try:
        while True:
            message, more = receive(connection)
            fds += more
            raise_if_error(message)
            if len(fds) >= message["num_fds"]:
                break
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    world_size = len(message["pids"])
    pidfds = iter(fds[1 + world_size :])
    return Endpoints(
        fds[0],
        fds[1 : 1 + world_size],
        [next(pidfds) if has else -1 for has in message["has_pidfd"]],
        message["pids"],
        message["global_ranks"],
        [(op, limit) for op, limit in message["limits"]],
    )
