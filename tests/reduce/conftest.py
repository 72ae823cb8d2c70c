import pytest

from ringcomm import _core, errors


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def simd_level(request):
    """Runs a test at every SIMD level that this processor has."""
    before = _core.simd_level()
    try:
        _core.set_simd_level(request.param)
    except errors.UsageError as error:
        pytest.skip(str(error))
    yield request.param
    _core.set_simd_level(before)
