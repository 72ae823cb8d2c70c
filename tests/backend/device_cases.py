"""What the torch backend promises on GPUs besides the cases of the CPU, with the emulated ones of tests/simt."""

import logging

import torch
import torch.distributed as dist

# What a kernel may still write to when its call has failed. On a real GPU the order of streams sees to that.
KEPT = []


def calls_go_to_the_gpu(rank, world):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("ringcomm.INIT")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    group = dist.new_group()
    assert not any("on simt" in line for line in said), "set up before the first call"
    x = torch.full((5,), float(rank))
    dist.all_reduce(x, group=group)
    assert x.tolist() == [sum(range(world))] * 5
    assert any("on simt" in line for line in said)
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    try:
        KEPT.append(torch.ones(3 + rank))
        dist.all_reduce(KEPT[-1], group=group)
    except dist.DistBackendError as error:
        assert "on GPUs" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def asynchronous_calls_and_futures(rank, world):
    total = float(sum(range(world)))
    xs = [torch.full((count,), float(rank)) for count in (1, 1000, 40_000)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    for x, work in zip(xs, works, strict=True):
        assert work.wait()
        assert work.is_completed()
        assert x.eq(total).all()
    x = torch.full((3, 4), float(rank)).t()  # not contiguous: a copy travels, and is copied back
    value = dist.all_reduce(x, async_op=True).get_future().then(lambda f: f.value()[0] * 2).wait()
    assert value.eq(2 * total).all()
    assert x.eq(total).all()
    dist.barrier()


def a_late_rank_is_named_and_the_group_is_lost(rank, world):
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=2))
    x = torch.ones(10)
    dist.all_reduce(x, group=group)
    if rank == 0:
        try:
            dist.all_reduce(x, group=group)
        except dist.DistBackendError as error:
            assert "Timed out" in str(error), error
        else:
            raise AssertionError("nothing was raised")
