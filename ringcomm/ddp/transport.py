"""What carries the gradients of the DDP hook: a ringcomm communicator or a torch process group.

Both are used by one thread at a time, reduce in the same order and give the same bits: every rank's
whole array is encoded (also the own part), summed in float32 in rank order, divided for a mean,
encoded again by the owner of each chunk, and decoded by everybody, the owner included.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringcomm import _core
from ringcomm.codecs import Codec
from ringcomm.errors import UsageError

__all__ = [
    "CHOICES",
    "CommTransport",
    "Config",
    "Transport",
    "check_device",
    "make_transport",
]

CHOICES = ("auto", "ringcomm", "torch")


class Transport(Protocol):
    """Collectives on contiguous 1-D tensors, all on one device, called in the same order on all ranks.

    On the CPU they block. On a GPU they are queued on the current stream, and block only where a
    communicator cannot queue (``comm.device_mode``), or a process group does not.
    """

    name: str
    rank: int
    world_size: int
    codec_seconds: float
    """Seconds spent encoding and decoding, where that can be told apart; else 0."""

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank handed to others, ever growing."""

    def all_reduce_encoded(
        self,
        x: torch.Tensor,
        codec: Codec,
        residual: torch.Tensor | None,
        owner_residual: torch.Tensor | None,
        step: int,
    ) -> None:
        """Mean over ranks through ``codec``, in place. float32, float16 or bfloat16.

        ``residual`` and ``owner_residual`` are float32, as long as ``x``, updated in place; of
        the second a rank touches only the elements that it owns.
        """

    def all_reduce(self, x: torch.Tensor, op: str) -> None:
        """Exact ``"sum"`` or ``"avg"`` in place. Real floating or integer dtypes.

        16-bit values are summed in float32 and rounded once.
        """

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Equally shaped tensors of all ranks, in rank order."""

    def owned(self, num_elems: int, device: torch.device) -> torch.Tensor:
        """Bool mask, on ``device``, of the elements whose sums this rank encodes there."""

    def close(self) -> None:
        """Release what the transport made. Idempotent, never waits for other ranks."""


class CommTransport:
    """A ringcomm communicator: ranks of one host, codec and transport fused in C++."""

    def __init__(self, comm: Any, *, owns_comm: bool) -> None:
        self.name = "ringcomm"
        self.rank: int = comm.rank
        self.world_size: int = comm.world_size
        self.codec_seconds = 0.0
        self._comm = comm
        self._owns_comm = owns_comm

    @property
    def bytes_sent(self) -> int:
        return sum(int(counters["bytes_sent"]) for counters in self._comm.stats().values())

    def all_reduce_encoded(
        self,
        x: torch.Tensor,
        codec: Codec,
        residual: torch.Tensor | None,
        owner_residual: torch.Tensor | None,
        step: int,
    ) -> None:
        self._comm.all_reduce(
            x,
            op="avg",
            codec=codec,
            residual=residual,
            owner_residual=owner_residual,
            step=step,
        )

    def all_reduce(self, x: torch.Tensor, op: str) -> None:
        self._comm.all_reduce(x, op=op)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        gathered = self._comm.all_gather(x.contiguous())
        return list(gathered.view(self.world_size, *x.shape))

    def owned(self, num_elems: int, device: torch.device) -> torch.Tensor:
        mask = torch.zeros(num_elems, dtype=torch.bool, device=device)
        for begin, end in self._comm.owned(num_elems):
            mask[begin:end] = True
        return mask

    def close(self) -> None:
        if self._owns_comm:
            self._comm.close()


# ---- choosing one ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    transport: str
    warmup_steps: int
    min_elems: int
    timeout: timedelta | None
    log_every: int


def make_transport(
    config: Config, group: dist.ProcessGroup | None, comm: Any, on_gpu: bool
) -> tuple[Transport, str]:
    """What ``config`` asks for, and why it is that. Collective. ``on_gpu``: the buckets are."""
    if comm is not None:
        if config.transport == "torch":
            raise UsageError("comm= is a ringcomm communicator, so transport cannot be 'torch'")
        if dist.is_available() and dist.is_initialized():
            expected = (dist.get_rank(group), dist.get_world_size(group))
            if expected != (comm.rank, comm.world_size):
                raise UsageError(
                    f"comm is rank {comm.rank} of {comm.world_size}, the model's process group is "
                    f"rank {expected[0]} of {expected[1]}; they must be the same ranks"
                )
        return CommTransport(comm, owns_comm=False), "the communicator that was passed"
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("torch.distributed is not initialised: call init_process_group() first")
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not a member of the process group")
    from ringcomm.ddp.group_transport import GroupTransport

    why = "as asked for"
    if config.transport != "torch":
        from ringcomm.bootstrap import init

        try:
            made = init(
                group=dist.group.WORLD if group is None else group,
                timeout=config.timeout,
                name="ddp",
            )
        except UsageError as error:
            if config.transport == "ringcomm":
                raise
            why = f"not shared memory: {error}"
        else:
            return CommTransport(made, owns_comm=True), "all ranks are on this host"
    return GroupTransport(group, config.timeout, on_gpu=on_gpu), why


def check_device(what: str, device: torch.device) -> None:
    """Refuses devices that the hook cannot work on.

    Raises:
        UsageError: with ``what`` is there.
    """
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise UsageError(f"{what} is on {device}, expected the CPU or a CUDA device")
    if _core.RUNTIME != "cuda":
        raise UsageError(
            f"{what} is on {device}, but this build has no CUDA (see python -m ringcomm.info): reinstall "
            "ringcomm where nvcc is, train on the CPU, or leave the hook off"
        )
