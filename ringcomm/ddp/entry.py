"""How a DDP model gets the hook."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from ringcomm.codecs import Codec
from ringcomm.ddp.state import DEFAULT_MIN_ELEMS, HookState
from ringcomm.errors import UsageError

__all__ = ["attach", "hook"]


def hook(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook, for ``ddp_model.register_comm_hook(HookState(...), hook)``.

    Args:
        state: A :class:`HookState` made for the same model.
        bucket: DDP's bucket, on the CPU or a GPU. Its buffer is overwritten with the mean over all ranks.

    Returns:
        A future of ``bucket.buffer()``. Does not block. On a GPU the mean is made on a stream of the
        state's, behind the current one; whoever waits for the future lets its stream wait.

    Raises:
        UsageError: the bucket cannot be handled; the message says why.
        AbortedError: an earlier bucket failed.
    """
    if isinstance(bucket, tuple):
        raise UsageError(
            "DDP called the hook with one gradient instead of a bucket: torch.compile runs with "
            "torch._dynamo.config.optimize_ddp = 'python_reducer', which ignores what hooks return. "
            "Set torch._dynamo.config.optimize_ddp = 'ddp_optimizer' (the default) or False"
        )
    if not isinstance(state, HookState):
        raise UsageError(
            f"the hook's state is a {type(state).__name__}, expected a ringcomm.ddp.HookState: "
            "ddp_model.register_comm_hook(HookState(ddp_model, codec='int4'), ringcomm.ddp.hook)"
        )
    return state.submit(bucket)


def attach(
    ddp_model: DistributedDataParallel,
    codec: str | Codec = "int4",
    *,
    transport: str = "auto",
    process_group: dist.ProcessGroup | None = None,
    comm: Any = None,
    warmup_steps: int | None = None,
    min_elems: int = DEFAULT_MIN_ELEMS,
    scaler: Any = None,
    seed: int | None = None,
    timeout: timedelta | None = None,
    log_every: int = 0,
) -> HookState:
    """Compress the gradient all-reduce of a DDP model. Collective over the model's ranks.

    Call it once, after wrapping and before the first backward, with the same arguments on all
    ranks. Arguments are those of :class:`HookState`.

    Returns:
        The hook's state: statistics, checkpoints, ``close()``.

    Raises:
        UsageError: not a DDP model, a model that has a hook already, parameters on a device that is
            neither the CPU nor a GPU of this build, or bad arguments.
    """
    model = getattr(ddp_model, "_orig_mod", ddp_model)  # a torch.compile wrapper
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"attach() takes a DistributedDataParallel model, found a {type(ddp_model).__name__}; "
            "wrap it first: model = torch.nn.parallel.DistributedDataParallel(module)"
        )
    if getattr(model, "mixed_precision", None) is not None:
        raise UsageError(
            "this model has DDP's mixed_precision, which installs a communication hook of its own; "
            "use torch.autocast instead, or mixed_precision=None"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in model.parameters()):
        raise UsageError(
            "this model has optimizers applied in the backward pass, which install a communication "
            "hook of their own; step the optimizer after backward() instead"
        )
    if model._comm_hooks:
        names = ", ".join(getattr(h, "__qualname__", repr(h)) for h, _ in model._comm_hooks)
        raise UsageError(
            f"this model has a communication hook already ({names}), and DDP takes one only; "
            "attach() once, on a freshly wrapped model"
        )
    state = HookState(
        model,
        codec,
        transport=transport,
        process_group=process_group,
        comm=comm,
        warmup_steps=warmup_steps,
        min_elems=min_elems,
        scaler=scaler,
        seed=seed,
        timeout=timeout,
        log_every=log_every,
    )
    try:
        model.register_comm_hook(state, hook)
    except BaseException as error:
        state.close()
        if isinstance(error, RuntimeError):
            raise UsageError(f"DDP refuses the hook: {error}") from error
        raise
    return state
