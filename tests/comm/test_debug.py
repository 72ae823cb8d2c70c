"""RINGCOMM_DEBUG: what was chosen and why, and what the core has to say, through one logger."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.worlds import ROOT

BODY = """
import sys
import numpy as np, ringcomm
from ringcomm.store import TCPStore

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore(port=port, is_server=rank == 0)
with ringcomm.init(rank, 2, store=store, timeout=30, name="debug") as comm:
    comm.all_reduce(np.ones(1000, np.float32), tag="bucket0")
    comm.broadcast(np.ones(10), 0, async_op=True).wait()
    comm.barrier()
    if rank == 0:
        try:
            comm.all_reduce(np.ones(5))
        except ringcomm.errors.MismatchError:
            pass
    else:
        try:
            comm.all_reduce(np.ones(6))
        except ringcomm.errors.MismatchError:
            pass
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(tmp_path: Path, **variables: str) -> list[str]:
    """What two ranks write to standard error."""
    port = free_port()
    ranks = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RINGCOMM_")}
    environment |= {"PYTHONPATH": str(ROOT), "RINGCOMM_TUNING": "off", **variables}
    for rank in range(2):
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", BODY, str(rank), str(port)],
                env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
    texts = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    return texts


def test_info_says_once_per_rank_what_was_chosen_and_why(tmp_path: Path) -> None:
    for rank, text in enumerate(run(tmp_path, RINGCOMM_DEBUG="INFO")):
        lines = [line for line in text.splitlines() if " INFO: " in line]
        assert len(lines) == 1, text
        assert lines[0].startswith(f"[rank{rank}] ringcomm INFO: group 'debug': rank {rank} of 2, ")
        for part in (
            "shared memory",
            "4 x 512 KiB staging",
            r"\w+ kernels",
            r"; 2 ranks on \d+ cores",
            r"one_shot up to 32768 bytes \(reduce/.*\), .*8192 bytes \(all_reduce\), built-in limits",
            "deadline 30 s",
        ):
            assert re.search(part, lines[0]), (part, lines[0])


def test_the_core_speaks_through_the_same_logger(tmp_path: Path) -> None:
    texts = run(tmp_path, RINGCOMM_DEBUG="WARN")
    lines = "".join(texts).splitlines()
    assert len(lines) == 1, "the rank that finds the failure says so"
    assert re.match(
        r"\[rank\d\] ringcomm WARNING: ranks of group 'debug' called different operations", lines[0]
    )


def test_trace_shows_every_call(tmp_path: Path) -> None:
    for text in run(tmp_path, RINGCOMM_DEBUG="TRACE"):
        for call in (
            r"all_reduce #1 \(float32 x 1000, sum, one_shot, tag 'bucket0'\): \d+ us",
            r"broadcast #2 \(float64 x 10, root 0, one_shot\): \d+ us",
            r"barrier #3: \d+ us",
        ):
            assert re.search(rf"\] ringcomm TRACE: {call}\n", text), text


def test_subsystems_are_chosen_and_messages_may_go_to_a_file(tmp_path: Path) -> None:
    for selection, kinds in (
        ("INIT", {"INFO"}),
        ("^INIT", {"TRACE"}),
        ("COLL,INIT", {"INFO", "TRACE"}),
    ):
        target = tmp_path / selection
        target.mkdir()
        texts = run(
            tmp_path,
            RINGCOMM_DEBUG="TRACE",
            RINGCOMM_DEBUG_SUBSYS=selection,
            RINGCOMM_DEBUG_FILE=str(target / "%h.%p.log"),
        )
        assert texts == ["", ""]
        files = list(target.iterdir())
        assert len(files) == 2
        assert all(re.match(rf"{os.uname().nodename}\.\d+\.log$", file.name) for file in files)
        found = {
            kind for file in files for kind in re.findall(r"ringcomm (\w+):", file.read_text())
        }
        assert found - {"WARNING"} == kinds, selection
