"""The oracle itself, against hand-made results and against torch's conversions."""

import itertools

import numpy as np
import pytest

from ringcomm import reference


def patterns():
    """Every float32 exponent with awkward mantissas, both signs."""
    tails = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000]
    tails += [0x7FFFFF, 0x7FF000, 0x400000]
    heads = np.arange(512, dtype=np.uint64)[:, None] << np.uint64(23)
    bits = (heads | np.array(tails, np.uint64)).reshape(-1).astype(np.uint32)
    return bits.view(np.float32)


def test_conversions_round_like_torch():
    torch = pytest.importorskip("torch")
    values = patterns()
    number = ~np.isnan(values)
    wide = torch.from_numpy(values.copy())
    bfloat16 = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    float16 = wide.to(torch.float16).numpy()
    ours = reference.float32_to_bfloat16(values)
    np.testing.assert_array_equal(ours[number], bfloat16[number])
    assert (ours[~number] == 0x7FC0).all()
    ours = reference.float32_to_float16(values)
    np.testing.assert_array_equal(ours[number].view(np.uint16), float16[number].view(np.uint16))
    assert np.isnan(ours[~number]).all()


def test_widening_undoes_narrowing():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (ml_dtypes.bfloat16, np.float16):
        every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(dtype)
        wide = reference.widen(every)
        number = ~np.isnan(wide)
        again = reference.narrow(wide, dtype)
        np.testing.assert_array_equal(again[number].view(np.uint16), every[number].view(np.uint16))


def test_avg_of_integers_truncates_towards_zero():
    inputs = [np.array([7, -7, 3], np.int32), np.array([0, 0, -4], np.int32)]
    np.testing.assert_array_equal(reference.reduce(inputs, "avg"), [3, -3, 0])


def test_avg_divides_by_numbers_of_ranks_that_the_dtype_does_not_hold():
    inputs = [np.array([-128, 127, 5], np.int8)] + [np.zeros(3, np.int8)] * 127
    np.testing.assert_array_equal(reference.reduce(inputs, "avg"), [-1, 0, 0])
    inputs = [np.array([2**64 - 1, 2**63], np.uint64)] + [np.zeros(2, np.uint64)] * 2
    np.testing.assert_array_equal(
        reference.reduce(inputs, "avg"), np.array([(2**64 - 1) // 3, 2**63 // 3], np.uint64)
    )


def test_bools_are_reduced_by_logical_operators():
    a, b = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    for op in ("sum", "max", "bor"):
        np.testing.assert_array_equal(reference.reduce([a, b], op), [False, True, True, True], op)
    for op in ("product", "min", "band"):
        np.testing.assert_array_equal(reference.reduce([a, b], op), [False, False, False, True], op)
    np.testing.assert_array_equal(reference.reduce([a, b], "bxor"), [False, True, True, False])


def test_complex_numbers_multiply_and_average():
    inputs = [np.array([1 + 2j, 3j], np.complex64), np.array([3 - 1j, 2j], np.complex64)]
    np.testing.assert_array_equal(reference.reduce(inputs, "product"), [5 + 5j, -6])
    np.testing.assert_array_equal(reference.reduce(inputs, "avg"), [2 + 0.5j, 2.5j])


def test_scale_rounds_to_the_dtype_before_anything_is_added():
    values = np.array([2049.0, 1.0], np.float32).astype(np.float16)  # 2048, 1
    np.testing.assert_array_equal(reference.scale(values, 1.0002), np.array([2048, 1], np.float16))
    scaled = reference.scale(np.array([1 + 2j], np.complex64), 0.5)
    assert scaled.dtype == np.complex64
    np.testing.assert_array_equal(scaled, [0.5 + 1j])


def test_float8_is_not_reduced():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
        assert reference.ops_of(getattr(ml_dtypes, name)) == ()


def test_uint16_is_an_integer_and_no_bit_pattern_of_bfloat16():
    inputs = [np.array([1, 65535], np.uint16), np.array([2, 1], np.uint16)]
    np.testing.assert_array_equal(reference.reduce(inputs), [3, 0])
    np.testing.assert_array_equal(reference.widen(inputs[0]), [1, 65535])


def test_nan_wins_min_and_max():
    inputs = [np.array([np.nan, 1], np.float32), np.array([1, np.nan], np.float32)]
    assert np.isnan(reference.reduce(inputs, "min")).all()
    assert np.isnan(reference.reduce(inputs, "max")).all()


def test_ring_sums_every_chunk_in_an_order_of_its_own():
    inputs = [np.full(40, value, np.float32) for value in (1e8, 1.0, -1e8)]
    result = reference.all_reduce_ring(inputs, "sum")
    # Of 16, 16 and 8 elements, in the orders 1 2 0, 2 0 1 and 0 1 2.
    np.testing.assert_array_equal(result, [0] * 16 + [1] * 16 + [0] * 8)


def test_chunks_of_a_ring_cover_the_array_once_in_whole_granules():
    for num_elems, world_size, itemsize in itertools.product(
        (0, 1, 63, 64, 1001), (1, 2, 3, 7), (1, 2, 16)
    ):
        chunks = reference.ring_chunks(num_elems, world_size, itemsize)
        assert [chunk.stop for chunk, _ in chunks[:-1]] == [chunk.start for chunk, _ in chunks[1:]]
        assert (chunks[0][0].start, chunks[-1][0].stop) == (0, num_elems)
        assert all(
            chunk.stop * itemsize % 64 == 0 or chunk.stop == num_elems for chunk, _ in chunks
        )
        assert [order[-1] for _, order in chunks] == list(range(world_size))


def test_movement_collectives():
    inputs = [np.arange(4) + 10 * rank for rank in range(2)]
    np.testing.assert_array_equal(reference.broadcast(inputs, 1), [10, 11, 12, 13])
    np.testing.assert_array_equal(reference.all_gather(inputs), [0, 1, 2, 3, 10, 11, 12, 13])
    first, second = reference.reduce_scatter(inputs, "sum")
    np.testing.assert_array_equal(first, [10, 12])
    np.testing.assert_array_equal(second, [14, 16])


@pytest.mark.parametrize(
    ("up", "down", "stochastic"),
    [
        ("int8", "int8", False),
        ("int4", "int8", False),
        ("bf16", "bf16", False),
        ("int4", "int4", True),
    ],
)
def test_a_compressed_all_reduce_does_not_depend_on_cuts(up, down, stochastic):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(200).astype(np.float32) for _ in range(3)]
    draw = reference.Draw(seed=4, step=2) if stochastic else None

    def run(begin, end):
        residuals = [np.full(end - begin, 0.125, np.float32) for _ in inputs]
        owner_residual = np.zeros(end - begin, np.float32)
        part_draw = draw._replace(first_elem=begin) if draw else None
        parts = [values[begin:end] for values in inputs]
        result = reference.all_reduce(
            parts, "avg", up, down, residuals, owner_residual, draw=part_draw
        )
        return np.concatenate([[result], residuals, [owner_residual]])

    cut = np.concatenate([run(0, 64), run(64, 96), run(96, 200)], axis=1)
    np.testing.assert_array_equal(run(0, 200), cut)


def test_error_feedback_of_an_all_reduce_keeps_the_sum_of_what_was_meant():
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(100).astype(np.float32) for _ in range(2)]
    residuals = [np.zeros(100, np.float32) for _ in inputs]
    owner_residual = np.zeros(100, np.float32)
    result = reference.all_reduce(inputs, "sum", "int4", "int4", residuals, owner_residual)
    meant = sum(inputs).astype(np.float64)
    np.testing.assert_allclose(result + owner_residual + sum(residuals), meant, atol=1e-5)
    assert np.abs(result - meant).max() > 1e-2


def test_codecs_refuse_operators_that_do_not_add():
    inputs = [np.ones(3, np.float32)] * 2
    with pytest.raises(ValueError, match="needs op 'sum' or 'avg', not 'max'"):
        reference.all_reduce(inputs, "max", "int8", "int8")
