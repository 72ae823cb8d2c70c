"""The DDP hook on real process groups. What is promised stands in cases.py, one function each."""

from pathlib import Path

import pytest

from tests.case_groups import SECONDS, Group, case_names, wanted_cases

pytest.importorskip("torch")

CASES = Path(__file__).parent / "cases.py"

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
TWO = [name for name in case_names(CASES) if name not in ONLY_THREE]


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    return {
        world_size: Group(
            "gloo",
            CASES,
            world_size,
            wanted_cases(request, f"[{world_size}-"),
            tmp_path_factory.mktemp(f"ranks{world_size}-"),
        )
        for world_size in (2, 3)
    }


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [(2, case) for case in TWO] + [(3, case) for case in THREE],
)
def test_hook(groups, world_size, case):
    groups[world_size].check(case)
