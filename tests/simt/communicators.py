"""Communicators on arrays of emulated GPUs, in every mode: what their tests share. The fixture ``pools`` gives the ranks."""

from collections.abc import Callable

from ringcomm import Communicator, reference
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.worlds import Worlds

# What makes a group choose a mode.
MODES = {
    "in_kernel": {"RINGCOMM_SIMT_DEVICES": "4"},
    "stepped": {"RINGCOMM_SIMT_DEVICES": "1"},
    "host": {"RINGCOMM_SIMT_DEVICES": "4", "RINGCOMM_SIMT_PEERS": "0"},
}
SLAB = {"RINGCOMM_CUDA_SLAB_MIB": "1"}  # small: several rounds

Pools = Callable[[str], Worlds]  # by mode


def check_small(comm: Communicator) -> str:
    comm.use_device("simt")
    for seed in range(10):
        inputs = random_inputs("float32", 2000, comm.world_size, seed)
        for codec in (None, "int8"):
            x = inputs[comm.rank].copy()
            comm.all_reduce(x, codec=codec)
            comm.synchronize()
            assert_same_bits(x, reference.all_reduce(inputs, "sum", codec, codec), (seed, codec))
    return str(comm.device_mode)
