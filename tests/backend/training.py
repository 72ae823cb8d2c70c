"""What torch builds on a process group, on every rank of a "ringcomm" group: the same results as one
process, or as Gloo."""

import copy
import functools
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    """Two layers, a buffer, and if asked for a layer that stays unused."""

    def __init__(self, spare=False):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        if spare:
            self.spare = nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return self.second(torch.relu(self.first(x)))


def batch(rank, step=0):
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(6, 8, generator=generator)


@functools.cache
def gloo():
    return dist.new_group(backend="gloo")


def train(model, rank, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_as_gloo(rank, prepare=lambda model: None, spare=False, **options):
    trained = []
    for group in (dist.group.WORLD, gloo()):
        torch.manual_seed(0)
        model = DDP(Net(spare), process_group=group, **options)
        prepare(model)
        trained.append(train(model, rank))
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def ddp_equals_one_process(rank, world):
    alone, parallel = Net(), DDP(Net(), gradient_as_bucket_view=True)
    train(parallel, rank)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        alone(torch.cat([batch(r, step) for r in range(world)])).square().mean().backward()
        optimizer.step()
    for ours, theirs in zip(parallel.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def ddp_with_unused_parameters(rank, world):
    same_as_gloo(rank, spare=True, find_unused_parameters=True)


def ddp_with_a_static_graph(rank, world):
    same_as_gloo(rank, spare=True, static_graph=True)


def ddp_with_small_buckets(rank, world):
    same_as_gloo(rank, spare=True, find_unused_parameters=True, bucket_cap_mb=0.0001)


def ddp_with_uneven_inputs(rank, world):
    model = DDP(Net())
    with Join([model]):
        for step in range(2 + 3 * rank):
            model(batch(rank, step)).sum().backward()
    weights = [torch.empty(16, 8) for _ in range(world)]
    dist.all_gather(weights, model.module.first.weight.grad)
    assert all(weight.isfinite().all() for weight in weights)


def ddp_without_sync(rank, world):
    model = DDP(Net())
    with model.no_sync():
        model(batch(rank)).sum().backward()
    model(batch(rank, 1)).sum().backward()
    gradients = [torch.empty(16, 8) for _ in range(world)]
    dist.all_gather(gradients, model.module.first.weight.grad)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


def ddp_hook_fp16(rank, world):
    same_as_gloo(
        rank,
        lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook),
    )


def ddp_hook_power_sgd(rank, world):
    # One bucket: with more, callbacks and backward race for the order of calls, on Gloo just as here.
    def prepare(model):
        group = model.process_group
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    same_as_gloo(rank, prepare)


def ddp_hook_built_in(rank, world):
    same_as_gloo(
        rank,
        lambda model: model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS),
    )


def ddp_with_sparse_gradients(rank, world):
    trained = []
    for group in (dist.group.WORLD, gloo()):
        torch.manual_seed(3)
        model = DDP(nn.EmbeddingBag(20, 4, sparse=True), process_group=group)
        model(torch.tensor([[rank, 5], [5, 7 + rank]])).sum().backward()
        trained.append(model.module.weight.grad.to_dense())
    assert torch.equal(*trained)


def zero_redundancy_optimizer(rank, world):
    plain, sharded = DDP(Net()), DDP(Net())
    optimizers = [
        torch.optim.Adam(plain.parameters()),
        ZeroRedundancyOptimizer(sharded.parameters(), torch.optim.Adam),
    ]
    for model, optimizer in zip((plain, sharded), optimizers, strict=True):
        for step in range(3):
            optimizer.zero_grad()
            model(batch(rank, step)).sum().backward()
            optimizer.step()
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def fsdp2_equals_ddp(rank, world):
    plain = Net()
    sharded = copy.deepcopy(plain)
    plain = DDP(plain)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (sharded.first, sharded.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(plain, rank)
    train(sharded, rank)
    norm = nn.utils.clip_grad_norm_(sharded.parameters(), 1.0).full_tensor()
    assert norm.isfinite()
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-6)


def tensor_parallel_equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    alone = Net()
    parallel = parallelize_module(
        copy.deepcopy(alone), mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()}
    )
    x = batch(0)
    torch.testing.assert_close(parallel(x), alone(x))
    parallel(x).sum().backward()
    alone(x).sum().backward()
    torch.testing.assert_close(parallel.first.weight.grad.full_tensor(), alone.first.weight.grad)


def dtensors_are_redistributed(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(8.0 * world).view(2 * world, 4)
    for first in (Shard(0), Replicate()):
        tensor = distribute_tensor(whole, mesh, [first])
        for then in (Shard(0), Shard(1), Replicate()) if 4 % world == 0 else (Replicate(),):
            assert torch.equal(tensor.redistribute(mesh, [then]).full_tensor(), whole)


def checkpoints(rank, world):
    folder = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(folder)
    mesh = init_device_mesh("cpu", (world,))
    saved = {
        "weight": distribute_tensor(torch.arange(8.0 * world), mesh, [Shard(0)]),
        "step": torch.tensor(7),
    }
    dcp.save(saved, checkpoint_id=Path(folder[0]) / "now")
    dcp.async_save(saved, checkpoint_id=Path(folder[0]) / "later").result()
    for name in ("now", "later"):
        loaded = {
            "weight": distribute_tensor(torch.zeros(8 * world), mesh, [Shard(0)]),
            "step": torch.tensor(0),
        }
        dcp.load(loaded, checkpoint_id=Path(folder[0]) / name)
        assert torch.equal(loaded["weight"].full_tensor(), torch.arange(8.0 * world))
        assert loaded["step"] == 7


def pipelines(rank, world):
    torch.manual_seed(5)
    layers = [nn.Linear(8, 8) for _ in range(world)]
    x, target = torch.randn(8, 8), torch.randn(8, 8)
    expected = F.mse_loss(nn.Sequential(*copy.deepcopy(layers))(x), target)
    for schedule_class in (ScheduleGPipe, Schedule1F1B):
        stage = PipelineStage(copy.deepcopy(layers[rank]), rank, world, torch.device("cpu"))
        schedule = schedule_class(stage, n_microbatches=4, loss_fn=F.mse_loss)
        losses = []
        if rank == 0:
            schedule.step(x)
        elif rank == world - 1:
            schedule.step(target=target, losses=losses)
            torch.testing.assert_close(torch.stack(losses).mean(), expected)
        else:
            schedule.step()


def compiled_steps(rank, world):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    assert torch.equal(step(torch.ones(3)), torch.full((3,), 2.0 * world + 1))
    plain, compiled = DDP(Net()), DDP(Net())
    expected = train(plain, rank, 2)
    found = train(torch.compile(compiled, backend="aot_eager"), rank, 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def threads_of_one_rank_use_groups_of_their_own(rank, world):
    groups = [dist.new_group() for _ in range(4)]
    sums = [torch.zeros(1) for _ in groups]

    def work(i):
        for _ in range(50):
            sums[i].fill_(1)
            dist.all_reduce(sums[i], group=groups[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(total == world for total in sums)
