"""base/runtime.h on emulated GPUs: streams, events and shared memory do what they do on a GPU."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import _core
from ringcomm.errors import DeviceError, UsageError
from tests.simt import emulated
from tests.simt.emulator import SCHEDULES
from tests.worlds import RankFailure, RankProcess, Worlds

runtime: Any = getattr(_core, "simt", None)  # in the processes that these tests start

ELEMS = 1000
STATES = {"waits": 0, "came": 1, "late": 2}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Worlds]:
    """Processes that see two GPUs."""
    emulated.require()
    with Worlds(package=emulated.PACKAGE, RINGCOMM_SIMT_DEVICES="2") as worlds:
        yield worlds


def result(process: RankProcess) -> Any:
    outcome = process.outcome(time.monotonic() + 60)
    if outcome.kind != "value":
        raise RankFailure(outcome.trace or outcome.kind)
    return outcome.value


def inside(worlds: Worlds, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process with emulated GPUs."""
    process = worlds.take()
    process.start(function, *arguments)
    try:
        return result(process)
    finally:
        worlds.give_back(process, False)


KEPT: list[Any] = []  # of this process; it ends with it


def new_stream(device: int = 0) -> int:
    KEPT.append(runtime.OwnStream(device))
    return int(KEPT[-1].handle)


class Desk:
    """A word that a kernel waits for, and what the kernel does then."""

    def __init__(self, num_blocks: int = 1) -> None:
        self.num_blocks = num_blocks
        self.word = np.zeros(1, np.uint32)
        self.outcome = np.zeros(num_blocks, np.uint32)
        self.values = np.zeros(ELEMS, np.int32)

    def launch(self, stream: int, **options: Any) -> None:
        arguments = {"word": self.word.ctypes.data, "wait_value": 1} | options
        runtime.meet(
            outcome=self.outcome.ctypes.data,
            values=self.values.ctypes.data,
            num_elems=ELEMS,
            stream=stream,
            num_blocks=self.num_blocks,
            **arguments,
        )

    def state(self) -> str:
        (found,) = {name for name, value in STATES.items() if (self.outcome == value).all()}
        added = 1 if found == "came" else 0
        assert (self.values == added).all()
        return found


def seen_by_the_gpu() -> None:
    """Returns when the GPU has got as far as it can with everything that was queued before."""
    last = new_stream()
    place = np.zeros(1, np.uint8)
    runtime.fill_async(place.ctypes.data, 1, 1, last)
    runtime.synchronize(last)
    assert place[0] == 1


# ---- Order


def kernel_then_copy_then_fill() -> None:
    desk = Desk(num_blocks=3)
    copy = np.zeros_like(desk.values)
    stream = new_stream()
    desk.launch(stream)
    runtime.copy_async(copy.ctypes.data, desk.values.ctypes.data, copy.nbytes, stream)
    runtime.fill_async(desk.values.ctypes.data, 0, copy.nbytes, stream)
    assert not runtime.is_capturing(stream)
    seen_by_the_gpu()
    assert desk.state() == "waits"
    assert (copy == 0).all()
    desk.word[0] = 1
    runtime.synchronize(stream)
    assert (desk.outcome == STATES["came"]).all()
    assert (copy == 1).all()
    assert (desk.values == 0).all()


def test_a_launch_returns_at_once_and_the_stream_keeps_its_order(gpus: Worlds) -> None:
    inside(gpus, kernel_then_copy_then_fill)


def copy_held_back_by_an_event() -> None:
    desk = Desk()
    copy = np.zeros_like(desk.values)
    first, second = new_stream(), new_stream()
    event = runtime.Event(0)
    assert event.passed()
    desk.launch(first)
    event.record(first)
    event.hold_back(second)
    runtime.copy_async(copy.ctypes.data, desk.values.ctypes.data, copy.nbytes, second)
    seen_by_the_gpu()
    assert not event.passed()
    assert (copy == 0).all()
    desk.word[0] = 1
    runtime.synchronize(second)
    assert event.passed()
    assert (copy == 1).all()


def test_an_event_holds_back_another_stream(gpus: Worlds) -> None:
    inside(gpus, copy_held_back_by_an_event)


def event_recorded_twice() -> None:
    early, late = Desk(), Desk()
    first, second, third = (new_stream() for _ in range(3))
    event = runtime.Event(0)
    early.launch(first)
    event.record(first)
    event.hold_back(second)
    late.launch(third)
    event.record(third)
    early.word[0] = 1
    runtime.synchronize(second)  # waits for the first record alone
    assert not event.passed()
    late.word[0] = 1
    runtime.synchronize(third)
    assert event.passed()


def test_who_is_held_back_waits_for_what_was_recorded_until_then(gpus: Worlds) -> None:
    inside(gpus, event_recorded_twice)


def streams_go_on_while_a_kernel_waits() -> None:
    held, free = Desk(), Desk()
    free.word[0] = 1
    streams = [new_stream() for _ in range(2)]
    held.launch(streams[0])
    free.launch(streams[1])
    runtime.synchronize(streams[1])
    assert (held.state(), free.state()) == ("waits", "came")
    held.word[0] = 1
    runtime.synchronize(streams[0])
    assert held.state() == "came"


def test_a_kernel_that_waits_holds_up_no_other_stream(gpus: Worlds) -> None:
    inside(gpus, streams_go_on_while_a_kernel_waits)


# ---- Kernels that wait for each other


def two_threads_meet(rounds: int) -> None:
    desks = [Desk(num_blocks=1), Desk(num_blocks=1)]
    counts = np.zeros((2, rounds), np.uint32)

    def rank(me: int) -> None:
        with runtime.DeviceGuard(me):
            stream = new_stream(me)
            for i in range(rounds):
                desks[me].launch(
                    stream, wait_value=i + 1, tell=desks[1 - me].word.ctypes.data, value=i + 1
                )
                to = counts[me, i:].ctypes.data
                runtime.copy_async(to, desks[me].outcome.ctypes.data, 4, stream)
            runtime.synchronize(stream)

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counts == STATES["came"]).all()
    assert all((desk.values == rounds).all() for desk in desks)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernels_of_two_ranks_in_one_process_meet(schedule: str) -> None:
    emulated.require()
    variables = {"RINGCOMM_SIMT_SCHEDULE": schedule, "RINGCOMM_SIMT_DEVICES": "2"}
    with Worlds(package=emulated.PACKAGE, **variables) as worlds:
        inside(worlds, two_threads_meet, 50)


def share_and_meet(path: str, me: int, rounds: int) -> None:
    """Two processes, each with the words that the other one sets."""
    mine = runtime.SharedMemory.allocate(0, 4096)
    if me == 0:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.bind(path)
            server.listen()
            connection, _ = server.accept()
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        until = time.monotonic() + 30
        while connection.connect_ex(path) != 0:
            assert time.monotonic() < until
            time.sleep(0.01)
    with connection:
        fd = mine.export_descriptor()
        if fd >= 0:
            socket.send_fds(connection, [mine.handle], [fd])
            os.close(fd)
        else:
            connection.send(mine.handle)
        handle, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        theirs = runtime.SharedMemory.open(0, handle, fds[0] if fds else -1)
        for fd in fds:
            os.close(fd)
        assert theirs.address != mine.address
        assert runtime.device_of(theirs.address + 4095) == 0
        desk = Desk()
        stream = new_stream()
        for i in range(rounds):
            desk.launch(
                stream, word=mine.address, wait_value=i + 1, tell=theirs.address, value=i + 1
            )
        runtime.synchronize(stream)
        assert (desk.values == rounds).all()
        connection.send(b"done")
        assert connection.recv(16) == b"done"
        theirs.close()
        mine.close()


@pytest.mark.parametrize("export", ["descriptor", "legacy"])
def test_kernels_of_two_processes_meet_in_shared_memory(export: str, tmp_path: Path) -> None:
    emulated.require()
    with Worlds(package=emulated.PACKAGE, RINGCOMM_SIMT_EXPORT=export) as worlds:
        ranks = [worlds.take(), worlds.take()]
        for me, rank in enumerate(ranks):
            rank.start(share_and_meet, str(tmp_path / "meet"), me, 50)
        try:
            for rank in ranks:
                result(rank)
        finally:
            for rank in ranks:
                worlds.give_back(rank, False)


def nobody_comes() -> None:
    desk = Desk(num_blocks=2)
    stream = new_stream()
    desk.launch(stream, timeout_s=0.05)
    begin = time.monotonic()
    runtime.synchronize(stream)
    assert desk.state() == "late"
    assert 0.03 < time.monotonic() - begin < 30


def test_a_wait_ends_by_the_kernels_own_deadline(gpus: Worlds) -> None:
    inside(gpus, nobody_comes)


def test_a_process_ends_though_a_kernel_waits() -> None:
    emulated.require()
    program = (
        "from tests.simt.test_runtime import *; Desk().launch(0, timeout_s=1000.0); print('ok')"
    )
    assert emulated.python("-c", program, timeout=30) == "ok\n"


# ---- Devices and memory


def ask_devices() -> None:
    assert _core.RUNTIME == "simt"
    assert runtime.available() == (True, "")
    assert runtime.device_count() == _core.cuda_probe().count == 2
    assert runtime.device_uuid(0) != runtime.device_uuid(1)
    assert runtime.reaches(0, 1)
    assert _core.link_between(0, 1) == ("NVLink", "emulation")
    assert _core.link_between(1, 1) == ("same", "emulation")
    assert not runtime.shares_device_concurrently(0)
    assert runtime.current_device() == 0
    with runtime.DeviceGuard(1):
        assert runtime.current_device() == 1
    assert runtime.current_device() == 0
    with pytest.raises(DeviceError, match="no device 2: this process sees 2"):
        runtime.OwnStream(2)


def test_devices_are_those_that_the_environment_names(gpus: Worlds) -> None:
    inside(gpus, ask_devices)


def in_a_new_thread(body: Callable[[], None]) -> None:
    """A thread has no device before it chooses one."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for problem in problems:
        raise problem


def use_device_1_everywhere() -> None:
    """Objects of device 1, made, used and ended in threads that have used none."""
    kept: list[Any] = []

    def make() -> None:
        assert runtime.reaches(1, 0)
        with runtime.DeviceGuard(1):
            assert runtime.current_device() == 1
            kept.append(runtime.PinnedMemory(64))
            with runtime.DeviceGuard(1):
                pass
            assert runtime.current_device() == 1
        assert runtime.current_device() == 0
        kept.append(runtime.OwnStream(1))
        kept.append(runtime.Event(1))
        kept.append(runtime.DeviceMemory(1, 64))
        kept.append(runtime.SharedMemory.allocate(1, 64))
        kept.append(runtime.SharedMemory.open(1, kept[-1].handle, -1))
        assert runtime.current_device() == 0

    def use() -> None:
        _, stream, event = kept[:3]
        event.record(stream.handle)
        event.hold_back(stream.handle)
        assert runtime.device_of(kept[3].address) == 1
        until = time.monotonic() + 30
        while not event.passed():
            assert time.monotonic() < until
        assert runtime.current_device() == 0

    def end() -> None:
        kept.clear()
        assert runtime.current_device() == 0

    for step in (make, use, end):
        in_a_new_thread(step)
    assert runtime.devices_with_context() == [1]


def test_a_guard_leaves_all_as_it_was_and_uses_no_other_device(gpus: Worlds) -> None:
    with Worlds(package=emulated.PACKAGE, RINGCOMM_SIMT_DEVICES="2") as worlds:  # that used nothing
        inside(worlds, use_device_1_everywhere)


def ask_addresses() -> None:
    array = np.zeros(100, np.uint8)
    address = array.ctypes.data
    assert runtime.device_of(address) == 0
    with runtime.DeviceGuard(1):
        assert runtime.device_of(address) == 1
    runtime.place(address, 100, -1)
    assert [runtime.device_of(address + i) for i in (0, 99, 100)] == [-1, -1, 0]
    on_gpu, pinned = runtime.DeviceMemory(1, 64), runtime.PinnedMemory(64)
    assert runtime.device_of(on_gpu.address + 63) == 1
    assert runtime.device_of(pinned.address) == -1
    shared = runtime.SharedMemory.allocate(1, 64)
    again = runtime.SharedMemory.open(0, shared.handle, -1)
    assert again.address == shared.address
    assert runtime.device_of(shared.address) == 1


def test_addresses_have_a_device(gpus: Worlds) -> None:
    inside(gpus, ask_addresses)


def allocate_on(device: int) -> bytes:
    KEPT.append(runtime.SharedMemory.allocate(device, 64))
    return bytes(KEPT[-1].handle)


PID_OFFSET = 4  # in a handle


def open_as_if_pids_were_the_same(handle: bytes) -> None:
    """As in two containers, each of which has a process 1."""
    same_pid = bytearray(handle)
    same_pid[PID_OFFSET : PID_OFFSET + 4] = os.getpid().to_bytes(4, "little")
    assert same_pid != handle
    open_refused(bytes(same_pid), "needs its descriptor, which did not come")


def test_memory_of_another_process_with_the_same_pid_is_not_taken_for_the_own(gpus: Worlds) -> None:
    owner = gpus.take()
    owner.start(allocate_on, 0)
    inside(gpus, open_as_if_pids_were_the_same, result(owner))
    gpus.give_back(owner, False)


def tokens() -> tuple[bytes, bytes]:
    """Of this process and of a forked child."""
    own = runtime.process_token()
    assert runtime.process_token() == own
    in_a_new_thread(lambda: KEPT.append(runtime.process_token()))
    assert KEPT.pop() == own
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, runtime.process_token() + runtime.process_token())
        finally:
            os._exit(0)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with os.fdopen(reader, "rb") as pipe:
        twice = pipe.read()
    assert twice[:16] == twice[16:]
    assert runtime.process_token() == own
    return own, twice[:16]


def test_every_process_has_a_token_of_its_own(gpus: Worlds) -> None:
    found = [*inside(gpus, tokens), *inside(gpus, tokens)[1:]]
    with Worlds(package=emulated.PACKAGE) as worlds:
        found += inside(worlds, tokens)
    assert {len(token) for token in found} == {16}
    assert len(set(found)) == 5


def open_refused(handle: bytes, reason: str) -> None:
    with pytest.raises(DeviceError, match=reason):
        runtime.SharedMemory.open(0, handle, -1)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RINGCOMM_SIMT_VISIBLE": "0"}, "does not see: give all ranks of a host the same"),
        ({"RINGCOMM_SIMT_PEERS": "0"}, "device 0 cannot reach memory of device 1"),
        ({}, "needs its descriptor, which did not come"),
    ],
)
def test_memory_that_cannot_be_opened_says_why(
    gpus: Worlds, variables: dict[str, str], reason: str
) -> None:
    owner = gpus.take()
    owner.start(allocate_on, 1)
    handle = result(owner)
    with Worlds(package=emulated.PACKAGE, RINGCOMM_SIMT_DEVICES="2", **variables) as worlds:
        inside(worlds, open_refused, handle, reason)
    gpus.give_back(owner, False)


def kernel_on_another_device() -> None:
    stream = new_stream(1)
    with pytest.raises(DeviceError, match="its stream is one of device 1 but the current device"):
        Desk().launch(stream)
    with pytest.raises(DeviceError, match="event of device 0 was recorded on a stream of device 1"):
        runtime.Event(0).record(stream)


def test_a_kernel_runs_on_the_current_device_only(gpus: Worlds) -> None:
    inside(gpus, kernel_on_another_device)


def stream_that_is_gone() -> None:
    stream = runtime.OwnStream(0)
    handle = stream.handle
    del stream
    with pytest.raises(DeviceError, match="is no stream, or no longer"):
        Desk().launch(handle)


def test_a_stream_that_is_gone_is_refused(gpus: Worlds) -> None:
    inside(gpus, stream_that_is_gone)


def kernel_that_fails() -> None:
    stream = new_stream()
    event = runtime.Event(0)
    runtime.divergent_barrier(stream)
    event.record(stream)
    for call in (runtime.synchronize, Desk().launch, event.record):
        with pytest.raises(DeviceError, match=r"GPU has failed: divergent barrier: kernel diverg"):
            call(stream)
    with pytest.raises(DeviceError, match="divergent barrier"):
        event.passed()


def test_what_goes_wrong_in_a_kernel_is_every_later_calls_error(gpus: Worlds) -> None:
    inside(gpus, kernel_that_fails)


def fork_after_use() -> None:
    stream = new_stream()
    seen_by_the_gpu()
    pid = os.fork()
    if pid == 0:
        try:
            Desk().launch(stream)
        except DeviceError as error:
            os._exit(0 if "was forked from process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_process_that_was_forked_after_use_is_told_so(gpus: Worlds) -> None:
    inside(gpus, fork_after_use)


def launch_with_a_bad_schedule() -> None:
    with pytest.raises(UsageError, match="forward, reverse, random or priority, not 'sideways'"):
        Desk().launch(0)


def test_a_bad_variable_is_refused() -> None:
    emulated.require()
    with Worlds(package=emulated.PACKAGE, RINGCOMM_SIMT_SCHEDULE="sideways") as worlds:
        inside(worlds, launch_with_a_bad_schedule)
