"""What torch's backend and the DDP hook promise for tensors on GPUs: one function per promise, run on every rank.

On a real GPU all ranks share it. On the emulated one (RINGCOMM_DEVICE=simt) tensors of the CPU are its arrays.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ringcomm

EMULATED = os.environ.get("RINGCOMM_DEVICE") == "simt"
DEVICE = torch.device("cpu" if EMULATED else "cuda:0")
STEPS = int(os.environ.get("RC_TEST_STEPS", "8"))
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
if not EMULATED:
    torch.cuda.set_device(DEVICE)


def numbers(rank, count, dtype=torch.float32):
    """Whole numbers, so that sums are exact in every order."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 8, (count,), generator=generator).to(dtype)


def same_everywhere(*tensors):
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        copies = [torch.empty_like(raw) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, raw)
        assert all(torch.equal(copies[0], other) for other in copies)


def all_reduce_of_every_dtype(rank, world):
    for dtype in (*FLOATS, torch.int8, torch.int32, torch.int64, torch.uint8):
        for op, combine in ((dist.ReduceOp.SUM, sum), (dist.ReduceOp.MAX, None)):
            for count in (0, 1, 1000, 300_001 if not EMULATED else 2001):
                inputs = [numbers(r, count, dtype) for r in range(world)]
                expected = sum(inputs) if combine else torch.stack(inputs).amax(0)
                x = inputs[rank].to(DEVICE)
                dist.all_reduce(x, op)
                assert torch.equal(x.cpu(), expected), (dtype, op, count)


def moving_collectives(rank, world):
    x = numbers(rank, 77).to(DEVICE)
    everyone = [numbers(r, 77) for r in range(world)]
    gathered = torch.empty(world * 77, device=DEVICE)
    dist.all_gather_into_tensor(gathered, x)
    assert torch.equal(gathered.cpu(), torch.cat(everyone))
    parts = [torch.empty(77, device=DEVICE) for _ in range(world)]
    dist.all_gather(parts, x)
    assert all(torch.equal(part.cpu(), one) for part, one in zip(parts, everyone, strict=True))
    root = world - 1
    copy = x.clone()
    dist.broadcast(copy, root)
    assert torch.equal(copy.cpu(), everyone[root])
    total = torch.empty(11, device=DEVICE)
    dist.reduce_scatter_tensor(total, numbers(rank, 11 * world).to(DEVICE))
    whole = sum(numbers(r, 11 * world) for r in range(world))
    assert torch.equal(total.cpu(), whole[11 * rank : 11 * (rank + 1)])
    out = torch.empty(5 * world, device=DEVICE)
    dist.all_to_all_single(out, numbers(rank, 5 * world).to(DEVICE))
    sent = [numbers(r, 5 * world)[5 * rank : 5 * (rank + 1)] for r in range(world)]
    assert torch.equal(out.cpu(), torch.cat(sent))
    if rank == 0:
        dist.send(x, 1)
    elif rank == 1:
        received = torch.empty(77, device=DEVICE)
        dist.recv(received, 0)
        assert torch.equal(received.cpu(), everyone[0])
    dist.barrier()


def lists_of_tensors_are_reduced_as_one(rank, world):
    counts = (1, 5, 0, 1000, 70_000) * 3
    for async_op in (False, True):
        listed = [numbers(rank, count).to(DEVICE) for count in counts]
        for x in listed:
            x.mul_(2)  # must be done before the collective reads
        work = dist.all_reduce_coalesced(listed, async_op=async_op)
        if async_op:
            work.wait()
        for x, count in zip(listed, counts, strict=True):
            x.add_(1)  # must not come before it has ended
            assert torch.equal(x.cpu(), 2 * sum(numbers(r, count) for r in range(world)) + 1)


def work_is_awaited_by_the_stream(rank, world):
    for _ in range(20):
        x = torch.full((100_000 if not EMULATED else 1000,), float(rank + 1), device=DEVICE)
        x.mul_(2)  # must be done before the collective reads
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        x.add_(1)  # must not come before it has ended
        assert (x.cpu() == world * (world + 1) + 1).all()


def model(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    return nn.Sequential(*layers).to(DEVICE)


def batch(rank, step):
    """A task that a small network learns."""
    generator = torch.Generator().manual_seed(10_000 * rank + step)
    x = torch.randn(64, 64, generator=generator)
    rule = torch.randn(64, 10, generator=torch.Generator().manual_seed(7))
    return x.to(DEVICE), (x @ rule).argmax(1).to(DEVICE)


def train(rank, steps, spec):
    """Losses of the last tenth of the steps, averaged."""
    options = {} if EMULATED else {"device_ids": [0]}
    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.2, **options)
    state = ringcomm.attach(ddp, codec=spec) if spec else None
    optimizer = torch.optim.SGD(ddp.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = batch(rank, step)
        loss = cross_entropy(ddp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - max(1, steps // 10):
            losses.append(loss.detach())
    same_everywhere(*ddp.parameters())
    if state is not None:
        state.close()
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    return float(mean)


def ddp_learns_with_int4_as_well_as_without(rank, world):
    exact = train(rank, STEPS, None)
    small = train(rank, STEPS, "int4")
    if STEPS >= 1000:
        assert exact < 1.0, exact
    assert abs(small - exact) < max(0.05 * exact, 0.05), (small, exact)


def every_codec_trains(rank, world):
    for spec in ("none", "bf16", "int8", "int4/4"):
        train(rank, 10, spec)
