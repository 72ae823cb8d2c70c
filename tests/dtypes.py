"""The core's dtypes as NumPy has them, what reduces them, and random arrays of each."""

from typing import Any

import numpy as np

from ringcomm import _core, reference

try:
    import ml_dtypes
except ImportError:  # then bfloat16 and float8 are left out of the tests
    ml_dtypes = None


def needs_ml_dtypes(name: str) -> bool:
    return name == "bfloat16" or name.startswith("float8")


# By name, in the order of the wire ids.
NUMPY: dict[str, Any] = {
    name: np.dtype(getattr(ml_dtypes, name) if needs_ml_dtypes(name) else name)
    for name in _core.DTYPES
    if not needs_ml_dtypes(name) or ml_dtypes is not None
}
FLOAT8 = tuple(name for name in NUMPY if name.startswith("float8"))
REDUCED = tuple(name for name in NUMPY if name not in FLOAT8)
SCALED = tuple(name for name in REDUCED if "float" in name or "complex" in name)
PAIRS = [(name, op) for name in REDUCED for op in reference.ops_of(NUMPY[name])]

Array = Any


def random_array(dtype: str, count: int, seed: Any, special: bool = False) -> Array:
    """All bits for integers and float8, magnitudes from 1e-3 to 1e3 for what is computed in floats.

    ``special`` adds zeros, infinities, NaN, subnormal and very large numbers.
    """
    rng = np.random.default_rng(seed)
    kind = NUMPY[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, count).astype(bool)
    if dtype.startswith("complex"):
        part = "float32" if dtype == "complex64" else "float64"
        return random_array(part, 2 * count, seed, special).view(kind)
    if kind.kind in "iu" or dtype in FLOAT8:
        return rng.integers(0, 256, count * kind.itemsize, np.uint8).view(kind)
    values = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
    if special:
        for number in (0.0, np.nan, np.inf, -np.inf, -0.0, 1e-40, 6e4, -6e4):
            values[rng.random(count) < 0.02] = number
    if dtype == "float64":
        return values
    with np.errstate(all="ignore"):
        return reference.narrow(values.astype(np.float32), kind)


def real_parts(values: Array) -> Array:
    """``values`` as numbers that ``numpy.isnan`` takes, two of them for a complex one."""
    if values.dtype.kind == "c":
        return values.view(values.real.dtype)
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def assert_same_numbers(actual: Array, expected: Array, what: object = "") -> None:
    """Equal bits, but any NaN for a NaN."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    nan = np.isnan(real_parts(expected))
    assert np.isnan(real_parts(actual)[nan]).all(), what
    size = expected.real.itemsize  # of a part
    bits = [array.view(f"u{size}")[~nan] for array in (actual, expected)]
    wrong = np.flatnonzero(bits[0] != bits[1])
    assert wrong.size == 0, f"{what}: {wrong.size} values differ, the first is number {wrong[0]}"
