"""A tiny key-value store for the torch-free path: rank 0 serves, the others connect.

Only a few hundred bytes per rank travel here, once, at set-up. Anything with ``set(key, value)`` and
a blocking ``get(key)`` does the same job: torch's ``TCPStore``, ``FileStore`` and ``HashStore`` are
accepted wherever a store is.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from typing import Any, Protocol, runtime_checkable

from ringcomm.errors import (
    DeadlineError,
    PeerLostError,
    SystemResourceError,
    UsageError,
    WireError,
)

__all__ = ["Store", "TCPStore", "get_before", "shared_store"]

_SET, _GET = 1, 2
_HEADER = struct.Struct("<BIId")  # verb, key bytes, value bytes, seconds to wait
_MAX_KEY = 1024
_MAX_VALUE = 64 * 1024


@runtime_checkable
class Store(Protocol):
    """What rendezvous needs of a store."""

    def set(self, key: str, value: bytes) -> Any:
        """Stores ``value`` under ``key``, replacing what was there."""

    def get(self, key: str) -> bytes:
        """Returns the value of ``key``; blocks until somebody has set it."""


def get_before(store: Store, key: str, deadline: float) -> bytes:
    """Returns ``store.get(key)``, waiting until ``time.monotonic()`` reaches ``deadline``.

    Raises:
        DeadlineError: nobody set the key in time.
    """
    left = max(0.0, deadline - time.monotonic())
    if isinstance(store, TCPStore):
        return store.get(key, timeout=left)
    wait = getattr(store, "wait", None)
    if wait is not None:  # torch stores
        from datetime import timedelta

        try:
            wait([key], timedelta(seconds=max(left, 0.001)))
        except RuntimeError as error:
            raise DeadlineError(f"no value for {key!r} in the store within the deadline") from error
    return bytes(store.get(key))


class TCPStore:
    """A store on ``host:port``, served by a daemon thread of the process that has ``is_server``.

    Args:
        host: address; binds exactly this one, so the default loopback is not reachable from outside.
        port: TCP port; 0 lets the system choose (server only, see :attr:`port`).
        is_server: exactly one process serves.
        timeout: seconds that a client waits for the server to come up, and the default of ``get``.

    Raises:
        UsageError: the port is taken (server).
        DeadlineError: no server answers (client).
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, is_server: bool, timeout: float = 300.0
    ) -> None:
        self.host = host
        self.timeout = timeout
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._listener: socket.socket | None = None
        self._pid = os.getpid()
        self._was_up = False  # client: the server has answered before
        if is_server:
            self._listener = _listen(host, port)
            port = self._listener.getsockname()[1]
            threading.Thread(target=self._serve, name="ringcomm-store", daemon=True).start()
        self.port = port

    def set(self, key: str, value: bytes) -> None:
        """Stores ``value`` (at most 64 KiB) under ``key``."""
        if len(key.encode()) > _MAX_KEY or len(value) > _MAX_VALUE:
            raise UsageError(f"a key has at most {_MAX_KEY} bytes and a value {_MAX_VALUE}")
        if self._listener is not None:
            self._put(key, bytes(value))
        else:
            self._request(_SET, key, value, self.timeout)

    def get(self, key: str, timeout: float | None = None) -> bytes:
        """Returns the value of ``key``; blocks until it is set, at most ``timeout`` seconds.

        Raises:
            DeadlineError: nobody set it in time. PeerLostError: the server is gone.
        """
        seconds = self.timeout if timeout is None else timeout
        if self._listener is not None:
            value = self._wait_for(key, seconds)
        else:
            value = self._request(_GET, key, b"", seconds)
        if value is None:
            raise DeadlineError(f"no value for {key!r} in the store within {seconds:g} s")
        return value

    def close(self) -> None:
        """Stops serving. Idempotent."""
        if self._listener is not None:
            if self._pid == os.getpid():  # in a forked child this would stop the parent's
                with contextlib.suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); close() does not
            self._listener.close()

    @property
    def is_server(self) -> bool:
        """Whether this process serves the store."""
        return self._listener is not None

    # -- server --

    def _put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def _wait_for(self, key: str, seconds: float) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, seconds)
            return self._values.get(key)

    def _serve(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        # A stranger's bytes can at worst end this one connection.
        with connection, contextlib.suppress(OSError, WireError, UnicodeDecodeError):
            verb, key, value, seconds = _receive(connection)
            if verb == _SET:
                self._put(key, value)
                found: bytes | None = b""
            else:
                found = self._wait_for(key, min(seconds, 24 * 3600.0))
            connection.sendall(
                struct.pack("<i", -1 if found is None else len(found)) + (found or b"")
            )

    # -- client --

    def _request(self, verb: int, key: str, value: bytes, seconds: float) -> bytes | None:
        deadline = time.monotonic() + max(seconds, 0.05)
        try:
            connection = _connect(self.host, self.port, deadline, retry=not self._was_up)
            with connection:
                name = key.encode()
                connection.sendall(
                    _HEADER.pack(verb, len(name), len(value), seconds) + name + value
                )
                connection.settimeout(max(0.05, deadline - time.monotonic()) + 1.0)
                (length,) = struct.unpack("<i", _read(connection, 4))
                self._was_up = True
                return None if length < 0 else _read(connection, length)
        except TimeoutError as error:
            if isinstance(error, DeadlineError):
                raise
            raise DeadlineError(
                f"the store at {self.host}:{self.port} (rank 0) does not answer; is it stopped?"
            ) from error
        except (OSError, WireError) as error:
            lost = PeerLostError(
                f"the store at {self.host}:{self.port} (rank 0) went away while waiting for {key!r}"
            )
            lost.rank = 0
            raise lost from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=256)
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen on {host}:{port} ({error.strerror or error}): is another job using this "
            "MASTER_PORT, or is MASTER_ADDR not an address of this machine? Choose another port."
        ) from error


def _connect(host: str, port: int, deadline: float, *, retry: bool) -> socket.socket:
    while True:
        try:
            return socket.create_connection(
                (host, port), timeout=max(0.05, deadline - time.monotonic())
            )
        except OSError as error:
            if not retry:
                raise
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"no store answers at {host}:{port} ({error}): did rank 0 start, with the same "
                    "MASTER_ADDR and MASTER_PORT?"
                ) from error
            time.sleep(0.02)


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            raise WireError("the connection ended in the middle of a message")
        data += piece
    return bytes(data)


def _receive(connection: socket.socket) -> tuple[int, str, bytes, float]:
    connection.settimeout(10.0)
    verb, key_bytes, value_bytes, seconds = _HEADER.unpack(_read(connection, _HEADER.size))
    if verb not in (_SET, _GET) or key_bytes > _MAX_KEY or value_bytes > _MAX_VALUE:
        raise WireError("not a store request")
    key = _read(connection, key_bytes).decode()
    return verb, key, _read(connection, value_bytes), seconds


_shared: dict[tuple[str, int], TCPStore] = {}
_shared_lock = threading.Lock()


def shared_store(host: str, port: int, *, is_server: bool, timeout: float) -> TCPStore:
    """The store of this process for ``host:port``; later communicators reuse it.

    Raises:
        SystemResourceError: this process is a client of that store and cannot serve it, too.
    """
    with _shared_lock:
        store = _shared.get((host, port))
        if store is not None and store._pid != os.getpid():  # of the parent, before a fork
            store.close()
            store = None
        if store is None:
            store = TCPStore(host, port, is_server=is_server, timeout=timeout)
            _shared[host, port] = store
        elif is_server and not store.is_server:
            raise SystemResourceError(f"this process already uses {host}:{port} as a client")
        return store
