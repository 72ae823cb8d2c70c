"""Ranks for tests: real processes, reused from one test to the next, or threads of one process.

``Worlds.run(n, body, *args)`` calls ``body(comm, *args)`` on n ranks, each in its own process with a
fresh communicator, and returns what they returned. ``body`` is a module-level function. No process
outlives its :class:`Worlds`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ringcomm
from ringcomm import env
from ringcomm.store import TCPStore

ROOT = Path(__file__).resolve().parents[1]

Body = Callable[..., Any]


@dataclass
class Outcome:
    """How a rank's function ended. Exactly one of the three kinds."""

    kind: str  # "value", "error" or "gone": the process ended instead of answering
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    culprit: int | None = None  # the error's `rank`
    when: float = 0.0  # time.monotonic() of the answer's arrival


class RankFailure(AssertionError):
    """A rank raised, with its traceback, or ended."""


class RankProcess:
    """One forked process. Runs one function at a time."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid = pid
        self.connection = connection

    def start(self, function: Body, *args: Any, **kwargs: Any) -> None:
        self.connection.send((function, args, kwargs))

    def outcome(self, until: float) -> Outcome:
        """Waits for the answer until time.monotonic() is ``until``."""
        try:
            if not self.connection.poll(max(0.0, until - time.monotonic())):
                raise RankFailure(f"process {self.pid} does not answer: a hang\n{stacks(self.pid)}")
            kind, content, trace, culprit = self.connection.recv()
        except (EOFError, ConnectionError):
            return Outcome("gone", when=time.monotonic())
        if kind == "value":
            return Outcome(kind, value=content, when=time.monotonic())
        return Outcome(kind, None, content, trace, culprit, time.monotonic())

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def stacks(pid: int) -> str:
    """What the kernel says about the threads of a process that hangs."""
    lines = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            lines.append(f"  thread {task.name}: {state} {(task / 'wchan').read_text()}")
    return "\n".join(lines)


class Running:
    """Ranks that are at work."""

    def __init__(self, worlds: "Worlds", ranks: list[RankProcess], store: TCPStore) -> None:
        self._worlds = worlds
        self._store = store
        self.ranks = ranks

    def outcomes(self, deadline: float) -> list[Outcome]:
        """How every rank ended, in at most ``deadline`` seconds. Afterwards nobody is at work."""
        until = time.monotonic() + deadline
        finished: list[Outcome] = []
        try:
            for rank in self.ranks:
                finished.append(rank.outcome(until))
        finally:
            self._store.close()
            for i, rank in enumerate(self.ranks):
                self._worlds.give_back(rank, i < len(finished) and finished[i].kind != "gone")
        return finished


class Worlds:
    """A pool of rank processes, forked from one nursery. A context manager.

    Args:
        package: The folder whose ``ringcomm`` they import; see tests/simt/emulated.py.
        variables: Environment variables of theirs.
    """

    def __init__(self, package: Path = ROOT, **variables: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="rc-tests-")
        ours, theirs = socket.socketpair()
        self._orders = ours
        environment = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith(("RINGCOMM_", "TORCHELASTIC_"))
            },
            "OPENBLAS_NUM_THREADS": "1",
            "RINGCOMM_TUNING": "off",
            "PYTHONPATH": os.pathsep.join([str(package), str(ROOT), *filter(None, sys.path)]),
            "TMPDIR": self.directory,
            **variables,
        }
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=package,
            start_new_session=True,
        )
        theirs.close()
        self._orders.settimeout(60)
        if self._orders.recv(64) != b"ready\n":
            raise RuntimeError("the nursery did not start")
        self._idle: list[RankProcess] = []
        self.spawned: list[int] = []

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for rank in self._idle:
            self._end(rank)
        self._idle.clear()
        self._orders.close()
        self._nursery.wait(10)
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def leftovers(self) -> list[str]:
        """Names in the ranks' temporary directory and in /dev/shm that ringcomm left."""
        shared = [str(path) for path in Path("/dev/shm").glob("*ringcomm*")]
        return [str(path) for path in Path(self.directory).iterdir()] + shared

    # -- processes --

    def take(self) -> RankProcess:
        if self._idle:
            return self._idle.pop()
        ours, theirs = socket.socketpair()
        socket.send_fds(self._orders, [b"fork"], [theirs.fileno()])
        theirs.close()
        pid = int(self._orders.recv(64))
        self.spawned.append(pid)
        return RankProcess(pid, Connection(ours.detach()))

    def give_back(self, rank: RankProcess, reusable: bool) -> None:
        if reusable:
            self._idle.append(rank)
        else:
            self._end(rank)

    def _end(self, rank: RankProcess) -> int:
        with contextlib.suppress(ProcessLookupError):
            rank.kill()
        rank.connection.close()
        self._orders.sendall(b"reap %d" % rank.pid)
        return int(self._orders.recv(64))

    # -- communicators --

    def start(self, world_size: int, body: Body, *args: Any, **options: Any) -> Running:
        """Begins ``body(comm, *args)`` on every rank.

        ``options``: see :func:`with_communicator`.
        """
        store = TCPStore(is_server=True)
        ranks = [self.take() for _ in range(world_size)]
        for rank, process in enumerate(ranks):
            process.start(with_communicator, rank, world_size, store.port, body, args, **options)
        return Running(self, ranks, store)

    def outcomes(
        self, world_size: int, body: Body, *args: Any, deadline: float = 60.0, **options: Any
    ) -> list[Outcome]:
        return self.start(world_size, body, *args, **options).outcomes(deadline)

    def run(
        self, world_size: int, body: Body, *args: Any, deadline: float = 60.0, **options: Any
    ) -> list[Any]:
        """What every rank returned.

        Raises:
            RankFailure: one raised, ended or hung.
        """
        found = self.outcomes(world_size, body, *args, deadline=deadline, **options)
        bad = [f"rank {i}: {o.trace or o.kind}" for i, o in enumerate(found) if o.kind != "value"]
        if bad:
            raise RankFailure("\n".join(bad)[:8000])
        return [outcome.value for outcome in found]

    def run_threads(
        self, world_size: int, body: Body, *args: Any, deadline: float = 60.0, **options: Any
    ) -> list[Any]:
        """:meth:`run` with all ranks as threads of one process."""
        process = self.take()
        process.start(threads_with_communicators, world_size, body, args, **options)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._end, process)
            outcome = process.outcome(time.monotonic() + deadline)
            cleanup.pop_all()
        self.give_back(process, outcome.kind != "gone")
        if outcome.kind != "value":
            raise RankFailure(outcome.trace or outcome.kind)
        return outcome.value


# ---- inside a rank -------------------------------------------------------------------------------


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables that ringcomm reads, for one block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    env.forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        env.forget()


def with_communicator(
    rank: int,
    world_size: int,
    port: int,
    body: Body,
    args: tuple[Any, ...],
    *,
    timeout: float = 20.0,
    staging_kib: int | None = None,
    first_seq: int = 0,
    name: str = "world",
) -> Any:
    """Runs ``body(comm, *args)`` with a communicator over the store at ``port``.

    Options: the communicator's ``timeout`` and ``name``; ``staging_kib``, RINGCOMM_STAGING_KIB;
    ``first_seq``, where the wrapping counters start.
    """
    comm = join(rank, world_size, port, timeout, staging_kib, first_seq, name)
    with comm:
        return body(comm, *args)


def join(
    rank: int,
    world_size: int,
    port: int,
    timeout: float = 20.0,
    staging_kib: int | None = None,
    first_seq: int = 0,
    name: str = "world",
) -> ringcomm.Communicator:
    store = TCPStore(port=port, is_server=False, timeout=timeout)
    with settings(staging_kib, first_seq):
        return ringcomm.init(rank, world_size, store=store, timeout=timeout, name=name)


@contextlib.contextmanager
def settings(staging_kib: int | None, first_seq: int) -> Iterator[None]:
    """What a process, not a call, says about its communicators. Threads share it."""
    from ringcomm import bootstrap

    if staging_kib is None and first_seq == 0:
        yield
        return
    before = bootstrap._first_seq
    bootstrap._first_seq = first_seq
    try:
        with environment(RINGCOMM_STAGING_KIB=str(staging_kib)) if staging_kib else nullcontext():
            yield
    finally:
        bootstrap._first_seq = before


def threads_with_communicators(
    world_size: int,
    body: Body,
    args: tuple[Any, ...],
    *,
    staging_kib: int | None = None,
    first_seq: int = 0,
    **options: Any,
) -> list[Any]:
    store = TCPStore(is_server=True)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = with_communicator(rank, world_size, store.port, body, args, **options)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)
    ]
    with settings(staging_kib, first_seq):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    store.close()
    if errors:
        raise errors[0]
    return results


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
