"""Array kinds and layouts: torch, NumPy and DLPack; contiguous or not, 0-dimensional, views."""

from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, _core
from tests.worlds import Worlds


class OnlyDlpack:
    """An array of a library that ringcomm has never heard of."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def check_layouts(comm: Communicator) -> None:
    n = comm.world_size
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    views = {
        "whole": lambda a: a,
        "transposed": lambda a: a.T,
        "every third column": lambda a: a[:, ::3],
        "reversed": lambda a: a[::-1],
        "a corner": lambda a: a[2:5, 3:7],
        "one element": lambda a: a[1, 1:2],
        "no element": lambda a: a[:, 4:4],
    }
    for wrap in (lambda a: a, OnlyDlpack):
        for what, cut in views.items():
            if wrap is OnlyDlpack and what == "reversed":
                continue  # DLPack has no negative strides in NumPy's export
            array = base + comm.rank
            everything = array.copy()
            cut(everything)[...] = cut(base) * n + n * (n - 1) / 2
            comm.all_reduce(wrap(cut(array)))
            np.testing.assert_array_equal(array, everything, what)  # nothing outside is touched

            array = base * (comm.rank + 1)
            comm.broadcast(wrap(cut(array)), n - 1)
            np.testing.assert_array_equal(cut(array), cut(base) * n, what)

            got = comm.all_gather(wrap(cut(base + comm.rank)))
            expected = np.stack([cut(base + rank) for rank in range(n)])
            np.testing.assert_array_equal(got, expected, what)

    stacked = np.repeat(base[None], 2 * n, axis=0).transpose(0, 2, 1)
    got = comm.reduce_scatter(stacked, "avg")
    assert got.shape == (2, 10, 6)
    np.testing.assert_array_equal(got, stacked[:2])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_views_are_reduced_in_place_and_nothing_else_is_touched(
    worlds: Worlds, world_size: int
) -> None:
    worlds.run(world_size, check_layouts)


def check_zero_dim(comm: Communicator) -> None:
    x = np.array(comm.rank + 1.5)
    assert comm.all_reduce(x, "max") is x
    assert x.shape == ()
    assert x == comm.world_size + 0.5
    y = np.array(7 * comm.rank, np.int64)
    comm.broadcast(y, 1)
    assert y == 7
    assert comm.all_gather(np.array(comm.rank, np.int32)).tolist() == list(range(comm.world_size))


def test_zero_dimensional_arrays(worlds: Worlds) -> None:
    worlds.run(3, check_zero_dim)


def check_torch(comm: Communicator) -> None:
    import torch

    n, rank = comm.world_size, comm.rank
    for name in _core.DTYPES:
        dtype = getattr(torch, name)
        source = torch.arange(12).remainder(5).reshape(3, 4).to(dtype)
        y = (source if rank == n - 1 else torch.zeros_like(source)).t()
        comm.broadcast(y, n - 1)
        assert torch.equal(y.float(), source.t().float()), dtype
        got = comm.all_gather(torch.full((2,), 1.0 + rank).to(dtype))
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got.float(), (1.0 + torch.arange(n)).to(dtype).float().repeat(2, 1).t())
        if name.startswith("float8"):
            continue
        if name == "bool":
            x = torch.tensor([False, rank == 1])
            assert comm.all_reduce(x, "bor") is x
            assert x.tolist() == [False, True]
            continue
        x = torch.full((5, 7), rank + 1, dtype=dtype)
        assert comm.all_reduce(x) is x
        assert (x == n * (n + 1) // 2).all(), dtype
        part = comm.reduce_scatter(torch.ones(2 * n, 3, dtype=dtype))
        assert part.shape == (2, 3)
        assert (part == n).all()
    z = torch.full((3,), 1 + 1j) * (rank + 1)
    comm.all_reduce(z, "premul_sum", factor=torch.tensor(0.5))
    assert (z == (1 + 1j) * n * (n + 1) / 4).all()
    parameter = torch.nn.Parameter(torch.ones(4))
    comm.all_reduce(parameter)
    assert (parameter == n).all()
    assert parameter.requires_grad
    residual = torch.zeros(100)
    x = torch.rand(100)
    work = comm.all_reduce(x, codec="int4", residual=residual, async_op=True)
    assert work.wait() is x
    assert residual.abs().max() > 0
    # One rank passes torch, the other NumPy: the wire does not know.
    mixed: Any = torch.full((9,), 1.0) if rank == 0 else np.full(9, 1.0, np.float32)
    comm.all_reduce(mixed)
    assert float(mixed[4]) == n


def test_torch_tensors_of_every_dtype(worlds: Worlds) -> None:
    pytest.importorskip("torch")
    worlds.run(2, check_torch)
