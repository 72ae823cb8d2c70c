"""ringcomm.cupyx: the calls of cupyx.distributed, on NumPy arrays and torch tensors."""

import socket
import sys
import types
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, cupyx, reference
from ringcomm.cupyx import RingBackend, init_process_group
from ringcomm.errors import UsageError
from tests.comm.oracle import assert_same_bits, random_input, random_inputs
from tests.simt import emulated
from tests.worlds import Worlds

WORLD_SIZES = (1, 2, 3)


@pytest.fixture
def port() -> int:
    """One that no process has used: which of them serve it, they remember."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_reductions(comm: Communicator, port: int, device: str | None = None) -> None:
    n, rank = comm.world_size, comm.rank
    with RingBackend(n, rank, port=port, device=device) as backend:
        assert backend.comm.device == device
        for count in (0, 1, 5, 3000):
            inputs = random_inputs("float32", n * count, n, count)
            mine = inputs[rank].copy()
            for op, name in (("sum", "sum"), ("prod", "product"), ("min", "min"), ("max", "max")):
                expected = reference.all_reduce(inputs, name)
                out = np.zeros_like(mine)
                backend.all_reduce(mine, out, op)
                assert_same_bits(out, expected, (op, count))
                out = np.zeros_like(mine)
                backend.reduce(mine, out, n - 1, op)
                expected = expected if rank == n - 1 else np.zeros_like(mine)
                assert_same_bits(out, expected, ("reduce", op, count))
            assert_same_bits(mine, inputs[rank], "in_array is not modified")
            total = reference.all_reduce(inputs, "sum")
            backend.all_reduce(mine, mine)
            assert_same_bits(mine, total, ("in place", count))
            out = np.full(count + 1, 7, np.float32)
            backend.reduce_scatter(inputs[rank].reshape(n, count), out, count)
            assert_same_bits(out[:count], total[rank * count : (rank + 1) * count], "scattered")
            assert out[count] == 7
        strided = np.asfortranarray(random_input("float32", 12, rank, 1).reshape(3, 4))
        out = np.zeros((3, 4), np.float32, order="F")
        backend.all_reduce(strided, out)
        whole = [random_input("float32", 12, r, 1).reshape(3, 4) for r in range(n)]
        assert np.array_equal(out, reference.all_reduce(whole, "sum"))
        close = np.zeros(4096, np.float32)
        backend.all_reduce(np.ones(4096, np.float32), close, codec="int8")
        assert np.allclose(close, n, rtol=0.01)


def check_moves(comm: Communicator, port: int, device: str | None = None) -> None:
    n, rank = comm.world_size, comm.rank
    backend = RingBackend(n, rank, port=port, device=device)
    for count in (1, 5, 3000):
        values = [
            [random_input("int32", count, 10 * s + r, count) for r in range(n)] for s in range(n)
        ]
        x = values[0][0].copy() if rank == 0 else np.zeros(count, np.int32)
        backend.broadcast(x)
        assert_same_bits(x, values[0][0], "broadcast")
        out = np.zeros(n * count, np.int32)
        backend.all_gather(values[rank][0], out, count)
        assert_same_bits(out, np.concatenate([values[s][0] for s in range(n)]), "all_gather")
        rows, row = np.stack(values[rank]), np.zeros(count, np.int32)
        backend.scatter(rows if rank == n - 1 else None, row, n - 1)
        assert_same_bits(row, values[n - 1][rank], "scatter")
        out = np.zeros((n, count), np.int32)
        backend.gather(values[rank][0], out if rank == 0 else None)
        if rank == 0:
            assert_same_bits(out, np.stack([values[s][0] for s in range(n)]), "gather")
        backend.all_to_all(rows, out)
        assert_same_bits(out, np.stack([values[s][rank] for s in range(n)]), "all_to_all")
        to, source = (rank + 1) % n, (rank - 1) % n
        got = np.zeros(count, np.int32)
        if n == 2:
            backend.send_recv(values[rank][to], got, to)
            assert_same_bits(got, values[to][rank], "send_recv")
        elif n > 2:
            if rank % 2 == 0:
                backend.send(values[rank][to], to)
                backend.recv(got, source)
            else:
                backend.recv(got, source)
                backend.send(values[rank][to], to)
            assert_same_bits(got, values[source][rank], "send and recv")
    backend.barrier()
    backend.stop()
    backend.stop()


def check_tensors(comm: Communicator, port: int) -> None:
    import torch

    with init_process_group(comm.world_size, comm.rank, port=port) as backend:
        out = torch.zeros(2, 3, dtype=torch.bfloat16)
        backend.all_reduce(torch.ones(6, dtype=torch.bfloat16), out)
        assert out.eq(comm.world_size).all()


def check_errors(comm: Communicator, port: int) -> None:
    n, rank = comm.world_size, comm.rank
    x = np.zeros(6, np.float32)
    with init_process_group(n, rank, port=port) as backend:
        refused = (
            (lambda: backend.all_reduce(x, x, "mean"), "op must be one of"),
            (lambda: backend.all_reduce(x, x[:3]), "3 elements of float32, expected 6"),
            (lambda: backend.all_reduce(x, x.astype(int)), "6 elements of int64, expected 6"),
            (
                lambda: backend.all_reduce(x, np.zeros((3, 4), np.float32)[:, ::2]),
                "out_array: a non-contig",
            ),
            (lambda: backend.reduce_scatter(x, x, 6), "in_array: 6 elements, expected 12 or more"),
            (lambda: backend.all_gather(x, x, 6), "out_array: 6 elements, expected 12 or more"),
            (
                lambda: backend.all_gather(x, np.zeros((12, 2))[:, 0], 6),
                "out_array: must be contig",
            ),
            (lambda: backend.all_to_all(x, x), r"in_array: shape \(6,\), expected \(2, ...\)"),
            (lambda: backend.broadcast(x, 2), "root must be"),
            (lambda: backend.send(x, 5), "dst must be"),
            (lambda: backend.all_reduce(x, x, stream=3), "stream: a int"),
            (lambda: backend.all_reduce(x, x, stream=FakeStream()), "only CuPy arrays.*numpy"),
            (lambda: backend.all_reduce([1.0], x), "in_array: a list, which is no array"),
        )
        for call, reason in refused:
            with pytest.raises(UsageError, match=reason):
                call()
        backend.all_reduce(x, x)  # nobody sent anything before


class FakeStream:
    ptr = 7
    current = 0

    def __enter__(self) -> None:
        FakeStream.current += 1

    def __exit__(self, *exc: object) -> None:
        FakeStream.current -= 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("check", [check_reductions, check_moves])
def test_the_calls_of_cupyx_give_what_the_reference_gives(
    worlds: Worlds, port: int, check: Any, world_size: int
) -> None:
    worlds.run(world_size, check, port)


@pytest.mark.parametrize("check", [check_reductions, check_moves])
def test_the_calls_of_cupyx_run_on_gpus(port: int, check: Any) -> None:
    emulated.require()
    # One GPU for all, so that calls return when the results are there; CuPy's streams see to that else.
    with Worlds(package=emulated.package(), RINGCOMM_SIMT_DEVICES="1") as worlds:
        worlds.run(2, check, port, "simt")


def test_torch_tensors_work_too(worlds: Worlds, port: int) -> None:
    pytest.importorskip("torch")
    worlds.run(2, check_tensors, port)


def test_wrong_arguments_say_what_to_pass(worlds: Worlds, port: int) -> None:
    worlds.run(2, check_errors, port)


def check_mpi(comm: Communicator) -> None:
    def allgather(port: int | None) -> list[int | None]:
        return [int(found) or None for found in comm.all_gather(np.array([port or 0])).flatten()]

    fake = types.ModuleType("mpi4py")
    world = types.SimpleNamespace(allgather=allgather)
    fake.MPI = types.SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    sys.modules["mpi4py"] = fake
    try:
        with init_process_group(comm.world_size, comm.rank, use_mpi=True) as backend:
            x = np.ones(3, np.float32)
            backend.all_reduce(x, x)
            assert x.tolist() == [comm.world_size] * 3
    finally:
        del sys.modules["mpi4py"]


def test_ranks_meet_through_mpi(worlds: Worlds) -> None:
    worlds.run(3, check_mpi)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"n_devices": 0, "rank": 0}, "n_devices must be 1 or more"),
        ({"n_devices": 2, "rank": 2}, "rank must be 0 to 1"),
        ({"n_devices": 2, "rank": 0, "backend": "mpi"}, "backend must be 'ringcomm' or 'nccl'"),
        ({"n_devices": 2, "rank": 0, "use_mpi": True}, "needs the package mpi4py"),
    ],
)
def test_wrong_groups_are_refused(
    arguments: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match=reason):
        init_process_group(**arguments)


def test_a_stream_is_current_during_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupyx, "view", lambda x, writable: types.SimpleNamespace(kind="cupy"))
    with cupyx._on(FakeStream(), object()):
        assert FakeStream.current == 1
    assert FakeStream.current == 0
