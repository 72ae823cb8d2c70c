"""Messages that both ends can make, and an exchange of many of them that several tests have."""

from typing import Any

import numpy as np

from ringcomm import Communicator

SLOTS, EAGER_BYTES = 8, 4096
PIECE = 128 * 1024
SIZES = (0, 1, 1000, EAGER_BYTES, EAGER_BYTES + 1, PIECE, 5 * PIECE + 3)


def content(src: int, dst: int, tag: int, number: int, num_bytes: int) -> Any:
    """What a message from ``src`` to ``dst`` holds; no two of a test are alike."""
    seed = [src, dst, tag, number, num_bytes]
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def everybody_to_everybody(comm: Communicator, seed: int, rounds: int, max_bytes: int) -> None:
    """Sizes and tags are a function of (src, dst, number); calls are in another order on each rank."""
    n = comm.world_size
    each = 4

    def size_of(src: int, dst: int, number: int) -> int:
        dice = np.random.default_rng([seed, src, dst, number])
        return int(max_bytes ** dice.random()) - 1 if dice.random() < 0.8 else 0

    for turn in range(rounds):
        dice = np.random.default_rng([seed, comm.rank, turn])
        sends, receives = [], []
        expected = {}
        calls = [("send", peer, k) for peer in range(n) for k in range(each)]
        calls += [("recv", peer, k) for peer in range(n) for k in range(each)]
        if turn % 2:  # all sends first: what every rank can do without a deadlock
            dice.shuffle(calls)
        for what, peer, k in calls:
            number = turn * each + k
            if what == "send":
                size = size_of(comm.rank, peer, number)
                x = content(comm.rank, peer, k, number, size)
                sends.append(comm.send(x, peer, k, async_op=True))
            else:
                got = np.full(size_of(peer, comm.rank, number), 255, np.uint8)
                expected[len(receives)] = (peer, k, number, got)
                receives.append(comm.recv(got, peer, k, async_op=True))
        order = list(expected)
        dice.shuffle(order)
        for i in order:
            peer, k, number, got = expected[i]
            assert receives[i].wait() == peer
            np.testing.assert_array_equal(got, content(peer, comm.rank, k, number, got.size))
        for work in sends:
            work.wait()
