"""Any process group of torch as a contender: Gloo, and ringcomm's own backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from bench.contender import Contender, Unsupported
from bench.operations import Buffers, Case

__all__ = ["TorchDistributed"]

# torch 2.13 has renamed them, and warns at the old names.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class TorchDistributed(Contender):
    """Calls of ``torch.distributed`` on one group.

    Args:
        name: The row's ``who``.
        baseline: As :attr:`Contender.baseline`.
        group: None: the default group.
        without: Reduce operators that this backend does not have.
    """

    def __init__(
        self, name: str, baseline: str | None, group: Any = None, without: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.name, self.baseline = name, baseline
        self._group, self._without = group, without

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        if case.kind.reduces and case.redop in self._without:
            raise Unsupported(f"it has no {case.redop}")
        source, target, root, group = buffers.source, buffers.target, case.root, self._group
        op = getattr(dist.ReduceOp, case.redop.upper())
        is_root = case.rank == root
        if case.op == "all_reduce":
            return lambda: dist.all_reduce(target, op, group)
        if case.op == "reduce":
            return lambda: dist.reduce(target, root, op, group)
        if case.op == "broadcast":
            return lambda: dist.broadcast(target, root, group)
        if case.op == "all_gather":
            return lambda: ALL_GATHER(target, source, group)
        if case.op == "reduce_scatter":
            return lambda: REDUCE_SCATTER(target, source, op, group)
        if case.op == "all_to_all":
            return lambda: dist.all_to_all_single(target, source, group=group)
        if case.op == "gather":
            parts = list(target.chunk(case.n)) if is_root else None
            return lambda: dist.gather(source, parts, root, group)
        if case.op == "scatter":
            parts = list(source.chunk(case.n)) if is_root else None
            return lambda: dist.scatter(target, parts, root, group)
        if case.op == "coalesced":
            return self._coalesced(case.listed(target), op)
        return self._ping_pong(case, target)

    def _coalesced(self, tensors: list[Any], op: Any) -> Callable[[], Any]:
        """Of the group: torch.distributed's own function is deprecated, its backends' are not."""
        group = self._group or dist.group.WORLD
        options = dist.AllreduceCoalescedOptions()
        options.reduceOp = op
        return lambda: group.allreduce_coalesced(tensors, options).wait()

    def _ping_pong(self, case: Case, target: Any) -> Callable[[], Any]:
        group = self._group

        def first() -> None:
            dist.send(target, 1, group)
            dist.recv(target, 1, group)

        def second() -> None:
            dist.recv(target, 0, group)
            dist.send(target, 0, group)

        return (first, second, lambda: None)[min(case.rank, 2)]
