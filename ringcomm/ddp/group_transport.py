"""The gradients of the DDP hook over any torch process group."""

import contextlib
import time
from datetime import timedelta
from typing import Any

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

__all__ = ["GroupTransport"]

_DTYPES: dict[torch.dtype, int] = {
    getattr(torch, name): code for name, code in _core.DTYPES.items()
}
_FLOAT32: int = _core.DTYPES["float32"]


class GroupTransport:
    """Any torch process group, through a private copy of it with the same backend.

    The codec's two shots are an all-to-all of encoded chunks and an all-gather of encoded sums,
    both in uint8. Making one is collective over the ranks of ``group``.

    On a GPU the codec's kernels and the group's calls are queued on the current stream.

    Args:
        group: The ranks; default all.
        timeout: Deadline of each call; default that of ``torch.distributed``.
        on_gpu: The tensors are on GPUs.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        *,
        on_gpu: bool = False,
    ) -> None:
        if group is None:
            group = dist.group.WORLD
        ranks = dist.get_process_group_ranks(group)
        backend = dist.get_backend(group)
        if str(backend) == "nccl" and not on_gpu:
            raise UsageError(
                "the process group is NCCL, which has no CPU tensors, and the model is on the CPU; initialise "
                "with 'cpu:gloo,cuda:nccl' or 'gloo'"
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
        world, num_elems = self.world_size, x.numel()
        chunk = _chunk_elems(num_elems, world)
        bounds = [
            (min(num_elems, r * chunk), min(num_elems, (r + 1) * chunk)) for r in range(world)
        ]
        begin, end = bounds[self.rank]
        own_elems = end - begin
        stochastic = codec.rounding == "stochastic"
        item, input_ptr, dtype = x.element_size(), x.data_ptr(), _DTYPES[x.dtype]
        residual_ptr = 0 if residual is None else residual.data_ptr()
        owner_ptr = 0 if owner_residual is None else owner_residual.data_ptr() + begin * 4
        where = _where(x.device)

        # First shot: chunk r of everybody to rank r.
        started = time.perf_counter()
        out_bytes = [int(_core.wire_bytes(codec.up, last - first)) for first, last in bounds]
        own_bytes = out_bytes[self.rank]
        wire = self._bytes("out", sum(out_bytes), x.device)
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
                **where,
            )
            ptr += num_bytes
        arrived = self._bytes("in", own_bytes * world, x.device)
        self.codec_seconds += time.perf_counter() - started
        with self._translated("all-to-all of encoded gradients"):
            dist.all_to_all_single(arrived, wire, [own_bytes] * world, out_bytes, group=self._group)
        self.bytes_sent += sum(out_bytes) - own_bytes

        # The owner sums in rank order, in float32.
        started = time.perf_counter()
        total = self._floats(own_elems, x.device)
        for peer in range(world):
            _core.decode_add(
                codec.up,
                arrived.data_ptr() + peer * own_bytes,
                own_elems,
                total.data_ptr(),
                peer == 0,
                **where,
            )
        _core.divide(total.data_ptr(), own_elems, world, **where)

        # Second shot: everybody's sums to everybody, in equal slots.
        slot = int(_core.wire_bytes(codec.down, chunk))
        sums = self._bytes("sums", slot, x.device)
        _core.encode(
            codec.down,
            total.data_ptr(),
            _FLOAT32,
            own_elems,
            sums.data_ptr(),
            owner_ptr,
            stochastic,
            codec.seed,
            step,
            world,  # the rank of sums in the counter of stochastic rounding
            begin,
            **where,
        )
        gathered = self._bytes("gathered", slot * world, x.device)
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
                **where,
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

    def owned(self, num_elems: int, device: torch.device) -> torch.Tensor:
        chunk = _chunk_elems(num_elems, self.world_size)
        mask = torch.zeros(num_elems, dtype=torch.bool, device=device)
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

    def _bytes(self, role: str, num_bytes: int, device: torch.device) -> torch.Tensor:
        return self._kept(role, num_bytes, torch.uint8, device)

    def _floats(self, num_elems: int, device: torch.device) -> torch.Tensor:
        return self._kept("total", num_elems, torch.float32, device)

    def _kept(
        self, role: str, num_elems: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        kept = self._scratch.get(role)
        if kept is None or kept.numel() < num_elems or kept.device != device:
            kept = self._scratch[role] = torch.empty(num_elems, dtype=dtype, device=device)
        return kept[:num_elems]

    def _translated(self, what: str) -> "_Translated":
        if self._closed:
            raise AbortedError(f"{what}: this transport is closed")
        return _Translated(self, what)


def _chunk_elems(num_elems: int, world_size: int) -> int:
    """Of what a rank owns: whole blocks."""
    return -(-num_elems // (world_size * BLOCK_ELEMS)) * BLOCK_ELEMS


def _where(device: torch.device) -> dict[str, int]:
    """What tells the codec's functions that memory is a GPU's: the stream to be queued on."""
    if device.type != "cuda":
        return {}
    return {"stream": torch.cuda.current_stream(device).cuda_stream}


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
