"""A drop-in communication hook for ``torch.nn.parallel.DistributedDataParallel``.

::

    model = DistributedDataParallel(module)
    state = ringcomm.attach(model, codec="int4")      # or, the same in torch's own words:
    state = HookState(model, codec="int4")
    model.register_comm_hook(state, ringcomm.ddp.hook)

Each gradient bucket becomes the mean over all ranks, with the same bits on every rank:

- Parameters of two or more dimensions and at least ``min_elems`` elements travel through the codec;
  what the encoding loses is kept per parameter (error feedback) and added the next time.
- Everything else goes exact: biases and other 1-D parameters, small ones, sparse, float64 and
  complex gradients, and all of it during the first ``warmup_steps`` steps.
- The mean is always over the full world size, also under ``Join`` with uneven inputs.
- Gradients with NaN or Inf arrive as NaN on every rank, and leave the error feedback untouched.

The hook itself only hands the bucket to a worker thread and returns a future. That thread runs the
buckets strictly in order, over a communicator of its own; nothing ever waits inside a future's
callback. Buckets on a GPU are queued there, on a stream beside the current one, over ringcomm inside
a host and over NCCL (or whatever the process group has for GPUs) else. If it fails, ``backward()``
raises the error and the state refuses to go on.

Results depend on the layout of DDP's buckets only through blocks of 32 values: if the sizes of all
compressed parameters are multiples of 32, not at all.
"""

from ringcomm.ddp.entry import attach as attach
from ringcomm.ddp.entry import hook as hook
from ringcomm.ddp.state import HookState as HookState

__all__ = ["HookState", "attach", "hook"]
