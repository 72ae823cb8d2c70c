"""Runs the cases of a file in one group of torch processes, see tests/run_cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 110


def case_names(cases):
    """Public functions of a file that take (rank, world), without importing it here."""
    lines = cases.read_text().splitlines()
    ours = [line for line in lines if line.startswith("def ") and line.endswith("(rank, world):")]
    return [line[4 : line.index("(")] for line in ours]


def environment(package=ROOT, **variables):
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **variables,
    }


class Group:
    """Runs all wanted cases at once, when the first of them is asked for."""

    def __init__(self, backend, file, world_size, names, directory, package=ROOT, **variables):
        self.backend = backend
        self.package = package  # the folder whose ringcomm they import, see tests/simt/emulated.py
        self.file = file
        self.world_size = world_size
        self.names = names
        self.directory = directory
        self.variables = variables
        self.outcome = None

    def check(self, case):
        if self.outcome is None:
            self.outcome = self.run()
        errors, exits, output = self.outcome
        found = errors.get(case, [])
        failed = "\n".join(error for error in found if error)
        assert not failed, failed
        assert len(found) == self.world_size, f"did not finish on all ranks: {exits}\n{output}"

    def run(self):
        """Returns case -> list of errors, the exit codes and the output."""
        results = [self.directory / f"results.{rank}" for rank in range(self.world_size)]
        logs = [self.directory / f"log.{rank}" for rank in range(self.world_size)]
        processes = []
        try:
            for rank in range(self.world_size):
                command = [sys.executable, "-m", "tests.run_cases", self.backend, self.file]
                command += [rank, self.world_size, self.directory / "store", results[rank]]
                with logs[rank].open("w") as log:
                    processes.append(
                        subprocess.Popen(
                            [*map(str, command), *self.names],
                            env=environment(self.package, **self.variables),
                            cwd=self.package,
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


def wanted_cases(request, marker):
    """The cases of this file's collected tests whose id begins with ``marker``, such as "[2-"."""
    return [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and item.name.startswith("test_") and marker in item.name
    ]
