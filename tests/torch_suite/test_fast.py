"""torch's own DistributedTest on ringcomm: the fast part. The whole: ``make torch-suite``."""

import subprocess
import sys

import pytest

from tests.case_groups import ROOT, environment

for package in ("torch", "expecttest", "hypothesis"):
    pytest.importorskip(package)


@pytest.mark.timeout(900)
def test_what_gloo_passes_passes() -> None:
    command = [sys.executable, "-m", "tests.torch_suite", "--world-size", "2", "--fast"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    print(run.stdout.splitlines()[-1])
