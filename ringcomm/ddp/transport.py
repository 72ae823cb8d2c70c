"""What carries the gradients of the DDP hook: a ringcomm communicator or a torch process group.

Both are used by one worker thread only, block it, reduce in the same order and give the same bits:
every rank's whole array is encoded (also the own part), summed in float32 in rank order, divided
for a mean, encoded again by the owner of each chunk, and decoded by everybody, the owner included.
"""

import contextlib
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringcomm import _core
from ringcomm.codecs import BLOCK_ELEMS, Codec
from ringcomm.errors import (
    AbortedError,
    DeadlineError,
    PeerLostError,
    RingcommError,
    UsageError,
)

__all__ = [
    "CHOICES",
    "CommTransport",
    "Config",
    "GroupTransport",
    "Transport",
    "make_transport",
    "no_cuda",
]

CHOICES = ("auto", "ringcomm", "torch")

_DTYPES: dict[torch.dtype, int] = {
    getattr(torch, name): code for name, code in _core.DTYPES.items()
}
_FLOAT32: int = _core.DTYPES["float32"]


class Transport(Protocol):
    """Blocking collectives on contiguous 1-D CPU tensors, called in the same order on all ranks."""

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

    def owned(self, num_elems: int) -> torch.Tensor:
        """Bool mask of the elements whose sums this rank encodes."""

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

    def owned(self, num_elems: int) -> torch.Tensor:
        mask = torch.zeros(num_elems, dtype=torch.bool)
        for begin, end in self._comm.owned(num_elems):
            mask[begin:end] = True
        return mask

    def close(self) -> None:
        if self._owns_comm:
            self._comm.close()


class GroupTransport:
    """Any torch process group, through a private copy of it with the same backend.

    The codec's two shots are an all-to-all of encoded chunks and an all-gather of encoded sums,
    both in uint8. Making one is collective over the ranks of ``group``.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, timeout: timedelta | None = None
    ) -> None:
        if group is None:
            group = dist.group.WORLD
        ranks = dist.get_process_group_ranks(group)
        backend = dist.get_backend(group)
        if str(backend) == "nccl":
            raise UsageError(
                "the process group is NCCL, which has no CPU tensors, and CUDA arrays are not "
                "supported by this build; initialise with 'cpu:gloo,cuda:nccl' or 'gloo'"
            )
        world = dist.get_world_size()
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        if len(ranks) < world:
            # Only members need to come here; MPI cannot do that, and says so.
            options["use_local_synchronization"] = True
        self._group = dist.new_group(
            ranks, backend=str(backend), group_desc="ringcomm_ddp", **options
        )
        self.name = f"torch:{backend}"
        self.rank = dist.get_rank(group)
        self.world_size = len(ranks)
        self.bytes_sent = 0
        self.codec_seconds = 0.0
        self._scratch: dict[str, torch.Tensor] = {}
        self._closed = False

    def all_reduce_encoded(
        self,
        x: torch.Tensor,
        codec: Codec,
        residual: torch.Tensor | None,
        owner_residual: torch.Tensor | None,
        step: int,
    ) -> None:
        world = self.world_size
        num_elems = x.numel()
        chunk = -(-num_elems // (world * BLOCK_ELEMS)) * BLOCK_ELEMS
        bounds = [
            (min(num_elems, r * chunk), min(num_elems, (r + 1) * chunk)) for r in range(world)
        ]
        begin, end = bounds[self.rank]
        stochastic = codec.rounding == "stochastic"
        item = x.element_size()
        input_ptr, dtype = x.data_ptr(), _DTYPES[x.dtype]
        residual_ptr = 0 if residual is None else residual.data_ptr()
        owner_ptr = 0 if owner_residual is None else owner_residual.data_ptr()

        # First shot: chunk r of everybody to rank r.
        started = time.perf_counter()
        out_bytes = [int(_core.wire_bytes(codec.up, last - first)) for first, last in bounds]
        own_bytes = out_bytes[self.rank]
        wire = self._bytes("out", sum(out_bytes))
        ptr = wire.data_ptr()
        for (first, last), num_bytes in zip(bounds, out_bytes, strict=True):
            _core.encode(
                codec.up,
                input_ptr + first * item,
                dtype,
                last - first,
                ptr,
                residual_ptr and residual_ptr + first * 4,
                stochastic,
                codec.seed,
                step,
                self.rank,
                first,
            )
            ptr += num_bytes
        arrived = self._bytes("in", own_bytes * world)
        self.codec_seconds += time.perf_counter() - started
        with self._translated("all-to-all of encoded gradients"):
            dist.all_to_all_single(arrived, wire, [own_bytes] * world, out_bytes, group=self._group)
        self.bytes_sent += sum(out_bytes) - own_bytes

        # The owner sums in rank order, in float32.
        started = time.perf_counter()
        total = self._floats(end - begin)
        for peer in range(world):
            _core.decode_add(
                codec.up,
                arrived.data_ptr() + peer * own_bytes,
                end - begin,
                total.data_ptr(),
                peer == 0,
            )
        _core.divide(total.data_ptr(), end - begin, world)

        # Second shot: everybody's sums to everybody, in equal slots.
        slot = int(_core.wire_bytes(codec.down, chunk))
        sums = self._bytes("sums", slot)
        _core.encode(
            codec.down,
            total.data_ptr(),
            _FLOAT32,
            end - begin,
            sums.data_ptr(),
            owner_ptr and owner_ptr + begin * 4,
            stochastic,
            codec.seed,
            step,
            world,  # the rank of sums in the counter of stochastic rounding
            begin,
        )
        gathered = self._bytes("gathered", slot * world)
        self.codec_seconds += time.perf_counter() - started
        with self._translated("all-gather of encoded sums"):
            self._all_gather_single(gathered, sums)
        self.bytes_sent += slot * (world - 1)
        started = time.perf_counter()
        for peer, (first, last) in enumerate(bounds):
            _core.decode(
                codec.down,
                gathered.data_ptr() + peer * slot,
                last - first,
                input_ptr + first * item,
                dtype,
            )
        self.codec_seconds += time.perf_counter() - started

    def all_reduce(self, x: torch.Tensor, op: str) -> None:
        # 16-bit sums are kept in float32, as everywhere in ringcomm; Gloo would round every hop.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        with self._translated("all-reduce"):
            dist.all_reduce(wide, group=self._group)
        if op == "avg":
            wide.div_(self.world_size)
        if wide is not x:
            x.copy_(wide)
        self.bytes_sent += 2 * (self.world_size - 1) * wide.nbytes // self.world_size

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        flat = x.contiguous().view(-1)
        gathered = flat.new_empty(flat.numel() * self.world_size)
        with self._translated("all-gather"):
            self._all_gather_single(gathered, flat)
        self.bytes_sent += x.nbytes * (self.world_size - 1)
        return list(gathered.view(self.world_size, *x.shape))

    def owned(self, num_elems: int) -> torch.Tensor:
        chunk = -(-num_elems // (self.world_size * BLOCK_ELEMS)) * BLOCK_ELEMS
        mask = torch.zeros(num_elems, dtype=torch.bool)
        mask[self.rank * chunk : (self.rank + 1) * chunk] = True
        return mask

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Letting go of the group lets it join its threads now and not at the end of the interpreter.
        # torch.distributed as a whole may be gone already.
        group = self.__dict__.pop("_group")
        with contextlib.suppress(ValueError, AssertionError, RuntimeError):
            dist.destroy_process_group(group)

    def _all_gather_single(self, output: torch.Tensor, x: torch.Tensor) -> None:
        # torch 2.13 renamed all_gather_into_tensor.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(output, x, group=self._group)

    def _bytes(self, role: str, num_bytes: int) -> torch.Tensor:
        kept = self._scratch.get(role)
        if kept is None or kept.numel() < num_bytes:
            kept = self._scratch[role] = torch.empty(num_bytes, dtype=torch.uint8)
        return kept[:num_bytes]

    def _floats(self, num_elems: int) -> torch.Tensor:
        kept = self._scratch.get("total")
        if kept is None or kept.numel() < num_elems:
            kept = self._scratch["total"] = torch.empty(num_elems)
        return kept[:num_elems]

    def _translated(self, what: str) -> "_Translated":
        if self._closed:
            raise AbortedError(f"{what}: this transport is closed")
        return _Translated(self, what)


class _Translated:
    """Turns errors of torch.distributed into ours; the original stays as the cause."""

    __slots__ = ("transport", "what")

    def __init__(self, transport: GroupTransport, what: str) -> None:
        self.transport = transport
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, RingcommError):
            return
        text = str(error)
        folded = text.lower()
        cls: type[RingcommError] = RingcommError
        if "timed out" in folded or "timeout" in folded:
            cls = DeadlineError
        elif "connection closed" in folded or "connection reset" in folded or "broken" in folded:
            cls = PeerLostError
        raise cls(
            f"{self.what} over {self.transport.name} failed on rank {self.transport.rank} of "
            f"{self.transport.world_size}: {text}"
        ) from error


# ---- choosing one ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    transport: str
    warmup_steps: int
    min_elems: int
    timeout: timedelta | None
    log_every: int


def make_transport(
    config: Config, group: dist.ProcessGroup | None, comm: Any
) -> tuple[Transport, str]:
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
    return GroupTransport(group, config.timeout), why


def no_cuda(what: str, device: torch.device) -> str:
    return (
        f"{what} is on {device}: CUDA arrays are not supported by this build, whose transports and "
        "codecs are on the CPU. Train on the CPU, or leave the hook off"
    )
