"""How far a compressed mean is from the exact one, with and without error feedback."""

import numpy as np
import pytest

from tests.codec import codec_calls

NUM_RANKS = 4
NUM_ELEMS = 1 << 14


def compressed_mean(gradients, up, down, residuals=None, owner_residual=None):
    """Two-shot all-reduce with the kernels: encode, sum in rank order, encode the mean, decode."""
    total = np.zeros(NUM_ELEMS, np.float32)
    for rank, gradient in enumerate(gradients):
        wire = codec_calls.encode(up, gradient, None if residuals is None else residuals[rank])
        codec_calls.decode_add(up, wire, total, first=rank == 0)
    total /= np.float32(NUM_RANKS)
    return codec_calls.decode(down, codec_calls.encode(down, total, owner_residual), NUM_ELEMS)


def vnmse(estimate, exact):
    return float(((estimate - exact) ** 2).sum() / (exact**2).sum())


def gaussian(rng):
    return rng.standard_normal((NUM_RANKS, NUM_ELEMS)).astype(np.float32)


def error_after_steps(up, down, feedback, owner_feedback, num_steps=64):
    """vNMSE of the sum over steps of one fixed gradient per rank with 10 % fresh noise."""
    rng = np.random.default_rng(0)
    fixed = gaussian(rng)
    residuals = np.zeros((NUM_RANKS, NUM_ELEMS), np.float32) if feedback else None
    owner_residual = np.zeros(NUM_ELEMS, np.float32) if owner_feedback else None
    exact, estimate = np.zeros(NUM_ELEMS), np.zeros(NUM_ELEMS)
    for _ in range(num_steps):
        gradients = fixed + np.float32(0.1) * gaussian(rng)
        exact += gradients.astype(np.float64).mean(axis=0)
        estimate += compressed_mean(gradients, up, down, residuals, owner_residual)
    return vnmse(estimate, exact)


@pytest.mark.parametrize(("codec", "bar"), [("int8", 6e-5), ("int4", 2e-2)])
def test_one_step_error(codec, bar):
    gradients = gaussian(np.random.default_rng(1))
    estimate = compressed_mean(gradients, codec, codec)
    assert vnmse(estimate, gradients.astype(np.float64).mean(axis=0)) <= bar


@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e-6, 1e-8, 1e-30])
def test_one_step_error_does_not_depend_on_the_magnitude(magnitude):
    gradients = gaussian(np.random.default_rng(1)) * np.float32(magnitude)
    estimate = compressed_mean(gradients, "int8", "int8").astype(np.float64)
    assert vnmse(estimate, gradients.astype(np.float64).mean(axis=0)) <= 6e-5


@pytest.mark.parametrize(
    ("up", "down", "owner_feedback", "bar"),
    [("int4", "int4", True, 1e-5), ("int4", "int8", False, 3e-5)],
)
def test_error_feedback_cancels_over_steps(up, down, owner_feedback, bar):
    with_feedback = error_after_steps(up, down, feedback=True, owner_feedback=owner_feedback)
    without = error_after_steps(up, down, feedback=False, owner_feedback=False)
    assert with_feedback <= bar
    assert without >= 10 * with_feedback
