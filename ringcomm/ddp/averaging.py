"""The mean of one bucket over all ranks, exact or through a codec.

All of it happens on the calling thread, and on a GPU on the current stream.
"""

import torch

from ringcomm.codecs import Codec
from ringcomm.ddp.bucket import Plan
from ringcomm.ddp.counters import Counters
from ringcomm.ddp.residuals import kept_where_unused
from ringcomm.ddp.transport import Transport

__all__ = ["average_encoded", "average_exact", "average_sparse"]


def average_exact(
    transport: Transport, buffer: torch.Tensor, counters: Counters, warmup: bool
) -> torch.Tensor:
    """The mean, in place."""
    if transport.world_size > 1:
        before = transport.bytes_sent
        transport.all_reduce(torch.view_as_real(buffer) if buffer.is_complex() else buffer, "avg")
        counters.add_exact(transport.bytes_sent - before, buffer.numel(), warmup)
    return buffer


def average_sparse(
    transport: Transport, gradient: torch.Tensor, counters: Counters, warmup: bool
) -> torch.Tensor:
    """The exact mean of sparse gradients: everybody gets everybody's indices and values.

    On a GPU the host waits, to learn how many there are.
    """
    if transport.world_size == 1:
        return gradient
    before = transport.bytes_sent
    gradient = gradient.coalesce()
    indices, values = gradient.indices(), gradient.values()
    own = torch.tensor([values.shape[0]], device=values.device)
    counts = [int(count) for count in transport.all_gather(own)]
    most = max(counts)
    if most == 0:
        return gradient
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    padded_indices = indices.new_zeros((most, indices.shape[0]))
    padded_indices[: values.shape[0]] = indices.t()
    padded_values = wide.new_zeros((most, *values.shape[1:]))
    padded_values[: values.shape[0]] = wide
    parts = transport.all_gather(padded_indices)
    all_indices = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    if padded_values.is_complex():
        real = transport.all_gather(torch.view_as_real(padded_values))
        parts = [torch.view_as_complex(part) for part in real]
    else:
        parts = transport.all_gather(padded_values)
    all_values = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    total = torch.sparse_coo_tensor(
        all_indices.t(), all_values, gradient.shape, check_invariants=False
    ).coalesce()
    mean = (total.values() / transport.world_size).to(values.dtype)
    counters.add_exact(transport.bytes_sent - before, values.numel(), warmup)
    return torch.sparse_coo_tensor(
        total.indices(), mean, gradient.shape, is_coalesced=True, check_invariants=False
    )


def average_encoded(
    transport: Transport,
    buffer: torch.Tensor,
    plan: Plan,
    codec: Codec,
    counter: int,
    counters: Counters,
    may_be_unused: bool,
) -> torch.Tensor:
    """The mean, in place: through ``codec``, with the plan's residuals, but for what the plan says goes exact.

    Args:
        counter: Of stochastic rounding.
        may_be_unused: As in :func:`~ringcomm.ddp.residuals.kept_where_unused`.
    """
    before = transport.bytes_sent
    small = torch.cat([buffer[a:b] for a, b in plan.exact]) if plan.exact else None
    if plan.encoded:
        for begin, end in plan.exact:
            buffer[begin:end].zero_()
        with kept_where_unused(buffer, plan, may_be_unused):
            transport.all_reduce_encoded(buffer, codec, plan.residual, plan.owner_residual, counter)
        counters.add_encoded(transport.bytes_sent - before, plan.num_encoded)
        counters.codec_seconds = transport.codec_seconds
    if small is not None:
        before = transport.bytes_sent
        transport.all_reduce(small, "avg")
        counters.add_exact(transport.bytes_sent - before, small.numel(), False)
        sizes = [end - begin for begin, end in plan.exact]
        for (begin, end), part in zip(plan.exact, torch.split(small, sizes), strict=True):
            buffer[begin:end] = part
    return buffer
