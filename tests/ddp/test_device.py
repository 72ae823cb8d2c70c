"""The DDP hook on emulated GPUs. What is promised stands in device_cases.py."""

from pathlib import Path

import pytest

from tests.case_groups import SECONDS, Group, case_names, wanted_cases
from tests.simt import emulated

pytest.importorskip("torch")

CASES = Path(__file__).parent / "device_cases.py"
# Ranks and GPUs: with one each, kernels wait for each other, else hosts do.
WORLDS = [(2, 2), (4, 1)]


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    emulated.require()
    return {
        (world_size, gpus): Group(
            "gloo",
            CASES,
            world_size,
            wanted_cases(request, f"[{world_size}-{gpus}-"),
            tmp_path_factory.mktemp(f"ranks{world_size}-"),
            package=emulated.package(),
            RINGCOMM_SIMT_DEVICES=str(gpus),
        )
        for world_size, gpus in WORLDS
    }


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("world_size", "gpus", "case"),
    [(world_size, gpus, case) for world_size, gpus in WORLDS for case in case_names(CASES)],
)
def test_device(groups, world_size, gpus, case):
    groups[world_size, gpus].check(case)
