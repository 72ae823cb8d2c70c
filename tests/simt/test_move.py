"""Broadcast, all_gather and the exchanges between emulated GPUs move every byte to where it belongs, and no other."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.dtypes import NUMPY, random_array
from tests.simt import collectives
from tests.simt.collectives import MODES, Call, Group
from tests.simt.emulator import PLANS, Emulator, Plan

WORLD_SIZES = (1, 2, 3, 4)
# Elements: none, one, less and more than a vector, a piece, a slice, several pieces.
SIZES = (0, 1, 17, 511, 512, 4099, 5003)
# By the bytes of an element.
DTYPES = tuple(
    name for name in ("uint8", "bfloat16", "float32", "int64", "complex128") if name in NUMPY
)

Array = Any
# A collective on arrays in device memory: its calls, what was put into every array, and what has to be there later.
Made = tuple[list[Call], list[tuple[Array, Array]]]


class Maker:
    """Collectives of one group, with new random arrays each."""

    def __init__(
        self,
        simt: Emulator,
        world_size: int,
        dtype: str,
        seed: int,
        shift: int = 0,
        in_place: bool = False,
    ) -> None:
        self.simt = simt
        self.world_size = world_size
        self.dtype = dtype
        self.seed = seed
        self.shift = shift * NUMPY[dtype].itemsize
        self.in_place = in_place

    @property
    def ranks(self) -> range:
        return range(self.world_size)

    def random(self, count: int) -> Array:
        self.seed += 1
        return random_array(self.dtype, count, self.seed)

    def place(self, values: Array, name: str) -> Array:
        return self.simt.array(values, name, self.shift)

    def call(self, op: str, algo: str, count: int = 0, **fields: Any) -> Call:
        return collectives.call(op, algo, self.dtype, count, **fields)

    def broadcast(self, count: int, algo: str = "staged") -> Made:
        values = [self.random(count) for _ in self.ranks]
        root = self.seed % self.world_size
        inputs = [self.place(array, "input") for array in values]
        outputs = (
            inputs
            if self.in_place
            else [self.place(self.random(count), "output") for _ in self.ranks]
        )
        calls = [
            self.call("broadcast", algo, count, root=root, input=given, output=output)
            for given, output in zip(inputs, outputs, strict=True)
        ]
        expected = [(output, values[root]) for output in outputs]
        if not self.in_place:
            expected += list(zip(inputs, values, strict=True))
        return calls, expected

    def ring(self, count: int) -> Made:
        return self.broadcast(count, "ring")

    def all_gather(self, count: int) -> Made:
        values = [self.random(count) for _ in self.ranks]
        together = np.concatenate(values)
        calls, expected = [], []
        for rank in self.ranks:
            output = self.place(self.random(count * self.world_size), "output")
            given = output[rank * count : (rank + 1) * count]
            if not self.in_place:
                given = self.place(values[rank], "input")
            given[:] = values[rank]
            calls.append(self.call("all_gather", "staged", count, input=given, output=output))
            expected.append((output, together))
        return calls, expected

    def all_gather_list(self, count: int) -> Made:
        values = [self.random(count) for _ in self.ranks]
        calls, expected = [], []
        for rank in self.ranks:
            outputs = [self.place(self.random(count), "part") for _ in self.ranks]
            given = outputs[rank] if self.in_place else self.place(values[rank], "input")
            given[:] = values[rank]
            calls.append(
                self.call("all_gather", "staged", count, input=given, receives=outputs, has_parts=1)
            )
            expected += zip(outputs, values, strict=True)
        return calls, expected

    def exchange(self, op: str, counts: Sequence[Sequence[int]], root: int = -1) -> Made:
        """``counts[s][r]`` elements go from rank s to rank r."""
        values = [[self.random(count) for count in row] for row in counts]
        sends = [
            [self.place(part, f"part of {s} for {r}") for r, part in enumerate(row)]
            for s, row in enumerate(values)
        ]
        receives = [
            [self.place(self.random(counts[s][r]), f"part of {r} from {s}") for s in self.ranks]
            for r in self.ranks
        ]
        if self.in_place:
            for rank in self.ranks:
                receives[rank][rank] = sends[rank][rank]
        most = max(map(max, counts))
        calls = [
            self.call(op, "staged", sends=s, receives=r, most_part_elems=most, root=root)
            for s, r in zip(sends, receives, strict=True)
        ]
        expected = [(receives[r][s], values[s][r]) for s in self.ranks for r in self.ranks]
        expected += [(sends[s][r], values[s][r]) for s in self.ranks for r in self.ranks]
        return calls, expected

    def uneven(self, count: int) -> Array:
        """From nothing to ``count``, several zeros among them."""
        rng = np.random.default_rng((self.seed, count))
        counts = rng.integers(0, count + 1, (self.world_size, self.world_size))
        counts[rng.random(counts.shape) < 0.25] = 0
        counts.flat[rng.integers(counts.size)] = count
        return counts

    def all_to_all(self, count: int) -> Made:
        return self.exchange("all_to_all", self.uneven(count).tolist())

    def gather(self, count: int) -> Made:
        root = (self.seed + 1) % self.world_size
        counts = np.zeros((self.world_size, self.world_size), int)
        counts[:, root] = self.uneven(count)[:, 0]
        return self.exchange("gather", counts.tolist(), root)

    def scatter(self, count: int) -> Made:
        root = self.seed % self.world_size
        counts = np.zeros((self.world_size, self.world_size), int)
        counts[root] = self.uneven(count)[0]
        return self.exchange("scatter", counts.tolist(), root)

    def direct(self, count: int, move: Callable[["Maker", int], Made]) -> Made:
        calls, expected = move(self, count)
        collectives.where_they_are(calls)
        return calls, expected


MOVES: dict[str, Callable[[Maker, int], Made]] = {
    "broadcast": Maker.broadcast,
    "ring broadcast": Maker.ring,
    "all_gather": Maker.all_gather,
    "all_gather into a list": Maker.all_gather_list,
    "all_to_all": Maker.all_to_all,
    "gather": Maker.gather,
    "scatter": Maker.scatter,
}
MOVES |= {
    f"direct {name}": functools.partial(Maker.direct, move=move)
    for name, move in MOVES.items()
    if name != "ring broadcast"
}


def check(expected: Sequence[tuple[Array, Array]], what: object) -> None:
    for array, values in expected:
        assert array.tobytes() == values.tobytes(), what


def run_one(simt: Emulator, group: Group, move: str, maker: Maker, count: int, plan: Plan) -> None:
    calls, expected = MOVES[move](maker, count)
    what = (move, group.world_size, group.mode, maker.dtype, count, plan)
    assert group.run([calls], *plan) == [], what
    check(expected, what)
    simt.release_all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("move", MOVES)
def test_every_byte_arrives_under_every_schedule(
    simt: Emulator, move: str, world_size: int, mode: str
) -> None:
    dtypes = itertools.cycle(DTYPES)
    places = itertools.cycle(range(world_size))
    for seed, (plan, count) in enumerate(itertools.product(PLANS, SIZES)):
        dtype = next(dtypes)
        count = -(-count // NUMPY[dtype].itemsize) if seed % 2 else count
        group = Group(simt, world_size, mode, num_blocks=2 + seed % 2)
        run_one(simt, group, move, Maker(simt, world_size, dtype, next(places)), count, plan)


@pytest.mark.parametrize("move", MOVES)
def test_the_own_part_may_be_in_place(simt: Emulator, move: str) -> None:
    for (world_size, mode), count in itertools.product(
        itertools.product((1, 2, 3), MODES), (1, 33, 1500)
    ):
        maker = Maker(simt, world_size, "float32", count, in_place=True)
        run_one(simt, Group(simt, world_size, mode), move, maker, count, ("random", count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", MOVES)
def test_arrays_may_start_at_any_element(simt: Emulator, move: str, dtype: str) -> None:
    for shift, mode in itertools.product((1, 3, 8), MODES):
        maker = Maker(simt, 3, dtype, shift, shift=shift)
        run_one(simt, Group(simt, 3, mode), move, maker, 1201, ("priority", shift))


def run_in_a_row(simt: Emulator, world_size: int, mode: str, plan: Plan, first_epoch: int) -> None:
    group = Group(simt, world_size, mode, num_blocks=3, first_epoch=first_epoch)
    maker = Maker(simt, world_size, "int64", 1)
    moves = list(itertools.product(MOVES.values(), (700, 1, 150)))
    np.random.default_rng(plan[1]).shuffle(moves)
    made = [move(maker, count) for move, count in moves]
    assert group.run([calls for calls, _ in made], *plan) == [], plan
    for _, expected in made:
        check(expected, plan)
    simt.release_all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_one_follows_the_other_on_the_same_slabs(
    simt: Emulator, world_size: int, mode: str
) -> None:
    """Also where the epochs wrap around."""
    for plan in PLANS:
        run_in_a_row(simt, world_size, mode, plan, 0)
        run_in_a_row(simt, world_size, mode, plan, 2**32 - 9)


def test_sixteen_ranks(simt: Emulator) -> None:
    for move in MOVES:
        group = Group(simt, 16, "in_kernel", num_blocks=1)
        run_one(simt, group, move, Maker(simt, 16, "float32", 5), 300, ("random", 1))


def test_blocks_and_pieces_are_as_few_as_need_be(simt: Emulator) -> None:
    maker = Maker(simt, 2, "uint8", 0)
    for count, blocks, rounds in ((0, 1, 1), (1, 1, 2), (512, 1, 2), (513, 1, 3), (4097, 2, 6)):
        group = Group(simt, 2, "stepped")
        calls, _ = maker.all_gather(count)
        assert group.plan(calls) == (rounds, blocks), count


@pytest.mark.parametrize("move", ["all_gather", "ring broadcast"])
def test_a_late_rank_ends_the_kernels_of_all_others(simt: Emulator, move: str) -> None:
    for plan in PLANS:
        group = Group(simt, 3, "in_kernel")
        calls, _ = MOVES[move](Maker(simt, 3, "uint8", 0), 3000)
        rounds, _ = group.plan(calls)
        group.views, late = group.views[:2], group.views[2].rank
        group.queue(calls[:2], 0, rounds)
        assert simt.run(*plan) == [], plan
        assert group.late_ranks() == [late + 1, late + 1], plan
        simt.release_all()
