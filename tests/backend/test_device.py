"""The torch backend on emulated GPUs: tensors of the CPU are their arrays. Cases of collectives.py and training.py."""

from pathlib import Path

import pytest

from tests.case_groups import SECONDS, Group, wanted_cases
from tests.simt import emulated

pytest.importorskip("torch")

HERE = Path(__file__).parent
CASES = {
    "collectives": [
        "all_reduce_equals_gloo",
        "one_to_all_and_all_to_one_equal_gloo",
        "gathers_and_scatters_of_lists_and_tensors",
        "all_to_all_even_uneven_and_lists",
        "sparse_sums",
        "objects_of_any_size",
        "messages_with_tags_and_any_source",
        "groups_go_in_any_order",
    ],
    "training": ["ddp_with_small_buckets", "fsdp2_equals_ddp"],
}
# How the ranks' GPUs wait for each other, and the hosts in which they do so.
MODES = {
    "in_kernel": {"RINGCOMM_SIMT_DEVICES": "2"},
    "stepped": {"RINGCOMM_SIMT_DEVICES": "1"},
    "host": {"RINGCOMM_SIMT_DEVICES": "2", "RINGCOMM_SIMT_PEERS": "0"},
}


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    emulated.require()
    return {
        (file, mode): Group(
            "ringcomm",
            HERE / f"{file}.py",
            2,
            wanted_cases(request, f"[{file}-{mode}-"),
            tmp_path_factory.mktemp(f"{file}-{mode}-"),
            package=emulated.package(),
            RINGCOMM_DEVICE="simt",
            **MODES[mode],
        )
        for file in CASES
        for mode in MODES
    }


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("file", "mode", "case"),
    [(file, mode, case) for file in CASES for mode in MODES for case in CASES[file]],
)
def test_device(groups, file, mode, case):
    groups[file, mode].check(case)
