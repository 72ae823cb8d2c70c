"""What the bench calls a right result: it must agree with the oracle, and notice one wrong element."""

from __future__ import annotations

import pytest
import torch

from bench import operations
from bench.operations import DTYPES, OPERATIONS, Case
from ringcomm import reference

SIZES = (4, 4096, 3 * 4 * 1009)


@pytest.fixture(autouse=True)
def short_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of several periods, without being large."""
    monkeypatch.setattr(operations, "PERIOD", 251)


def right_results(op: str, cases: list[Case]) -> list[torch.Tensor | None]:
    """What every rank must end with, put together here in float64; None: nothing is said of it."""
    inputs = [case.buffers().source.double() for case in cases]
    n, root = len(cases), cases[0].root
    redop = {"product": lambda x: x.prod(0), "min": lambda x: x.amin(0), "max": lambda x: x.amax(0)}
    total = {"sum": lambda x: x.sum(0), "avg": lambda x: x.sum(0) / n} | redop
    if op in ("all_reduce", "coalesced"):
        return [total[cases[0].redop](torch.stack(inputs))] * n
    if op == "reduce":
        reduced = total[cases[0].redop](torch.stack(inputs))
        return [reduced if rank == root else None for rank in range(n)]
    if op == "broadcast":
        return [inputs[root]] * n
    if op == "all_gather":
        return [torch.cat(inputs)] * n
    if op == "reduce_scatter":
        return list(total[cases[0].redop](torch.stack(inputs)).chunk(n))
    if op == "all_to_all":
        return [torch.cat([one.chunk(n)[rank] for one in inputs]) for rank in range(n)]
    if op == "gather":
        return [torch.cat(inputs) if rank == root else None for rank in range(n)]
    if op == "scatter":
        return list(inputs[root].chunk(n))
    return [inputs[0] if rank < 2 else None for rank in range(n)]


def make_cases(op: str, dtype: str, size: int, n: int, redop: str = "sum") -> list[Case]:
    return [Case(op, dtype, size, rank, n, redop, n - 1) for rank in range(n)]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_right_results_pass_and_one_wrong_element_does_not(op: str, size: int, n: int) -> None:
    cases = make_cases(op, "float32", size, n)
    for case, want in zip(cases, right_results(op, cases), strict=True):
        got = case.buffers().target.clone()
        if want is None:
            assert case.count_wrong(got) == (0, 0.0)
            continue
        got.copy_(want)
        wrong, error = case.count_wrong(got)
        assert wrong == 0 and error < 1e-12
        for place in (0, got.numel() // 2, got.numel() - 1):
            spoilt = got.clone()
            spoilt[place] += 1e-3
            assert case.count_wrong(spoilt)[0] == 1
            spoilt[place] = float("nan")
            assert case.count_wrong(spoilt)[0] == 1


@pytest.mark.parametrize("redop", ["sum", "avg", "min", "max", "product"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_no_error_in_any_dtype(dtype: str, redop: str) -> None:
    cases = make_cases("all_reduce", dtype, 4096, 3, redop)
    (want, *_) = right_results("all_reduce", cases)
    assert want is not None
    kind = cases[0].dtype
    got = want.to(kind) if kind.is_floating_point else want.long().to(kind)
    assert cases[0].count_wrong(got)[0] == 0
    got[7] += 1
    assert cases[0].count_wrong(got)[0] == 1


def test_parts_in_the_wrong_order_are_wrong() -> None:
    cases = make_cases("all_gather", "float32", 4096, 2)
    want = right_results("all_gather", cases)[0]
    assert want is not None
    swapped = torch.cat(want.float().chunk(2)[::-1])
    assert cases[0].count_wrong(swapped)[0] > swapped.numel() * 0.9


@pytest.mark.parametrize(
    ("codec", "up", "down"), [("int8", "int8", "int8"), ("int4", "int4", "int8")]
)
def test_a_codec_may_be_off_by_its_step_and_no_more(codec: str, up: str, down: str) -> None:
    cases = make_cases("all_reduce", "float32", 4096, 2)
    inputs = [case.buffers().source.numpy() for case in cases]
    got = torch.from_numpy(reference.all_reduce(inputs, "sum", up, down))
    wrong, error = cases[0].count_wrong(got, codec)
    assert wrong == 0 and 0 < error < 0.05
    assert cases[0].count_wrong(got)[0] > 0  # it is not exact
    got[3] += 3 * max(abs(one).max() for one in inputs)
    assert cases[0].count_wrong(got, codec)[0] == 1


def test_sizes_count_all_parts_and_busbw_is_that_of_nccl_tests() -> None:
    case = Case("all_gather", "float32", 4096, 0, 3, "sum", 0)
    assert (case.part, case.count, case.num_bytes) == (341, 1023, 4092)
    assert case.buffers().source.numel() == 341 and case.buffers().target.numel() == 1023
    factors = {op: kind.bus_factor(4) for op, kind in OPERATIONS.items()}
    assert factors["all_reduce"] == 1.5 and factors["all_gather"] == 0.75
    assert factors["broadcast"] == factors["reduce"] == 1.0


def test_in_place_operations_get_their_input_back() -> None:
    case = Case("all_reduce", "float32", 64, 1, 2, "sum", 0)
    buffers = case.buffers()
    assert buffers.source is buffers.target
    buffers.target.zero_()
    case.reset(buffers)
    assert torch.equal(buffers.target, case.input)
    case.reset(buffers, 0)
    assert not buffers.target.any()
