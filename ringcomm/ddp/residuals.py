"""What encoding has lost so far, by parameter, and the plans of the buckets in whose arrays it lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ringcomm import _core
from ringcomm.codecs import Codec
from ringcomm.ddp.bucket import Layout, Plan, adopt, nonzero_ranges
from ringcomm.ddp.transport import Transport
from ringcomm.errors import UsageError

__all__ = ["Residuals", "kept_where_unused"]


class Residuals:
    """Error feedback of one rank.

    Attributes:
        own: What this rank's contributions have lost, by parameter name.
        owner: What the sums that this rank encodes have lost, likewise; zero elsewhere.
    """

    def __init__(self, codec: Codec) -> None:
        self.own: dict[str, torch.Tensor] = {}
        self.owner: dict[str, torch.Tensor] = {}
        self._codec = codec
        self._plans: dict[tuple[str, ...], Plan] = {}

    # ---- plans -----------------------------------------------------------------------------------

    def plan(self, layout: Layout, device: torch.device, transport: Transport) -> Plan:
        """The plan of a bucket, with its residuals on ``device``. Collective as :meth:`new_plan`."""
        return self._plans.get(layout.names) or self.new_plan(layout, device, transport)

    def new_plan(self, layout: Layout, device: torch.device, transport: Transport) -> Plan:
        """Plan a bucket that was not seen yet. Collective if the codec keeps owner residuals."""
        plan = Plan.of(layout)
        stale = set(layout.names)
        self._plans = {
            names: kept for names, kept in self._plans.items() if stale.isdisjoint(names)
        }
        self._plans[layout.names] = plan
        if self._codec.error_feedback and plan.encoded:
            plan.residual = torch.zeros(plan.num_elems, device=device)
            adopt(self.own, plan, plan.residual)
        if self._codec.down_codec.error_feedback and plan.encoded:
            plan.owner_residual = torch.zeros(plan.num_elems, device=device)
            held = adopt(self.owner, plan, plan.owner_residual)
            # Elements have other owners than before: put the pieces together once, exactly, and
            # keep the own ones. Whether anybody has a piece must be agreed on.
            wanted = torch.tensor([float(held)], device=device)
            transport.all_reduce(wanted, "sum")
            if wanted.item() > 0:
                transport.all_reduce(plan.owner_residual, "sum")
                owned = transport.owned(plan.num_elems, device)
                plan.owner_residual.masked_fill_(~owned, 0.0)
        return plan

    def forget_plans(self) -> None:
        """Residuals stay; the next buckets are planned anew."""
        self._plans.clear()

    def rescale(self, factor: float) -> None:
        """Multiply all residuals; by 0 also those that are not finite."""
        for residual in (*self.own.values(), *self.owner.values()):
            if factor == 0.0:
                residual.zero_()
            else:
                residual.mul_(factor)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies, for ``HookState.state_dict()``."""
        return {
            "residuals": {name: value.clone() for name, value in self.own.items()},
            "owner_residuals": {
                name: {"num_elems": value.numel(), "ranges": nonzero_ranges(value)}
                for name, value in self.owner.items()
            },
        }

    @staticmethod
    def check(state: dict[str, Any], sizes: dict[str, int]) -> bool:
        """Whether ``state`` has any residuals. ``sizes``: elements of the model's parameters, by name.

        Raises:
            UsageError: it has some of other parameters.
        """
        held = {name: value.numel() for name, value in state["residuals"].items()}
        held |= {name: value["num_elems"] for name, value in state["owner_residuals"].items()}
        for name, num_elems in held.items():
            if sizes.get(name) != num_elems:
                raise UsageError(
                    f"state: it has {num_elems} residuals of parameter {name!r}, the model has "
                    f"{sizes.get(name, 'no such parameter')}; is it of another model?"
                )
        return bool(held)

    def clear(self) -> None:
        self._plans.clear()
        self.own.clear()
        self.owner.clear()

    def load(self, state: dict[str, Any]) -> None:
        """Take over copies of what :meth:`state_dict` returned, in place of everything."""
        self.clear()
        for name, value in state["residuals"].items():
            self.own[name] = value.clone()
        for name, value in state["owner_residuals"].items():
            dense = torch.zeros(value["num_elems"])
            for begin, part in value["ranges"]:
                dense[begin : begin + part.numel()] = part
            self.owner[name] = dense


@contextmanager
def kept_where_unused(buffer: torch.Tensor, plan: Plan, may_be_unused: bool) -> Iterator[None]:
    """Keeps the residuals of parameters whose gradient is all zero on this rank.

    DDP throws away what arrives for a parameter that no rank used, so sending its residual would
    lose it. Such a parameter sends zeros and finds its residual unchanged.

    On a GPU the host does not know which they are and does not wait to learn it; there, unless
    ``may_be_unused``, a parameter with a gradient of zeros is one like all others.
    """
    stash: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    if plan.residual is not None and (buffer.is_cpu or may_be_unused):
        item = buffer.element_size()
        for _, begin, end in plan.encoded:
            residual = plan.residual[begin:end]
            if not buffer.is_cpu:
                flag = ~buffer[begin:end].any()
                stash.append((residual, residual.clone(), flag))
                residual.masked_fill_(flag, 0.0)
            elif _core.is_zero(buffer.data_ptr() + begin * item, (end - begin) * item):
                stash.append((residual, residual.clone(), None))
                residual.zero_()
    try:
        yield
    finally:
        for residual, kept, is_unused in stash:
            residual.copy_(kept if is_unused is None else torch.where(is_unused, kept, residual))
