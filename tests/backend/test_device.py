"""The torch backend on emulated GPUs, whose arrays are the tensors of the CPU. Cases are those of device_cases.py, and
some of the CPU's."""

from pathlib import Path

import pytest

from tests.case_groups import SECONDS, Group, case_names, wanted_cases
from tests.simt import emulated

pytest.importorskip("torch")

HERE = Path(__file__).parent
# What makes a group of two choose a mode.
MODES = {
    "in_kernel": {"RINGCOMM_SIMT_DEVICES": "2"},
    "stepped": {"RINGCOMM_SIMT_DEVICES": "1"},
    "host": {"RINGCOMM_SIMT_DEVICES": "2", "RINGCOMM_SIMT_PEERS": "0"},
}
OWN = case_names(HERE / "device_cases.py")
COLLECTIVES = [
    "all_reduce_equals_gloo",
    "one_to_all_and_all_to_one_equal_gloo",
    "gathers_and_scatters_of_lists_and_tensors",
    "all_to_all_even_uneven_and_lists",
    "sparse_sums",
    "objects_of_any_size",
    "coalesced_calls",
    "lists_of_tensors_are_reduced_as_one",
    "lists_of_tensors_are_gathered_and_scattered_as_one",
    "messages_with_tags_and_any_source",
    "groups_go_in_any_order",
]
# By file and mode.
CASES = {
    ("device_cases", "in_kernel"): OWN,
    ("device_cases", "stepped"): OWN,
    ("device_cases", "host"): OWN,
    ("collectives", "in_kernel"): COLLECTIVES,
    ("collectives", "stepped"): COLLECTIVES,
    ("training", "in_kernel"): ["ddp_with_small_buckets", "fsdp2_equals_ddp"],
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
        for file, mode in CASES
    }


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("file", "mode", "case"),
    [(file, mode, case) for (file, mode), cases in CASES.items() for case in cases],
)
def test_device(groups, file, mode, case):
    groups[file, mode].check(case)
