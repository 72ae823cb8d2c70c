"""How the ranks of one node meet: through a store, then through a Unix socket.

1. Every rank says hello in the store (versions, host, process, settings). Rank 0 reads all of them and
   publishes one verdict: the address of its socket, or the error that everybody raises.
2. Every rank connects and hands over its staging segment and a pidfd of itself; rank 0 hands out all
   of them together with the control page (``SCM_RIGHTS``). The socket sits in a 0700 directory that is
   removed as soon as everybody is connected. No shared object has a name.
"""

import array
import contextlib
import json
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringcomm import _core, errors
from ringcomm._version import __version__
from ringcomm.store import Store, get_before

__all__ = ["Endpoints", "boot_id", "rendezvous"]

Message = dict[str, Any]
_LENGTH = struct.Struct("<I")
_MAX_MESSAGE = 64 * 1024
_FDS_PER_MESSAGE = 64  # the kernel takes 253
_POLL_S = 0.05


@dataclass
class Endpoints:
    """Descriptors of a group's shared memory and processes. A context manager that closes them."""

    control_fd: int
    staging_fds: list[int]
    pidfds: list[int]  # -1 where the kernel has no pidfd
    pids: list[int]
    _closed: bool = field(default=False, repr=False)

    def __enter__(self) -> "Endpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._closed:
            self._closed = True
            for fd in {self.control_fd, *self.staging_fds, *self.pidfds} - {-1}:
                os.close(fd)


def boot_id() -> str:
    """Identifies the running kernel, and so the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rendezvous(
    store: Store,
    rank: int,
    world_size: int,
    *,
    prefix: str,
    name: str,
    timeout: float,
    buffer_bytes: int,
) -> Endpoints:
    """Meets the other ranks; collective. Blocks until all have come, at most ``timeout`` seconds.

    Args:
        store: shared by all ranks of this group.
        prefix: keys of this group in the store; unique per group and per restart.
        name: of the group, for messages.
        buffer_bytes: size of one staging buffer, the same on all ranks.

    Raises:
        UsageError: ranks are on several hosts, or disagree on versions or settings.
        DeadlineError: a rank did not come. PeerLostError: one died on the way.
        SystemResourceError: no memory or descriptors. On every rank the same sentence.
    """
    deadline = time.monotonic() + timeout
    staging_fd = _core.create_segment(f"ringcomm-{name}-{rank}", _core.staging_bytes(buffer_bytes))
    pidfd = _own_pidfd()
    try:
        hello = {
            "boot_id": boot_id(),
            "buffer_bytes": buffer_bytes,
            "pid": os.getpid(),
            "protocol": [_core.SHARED_LAYOUT_VERSION, _core.CODEC_FORMAT_VERSION],
            "version": __version__,
            "world_size": world_size,
        }
        store.set(f"{prefix}/hello/{rank}", json.dumps(hello).encode())
        if rank == 0:
            return _Host(store, world_size, prefix, name, deadline, timeout).run(staging_fd, pidfd)
        return _join(store, rank, prefix, name, deadline, timeout, staging_fd, pidfd)
    finally:
        os.close(staging_fd)
        if pidfd >= 0:
            os.close(pidfd)


def _own_pidfd() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):  # kernels and sandboxes without it: /proc is watched instead
        return -1


def _is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


# ---- rank 0 --------------------------------------------------------------------------------------


class _Host:
    def __init__(
        self, store: Store, world_size: int, prefix: str, name: str, deadline: float, timeout: float
    ) -> None:
        self.store = store
        self.world_size = world_size
        self.prefix = prefix
        self.name = name
        self.deadline = deadline
        self.timeout = timeout
        self.token = secrets.token_hex(16)

    def run(self, staging_fd: int, pidfd: int) -> Endpoints:
        try:
            hellos = self._read_hellos()
        except errors.RingcommError as error:
            self._publish({"error": str(error), "class": type(error).__name__, "rank": error.rank})
            raise
        _sweep_stale_directories()
        directory = tempfile.mkdtemp(prefix=f"ringcomm-{os.getuid()}-{os.getpid()}-")
        connections: dict[int, socket.socket] = {}
        control_fd = -1
        received: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                path = os.path.join(directory, "socket")
                listener.bind(path)
                listener.listen(self.world_size)
                self._publish({"path": path, "token": self.token})
                fds = self._accept_all(listener, connections, received, [h["pid"] for h in hellos])
            shutil.rmtree(directory)
            fds[0] = (os.dup(staging_fd), os.dup(pidfd) if pidfd >= 0 else -1)
            received.extend(fd for fd in fds[0] if fd >= 0)
            control_fd = _core.create_segment(
                f"ringcomm-{self.name}-control", _core.control_bytes(self.world_size)
            )
            received.append(control_fd)
            _core.format_control(control_fd, self.world_size)
            endpoints = Endpoints(
                control_fd,
                [fds[rank][0] for rank in range(self.world_size)],
                [fds[rank][1] for rank in range(self.world_size)],
                [hello["pid"] for hello in hellos],
            )
            for connection in connections.values():
                _send_endpoints(connection, endpoints, self.deadline)
            return endpoints
        except BaseException as error:
            verdict: Message = {"error": str(error), "class": "RingcommError", "rank": None}
            if isinstance(error, errors.RingcommError):
                verdict.update({"class": type(error).__name__, "rank": error.rank})
            for connection in connections.values():
                with contextlib.suppress(OSError):
                    _send(connection, verdict)
            for fd in received:
                os.close(fd)
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            for connection in connections.values():
                connection.close()

    def _publish(self, verdict: Message) -> None:
        self.store.set(f"{self.prefix}/verdict", json.dumps(verdict).encode())

    def _read_hellos(self) -> list[Message]:
        hellos: list[Message] = []
        missing: list[int] = []
        for rank in range(self.world_size):
            try:
                # Once the deadline is over, only those that are there already still count.
                hellos.append(
                    json.loads(get_before(self.store, f"{self.prefix}/hello/{rank}", self.deadline))
                )
            except errors.DeadlineError:
                missing.append(rank)
        if missing:
            error = errors.DeadlineError(
                f"set-up of group '{self.name}': rank(s) {missing} of {self.world_size} did not come within "
                f"{self.timeout:g} s; did they start, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?"
            )
            error.rank = missing[0]
            raise error
        for rank, hello in enumerate(hellos):
            for key, advice in (
                ("world_size", "start every rank with the same WORLD_SIZE"),
                ("version", "install the same ringcomm everywhere"),
                ("protocol", "install the same ringcomm everywhere"),
                ("boot_id", _SPANS_HOSTS),
                ("buffer_bytes", "set the same RINGCOMM_STAGING_KIB everywhere"),
            ):
                if hello[key] != hellos[0][key]:
                    raise errors.UsageError(
                        f"set-up of group '{self.name}': rank 0 has {key} {hellos[0][key]!r}, rank {rank} has "
                        f"{hello[key]!r}; {advice}"
                    )
        return hellos

    def _accept_all(
        self,
        listener: socket.socket,
        connections: dict[int, socket.socket],
        received: list[int],
        pids: list[int],
    ) -> dict[int, tuple[int, int]]:
        fds: dict[int, tuple[int, int]] = {}
        lost: errors.RingcommError | None = None
        listener.settimeout(_POLL_S)
        while len(connections) < self.world_size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                absent = [rank for rank in range(1, self.world_size) if rank not in connections]
                dead = [rank for rank in absent if _is_gone(pids[rank])]
                if lost is None and dead:
                    lost = errors.PeerLostError(
                        f"rank {dead[0]} (pid {pids[dead[0]]}) died during the set-up of group '{self.name}'"
                    )
                    lost.rank = dead[0]
                if lost is not None and set(absent) <= set(dead):
                    break
                if time.monotonic() > self.deadline:
                    late = errors.DeadlineError(
                        f"set-up of group '{self.name}': rank(s) {absent} did not connect within {self.timeout:g} s"
                    )
                    late.rank = absent[0]
                    raise late from None
                continue
            guest = self._admit(connection, received)
            if guest is None or guest[0] in connections:
                connection.close()
                continue
            rank, staging_fd, pidfd = guest
            connections[rank] = connection
            fds[rank] = (staging_fd, pidfd)
        if lost is not None:
            raise lost
        return fds

    def _admit(self, connection: socket.socket, received: list[int]) -> tuple[int, int, int] | None:
        """Returns (rank, staging fd, pidfd) of a member of this group, None for a stranger."""
        connection.settimeout(max(1.0, self.deadline - time.monotonic()))
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            return None
        try:
            message, fds = _receive(connection)
        except (OSError, errors.WireError, ValueError):
            return None
        received.extend(fds)
        rank = message.get("rank")
        if not secrets.compare_digest(str(message.get("token")), self.token) or not fds:
            # A process of an earlier run that found the same store.
            with contextlib.suppress(OSError):
                _send(
                    connection,
                    {
                        "error": f"this is not the group '{self.name}' that you are looking for: the store holds "
                        "an address of another run. Use a fresh store or prefix per run.",
                        "class": "UsageError",
                        "rank": None,
                    },
                )
            return None
        if not isinstance(rank, int) or not 0 < rank < self.world_size:
            return None
        return rank, fds[0], fds[1] if len(fds) > 1 else -1


_SPANS_HOSTS = (
    "a ringcomm communicator lives inside one host. Across hosts use a torch process group (gloo, nccl, mpi) "
    "and ringcomm.attach(model, transport='torch')"
)


# ---- the other ranks -----------------------------------------------------------------------------


def _join(
    store: Store,
    rank: int,
    prefix: str,
    name: str,
    deadline: float,
    timeout: float,
    staging_fd: int,
    pidfd: int,
) -> Endpoints:
    try:
        # Rank 0 reports missing ranks at its own deadline, which may have begun a little later.
        verdict = json.loads(get_before(store, f"{prefix}/verdict", deadline + 2.0))
    except errors.DeadlineError:
        error = errors.DeadlineError(
            f"set-up of group '{name}': rank {rank} heard nothing from rank 0 within {timeout:g} s; did rank 0 "
            "start, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?"
        )
        error.rank = 0
        raise error from None
    _raise_if_error(verdict)
    path = verdict["path"]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(1.0, deadline + 2.0 - time.monotonic()))
            connection.connect(path)
            _send(
                connection,
                {"rank": rank, "token": verdict["token"]},
                [staging_fd] + ([pidfd] if pidfd >= 0 else []),
            )
            return _receive_endpoints(connection)
    except (OSError, errors.WireError) as problem:
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)  # rank 0 cannot any more
        lost = errors.PeerLostError(f"rank 0 died during the set-up of group '{name}' ({problem})")
        lost.rank = 0
        raise lost from problem


def _raise_if_error(message: Message) -> None:
    if "error" not in message:
        return
    error: errors.RingcommError = getattr(errors, message["class"])(message["error"])
    error.rank = message["rank"]
    raise error


# ---- messages: 4 bytes length, JSON; descriptors ride along --------------------------------------


def _send(connection: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(body)) + body], fds or [])


def _receive(connection: socket.socket) -> tuple[Message, list[int]]:
    fds = array.array("i")
    space = socket.CMSG_SPACE(_FDS_PER_MESSAGE * fds.itemsize)
    data, ancillary, _, _ = connection.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
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
    return message, list(fds)


def _read_some(connection: socket.socket, num_bytes: int) -> bytes:
    piece = connection.recv(num_bytes)
    if not piece:
        raise errors.WireError("the connection ended")
    return piece


def _send_endpoints(connection: socket.socket, endpoints: Endpoints, deadline: float) -> None:
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
            _send(
                connection,
                {"pids": endpoints.pids, "has_pidfd": has_pidfd, "num_fds": len(fds)},
                fds[first : first + _FDS_PER_MESSAGE],
            )


def _receive_endpoints(connection: socket.socket) -> Endpoints:
    fds: list[int] = []
    while True:
        message, more = _receive(connection)
        _raise_if_error(message)
        fds += more
        if len(fds) >= message["num_fds"]:
            break
    world_size = len(message["pids"])
    pidfds = iter(fds[1 + world_size :])
    return Endpoints(
        fds[0],
        fds[1 : 1 + world_size],
        [next(pidfds) if has else -1 for has in message["has_pidfd"]],
        message["pids"],
    )


def _sweep_stale_directories() -> None:
    """Removes set-up directories whose owner was killed before it could."""
    for directory in Path(tempfile.gettempdir()).glob(f"ringcomm-{os.getuid()}-*"):
        pid = directory.name.split("-")[2]
        if pid.isdigit() and _is_gone(int(pid)):
            shutil.rmtree(directory, ignore_errors=True)
