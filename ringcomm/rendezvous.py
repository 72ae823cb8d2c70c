"""How the ranks of one node meet: through a store, then through a Unix socket.

1. Every rank says hello in the store (versions, host, process, settings, a nonce). Rank 0 reads all of
   them and publishes one verdict: the address of its socket, or the error that everybody raises. The
   verdict repeats the nonces, so nobody acts on one that an earlier run left in the store.
2. Every rank connects and hands over its staging segment and a pidfd of itself; rank 0 hands out all
   of them together with the control page (``SCM_RIGHTS``). The socket sits in a 0700 directory that is
   removed as soon as everybody is connected. No shared object has a name.

Until pidfds have been exchanged, /proc tells whether a process that said hello is still there.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from pathlib import Path

from ringcomm import _core, errors
from ringcomm._version import __version__
from ringcomm.descriptors import (
    Endpoints,
    Message,
    raise_if_error,
    receive,
    receive_endpoints,
    send,
    send_endpoints,
)
from ringcomm.store import Store, TCPStore, get_before
from ringcomm.tuning import Limits

__all__ = ["boot_id", "rendezvous"]

_POLL_S = 0.05
_STORE_SLICE_S = 0.1  # longest wait in the store between two looks at the other processes
_STALE_GRACE_S = 0.3  # for the successor of a dead process whose hello was there before we came
_ACKNOWLEDGE_S = 1.0  # rank 0 serves its store this long for ranks that have not read its error


def boot_id() -> str:
    """Identifies the running kernel, and so the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rendezvous(
    store: Store | None,
    rank: int,
    world_size: int,
    *,
    prefix: str,
    name: str,
    timeout: float,
    buffer_bytes: int,
    first_seq: int = 0,
    segment_fd: int | None = None,
    global_rank: int | None = None,
    limits: Limits | None = None,
) -> Endpoints:
    """Meets the other ranks; collective. Blocks until all have come, at most ``timeout`` seconds.

    Args:
        store: shared by all ranks of this group; None for a single rank.
        prefix: keys of this group in the store; unique per group and per restart.
        name: of the group, for messages.
        buffer_bytes: size of one staging buffer, the same on all ranks.
        segment_fd: what this rank shares instead of a staging segment, of ``buffer_bytes``; borrowed.
        first_seq: where the group's wrapping counters start, the same on all ranks; for tests.
        global_rank: this process's rank in the job, for people; None: as in the group.
        limits: rank 0's measured limits, for all ranks.

    Raises:
        UsageError: ranks are on several hosts, or disagree on versions or settings.
        DeadlineError: a rank did not come. PeerLostError: one died on the way.
        SystemResourceError: no memory or descriptors. On every rank the same sentence.
    """
    meeting = _Meeting(store, rank, world_size, prefix, name, timeout, buffer_bytes, first_seq)
    meeting.hello["global_rank"] = rank if global_rank is None else global_rank
    with contextlib.ExitStack() as cleanup:
        try:
            if segment_fd is None:
                segment_fd = _core.create_segment(
                    f"ringcomm-{name}-{rank}", _core.staging_bytes(buffer_bytes, world_size)
                )
                cleanup.callback(os.close, segment_fd)
                _core.format_staging(segment_fd, buffer_bytes, world_size, first_seq)
        except errors.RingcommError as problem:
            # The others must not wait for a rank that cannot come.
            error = type(problem)(f"rank {rank}: {problem}")
            error.rank = rank
            meeting.hello |= {"error": str(error), "class": type(error).__name__}
            meeting.say_hello()
            if rank == 0:
                _Host(meeting).tell(error)
            raise error from problem
        pidfd = _own_pidfd()
        if pidfd >= 0:
            cleanup.callback(os.close, pidfd)
        meeting.say_hello()
        if rank == 0:
            return _Host(meeting, limits).run(segment_fd, pidfd)
        return _Guest(meeting).run(segment_fd, pidfd)


class _Meeting:
    """What one rank knows about the group while it forms."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        prefix: str,
        name: str,
        timeout: float,
        buffer_bytes: int,
        first_seq: int,
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.prefix = prefix
        self.name = name
        self.timeout = timeout
        self.buffer_bytes = buffer_bytes
        self.first_seq = first_seq
        self.start = time.monotonic()
        self.deadline = self.start + timeout
        self.hello: Message = {
            "boot_id": boot_id(),
            "buffer_bytes": buffer_bytes,
            "nonce": secrets.token_hex(8),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "process_start": _process_start(os.getpid()),
            "protocol": [_core.SHARED_LAYOUT_VERSION, _core.CODEC_FORMAT_VERSION],
            "time": self.start,  # CLOCK_MONOTONIC: one clock for all processes of the host
            "version": __version__,
            "world_size": world_size,
        }

    def key(self, kind: str, rank: int | None = None) -> str:
        return f"{self.prefix}/{kind}" + ("" if rank is None else f"/{rank}")

    def say_hello(self) -> None:
        if self.store is not None:
            self.store.set(self.key("hello", self.rank), json.dumps(self.hello).encode())

    def read(self, kind: str, rank: int | None = None, seconds: float = 0.0) -> Message | None:
        """What is under a key of the store; None if nobody has set it within ``seconds``."""
        assert self.store is not None
        try:
            value = get_before(self.store, self.key(kind, rank), time.monotonic() + seconds)
        except errors.DeadlineError:
            return None
        message = json.loads(value)
        return message if isinstance(message, dict) else None

    def is_lost(self, hello: Message) -> bool:
        """Whether the process that said this hello is gone, and nobody will say it again for it."""
        if hello["pid_namespace"] != self.hello["pid_namespace"] or not _is_gone(hello):
            return False
        before_us = hello["time"] < self.start
        return not before_us or time.monotonic() > self.start + _STALE_GRACE_S

    def lost(self, rank: int, hello: Message | None) -> errors.PeerLostError:
        """The error about a process that is gone; the same sentence on every rank."""
        pid = f" (pid {hello['pid']})" if hello else ""
        error = errors.PeerLostError(
            f"rank {rank}{pid} of group '{self.name}' died before its first collective. The communicator is lost: "
            "close it and init() a new one, with a fresh store if this one served an earlier run."
        )
        error.rank = rank
        return error

    def late(self, ranks: list[int], what: str) -> errors.DeadlineError:
        error = errors.DeadlineError(f"set-up of group '{self.name}': {what}")
        error.rank = ranks[0]
        return error


def _own_pidfd() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):  # kernels and sandboxes without it: /proc is watched instead
        return -1


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the third (the state) on; None if there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _process_start(pid: int) -> int:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0


def _is_gone(hello: Message) -> bool:
    fields = _stat_fields(hello["pid"])
    return fields is None or fields[0] in "ZX" or int(fields[19]) != hello["process_start"]


# ---- rank 0 --------------------------------------------------------------------------------------


class _Host:
    def __init__(self, meeting: _Meeting, limits: Limits | None = None) -> None:
        self.meeting = meeting
        self.limits = limits or []
        self.token = secrets.token_hex(16)
        self.hellos: dict[int, Message] = {0: meeting.hello}
        self.connections: dict[int, socket.socket] = {}
        self.received: list[int] = []  # descriptors that are ours to close

    def run(self, staging_fd: int, pidfd: int) -> Endpoints:
        try:
            fds = self._meet() if self.meeting.world_size > 1 else {}
            fds[0] = (self._own(os.dup(staging_fd)), self._own(os.dup(pidfd)) if pidfd >= 0 else -1)
            endpoints = self._endpoints(fds)
            for connection in self.connections.values():
                send_endpoints(connection, endpoints, self.meeting.deadline)
            return endpoints
        except BaseException as error:
            self.tell(error)
            for fd in self.received:
                os.close(fd)
            raise
        finally:
            for connection in self.connections.values():
                connection.close()

    def _own(self, fd: int) -> int:
        self.received.append(fd)
        return fd

    def _endpoints(self, fds: dict[int, tuple[int, int]]) -> Endpoints:
        ranks = range(self.meeting.world_size)
        control_fd = self._own(
            _core.create_segment(
                f"ringcomm-{self.meeting.name}-control",
                _core.control_bytes(self.meeting.world_size),
            )
        )
        _core.format_control(control_fd, self.meeting.world_size, self.meeting.first_seq)
        global_ranks = [self.hellos[rank]["global_rank"] for rank in ranks]
        return Endpoints(
            control_fd,
            [fds[rank][0] for rank in ranks],
            [fds[rank][1] for rank in ranks],
            [self.hellos[rank]["pid"] for rank in ranks],
            global_ranks if len({*global_ranks}) == len(ranks) else list(ranks),
            self.limits,
        )

    def _meet(self) -> dict[int, tuple[int, int]]:
        self._read_hellos()
        _sweep_stale_directories()
        try:
            directory = tempfile.mkdtemp(prefix=f"ringcomm-{os.getuid()}-{os.getpid()}-")
        except OSError as error:
            raise errors.SystemResourceError(
                f"rank 0 cannot make a directory for its socket ({error}); set TMPDIR to a writable directory"
            ) from error
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # alive, says it to those who sweep
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                path = os.path.join(directory, "socket")
                try:
                    listener.bind(path)
                except OSError as error:
                    raise errors.SystemResourceError(
                        f"rank 0 cannot listen on {path} ({error}); set TMPDIR to a short path of a local directory"
                    ) from error
                listener.listen(self.meeting.world_size)
                address = {"path": path, "token": self.token}
                self._publish(address)
                return self._accept_all(listener, address)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def _publish(self, verdict: Message) -> None:
        assert self.meeting.store is not None
        nonces = {str(rank): hello["nonce"] for rank, hello in self.hellos.items()}
        self.meeting.store.set(
            self.meeting.key("verdict"), json.dumps(verdict | {"nonces": nonces}).encode()
        )

    def tell(self, error: BaseException) -> None:
        """Makes everybody raise what rank 0 raises."""
        verdict: Message = {"error": str(error), "class": "RingcommError", "rank": None}
        if isinstance(error, errors.RingcommError):
            verdict |= {"class": type(error).__name__, "rank": error.rank}
        else:
            verdict["error"] = (
                f"rank 0 failed in the set-up of group '{self.meeting.name}': {error!r}"
            )
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                send(connection, verdict)
        store = self.meeting.store
        if store is None or self.meeting.world_size == 1:
            return
        with contextlib.suppress(Exception):
            self._publish(verdict)
            if not isinstance(store, TCPStore) or not store.is_server:
                return
            # The store goes when this process goes: let the others read first.
            end = time.monotonic() + _ACKNOWLEDGE_S
            for rank in range(1, self.meeting.world_size):
                hello = self.hellos.get(rank)
                while rank not in self.connections and time.monotonic() < end:
                    seen = self.meeting.read("seen", rank, _POLL_S)
                    if seen and (hello is None or seen["nonce"] == hello["nonce"]):
                        break
                    if hello and _is_gone(hello):
                        break

    def _read_hellos(self) -> None:
        meeting = self.meeting
        while len(self.hellos) < meeting.world_size:
            missing = [rank for rank in range(meeting.world_size) if rank not in self.hellos]
            late = time.monotonic() > meeting.deadline
            for i, rank in enumerate(missing):
                # One is waited for; the others count if they are there already.
                hello = meeting.read("hello", rank, 0.0 if late or i else _STORE_SLICE_S)
                if hello is not None:
                    self._greet(rank, hello)
            missing = [rank for rank in missing if rank not in self.hellos]
            self._check_alive(list(self.hellos))
            if late and missing:
                raise meeting.late(
                    missing,
                    f"rank(s) {missing} of {meeting.world_size} did not come within {meeting.timeout:g} s; did they "
                    "start, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?",
                )

    def _greet(self, rank: int, hello: Message) -> None:
        self.hellos[rank] = hello
        raise_if_error({"rank": rank} | hello)
        ours = self.meeting.hello
        for key, advice in (
            ("world_size", "start every rank with the same WORLD_SIZE"),
            ("version", "install the same ringcomm everywhere"),
            ("protocol", "install the same ringcomm everywhere"),
            ("boot_id", _SPANS_HOSTS),
            ("buffer_bytes", "set the same RINGCOMM_STAGING_KIB everywhere"),
        ):
            if hello.get(key) != ours[key]:
                raise errors.UsageError(
                    f"set-up of group '{self.meeting.name}': rank 0 has {key} {ours[key]!r}, rank {rank} has "
                    f"{hello.get(key)!r}; {advice}"
                )

    def _check_alive(self, ranks: list[int]) -> None:
        for rank in ranks:
            if self.meeting.is_lost(self.hellos[rank]):
                raise self.meeting.lost(rank, self.hellos[rank])

    def _accept_all(self, listener: socket.socket, address: Message) -> dict[int, tuple[int, int]]:
        meeting = self.meeting
        fds: dict[int, tuple[int, int]] = {}
        listener.settimeout(_POLL_S)
        while len(self.connections) < meeting.world_size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                absent = [r for r in range(1, meeting.world_size) if r not in self.connections]
                self._look_for_successors(absent, address)
                self._check_alive(absent)
                if time.monotonic() > meeting.deadline:
                    raise meeting.late(
                        absent, f"rank(s) {absent} did not connect within {meeting.timeout:g} s"
                    ) from None
                continue
            guest = self._admit(connection)
            if guest is None or guest[0] in self.connections:
                connection.close()
                continue
            rank, staging_fd, pidfd = guest
            self.connections[rank] = connection
            fds[rank] = (staging_fd, pidfd)
        return fds

    def _look_for_successors(self, absent: list[int], address: Message) -> None:
        """Takes new hellos of ranks whose hello was left over from an earlier run."""
        changed = False
        for rank in absent:
            hello = self.meeting.read("hello", rank)
            if hello is not None and hello["nonce"] != self.hellos[rank]["nonce"]:
                self._greet(rank, hello)
                changed = True
        if changed:
            self._publish(address)

    def _admit(self, connection: socket.socket) -> tuple[int, int, int] | None:
        """Returns (rank, staging fd, pidfd) of a member of this group, None for a stranger."""
        connection.settimeout(max(1.0, self.meeting.deadline - time.monotonic()))
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            return None
        try:
            message, fds = receive(connection)
        except errors.SystemResourceError:
            raise
        except (OSError, errors.WireError, ValueError):
            return None
        self.received.extend(fds)
        rank = message.get("rank")
        if not secrets.compare_digest(str(message.get("token")), self.token) or not fds:
            return None
        if not isinstance(rank, int) or not 0 < rank < self.meeting.world_size:
            return None
        return rank, fds[0], fds[1] if len(fds) > 1 else -1


_SPANS_HOSTS = (
    "a ringcomm communicator lives inside one host. Across hosts use a torch process group, as of "
    "dist.init_process_group('cpu:gloo') or nccl, and ringcomm.attach(model, transport='torch')"
)


# ---- the other ranks -----------------------------------------------------------------------------


class _Guest:
    def __init__(self, meeting: _Meeting) -> None:
        self.meeting = meeting
        self.host: Message | None = None  # rank 0's hello

    def run(self, staging_fd: int, pidfd: int) -> Endpoints:
        try:
            while True:
                verdict = self._wait_for_verdict()
                self._acknowledge_error(verdict)
                endpoints = self._connect(verdict, staging_fd, pidfd)
                if endpoints is not None:
                    return endpoints
                # Rank 0 has died, or is about to say why it went away.
                if self.host is not None and self.meeting.is_lost(self.host):
                    raise self.meeting.lost(0, self.host)
                time.sleep(_POLL_S)
        except errors.PeerLostError as error:
            if error.rank == 0:  # it cannot tidy up any more
                _sweep_stale_directories()
                raise self.meeting.lost(0, self.host) from error
            raise

    def _wait_for_verdict(self) -> Message:
        meeting = self.meeting
        # Rank 0 reports missing ranks at its own deadline, which may have begun a little later.
        while time.monotonic() < meeting.deadline + 2.0:
            kind, rank = ("hello", 0) if self.host is None else ("verdict", None)
            message = meeting.read(kind, rank, _STORE_SLICE_S)
            if self.host is None:
                self.host = message
                continue
            if message is not None:
                if message["nonces"].get(str(meeting.rank)) == meeting.hello["nonce"]:
                    return message
                # Of an earlier run, or rank 0 has not seen us yet; an error holds for us all the same.
                self.host = meeting.read("hello", 0) or self.host
                of_this_host = message["nonces"].get("0") == self.host["nonce"]
                if "error" in message and of_this_host and not _is_gone(self.host):
                    return message
                time.sleep(_POLL_S)
            if meeting.is_lost(self.host):
                raise meeting.lost(0, self.host)
        raise meeting.late(
            [0],
            f"rank {meeting.rank} heard nothing from rank 0 within {meeting.timeout:g} s; did rank 0 start, with the "
            "same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and a store that no other run uses?",
        )

    def _acknowledge_error(self, verdict: Message) -> None:
        if "error" not in verdict:
            return
        assert self.meeting.store is not None
        with contextlib.suppress(Exception):
            seen = json.dumps({"nonce": self.meeting.hello["nonce"]}).encode()
            self.meeting.store.set(self.meeting.key("seen", self.meeting.rank), seen)
        raise_if_error(verdict)

    def _connect(self, verdict: Message, staging_fd: int, pidfd: int) -> Endpoints | None:
        meeting = self.meeting
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(max(1.0, meeting.deadline + 2.0 - time.monotonic()))
                connection.connect(verdict["path"])
                send(
                    connection,
                    {"rank": meeting.rank, "token": verdict["token"]},
                    [staging_fd] + ([pidfd] if pidfd >= 0 else []),
                )
                return receive_endpoints(connection)
        except errors.WireError:
            return None
        except errors.RingcommError:
            raise  # what rank 0 raised, or no more descriptors here
        except TimeoutError:
            raise meeting.late(
                [0], f"rank 0 did not answer within {meeting.timeout:g} s; is it stopped?"
            ) from None
        except OSError:
            return None


def _sweep_stale_directories() -> None:
    """Removes set-up directories whose owner was killed before it could."""
    for directory in Path(tempfile.gettempdir()).glob(f"ringcomm-{os.getuid()}-*"):
        pid = directory.name.split("-")[2]
        fields = _stat_fields(int(pid)) if pid.isdigit() else ["?"]
        if fields is not None and fields[0] not in "ZX":
            continue
        with contextlib.suppress(OSError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # Held by an owner that lives in another PID namespace.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
