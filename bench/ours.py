"""ringcomm's rows: through the communicator, on memory that all ranks map, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

import ringcomm
from bench.contender import Contender, Unsupported
from bench.operations import Buffers, Case
from bench.torch_distributed import TorchDistributed

__all__ = ["OneByOne", "Ringcomm", "Symmetric", "through_dist"]


class Ringcomm(Contender):
    """``comm.all_reduce(x)`` and its like.

    Args:
        codec: Of an all_reduce; with one, other operations get no row.
        algo: Forced upon an all_reduce; None: the table chooses.
    """

    name = "ringcomm"

    def __init__(
        self, comm: ringcomm.Communicator, codec: str = "none", algo: str | None = None
    ) -> None:
        super().__init__()
        self.comm, self.codec, self.algo = comm, codec, algo

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        comm, source, target, root = self.comm, buffers.source, buffers.target, case.root
        is_root = case.rank == root
        if self.codec != "none":
            return self._encoded(case, target)
        if case.op == "all_reduce":
            algo = self.algo
            return lambda: comm.all_reduce(target, case.redop, None, algo)
        if case.op == "reduce":
            return lambda: comm.reduce(target, root, case.redop)
        if case.op == "broadcast":
            return lambda: comm.broadcast(target, root)
        if case.op == "all_gather":
            return lambda: comm.all_gather(source, target)
        if case.op == "reduce_scatter":
            return lambda: comm.reduce_scatter(source, case.redop, target)
        if case.op == "all_to_all":
            return lambda: comm.all_to_all(source, target)
        if case.op == "gather":
            return lambda: comm.gather(source, root, target if is_root else None)
        if case.op == "scatter":
            return lambda: comm.scatter(source if is_root else None, root, target)
        if case.op == "coalesced":
            arrays = case.listed(target)
            return lambda: comm.all_reduce_coalesced(arrays, case.redop)
        return self._ping_pong(case, target)

    def describe(self, case: Case) -> dict[str, Any]:
        if case.op == "send_recv":
            return {"codec": self.codec, "wire_bytes": case.num_bytes}
        if case.op == "coalesced":
            return {"codec": self.codec}
        plan = self.comm.explain(case.plan_bytes, case.op, self.codec)
        forced = self.algo if case.op == "all_reduce" and self.codec == "none" else None
        return {"algo": forced or plan.algo, "codec": self.codec, "wire_bytes": plan.wire_bytes}

    def _encoded(self, case: Case, target: Any) -> Callable[[], Any]:
        if case.op != "all_reduce":
            raise Unsupported("codecs are of all_reduce")
        if case.redop not in ("sum", "avg"):
            raise Unsupported(f"a codec has no {case.redop}")
        if case.dtype_name not in ("float32", "bfloat16", "float16"):
            raise Unsupported(f"a codec does not encode {case.dtype_name}")
        return lambda: self.comm.all_reduce(target, case.redop, self.codec)

    def _ping_pong(self, case: Case, target: Any) -> Callable[[], Any]:
        send, recv = getattr(self.comm, "send", None), getattr(self.comm, "recv", None)
        if send is None or recv is None:
            raise Unsupported("this ringcomm has no send and recv")

        def first() -> None:
            send(target, 1)
            recv(target, 1)

        def second() -> None:
            recv(target, 0)
            send(target, 0)

        return (first, second, lambda: None)[min(case.rank, 2)]


class OneByOne(Ringcomm):
    """A call for every array of a list, which is what a coalesced one is instead of."""

    name = "singly"

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        if case.op != "coalesced":
            raise Unsupported(f"{case.op} has one array")
        all_reduce, op, arrays = self.comm.all_reduce, case.redop, case.listed(buffers.target)

        def one_by_one() -> None:
            for array in arrays:
                all_reduce(array, op)

        return one_by_one


class Symmetric(Ringcomm):
    """The same calls on arrays of ``comm.empty(...)``, which the peers read where they are."""

    name = "symmetric"
    OPS = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")

    def __init__(self, comm: ringcomm.Communicator) -> None:
        if not hasattr(comm, "empty"):
            raise Unsupported("this ringcomm has no Communicator.empty")
        super().__init__(comm)

    def allocate(self, case: Case) -> Buffers:
        if case.op not in self.OPS:
            raise Unsupported(f"{case.op} has no form of its own for such arrays")
        return case.buffers(lambda count: self.comm.empty(count, case.dtype))

    def describe(self, case: Case) -> dict[str, Any]:
        plan = self.comm.explain(case.plan_bytes, case.op, symmetric=True)
        return {"algo": plan.algo, "codec": "none", "wire_bytes": plan.wire_bytes}


def through_dist() -> TorchDistributed:
    """``dist.all_reduce(x)`` and its like on a group of our backend; collective.

    Raises:
        Unsupported: this build has no backend.
    """
    try:
        import ringcomm.backend
    except ImportError as error:
        raise Unsupported(f"ringcomm.backend cannot be imported ({error})") from None
    ringcomm.backend.register()
    return TorchDistributed("dist", None, dist.new_group(backend="ringcomm"))
