"""What ringcomm.codecs promises. The bytes themselves are tested beside the kernels."""

import pickle

import numpy as np
import pytest

import ringcomm
from ringcomm import _core
from ringcomm.codecs import Codec, codec
from ringcomm.errors import DeviceError, UsageError, WireError

torch = pytest.importorskip("torch")

LOSSY = ["bf16", "fp16", "int8", "int4"]


@pytest.mark.parametrize(
    ("text", "canonical", "up", "down", "feedback"),
    [
        ("none", "none", "none", "none", False),
        ("bf16", "bf16", "bf16", "bf16", False),
        ("fp16", "fp16", "fp16", "fp16", False),
        ("int8", "int8", "int8", "int8", False),
        ("int8/8", "int8", "int8", "int8", False),
        ("int4", "int4", "int4", "int8", True),
        ("int4/8", "int4", "int4", "int8", True),
        ("int4/4", "int4/4", "int4", "int4", True),
        ("int4/int4", "int4/4", "int4", "int4", True),
        (" INT4 / 16 ", "int4/16", "int4", "bf16", True),
        ("int8/fp16", "int8/fp16", "int8", "fp16", False),
        ("int8/4", "int8/4", "int8", "int4", False),
        ("int4[ef=1]", "int4", "int4", "int8", True),
        ("int4/4[ef=0]", "int4/4[ef=0]", "int4", "int4", False),
        ("int8[ef=on]", "int8[ef=1]", "int8", "int8", True),
    ],
)
def test_specs_parse_and_have_one_canonical_form(text, canonical, up, down, feedback):
    parsed = codec(text)
    assert parsed.spec == canonical == str(parsed)
    assert (parsed.up, parsed.down) == (_core.CODECS[up], _core.CODECS[down])
    assert parsed.error_feedback is feedback
    assert codec(canonical) == parsed
    assert codec(parsed) is parsed
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    assert hash(codec(text)) == hash(parsed)


def test_options():
    parsed = codec("int4[rounding=stochastic, seed=7, ef=0]")
    assert (parsed.rounding, parsed.seed, parsed.error_feedback) == ("stochastic", 7, False)
    assert parsed.spec == "int4[rounding=stochastic,seed=7,ef=0]"
    assert codec(parsed.spec) == parsed
    assert parsed.with_options(rounding="nearest", seed=0, error_feedback=True) == codec("int4")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int9", "no 'int9'.*did you mean 'int8'.*none, bf16, fp16, int8, int4"),
        ("itn4", "did you mean 'int4'"),
        ("int4/3", "no '3'"),
        ("int4/", "no ''"),
        ("", "no ''"),
        ("fp8", "no 'fp8'"),
        ("topk:0.01", "no 'topk:0.01'"),
        ("int4[", "does not parse"),
        ("int4/4/4", "does not parse"),
        ("int4[rouding=nearest]", "unknown option 'rouding'.*did you mean 'rounding'"),
        ("int4[block=64]", "unknown option 'block'.*known are rounding"),
        ("int4[rounding=up]", "rounding=up.*nearest, stochastic"),
        ("int4[seed]", "needs a value"),
        ("int4[seed=x,rounding=stochastic]", "expected an integer"),
        ("int4[seed=-1,rounding=stochastic]", "2\\*\\*64"),
        ("int4[seed=7]", "no effect"),
        ("bf16[rounding=stochastic]", "bf16 rounds to nearest only"),
        ("int4/16[rounding=stochastic]", "bf16 rounds to nearest only"),
        ("int4[ef=2]", "expected 0 or 1"),
        ("int4[ef=0,ef=1]", "twice"),
        ("none[ef=1]", "takes no options"),
        ("int8/none", "cannot be mixed"),
        (8, "codec is a int"),
        (None, "codec is a NoneType"),
    ],
)
def test_typos_are_refused_with_a_hint(text, reason):
    with pytest.raises(UsageError, match=reason):
        codec(text)


def test_bits_per_value_counts_scales_and_both_ways():
    expected = {"none": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 6.5, "int4/4": 4.5}
    assert {spec: codec(spec).bits_per_value for spec in expected} == expected


def test_wire_bytes_of_each_way():
    assert codec("int4").wire_bytes(3200) == 3200 * 4.5 / 8
    assert codec("int4").wire_bytes(3200, down=True) == 3200 * 8.5 / 8
    assert codec("none").wire_bytes(5) == 20
    assert all(codec(spec).wire_bytes(0) == 0 for spec in [*LOSSY, "none"])
    with pytest.raises(UsageError, match="num_elems is -1"):
        codec("int8").wire_bytes(-1)


def test_down_codec_is_the_second_shot():
    assert codec("int4").down_codec == codec("int8")
    assert codec("int4/4").down_codec == codec("int4/4")
    assert codec("int4/4").down_codec.error_feedback
    assert not codec("int4/4[ef=0]").down_codec.error_feedback
    assert codec("int4/16").down_codec == codec("bf16")


@pytest.mark.parametrize("spec", [*LOSSY, "none"])
@pytest.mark.parametrize("size", [0, 1, 31, 33, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_encode_decode_round_trip_in_torch_and_numpy(spec, size, dtype):
    chosen = codec(spec)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    wire = chosen.encode(x)
    assert isinstance(wire, torch.Tensor)
    assert wire.dtype == torch.uint8
    assert wire.shape == (chosen.wire_bytes(size),)
    out = chosen.decode(wire, size)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float32
    step = {"none": 0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 127, "int4": 1 / 7}[spec]
    bound = step * x.float().abs().max().item() if size else 0
    assert (out - x.float()).abs().le(bound).all()
    again = torch.empty(size, dtype=getattr(torch, dtype))
    assert chosen.decode(wire, size, out=again) is again
    assert torch.equal(again, out.to(again.dtype))
    if dtype != "bfloat16":
        from_numpy = chosen.encode(x.numpy())
        assert isinstance(from_numpy, np.ndarray)
        assert from_numpy.dtype == np.uint8
        assert from_numpy.tobytes() == wire.numpy().tobytes()
        decoded = chosen.decode(from_numpy, size, dtype=dtype)
        assert isinstance(decoded, np.ndarray)
        assert decoded.dtype == dtype
        assert np.array_equal(decoded, again.numpy())


@pytest.mark.parametrize("spec", [*LOSSY, "none"])
def test_decode_add_accumulates_in_place(spec):
    chosen = codec(spec)
    x = np.random.default_rng(0).standard_normal((10, 10)).astype(np.float32)
    wire = chosen.encode(x)
    acc = np.ones((10, 10), np.float32)
    assert chosen.decode_add(wire, acc) is acc
    assert np.array_equal(acc.ravel(), 1 + chosen.decode(wire, 100))


@pytest.mark.parametrize("spec", LOSSY)
def test_residual_holds_what_the_encoding_lost(spec):
    chosen = codec(spec)
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    residual = np.zeros(100, np.float32)
    first = chosen.decode(chosen.encode(x, residual), 100)
    assert np.array_equal(residual, x - first)
    before = residual.copy()
    second = chosen.decode(chosen.encode(x, residual), 100)
    np.testing.assert_allclose(second + residual, x + before, rtol=1e-6, atol=1e-6)


def test_residual_is_left_alone_where_values_are_not_finite():
    x = np.ones(96, np.float32)
    x[40] = np.inf
    residual = np.full(96, 0.25, np.float32)
    out = codec("int8").decode(codec("int8").encode(x, residual), 96)
    assert np.isnan(out[32:64]).all()
    assert np.isfinite(out[:32]).all()
    assert (residual[32:64] == 0.25).all()
    assert (residual[:32] != 0.25).all()


def test_noncontiguous_input_encodes_like_its_copy():
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    wire = codec("int4").encode(x.T)
    assert wire.tobytes() == codec("int4").encode(np.ascontiguousarray(x.T)).tobytes()


def test_stochastic_rounding_depends_on_seed_step_rank_and_element_only():
    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    chosen = codec("int4[rounding=stochastic,seed=7]")
    base = chosen.encode(x, step=3, rank=1).tobytes()
    assert chosen.encode(x, step=3, rank=1).tobytes() == base
    assert chosen.encode(x, step=4, rank=1).tobytes() != base
    assert chosen.encode(x, step=3, rank=2).tobytes() != base
    assert chosen.with_options(seed=8).encode(x, step=3, rank=1).tobytes() != base
    head = chosen.encode(x[:64], step=3, rank=1)
    tail = chosen.encode(x[64:], step=3, rank=1, first_elem=64)
    whole = chosen.decode(chosen.encode(x, step=3, rank=1), 128)
    assert np.array_equal(np.concatenate([chosen.decode(head, 64), chosen.decode(tail, 64)]), whole)


def test_short_buffers_are_a_wire_error_with_both_sizes():
    chosen = codec("int8")
    expected = chosen.wire_bytes(100)
    short = np.zeros(expected - 1, np.uint8)
    zeros = np.zeros(100, np.float32)
    for call in (lambda: chosen.decode(short, 100), lambda: chosen.decode_add(short, zeros)):
        with pytest.raises(WireError, match=f"has {expected - 1} bytes.*100 values.*{expected}"):
            call()


def test_bad_arguments_are_refused():
    chosen = codec("int8")
    x = np.zeros(64, np.float32)
    wire = chosen.encode(x)
    read_only = np.zeros(64, np.float32)
    read_only.flags.writeable = False
    for call, reason in [
        (lambda: chosen.encode(x.astype(np.float64)), "codecs take float32"),
        (lambda: chosen.encode([1.0]), "list, which is no array"),
        (lambda: chosen.encode(x, np.zeros(63, np.float32)), "residual has 63 elements, x has 64"),
        (lambda: chosen.encode(x, np.zeros(64)), "residual: a contiguous float64"),
        (lambda: chosen.encode(x, np.zeros(128, np.float32)[::2]), "residual: a non-contiguous"),
        (lambda: chosen.encode(x, read_only), "residual: .*read-only"),
        (lambda: chosen.encode(x, first_elem=5), "multiple of 32"),
        (lambda: chosen.encode(x, step=-1), "step is -1"),
        (lambda: codec("none").encode(x, x.copy()), "takes no residual"),
        (lambda: chosen.decode(wire.astype(np.int32), 64), "expected contiguous uint8"),
        (lambda: chosen.decode(wire, -1), "num_elems is -1"),
        (lambda: chosen.decode(wire, 64, dtype="float64"), "expected one of float32"),
        (lambda: chosen.decode(wire, 64, out=read_only), "out: .*read-only"),
        (lambda: chosen.decode(wire, 64, out=np.zeros(63, np.float32)), "out has 63 elements"),
        (lambda: chosen.decode(wire, 64, dtype="float32", out=x), "not both"),
        (lambda: chosen.decode_add(wire, np.zeros(64)), "acc: a contiguous float64"),
    ]:
        with pytest.raises(UsageError, match=reason):
            call()


@pytest.mark.parametrize("dtype", ["float16", torch.float16, np.float16, np.dtype("float16")])
def test_decode_takes_dtypes_of_every_library(dtype):
    wire = codec("fp16").encode(np.ones(3, np.float32))
    assert codec("fp16").decode(wire, 3, dtype=dtype).dtype == np.float16


def test_codec_is_reachable_from_the_package():
    assert ringcomm.codec("int8") == codec("int8")
    assert ringcomm.Codec is Codec


def test_without_a_gpu_a_stream_is_refused() -> None:
    if _core.cuda_probe().count:
        pytest.skip("there is a GPU here")
    values = np.ones(64, np.float32)
    with pytest.raises(DeviceError, match="a kernel cannot run on a GPU: "):
        _core.divide(values.ctypes.data, 64, 2.0, stream=0)
    assert (values == 1).all()
