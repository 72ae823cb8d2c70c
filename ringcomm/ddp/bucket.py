"""What a bucket of DDP looks like, and what is left over in it from step to step."""

from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = [
    "Layout",
    "Plan",
    "adopt",
    "is_small",
    "nonzero_ranges",
    "num_values",
]


@dataclass(frozen=True)
class Layout:
    """Parameters of a bucket in the order of its buffer."""

    names: tuple[str, ...]
    small: tuple[bool, ...]  # goes exact
    sizes: tuple[int, ...]  # in values


@dataclass
class Plan:
    """What to do with the ranges of a bucket's buffer, and what was left over last time."""

    num_elems: int
    num_encoded: int
    encoded: list[tuple[str, int, int]]  # parameter name, begin, end
    exact: list[tuple[int, int]]  # begin, end; neighbours are merged
    residual: torch.Tensor | None = None
    owner_residual: torch.Tensor | None = None

    @staticmethod
    def of(layout: Layout) -> "Plan":
        encoded: list[tuple[str, int, int]] = []
        exact: list[tuple[int, int]] = []
        begin = 0
        for name, small, size in zip(layout.names, layout.small, layout.sizes, strict=True):
            end = begin + size
            if not small:
                encoded.append((name, begin, end))
            elif exact and exact[-1][1] == begin:
                exact[-1] = (exact[-1][0], end)
            else:
                exact.append((begin, end))
            begin = end
        return Plan(begin, sum(end - begin for _, begin, end in encoded), encoded, exact)


def is_small(parameter: torch.Tensor, min_elems: int) -> bool:
    """Whether a parameter goes exact. Complex ones do, though DDP shows them as float buckets."""
    return parameter.dim() < 2 or parameter.numel() < min_elems or parameter.is_complex()


def num_values(parameter: torch.Tensor) -> int:
    """Values that a parameter takes in a bucket: two for each complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def adopt(kept: dict[str, torch.Tensor], plan: Plan, flat: torch.Tensor) -> bool:
    """Move residuals by name into a plan's array. Whether there were any."""
    found = False
    for name, begin, end in plan.encoded:
        old = kept.get(name)
        if old is not None:
            flat[begin:end] = old
            found = True
        kept[name] = flat[begin:end]
    return found


def nonzero_ranges(values: torch.Tensor, gap: int = 64) -> list[tuple[int, torch.Tensor]]:
    """Copies of the stretches that hold all non-zero values, as (first element, values)."""
    found = values.nonzero().flatten()
    if not found.numel():
        return []
    cuts = ((found.diff() > gap).nonzero().flatten() + 1).tolist()
    edges = [0, *cuts, found.numel()]
    ranges = []
    for first, last in pairwise(edges):
        begin, end = int(found[first]), int(found[last - 1]) + 1
        ranges.append((begin, values[begin:end].clone()))
    return ranges
