"""A peer whose results are wrong in one element on one rank: the bench must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from bench.contender import Contender
from bench.operations import Buffers, Case


class Liar(Contender):
    name = "liar"
    baseline = "peer"

    def prepare(self, case: Case, buffers: Buffers) -> Callable[[], Any]:
        def all_reduce() -> None:
            dist.all_reduce(buffers.target)
            if case.rank == 1:
                buffers.target[-1] += 1

        return all_reduce


def available() -> str | None:
    return None


def connect(_rank: int, _n: int, _port: int) -> Liar:
    return Liar()
