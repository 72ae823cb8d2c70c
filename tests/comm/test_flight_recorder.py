"""The flight recorder: what it keeps, and that torch's own analyzer finds the culprit in its files."""

import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import DeadlineError, MismatchError, RingcommError, SystemResourceError
from tests.worlds import Worlds, environment


def some_calls(comm: Communicator) -> list[dict[str, Any]]:
    before = time.monotonic_ns()
    comm.all_reduce(np.zeros(100, np.float32), "max", tag="first")
    comm.all_reduce(np.zeros(100_000, np.float32), codec="int4")
    comm.broadcast(np.zeros(7, np.int64), root=1, async_op=True).wait()
    comm.all_to_all(np.zeros((2, 5), np.uint8))
    comm.barrier()
    records = comm.flight_recorder()
    for record in records:
        assert record["state"] == "completed"
        assert (
            before
            <= record["created_ns"]
            <= record["started_ns"]
            <= record["ended_ns"]
            <= time.monotonic_ns()
        )
    return records


def test_every_call_is_recorded(worlds: Worlds) -> None:
    for records in worlds.run(2, some_calls):
        assert [(r["seq"], r["op"], r["dtype"], r["count"], r["algo"]) for r in records] == [
            (1, "all_reduce", "float32", 100, "one_shot"),
            (2, "all_reduce", "float32", 100_000, "two_shot"),
            (3, "broadcast", "int64", 7, "one_shot"),
            (4, "all_to_all", "uint8", 10, "one_shot"),
            (5, "barrier", None, 0, None),
        ]
        assert [r["id"] - records[0]["id"] for r in records] == [0, 1, 2, 3, 4]
        assert [r["tag"] for r in records] == ["first", "", "", "", ""]
        assert [r["codec"] for r in records] == ["none", "int4/int8", "none", "none", "none"]
        assert [r["root"] for r in records] == [None, None, 1, None, None]
        assert [r["reduce_op"] for r in records] == ["max", "sum", None, None, None]


def recorder_of(comm: Communicator, size: str, calls: int) -> list[int]:
    """Sequence numbers that a recorder of ``size`` has after some calls."""
    with environment(RINGCOMM_FLIGHT_RECORDER=size):
        other = comm.split(0)
    assert other is not None
    with other:
        works = [other.barrier(async_op=True) for _ in range(calls)]  # more than fit wait at once
        for work in works:
            work.wait()
        assert {record["state"] for record in other.flight_recorder()} <= {"completed"}
        return [record["seq"] for record in other.flight_recorder()]


@pytest.mark.parametrize(("size", "expected"), [("4", [7, 8, 9, 10]), ("0", []), ("1", [10])])
def test_the_last_calls_are_kept(worlds: Worlds, size: str, expected: list[int]) -> None:
    assert worlds.run(2, recorder_of, size, 10) == [expected, expected]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.001)


def states_while_waiting(comm: Communicator, folder: Path) -> list[str]:
    seen = folder / "seen"
    states = []
    if comm.rank == 0:
        works = [comm.barrier(async_op=True) for _ in range(3)]
        while comm.flight_recorder()[0]["state"] == "scheduled":
            time.sleep(0.001)
        states = [record["state"] for record in comm.flight_recorder()]
        seen.touch()
        for work in works:
            work.wait()
    else:
        wait_for(seen)
        for _ in range(3):
            comm.barrier()
    return states


def test_states_follow_the_call(worlds: Worlds, tmp_path: Path) -> None:
    states = worlds.run(2, states_while_waiting, tmp_path)[0]
    assert states == ["started", "scheduled", "scheduled"]


# ---- dumps ---------------------------------------------------------------------------------------


def skips_a_call(comm: Communicator, prefix: str) -> str:
    """Rank 1 leaves out the all_reduce of 20 elements and goes on with that of 30."""
    with environment(RINGCOMM_FLIGHT_RECORDER_FILE=prefix):
        other = comm.split(0, name="train")
    assert other is not None
    with other:
        other.all_reduce(np.zeros(10, np.float32))
        other.barrier()
        with pytest.raises(MismatchError) as caught:
            other.all_reduce(np.zeros(20 + 10 * comm.rank, np.float32))
    return str(caught.value)


def never_comes(comm: Communicator, folder: Path) -> None:
    """Rank 1 makes no call while rank 0 waits until its deadline. Both dump all the same."""
    with environment(TORCH_FR_DUMP_TEMP_FILE=str(folder / "trace_")):
        other = comm.split(0, name="train")
    assert other is not None
    with other:
        other.all_reduce(np.zeros(10, np.float32))
        other.barrier()
        if comm.rank == 0:
            with pytest.raises(DeadlineError):
                other.all_reduce(np.zeros(20, np.float32))
        for rank in range(comm.world_size):
            wait_for(folder / f"trace_{rank}")


def traces(folder: Path) -> Path:
    """A folder for nothing but dumps."""
    (folder / "traces").mkdir(exist_ok=True)
    return folder / "traces"


def analyze(folder: Path) -> tuple[str, list[Any]]:
    """What torch's analyzer says about the dumps in a folder, and its table of collectives."""
    pytest.importorskip("torch.distributed.flight_recorder", reason="needs torch's analyzer")
    table = folder.parent / "analyzed"
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.flight_recorder.fr_trace",
            str(folder),
            "-o",
            str(table),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    _, database = pickle.loads(table.read_bytes())
    return finished.stdout + finished.stderr, database.collectives


def test_torch_names_the_rank_that_skipped_a_call(worlds: Worlds, tmp_path: Path) -> None:
    messages = worlds.run(2, skips_a_call, str(traces(tmp_path) / "trace_"))
    assert messages[0] == messages[1]
    assert sorted(path.name for path in traces(tmp_path).iterdir()) == ["trace_0", "trace_1"]
    text, calls = analyze(traces(tmp_path))
    assert "Collective sequence number: 3 has errors" in text
    assert "Culprit rank 1" in text
    assert "'[[20]]' does not match found input sizes: '[[30]]'" in text
    assert "nccl:all_reduce" in text
    assert "train:ringcomm" in text
    assert [call.pass_check for call in calls if call.pg_desc.startswith("train")][:3] == [
        True,
        True,
        False,
    ]


def test_torch_names_the_rank_that_never_came(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(2, never_comes, traces(tmp_path), timeout=1.0)
    text, _ = analyze(traces(tmp_path))
    assert "Not all ranks joining collective, sequence number: 3" in text
    assert "missing ranks: {1}" in text


def all_kinds_of_calls(comm: Communicator, folder: str) -> None:
    n, rank = comm.world_size, comm.rank
    x = np.ones(60, np.float32)
    for _ in range(2):
        comm.all_reduce(x)
        comm.reduce(x, 1)
        comm.broadcast(x, 1)
        comm.all_gather(x)
        comm.reduce_scatter(x)
        comm.all_to_all(x)
        counts = [2 * (rank + peer) for peer in range(n)]  # uneven, symmetric
        comm.all_to_all(np.ones(sum(counts)), send_counts=counts, receive_counts=counts)
        parts = [np.ones(r) for r in range(n)]
        comm.gather(np.ones(rank), 0, parts if rank == 0 else None)
        comm.scatter(parts if rank == 0 else None, 0, np.empty(rank))
        comm.barrier()
        comm.monitored_barrier()
    second = comm.split(0, name=comm.name)  # the same name twice in one process
    assert second is not None
    with second:
        second.all_reduce(x)
        comm.all_reduce(x)
        comm.dump_flight_recorder(os.path.join(folder, f"trace_{rank}"))


def test_torch_finds_nothing_wrong_where_nothing_is(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(3, all_kinds_of_calls, str(traces(tmp_path)))
    text, calls = analyze(traces(tmp_path))
    assert "error" not in text.lower()
    assert "culprit" not in text.lower()
    assert "Not all ranks" not in text
    assert len(calls) == 2 * 11 + 2 + 2  # split makes two
    assert all(call.pass_check and call.collective_state == "completed" for call in calls)


def test_the_file_has_the_fields_that_torch_writes(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(2, skips_a_call, str(tmp_path / "trace_"))
    dump = pickle.loads((tmp_path / "trace_1").read_bytes())
    assert dump["version"] == "2.10"
    assert dump["pg_config"]["train"] == {"name": "train", "desc": "ringcomm", "ranks": "[0, 1]"}
    assert list(dump["pg_status"].values())[-1] == {
        "last_enqueued_collective": 3,
        "last_started_collective": 3,
        "last_completed_collective": 2,
    }
    last = dump["entries"][-1]
    assert last["process_group"] == ("train", "ringcomm")
    assert last["profiling_name"] == "nccl:all_reduce"
    assert last["input_sizes"] == last["output_sizes"] == [[30]]
    assert last["input_dtypes"] == ["float32"]
    assert last["state"] == "started"
    assert last["retired"] is True
    assert last["time_discovered_completed_ns"] is None
    assert 0 <= time.time_ns() - last["time_created_ns"] < 100e9
    assert re.match(r"all_reduce #3 \(float32 x 30, sum, one_shot\)", last["call"])


def loses_it(comm: Communicator, prefix: str) -> list[str]:
    """The error of a lost communicator whose file cannot be written."""
    with environment(RINGCOMM_FLIGHT_RECORDER_FILE=prefix):
        other = comm.split(0)
    assert other is not None
    errors = []
    with other:
        with pytest.raises(RingcommError) as caught:
            other.all_gather(np.zeros(10 + comm.rank))
        errors.append(str(caught.value))
        with pytest.raises(SystemResourceError, match="cannot write the flight recorder's file"):
            other.dump_flight_recorder(prefix)
    return errors


def test_a_file_that_cannot_be_written_hides_no_error(worlds: Worlds, tmp_path: Path) -> None:
    first, second = worlds.run(2, loses_it, str(tmp_path / "no" / "such" / "folder"))
    assert first == second
    assert "called different operations" in first[0]


def threads_of_one_process(comm: Communicator, folder: str) -> None:
    comm.barrier()
    comm.dump_flight_recorder(os.path.join(folder, f"trace_{comm.rank}"))
    comm.barrier()


def test_ranks_that_are_threads_dump_only_themselves(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run_threads(2, threads_of_one_process, str(tmp_path))
    for rank in range(2):
        dump = pickle.loads((tmp_path / f"trace_{rank}").read_bytes())
        assert list(dump["pg_config"]) == ["world"]
        assert [entry["profiling_name"] for entry in dump["entries"]] == ["nccl:barrier"]


def busy_and_idle_groups(comm: Communicator, path: str) -> list[int]:
    """Calls of the busy group that are still known; the idle one's are older."""
    comm.barrier()
    with environment(RINGCOMM_FLIGHT_RECORDER="4"):
        busy = comm.split(0, name="busy")
    assert busy is not None
    with busy:
        for _ in range(10):
            busy.barrier()
        comm.barrier()
        comm.dump_flight_recorder(f"{path}{comm.rank}")
        return [record["id"] for record in busy.flight_recorder()]


def test_a_dump_begins_where_all_groups_are_known(worlds: Worlds, tmp_path: Path) -> None:
    ids = worlds.run(2, busy_and_idle_groups, str(tmp_path / "trace_"))[0]
    dump = pickle.loads((tmp_path / "trace_0").read_bytes())
    assert [entry["record_id"] for entry in dump["entries"]] == [*ids, ids[-1] + 1]
    assert [entry["process_group"][0] for entry in dump["entries"]] == ["busy"] * 4 + ["world"]
