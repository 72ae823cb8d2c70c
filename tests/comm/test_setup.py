"""Set-up: ranks that do not come, disagree, die or come back; stores that are stale, taken or gone."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringcomm
from ringcomm.errors import DeadlineError, PeerLostError, UsageError
from ringcomm.store import TCPStore
from tests.worlds import Outcome, Worlds, environment, join, open_descriptors


def together(
    worlds: Worlds, calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], deadline: float = 30
) -> list[Outcome]:
    """Runs one function per process at the same time."""
    processes = [worlds.take() for _ in calls]
    for process, (function, args) in zip(processes, calls, strict=True):
        process.start(function, *args)
    until = time.monotonic() + deadline
    outcomes: list[Outcome] = []
    try:
        for process in processes:
            outcomes.append(process.outcome(until))
    finally:
        for i, process in enumerate(processes):
            worlds.give_back(process, i < len(outcomes) and outcomes[i].kind != "gone")
    return outcomes


def messages(outcomes: list[Outcome]) -> list[str]:
    assert all(o.kind == "error" for o in outcomes), outcomes
    return [f"{type(o.error).__name__}: {o.error}" for o in outcomes]


def join_and_add(
    rank: int, world_size: int, port: int, timeout: float = 20.0, **options: Any
) -> float:
    with join(rank, world_size, port, timeout, **options) as comm:
        x = np.array([rank + 1.0])
        comm.all_reduce(x)
        return float(x[0])


def join_by_environment(rank: int, world_size: int, port: int, timeout: float) -> float:
    """As under a launcher: rank 0 serves the store."""
    with (
        environment(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        ),
        ringcomm.init(timeout=timeout) as comm,
    ):
        x = np.array([rank + 1.0])
        comm.all_reduce(x)
        return float(x[0])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def store() -> Any:
    server = TCPStore(is_server=True, timeout=20)
    yield server
    server.close()


def test_ranks_meet_through_the_launchers_variables(worlds: Worlds) -> None:
    port = free_port()
    outcomes = together(worlds, [(join_by_environment, (r, 3, port, 20.0)) for r in (2, 0, 1)])
    assert [o.value for o in outcomes] == [6.0, 6.0, 6.0], outcomes


def test_a_missing_rank_is_named_on_all_others(worlds: Worlds, store: TCPStore) -> None:
    start = time.monotonic()
    outcomes = together(worlds, [(join_and_add, (r, 3, store.port, 1.0)) for r in (0, 2)])
    assert time.monotonic() - start < 3.5
    first, second = messages(outcomes)
    assert first == second
    assert "DeadlineError" in first
    assert "rank(s) [1] of 3 did not come within 1 s" in first
    assert "MASTER_PORT" in first
    assert [o.culprit for o in outcomes] == [1, 1]


def test_a_missing_rank_0_is_named(worlds: Worlds, store: TCPStore) -> None:
    (message,) = messages(together(worlds, [(join_and_add, (1, 2, store.port, 0.5))]))
    assert "DeadlineError" in message
    assert "heard nothing from rank 0" in message


def test_no_server_is_a_deadline_error_with_the_address(worlds: Worlds) -> None:
    port = free_port()
    (message,) = messages(together(worlds, [(join_by_environment, (1, 2, port, 0.5))]))
    assert "DeadlineError" in message
    assert f"no store answers at 127.0.0.1:{port}" in message
    assert "did rank 0 start" in message


def test_a_taken_port_is_a_usage_error_with_the_address(worlds: Worlds) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (message,) = messages(together(worlds, [(join_by_environment, (0, 2, port, 0.5))]))
    assert "UsageError" in message
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert "another port" in message


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_different_world_sizes_are_shown_on_all_ranks(
    worlds: Worlds, sizes: tuple[int, int]
) -> None:
    port = free_port()
    start = time.monotonic()
    found = messages(
        together(worlds, [(join_by_environment, (r, sizes[r], port, 10.0)) for r in (0, 1)])
    )
    assert time.monotonic() - start < 5  # nobody waits for the deadline
    assert found[0] == found[1]
    assert f"rank 0 has world_size {sizes[0]}, rank 1 has {sizes[1]}" in found[0]
    assert "UsageError" in found[0]


def test_different_staging_sizes_are_shown_on_all_ranks(worlds: Worlds, store: TCPStore) -> None:
    found = messages(
        together(
            worlds,
            [(join_and_add_with, (r, 2, store.port, {"staging_kib": (16, 64)[r]})) for r in (0, 1)],
        )
    )
    assert found[0] == found[1]
    assert "RINGCOMM_STAGING_KIB" in found[0]
    assert "16384" in found[0]
    assert "4096" in found[0]


def join_and_add_with(rank: int, world_size: int, port: int, options: dict[str, Any]) -> float:
    return join_and_add(rank, world_size, port, **options)


# ---- stale stores --------------------------------------------------------------------------------


def remember_store(rank: int, world_size: int, port: int) -> dict[str, bytes]:
    """Joins, and returns what the store holds afterwards."""
    store = TCPStore(port=port, is_server=False)
    with ringcomm.init(rank, world_size, store=store, timeout=20) as comm:
        comm.barrier()
        keys = [f"ringcomm/0/1/{key}" for key in ("hello/0", "hello/1", "verdict")]
        return {key: store.get(key) for key in keys}


def fill_from_an_earlier_run(worlds: Worlds, store: TCPStore, gone: bool) -> None:
    old = TCPStore(is_server=True)
    left = together(worlds, [(remember_store, (r, 2, old.port)) for r in (0, 1)])[0].value
    old.close()
    for key, value in left.items():
        if gone and "hello" in key:
            hello = json.loads(value)
            hello["pid"] = 2**22 + 1  # no process has this number
            value = json.dumps(hello).encode()
        store.set(key, value)


@pytest.mark.parametrize("gone", [False, True])
def test_a_store_that_an_earlier_run_left_behind_does_no_harm(
    worlds: Worlds, store: TCPStore, gone: bool
) -> None:
    fill_from_an_earlier_run(worlds, store, gone)
    for order in ((0, 1), (1, 0)):
        fill_from_an_earlier_run(worlds, store, gone)
        outcomes = together(worlds, [(join_and_add, (r, 2, store.port)) for r in order])
        assert [o.value for o in outcomes] == [3.0, 3.0], outcomes


def test_a_stale_store_without_the_other_rank_says_what_to_do(
    worlds: Worlds, store: TCPStore
) -> None:
    for rank in (0, 1):
        fill_from_an_earlier_run(worlds, store, gone=True)
        (message,) = messages(together(worlds, [(join_and_add, (rank, 2, store.port, 2.0))]))
        assert f"PeerLostError: rank {1 - rank} (pid {2**22 + 1})" in message
        assert "fresh store if this one served an earlier run" in message


def test_a_verdict_never_makes_a_rank_remove_a_directory(
    worlds: Worlds, store: TCPStore, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    process = worlds.take()
    process.start(join_and_add, 1, 2, store.port, 3.0)
    hello = json.loads(store.get("ringcomm/0/1/hello/1"))
    store.set("ringcomm/0/1/hello/0", json.dumps(hello | {"pid": 2**22 + 1}).encode())
    verdict = {"path": str(precious / "socket"), "token": "", "nonces": {"1": hello["nonce"]}}
    store.set("ringcomm/0/1/verdict", json.dumps(verdict).encode())
    outcome = process.outcome(time.monotonic() + 20)
    worlds.give_back(process, True)
    assert isinstance(outcome.error, PeerLostError)
    assert precious.is_dir()


# ---- deaths and stops during set-up --------------------------------------------------------------


def test_a_rank_that_dies_after_its_hello_is_named_within_a_second(
    worlds: Worlds, store: TCPStore
) -> None:
    victim = worlds.take()
    victim.start(join_and_add, 1, 3, store.port)
    store.get("ringcomm/0/1/hello/1")
    host = worlds.take()
    host.start(join_and_add, 0, 3, store.port)
    store.get("ringcomm/0/1/hello/0")
    killed = time.monotonic()
    victim.kill()
    outcome = host.outcome(killed + 10)
    assert isinstance(outcome.error, PeerLostError), outcome
    assert outcome.culprit == 1
    assert f"rank 1 (pid {victim.pid}) of group 'world' died" in str(outcome.error)
    assert outcome.when - killed < 1
    worlds.give_back(victim, False)
    worlds.give_back(host, True)


def test_the_death_of_rank_0_during_set_up_is_noticed_within_a_second(
    worlds: Worlds, store: TCPStore
) -> None:
    host = worlds.take()
    host.start(join_and_add, 0, 3, store.port)
    guest = worlds.take()
    guest.start(join_and_add, 1, 3, store.port)
    store.get("ringcomm/0/1/hello/0")
    store.get("ringcomm/0/1/hello/1")
    killed = time.monotonic()
    host.kill()
    outcome = guest.outcome(killed + 10)
    assert isinstance(outcome.error, PeerLostError), outcome
    assert f"rank 0 (pid {host.pid}) of group 'world' died" in str(outcome.error)
    assert outcome.when - killed < 1
    worlds.give_back(host, False)
    worlds.give_back(guest, True)


def test_the_death_of_rank_0_that_serves_the_store_is_noticed_within_a_second(
    worlds: Worlds,
) -> None:
    port = free_port()
    host, guest = worlds.take(), worlds.take()
    host.start(join_by_environment, 0, 3, port, 20.0)
    guest.start(join_by_environment, 1, 3, port, 20.0)
    TCPStore(port=port, is_server=False, timeout=20).get("ringcomm/0/1/hello/1")
    killed = time.monotonic()
    host.kill()
    outcome = guest.outcome(killed + 10)
    assert isinstance(outcome.error, PeerLostError), outcome
    assert outcome.culprit == 0
    assert outcome.when - killed < 1
    worlds.give_back(host, False)
    worlds.give_back(guest, True)


def test_a_stopped_rank_0_is_a_deadline_not_a_death(worlds: Worlds, store: TCPStore) -> None:
    host, guest = worlds.take(), worlds.take()
    host.start(join_and_add, 0, 3, store.port, 2.0)
    store.get("ringcomm/0/1/hello/0")
    host.kill(signal.SIGSTOP)
    try:
        guest.start(join_and_add, 1, 3, store.port, 0.5)
        outcome = guest.outcome(time.monotonic() + 10)
    finally:
        host.kill(signal.SIGCONT)
    assert isinstance(outcome.error, DeadlineError), outcome
    assert outcome.culprit == 0
    assert isinstance(host.outcome(time.monotonic() + 10).error, DeadlineError)
    worlds.give_back(host, True)
    worlds.give_back(guest, True)


def fail_to_join(rank: int, port: int) -> tuple[int, int]:
    counts = []
    for _ in range(5):
        store = TCPStore(port=port, is_server=False)
        with pytest.raises((DeadlineError, UsageError)):
            ringcomm.init(rank, 2, store=store, timeout=0.3, name=f"failing {rank}")
        counts.append(open_descriptors())
    return counts[0], counts[-1]


def test_a_failed_set_up_leaves_no_descriptor(worlds: Worlds, store: TCPStore) -> None:
    for outcome in together(worlds, [(fail_to_join, (0, store.port))]):
        first, last = outcome.value
        assert first == last
    assert not worlds.leftovers()


def join_with_long_tmpdir(rank: int, port: int, directory: str) -> None:
    import tempfile

    tempfile.tempdir = directory
    try:
        join_and_add(rank, 2, port)
    finally:
        tempfile.tempdir = None


def test_a_directory_that_cannot_hold_the_socket_is_reported_on_all_ranks(
    worlds: Worlds, store: TCPStore, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    for directory in (deep, tmp_path / "missing"):
        calls = [(join_with_long_tmpdir, (r, store.port, str(directory))) for r in (0, 1)]
        found = messages(together(worlds, calls))
        assert found[0] == found[1]
        assert "SystemResourceError" in found[0]
        assert "TMPDIR" in found[0]


def exhausted(rank: int, port: int) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 3, limits[1]))
    try:
        join_and_add(rank, 2, port, 3.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_descriptors_is_a_clear_error_on_that_rank(worlds: Worlds, store: TCPStore) -> None:
    host, guest = together(worlds, [(exhausted, (r, store.port)) for r in (0, 1)])
    assert guest.kind == "error"
    assert "open files" in str(guest.error) or "ulimit" in str(guest.error), guest
    assert host.kind == "error"


# ---- the store -----------------------------------------------------------------------------------


def test_strangers_cannot_disturb_the_store(worlds: Worlds, store: TCPStore) -> None:
    for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(300), b"\x01" + b"\xff" * 16):
        with socket.create_connection(("127.0.0.1", store.port)) as stranger:
            stranger.sendall(junk)
    outcomes = together(worlds, [(join_and_add, (r, 2, store.port)) for r in (0, 1)])
    assert [o.value for o in outcomes] == [3.0, 3.0]


def test_a_closed_store_gives_its_port_back() -> None:
    first = TCPStore(is_server=True)
    first.set("key", b"value")
    assert TCPStore(port=first.port, is_server=False).get("key") == b"value"
    first.close()
    first.close()
    TCPStore(port=first.port, is_server=True).close()


def test_torch_stores_are_accepted(worlds: Worlds, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = str(tmp_path / "store")
    outcomes = together(worlds, [(join_by_file_store, (r, 2, path)) for r in (0, 1)])
    assert [o.value for o in outcomes] == [3.0, 3.0], outcomes
    # The same file again, as after a crash: torch leaves it there.
    outcomes = together(worlds, [(join_by_file_store, (r, 2, path)) for r in (0, 1)])
    assert [o.value for o in outcomes] == [3.0, 3.0], outcomes


def join_by_file_store(rank: int, world_size: int, path: str) -> float:
    import torch.distributed as dist

    store = dist.FileStore(path, -1)
    with ringcomm.init(rank, world_size, store=store, timeout=10) as comm:
        x = np.array([rank + 1.0])
        comm.all_reduce(x)
        return float(x[0])
