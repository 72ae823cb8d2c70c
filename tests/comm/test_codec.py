"""Compressed all_reduce: the oracle's bits, residuals included, however the array is cut."""

import numpy as np
import pytest

from ringcomm import Communicator, codec, reference
from tests.comm.oracle import assert_same_bits, random_input, random_inputs
from tests.dtypes import NUMPY
from tests.worlds import Worlds

# (up, down) of the oracle.
CODECS = {
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int4/4": ("int4", "int4"),
}
# With 4 KiB buffers a segment holds 1024 values (2 and 4 ranks) or 960 (3 ranks).
SIZES = (0, 1, 31, 33, 959, 961, 1023, 1024, 1025, 2048, 5003)


def check_codec(comm: Communicator, spec: str, with_residuals: bool, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    up, down = CODECS[spec.partition("[")[0]]
    options = codec(spec)
    step = 0
    for size in SIZES:
        residuals = [random_input("float32", size, r, 77) for r in range(n)]
        owner_residual = random_input("float32", size, 0, 78)
        mine, owned = residuals[rank].copy(), owner_residual.copy()
        for op in ("sum", "avg", "sum"):
            step += 1
            inputs = random_inputs(dtype, size, n, size + step)
            x = inputs[rank].copy()
            extra = {"residual": mine, "owner_residual": owned} if with_residuals else {}
            comm.all_reduce(x, op, codec=spec, **extra)
            draw = None
            if options.rounding == "stochastic":
                draw = reference.Draw(seed=options.seed, step=step)
            expected = reference.all_reduce(
                inputs,
                op,
                up,
                down,
                residuals if with_residuals else None,
                owner_residual if with_residuals else None,
                draw,
            )
            assert_same_bits(x, expected, (spec, op, size, n))
            if with_residuals:
                assert_same_bits(mine, residuals[rank], ("residual", spec, op, size, n))
                # A rank keeps the residual of what it owns; together the ranks have all of it.
                shares = comm.all_gather(owned)
                merged = np.where(
                    (shares.view(np.uint32) == owner_residual.view(np.uint32)).any(axis=0),
                    owner_residual,
                    np.float32(np.nan),
                )
                assert_same_bits(merged, owner_residual, ("owner_residual", spec, op, size, n))
                owned[:] = owner_residual


@pytest.mark.parametrize("spec", CODECS)
@pytest.mark.parametrize("with_residuals", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_codec_all_reduce_gives_the_oracles_bits(
    worlds: Worlds, world_size: int, with_residuals: bool, spec: str
) -> None:
    worlds.run(world_size, check_codec, spec, with_residuals, "float32", staging_kib=16)


@pytest.mark.parametrize(
    "spec", ["int8[rounding=stochastic,seed=5]", "int4/4[rounding=stochastic]"]
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_stochastic_rounding_draws_the_oracles_numbers(
    worlds: Worlds, world_size: int, spec: str
) -> None:
    worlds.run(world_size, check_codec, spec, True, "float32", staging_kib=16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codec_takes_16_bit_values(worlds: Worlds, dtype: str) -> None:
    if dtype not in NUMPY:
        pytest.skip("ml_dtypes is not installed")
    worlds.run(3, check_codec, "int8", False, dtype, staging_kib=16)


def check_cut(comm: Communicator, spec: str) -> list[bytes]:
    results = []
    for size in (5003, 100_001):
        x = random_input("float32", size, comm.rank, 3)
        residual = random_input("float32", size, comm.rank, 4)
        comm.all_reduce(x, codec=spec, residual=residual)
        results += [x.tobytes(), residual.tobytes()]
    return results


@pytest.mark.parametrize("spec", ["int8", "int4/4", "int4[rounding=stochastic]"])
def test_the_staging_size_does_not_change_a_bit(worlds: Worlds, spec: str) -> None:
    assert worlds.run(3, check_cut, spec, staging_kib=16) == worlds.run(3, check_cut, spec)


def check_non_finite(comm: Communicator) -> None:
    x = np.ones(96, np.float32)
    if comm.rank == 1:
        x[40] = np.inf
    residual = np.full(96, 0.25, np.float32)
    comm.all_reduce(x, codec="int8", residual=residual)
    assert np.isnan(x[32:64]).all()
    assert np.isfinite(x[:32]).all()
    assert np.isfinite(x[64:]).all()
    if comm.rank == 1:
        assert (residual[32:64] == 0.25).all()


def test_a_block_with_infinity_is_nan_on_every_rank_and_keeps_its_residual(worlds: Worlds) -> None:
    worlds.run(3, check_non_finite)


def check_single(comm: Communicator) -> None:
    x = random_input("float32", 1000, 0, 1)
    before = x.copy()
    residual = np.full(1000, 0.5, np.float32)
    comm.all_reduce(x, codec="int4", residual=residual)
    assert_same_bits(x, before, "x")
    assert (residual == 0.5).all()


def test_a_single_rank_encodes_nothing(worlds: Worlds) -> None:
    worlds.run(1, check_single)
