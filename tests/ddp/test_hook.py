"""The DDP hook on real process groups. What is promised stands in cases.py, one function each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 110

# Cases for three ranks: where sums have an order, an owner in the middle, and a rank to lose.
THREE = [
    "mean_equals_the_reference_bit_for_bit",
    "encoded_transports_give_equal_bits_at_every_size",
    "transports_give_equal_bits",
    "join_with_uneven_inputs",
    "survivors_go_on_in_a_smaller_group",
    "sparse_gradients_go_exact",
    "odd_sizes",
]
ONLY_THREE = {"survivors_go_on_in_a_smaller_group"}


def names():
    """Public functions of cases.py that take (rank, world), without importing it here."""
    lines = (HERE / "cases.py").read_text().splitlines()
    ours = [line for line in lines if line.startswith("def ") and line.endswith("(rank, world):")]
    return [line[4 : line.index("(")] for line in ours]


TWO = [name for name in names() if name not in ONLY_THREE]


def environment():
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def run(world_size, cases, directory):
    """Runs the cases in one group of processes. Returns case -> list of errors, and the output."""
    rendezvous = directory / "store"
    results = [directory / f"results.{rank}" for rank in range(world_size)]
    logs = [directory / f"log.{rank}" for rank in range(world_size)]
    processes = []
    try:
        for rank in range(world_size):
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            str(HERE / "run_rank.py"),
                            str(rank),
                            str(world_size),
                            str(rendezvous),
                            str(results[rank]),
                            *cases,
                        ],
                        env=environment(),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = {}
    for result in results:
        for line in result.read_text().splitlines() if result.exists() else []:
            entry = json.loads(line)
            errors.setdefault(entry["case"], []).append(entry["error"])
    output = "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
    exits = [process.returncode for process in processes]
    return errors, exits, output


class Group:
    """Runs all wanted cases at once, when the first of them is asked for."""

    def __init__(self, world_size, cases, directory):
        self.world_size = world_size
        self.cases = cases
        self.directory = directory
        self.outcome = None

    def check(self, case):
        if self.outcome is None:
            self.outcome = run(self.world_size, self.cases, self.directory)
        errors, exits, output = self.outcome
        found = errors.get(case, [])
        failed = "\n".join(error for error in found if error)
        assert not failed, failed
        assert len(found) == self.world_size, f"did not finish on all ranks: {exits}\n{output}"


def group_of(world_size, request, directory):
    prefix = f"[{world_size}-"
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and item.name.startswith("test_") and prefix in item.name
    ]
    return Group(world_size, cases, directory)


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    return {
        world_size: group_of(world_size, request, tmp_path_factory.mktemp(f"ranks{world_size}-"))
        for world_size in (2, 3)
    }


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [(2, case) for case in TWO] + [(3, case) for case in THREE],
)
def test_hook(groups, world_size, case):
    groups[world_size].check(case)
