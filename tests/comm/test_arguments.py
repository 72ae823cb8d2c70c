"""Bad arguments: a UsageError that says what to do, and a communicator that still works."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator, env
from ringcomm.errors import UsageError
from tests.worlds import Worlds


def floats(count: int = 8) -> Any:
    return np.ones(count, np.float32)


SHARED = np.ones(16, np.float32)


def read_only() -> Any:
    x = floats()
    x.flags.writeable = False
    return x


# name -> (what is called, pieces of the message)
BAD_CALLS: dict[str, tuple[Callable[[Communicator], Any], tuple[str, ...]]] = {
    "dtype": (
        lambda c: c.all_reduce(np.zeros(3, "M8[s]")),
        ("x:", "datetime64", "supported are float32", "float8_e8m0fnu"),
    ),
    "mean of bools": (
        lambda c: c.all_reduce(np.ones(3, bool), "avg"),
        ("op='avg'", "bool", "convert to float32"),
    ),
    "largest complex": (
        lambda c: c.all_reduce(np.ones(3, np.complex64), "max"),
        ("op='max'", "complex64", "no order"),
    ),
    "bits of floats": (
        lambda c: c.reduce_scatter(floats(), "bxor"),
        ("op='bxor'", "float32", "integer view"),
    ),
    "bits of floats, async": (
        lambda c: c.all_reduce(floats(), "band", async_op=True),
        ("op='band'", "float32"),
    ),
    "bits of floats, with a codec": (
        lambda c: c.all_reduce(floats(), "bor", codec="int8"),
        ("op='bor'", "float32"),
    ),
    "scaled integers": (
        lambda c: c.all_reduce(np.ones(3, np.int16), "premul_sum", factor=2),
        ("op='premul_sum'", "int16", "op='sum'"),
    ),
    "no factor": (lambda c: c.all_reduce(floats(), "premul_sum"), ("'premul_sum' needs factor",)),
    "no factor of reduce_scatter": (
        lambda c: c.reduce_scatter(floats(), "premul_sum"),
        ("'premul_sum' needs factor",),
    ),
    "factor of sum": (lambda c: c.all_reduce(floats(), factor=2.0), ("'premul_sum'", "'sum'")),
    "factor of avg": (
        lambda c: c.reduce_scatter(floats(), "avg", factor=1),
        ("'premul_sum'", "'avg'"),
    ),
    "factor with a codec": (
        lambda c: c.all_reduce(floats(), "premul_sum", codec="int8", factor=2.0),
        ("'premul_sum'", "multiply x by the factor first"),
    ),
    "text for a factor": (
        lambda c: c.all_reduce(floats(), "premul_sum", factor="2"),
        ("factor must be a real number", "'2'"),
    ),
    "complex factor": (
        lambda c: c.all_reduce(floats(), "premul_sum", factor=1j),
        ("factor must be a real number",),
    ),
    "several factors": (
        lambda c: c.all_reduce(floats(), "premul_sum", factor=np.ones(2)),
        ("factor must be a real number",),
    ),
    "object": (lambda c: c.all_reduce(np.array([None])), ("object",)),
    "list": (lambda c: c.all_reduce([1.0, 2.0]), ("list", "NumPy or CuPy array")),
    "None": (lambda c: c.all_reduce(None), ("NoneType",)),
    "read-only": (lambda c: c.all_reduce(read_only()), ("read-only", "writable copy")),
    "read-only, async": (lambda c: c.all_reduce(read_only(), async_op=True), ("read-only",)),
    "read-only, not root": (lambda c: c.broadcast(read_only(), 1 - c.rank), ("read-only",)),
    "stride 0": (
        lambda c: c.all_reduce(np.lib.stride_tricks.as_strided(floats(), (4,), (0,))),
        ("share memory",),
    ),
    "op": (lambda c: c.all_reduce(floats(), "summ"), ("op must be", "'sum'", "'summ'")),
    "op, async": (lambda c: c.all_reduce(floats(), "add", async_op=True), ("op must be", "'add'")),
    "op of reduce_scatter": (lambda c: c.reduce_scatter(floats(), "mean"), ("'avg'", "'mean'")),
    "algo": (lambda c: c.all_reduce(floats(), algo="two-shot"), ("'two_shot'", "'two-shot'")),
    "algo of another op": (
        lambda c: c.all_reduce(floats(), algo="staged"),
        ("staged", "all_reduce"),
    ),
    "codec": (lambda c: c.all_reduce(floats(), codec="int5"), ("int5", "int4")),
    "codec option": (lambda c: c.all_reduce(floats(), codec="int8[sed=1]"), ("sed", "seed")),
    "codec of integers": (
        lambda c: c.all_reduce(np.ones(9, np.int32), codec="int8"),
        ("float32", "int32", "codec=None"),
    ),
    "codec with max": (lambda c: c.all_reduce(floats(), "max", codec="int8"), ("'sum'", "'max'")),
    "codec with ring": (
        lambda c: c.all_reduce(floats(), codec="int8", algo="ring"),
        ("two_shot", "ring"),
    ),
    "residual without codec": (
        lambda c: c.all_reduce(floats(), residual=floats()),
        ("residual needs a codec",),
    ),
    "residual dtype": (
        lambda c: c.all_reduce(floats(), codec="int8", residual=np.zeros(8)),
        ("residual:", "float64", "float32 array of 8"),
    ),
    "residual length": (
        lambda c: c.all_reduce(floats(), codec="int8", residual=floats(7)),
        ("residual: 7", "8 elements"),
    ),
    "owner_residual length": (
        lambda c: c.all_reduce(floats(), codec="int8", owner_residual=floats(9)),
        ("owner_residual: 9",),
    ),
    "residual layout": (
        lambda c: c.all_reduce(floats(), codec="int8", residual=floats(16)[::2]),
        ("contiguous float32",),
    ),
    "root too large": (lambda c: c.broadcast(floats(), 2), ("root must be 0 to 1", "not 2")),
    "root negative": (lambda c: c.broadcast(floats(), -1), ("root must be 0 to 1", "not -1")),
    "tag": (lambda c: c.all_reduce(floats(), tag="x" * 25), ("tag", "24", "25")),
    "tag in bytes": (lambda c: c.barrier(tag="é" * 13), ("tag", "24", "26")),
    "out dtype": (
        lambda c: c.all_gather(floats(), np.zeros(16)),
        ("out: dtype float64", "float32"),
    ),
    "out length": (lambda c: c.all_gather(floats(), floats(15)), ("out: 15", "expected 16")),
    "out layout": (lambda c: c.all_gather(floats(), floats(32)[::2]), ("out: must be contiguous",)),
    "out read-only": (
        lambda c: c.reduce_scatter(floats(16), out=read_only()),
        ("out:", "read-only"),
    ),
    "indivisible": (lambda c: c.reduce_scatter(floats(7)), ("(7,)", "2 equal parts", "pad")),
    "scalar": (lambda c: c.reduce_scatter(np.array(1.0)), ("()", "equal parts")),
    "reduce root": (lambda c: c.reduce(floats(), 2), ("root must be 0 to 1", "not 2")),
    "reduce op": (lambda c: c.reduce(floats(), 0, "mean"), ("op must be", "'mean'")),
    "reduce read-only root": (lambda c: c.reduce(read_only(), c.rank), ("read-only",)),
    "gather root": (lambda c: c.gather(floats(), -1), ("root must be 0 to 1", "not -1")),
    "gather out elsewhere": (
        lambda c: c.gather(floats(), 1 - c.rank, floats(16)),
        ("out: only rank", "pass None"),
    ),
    "gather out length": (
        lambda c: c.gather(floats(), c.rank, floats(15)),
        ("out: 15 elements", "expected 16"),
    ),
    "gather out own part": (
        lambda c: c.gather(floats(), c.rank, [floats(7), floats(7)]),
        ("keeps 8 elements of x for itself", "room for 7"),
    ),
    "gather list length": (
        lambda c: c.gather(floats(), c.rank, [floats()]),
        ("out: a list of 1", "expected 2"),
    ),
    "gather list dtype": (
        lambda c: c.gather(floats(), c.rank, [floats(), np.ones(8)]),
        ("out[1]: dtype float64", "float32"),
    ),
    "gather list layout": (
        lambda c: c.gather(floats(), c.rank, [floats(), floats(16)[::2]]),
        ("out[1]: must be contiguous",),
    ),
    "gather list read-only": (
        lambda c: c.gather(floats(), c.rank, [read_only(), floats()]),
        ("out[0]:", "read-only"),
    ),
    "gather out twice": (
        lambda c: c.gather(floats(16), c.rank, [SHARED, SHARED]),
        ("rank 0 and from rank 1", "share memory"),
    ),
    "scatter x elsewhere": (
        lambda c: c.scatter(floats(), 1 - c.rank, floats(4)),
        ("x: only rank", "pass None"),
    ),
    "scatter no out": (lambda c: c.scatter(None, 1 - c.rank), ("out: pass an array",)),
    "scatter nothing": (lambda c: c.scatter(None, c.rank), ("x:", "NoneType")),
    "scatter indivisible": (lambda c: c.scatter(floats(7), c.rank), ("(7,)", "2 equal parts")),
    "scatter list length": (
        lambda c: c.scatter([floats()] * 3, c.rank),
        ("x: a list of 3", "expected 2"),
    ),
    "scatter list of numbers": (lambda c: c.scatter([1.0, 2.0], c.rank), ("x[0]: a scalar",)),
    "scatter dtypes": (
        lambda c: c.scatter([floats(), np.ones(8)], c.rank),
        ("x[1]: dtype float64", "float32 like x[0]"),
    ),
    "scatter out length": (
        lambda c: c.scatter(floats(16), c.rank, floats(9)),
        ("out: 9 elements", "expected 8"),
    ),
    "all_to_all indivisible": (lambda c: c.all_to_all(floats(7)), ("(7,)", "2 equal parts", "pad")),
    "all_to_all scalar": (lambda c: c.all_to_all(np.array(1.0)), ("()", "equal parts")),
    "all_to_all onto itself": (
        lambda c: c.all_to_all(SHARED, SHARED),
        ("out overlaps x", "pass an array that does not overlap"),
    ),
    "all_to_all shifted": (
        lambda c: c.all_to_all(SHARED[:8], SHARED[3:11]),
        ("out overlaps x",),
    ),
    "all_to_all counts": (
        lambda c: c.all_to_all(floats(), send_counts=[3, 4], receive_counts=[4, 4]),
        ("send_counts: [3, 4] adds up to 7", "(8,)"),
    ),
    "all_to_all number of counts": (
        lambda c: c.all_to_all(floats(), floats(), send_counts=[8]),
        ("send_counts: [8]", "expected 2 counts"),
    ),
    "all_to_all negative counts": (
        lambda c: c.all_to_all(floats(), send_counts=[9, -1], receive_counts=[4, 4]),
        ("[9, -1]", "0 or more"),
    ),
    "all_to_all negative receive counts": (
        lambda c: c.all_to_all(floats(), receive_counts=[-4, -4]),
        ("receive_counts: [-4, -4]", "0 or more"),
    ),
    "all_to_all counts of what": (
        lambda c: c.all_to_all(floats(), send_counts=[4, 4.5], receive_counts=[4, 4]),
        ("send_counts must be a whole number", "4.5"),
    ),
    "all_to_all no receive counts": (
        lambda c: c.all_to_all(floats(), send_counts=[1, 7]),
        ("receive_counts: with send_counts",),
    ),
    "all_to_all counts of a list": (
        lambda c: c.all_to_all([floats(), floats()], send_counts=[1, 1]),
        ("send_counts: only for one array",),
    ),
    "all_to_all own counts": (
        lambda c: c.all_to_all(floats(), send_counts=[4, 4], receive_counts=[3, 3]),
        ("keeps 4 elements of x for itself", "room for 3"),
    ),
    "all_to_all out indivisible": (
        lambda c: c.all_to_all(floats(), floats(7)),
        ("out: 7 elements", "expected 8"),
    ),
    "all_gather list": (
        lambda c: c.all_gather(floats(), [floats(), floats(9)]),
        ("out: the part of rank 1 has 9 elements, expected 8", "equally long"),
    ),
    "all_gather onto x": (
        lambda c: c.all_gather(SHARED[2:6], SHARED[:8]),
        ("out overlaps x", "this rank's own part"),
    ),
    "reduce_scatter list": (
        lambda c: c.reduce_scatter([floats(), floats(9)]),
        ("x: the part of rank", "all parts of reduce_scatter are equally long"),
    ),
    "reduce_scatter onto x": (
        lambda c: c.reduce_scatter(SHARED[:8], out=SHARED[2:6]),
        ("out overlaps x",),
    ),
    "explain op": (lambda c: c.explain(100, "all_reduc"), ("all_reduce", "'all_reduc'")),
    "explain size": (lambda c: c.explain(-1), ("-1", "0 or more")),
}


def check_bad_calls(comm: Communicator) -> None:
    for what, (call, pieces) in BAD_CALLS.items():
        with pytest.raises(UsageError) as error:
            call(comm)
        for piece in pieces:
            assert piece in str(error.value), (what, str(error.value))
    x = floats()
    comm.all_reduce(x)  # nothing was sent by any of them
    assert (x == 2).all()


def test_bad_arguments_say_what_to_do_and_leave_the_communicator_usable(worlds: Worlds) -> None:
    worlds.run(2, check_bad_calls)


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"rank": 2, "world_size": 2}, ("rank must be 0 to 1", "not 2")),
        ({"rank": -1, "world_size": 2}, ("rank must be 0 to 1", "not -1")),
        ({"rank": 0, "world_size": 0}, ("world_size must be 1 to", "not 0")),
        ({"rank": 0, "world_size": 1000}, ("world_size must be 1 to", "not 1000")),
        ({"rank": 0}, ("pass both", "WORLD_SIZE")),
        ({"rank": 0, "world_size": 1, "timeout": 0}, ("timeout must be", "not 0")),
        ({"rank": 0, "world_size": 1, "timeout": -3.0}, ("timeout must be",)),
        ({"rank": 0, "world_size": 1, "name": "n" * 65}, ("name has 65 bytes", "64")),
    ],
)
def test_init_refuses_arguments_that_make_no_sense(
    arguments: dict[str, Any], pieces: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    env.forget()
    with pytest.raises(UsageError) as error:
        ringcomm.init(**arguments)
    for piece in pieces:
        assert piece in str(error.value)


def test_world_size_1_needs_no_launcher_no_store_and_no_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    env.forget()
    with ringcomm.init() as one, ringcomm.init(0, 1) as two:
        x = floats()
        for comm in (one, two):
            assert (comm.rank, comm.world_size) == (0, 1)
            comm.all_reduce(x, "avg")
            assert comm.all_gather(x).shape == (1, 8)
            comm.broadcast(read_only(), 0)
            comm.barrier()
            assert comm.all_reduce(x, async_op=True).wait() is x
        assert (x == 1).all()
        one.all_reduce(x, "premul_sum", factor=0.5)
        assert (x == 0.5).all()
        part = one.reduce_scatter(x, "premul_sum", factor=np.float32(3))
        assert (part == 1.5).all()
        assert (x == 0.5).all()
        with pytest.raises(UsageError, match="integer view"):
            one.all_reduce(x, "band")


def refuses_many_ranks_with_tiny_buffers() -> None:
    from ringcomm import _core

    fd = _core.create_segment("t", max(_core.staging_bytes(4096, 128), _core.control_bytes(128)))
    _core.format_control(fd, 128)
    with pytest.raises(UsageError, match="RINGCOMM_STAGING_KIB"):
        _core.Communicator(
            rank=0,
            world_size=128,
            name="t",
            timeout_s=1,
            buffer_bytes=4096,
            num_cores=2,
            control_fd=fd,
            staging_fds=[fd] * 128,
            pidfds=[-1] * 128,
            pids=[1] * 128,
        )


def test_staging_too_small_for_the_world_size_is_an_error_not_an_overflow() -> None:
    refuses_many_ranks_with_tiny_buffers()
