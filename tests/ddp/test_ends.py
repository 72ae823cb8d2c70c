"""How training with the hook ends: without close(), and with a lost rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

TRAIN = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import ringcomm
from torch.nn.parallel import DistributedDataParallel as DDP

rank, store, transport, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group(
    "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
model = DDP(torch.nn.Linear(64, 64))
state = ringcomm.attach(model, "int4", transport=transport, warmup_steps=1)
for step in range(5):
    if ending == "killed" and step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        model(torch.ones(2, 64)).square().mean().backward()
    except ringcomm.errors.RingcommError as error:
        print(type(error).__name__, error)
        sys.stdout.flush()
        raise SystemExit(3)
if ending == "raises":
    raise KeyError("some bug")
if ending == "destroys":
    dist.destroy_process_group()
"""


def run(tmp_path, transport, ending):
    """Runs both ranks; returns their exit codes and outputs."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(rank), str(tmp_path / "store"), transport, ending],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("transport", ["torch", "ringcomm"])
@pytest.mark.parametrize(("ending", "code"), [("falls off", 0), ("destroys", 0), ("raises", 1)])
def test_a_process_that_does_not_close_ends_by_itself(tmp_path, transport, ending, code):
    codes, outputs = run(tmp_path, transport, ending)
    if ending != "destroys":
        # torch by itself, without ringcomm, aborts about one exit in twenty if its default group
        # is not destroyed. Here it matters that training got there and that nothing hangs.
        aborted = (-signal.SIGABRT, "terminate called without an active exception")
        codes = [
            code
            if (found, output.strip().splitlines()[-1:]) == (aborted[0], [aborted[1]])
            else found
            for found, output in zip(codes, outputs, strict=True)
        ]
    assert codes == [code, code], outputs


@pytest.mark.parametrize("transport", ["torch", "ringcomm"])
def test_a_killed_rank_makes_backward_raise_peer_lost(tmp_path, transport):
    codes, outputs = run(tmp_path, transport, "killed")
    assert codes == [3, -signal.SIGKILL], outputs
    assert "PeerLostError" in outputs[0], outputs
