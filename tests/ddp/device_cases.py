"""What the DDP hook promises on GPUs, with the emulated ones of tests/simt, whose arrays are the host's."""

import cases
import torch
import torch.distributed as dist

import ringcomm
from ringcomm import _core
from ringcomm.ddp import attach, group_transport
from ringcomm.ddp.group_transport import GroupTransport

SPECS = ("none", "bf16", "int8", "int4", "int4/4", "int4/4[rounding=stochastic,seed=3]")


class InHostOrder:
    """A communicator whose calls are done when they return, as torch's are that come next on the host.

    On a real GPU a stream sees to that.
    """

    def __init__(self, comm):
        self.comm = comm

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def all_reduce(self, *args, **options):
        result = self.comm.all_reduce(*args, **options)
        self.comm.synchronize()
        return result

    def all_gather(self, *args, **options):
        result = self.comm.all_gather(*args, **options)
        self.comm.synchronize()
        return result


def trained(rank, spec, comm):
    """Parameters and residuals of some steps, in which buckets are rebuilt."""
    model = cases.layers(bucket_cap_mb=0.02)
    with attach(model, spec, comm=comm, warmup_steps=1) as state:
        cases.train(model, torch.optim.SGD(model.parameters(), 0.1), rank, range(4))
        kept = state.state_dict()["residuals"]
    cases.same_everywhere(*model.parameters())
    return [parameter.detach().clone() for parameter in model.parameters()], kept


def training_on_gpus_gives_the_bits_of_the_cpu(rank, world):
    on_cpu = ringcomm.init(group=dist.group.WORLD)
    on_gpu = ringcomm.init(group=dist.group.WORLD, device="simt")
    assert on_gpu.device == "simt"
    for spec in SPECS:
        parameters, kept = trained(rank, spec, on_cpu)
        on_gpu.reset_stats()
        same, also_kept = trained(rank, spec, InHostOrder(on_gpu))
        assert on_gpu.stats()["all_reduce"]["calls"] > 0
        for one, other in zip(parameters, same, strict=True):
            assert torch.equal(one, other), spec
        assert kept.keys() == also_kept.keys()
        for name in kept:
            assert torch.equal(kept[name], also_kept[name]), (spec, name)
    on_cpu.close()
    on_gpu.close()


class KernelsInHostOrder(GroupTransport):
    """A process group whose codec runs in kernels, each done before the group's call that comes next."""

    def all_reduce_encoded(self, *args):
        on_host = group_transport._where
        group_transport._where = lambda device: {"stream": 0}
        try:
            super().all_reduce_encoded(*args)
            _core.simt.synchronize(0)
        finally:
            group_transport._where = on_host

    def _translated(self, what):
        _core.simt.synchronize(0)
        return super()._translated(what)


def process_groups_get_the_same_bytes_from_kernels(rank, world):
    transports = [GroupTransport(), KernelsInHostOrder()]
    for spec in ("bf16", "int8", "int4", "int4/4[rounding=stochastic,seed=7]"):
        codec = ringcomm.codec(spec)
        for num_elems in (0, 1, 33, 1000, 5003):
            for dtype in (torch.float32, torch.bfloat16):
                x = cases.rows(rank, num_elems, num_elems).to(dtype)
                seen = []
                for transport in transports:
                    got, residual, owner = x.clone(), torch.zeros(num_elems), torch.zeros(num_elems)
                    for step in range(2):
                        transport.all_reduce_encoded(got, codec, residual, owner, step)
                    seen.append((got, residual, owner))
                for one, other in zip(*seen, strict=True):
                    assert torch.equal(one, other), (spec, num_elems, dtype)
                cases.same_everywhere(got)
    for transport in transports:
        transport.close()


def nan_reaches_every_rank(rank, world):
    comm = ringcomm.init(group=dist.group.WORLD, device="simt")
    model = cases.linear()
    with attach(model, "int4/4", comm=InHostOrder(comm), warmup_steps=0):
        gradient = cases.rows(rank, 1, 64, 64)
        if rank == world - 1:
            gradient[1, 40] = float("nan")
        handle = next(model.parameters()).register_hook(lambda _: gradient)
        got = cases.put_gradient(model, gradient)
        handle.remove()
        bad = torch.zeros(64, 64, dtype=torch.bool)
        bad[1, 32:] = True
        assert torch.equal(torch.isnan(got), bad)
    comm.close()
