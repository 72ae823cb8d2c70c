"""CuPy arrays: collectives, codecs, and the stream that is current in CuPy."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator
from tests.gpu import places
from tests.gpu.conftest import Pools


@pytest.fixture(autouse=True)
def cupy(cuda: None) -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")


def check_collectives(comm: Communicator) -> None:
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        for dtype in ("float32", "float16", "int64", "complex64"):
            x = cupy.arange(1000).astype(dtype) * (comm.rank + 1)
            comm.all_reduce(x)
            x += 1  # in the order of the stream
            expected = np.arange(1000).astype(dtype) * (
                comm.world_size * (comm.world_size + 1) // 2
            )
            if dtype != "float16":
                assert (cupy.asnumpy(x) == expected + 1).all()
        gathered = comm.all_gather(cupy.full(3, comm.rank, "int32"))
        assert isinstance(gathered, cupy.ndarray)
        assert (cupy.asnumpy(gathered) == np.arange(comm.world_size)[:, None]).all()
        columns = cupy.zeros((64, 64), "float32")
        columns[:, ::2] = comm.rank
        comm.broadcast(columns[:, ::2], comm.world_size - 1)
        assert (cupy.asnumpy(columns[:, ::2]) == comm.world_size - 1).all()
        assert (cupy.asnumpy(columns[:, 1::2]) == 0).all()
        stream.synchronize()


def test_collectives_of_cupy_arrays(pools: Pools) -> None:
    # Threads go in steps as well: CuPy compiles and loads a kernel when it first needs it, and loading may wait for all
    # that runs on the GPU, such as a kernel of ringcomm that waits for the thread that loads.
    pools("cuda").run_threads(2, check_collectives)
    pools("cuda").run(2, check_collectives)


def check_codecs(comm: Communicator) -> None:
    import cupy

    codec = ringcomm.codec("int8")
    values = np.random.default_rng(0).standard_normal(1003, dtype=np.float32)
    wire = codec.encode(cupy.asarray(values))
    assert isinstance(wire, cupy.ndarray)
    expected = codec.encode(values)
    assert np.array_equal(cupy.asnumpy(wire), expected)
    assert np.array_equal(cupy.asnumpy(codec.decode(wire, 1003)), codec.decode(expected, 1003))
    exact = ringcomm.codec("none")
    half = cupy.asarray(values.astype(np.float16))
    assert np.array_equal(
        cupy.asnumpy(exact.decode(exact.encode(half), 1003, "float16")), values.astype(np.float16)
    )
    places.synchronize()


def test_codecs_take_cupy_arrays(pools: Pools) -> None:
    pools("cuda").run(1, check_codecs)
