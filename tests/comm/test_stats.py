"""stats() counts what the formulas say; explain() says what stats() will count."""

import numpy as np
import pytest

from ringcomm import Communicator, _core
from tests.worlds import Worlds

INT8_BLOCK, INT4_BLOCK = 34, 18


def check_bytes(comm: Communicator) -> None:
    n, others = comm.world_size, comm.world_size - 1

    def sent(op: str) -> int:
        row = comm.stats()[op]
        assert row["calls"] == 1
        assert row["seconds"] > 0
        comm.reset_stats()
        assert comm.stats() == {}
        return int(row["bytes_sent"])

    # n * 16 float32 per rank and segment: every chunk is the same size.
    count = n * 16 * 50
    x = np.zeros(count, np.float32)
    comm.all_reduce(x, algo="one_shot")
    assert sent("all_reduce") == others * count * 4
    for algo in ("two_shot", "ring"):
        comm.all_reduce(x, algo=algo)
        assert sent("all_reduce") == 2 * others * count * 4 // n, algo
    half = np.zeros(n * 32 * 50, np.float16)
    comm.all_reduce(half, algo="two_shot")
    assert sent("all_reduce") == 2 * others * half.nbytes // n
    comm.all_reduce(half, algo="ring")  # partial sums travel as float32
    assert sent("all_reduce") == 3 * others * half.nbytes // n
    comm.broadcast(x, 1)
    assert sent("broadcast") == (others * count * 4 if comm.rank == 1 else 0)
    comm.all_gather(x)
    assert sent("all_gather") == others * count * 4
    comm.reduce_scatter(x)
    assert sent("reduce_scatter") == others * count * 4 // n * (n if count * 4 <= 32768 else 1)
    for each in (100, 100_000):  # beside the flag, and through staging buffers
        y = np.zeros((n, each), np.float32)
        comm.reduce(y, 1)
        at_root = 0 if y.nbytes <= (32768 if n <= 4 else 8192) else others * y.nbytes // n
        got = sent("reduce")
        assert got == at_root if comm.rank == 1 and each == 100 else got <= y.nbytes
        assert comm.rank == 1 or got == y.nbytes
        comm.gather(y, 1)
        assert sent("gather") == (0 if comm.rank == 1 else y.nbytes)
        comm.scatter(y if comm.rank == 1 else None, 1, y[0].copy())
        assert sent("scatter") == (others * each * 4 if comm.rank == 1 else 0)
        comm.all_to_all(y)
        assert sent("all_to_all") == others * each * 4
    big = np.zeros(n * 100_000, np.float32)
    comm.reduce_scatter(big)
    assert sent("reduce_scatter") == others * 400_000

    blocks = 24  # per rank: whole blocks for everyone
    values = np.ones(n * blocks * 32, np.float32)
    for spec, up, down in (
        ("int8", INT8_BLOCK, INT8_BLOCK),
        ("int4", INT4_BLOCK, INT8_BLOCK),
        ("int4/4", INT4_BLOCK, INT4_BLOCK),
        ("bf16", 64, 64),
    ):
        comm.all_reduce(values, codec=spec)
        assert sent("all_reduce") == others * blocks * (up + down), spec
        plan = comm.explain(values.nbytes, codec=spec)
        assert plan.wire_bytes == others * blocks * (up + down)
        assert plan.algo == "two_shot"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_sent_equal_the_formulas(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_bytes)


def check_explain(comm: Communicator) -> list[str]:
    lines = []
    n, rank = comm.world_size, comm.rank
    for op in (op for op in _core.OPS if "barrier" not in op):
        for num_bytes in (0, 64, 4096, 32 * 1024, 1 << 20):
            plan = comm.explain(num_bytes, op)
            comm.reset_stats()
            count = num_bytes // 4
            x = np.zeros(count * (n if op in ("reduce_scatter", "scatter") else 1), np.float32)
            if op == "scatter":
                comm.scatter(x if rank == 0 else None, 0, np.zeros(count, np.float32))
            else:
                getattr(comm, op)(x)
            row = comm.stats()[op]
            assert row["bytes"] == num_bytes
            assert plan.op == op
            assert plan.num_bytes == num_bytes
            senders = {"broadcast": [0], "scatter": [0], "reduce": [1], "gather": [1]}
            if rank in senders.get(op, [rank]):
                assert row["bytes_sent"] == plan.wire_bytes, plan
            lines.append(str(plan))
    return lines


@pytest.mark.parametrize("world_size", [2, 4])
def test_explain_says_on_all_ranks_what_the_call_then_does(worlds: Worlds, world_size: int) -> None:
    lines = worlds.run(world_size, check_explain)
    assert all(rank_lines == lines[0] for rank_lines in lines)
    assert any("one_shot" in line for line in lines[0])
    assert any("two_shot" in line for line in lines[0])
    assert any("staged" in line for line in lines[0])


def check_single(comm: Communicator) -> None:
    comm.all_reduce(np.zeros(1000, np.float32))
    assert comm.stats()["all_reduce"]["bytes_sent"] == 0
    plan = comm.explain(4000)
    assert plan.wire_bytes == 0
    assert "single rank" in str(plan)


def test_a_single_rank_sends_nothing(worlds: Worlds) -> None:
    worlds.run(1, check_single)
