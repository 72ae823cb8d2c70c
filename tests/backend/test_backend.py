"""The torch backend on real ranks. What is promised stands in collectives.py and training.py."""

from pathlib import Path

import pytest

from tests.case_groups import SECONDS, Group, case_names, wanted_cases

pytest.importorskip("torch")

HERE = Path(__file__).parent
COLLECTIVES, TRAINING = HERE / "collectives.py", HERE / "training.py"
# Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch wraps the backend and checks every call over Gloo.
DETAIL = [
    "all_reduce_equals_gloo",
    "lists_of_tensors_are_reduced_as_one",
    "lists_of_tensors_are_gathered_and_scattered_as_one",
    "gathers_and_scatters_of_lists_and_tensors",
    "objects_of_any_size",
    "messages_with_tags_and_any_source",
    "groups_go_in_any_order",
]


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    def group(file, world_size, kind, **variables):
        directory = tmp_path_factory.mktemp(f"{kind}{world_size}-")
        names = wanted_cases(request, f"{kind}[{world_size}-")
        return Group("ringcomm", file, world_size, names, directory, **variables)

    made = {("collectives", n): group(COLLECTIVES, n, "collectives") for n in (1, 2, 3)}
    made["training", 2] = group(TRAINING, 2, "training")
    made["detail", 2] = group(COLLECTIVES, 2, "detail", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    return made


ALONE = [
    "all_reduce_equals_gloo",
    "sizes_from_nothing_to_large",
    "one_to_all_and_all_to_one_equal_gloo",
    "gathers_and_scatters_of_lists_and_tensors",
    "all_to_all_even_uneven_and_lists",
    "sparse_sums",
    "objects_of_any_size",
    "lists_of_tensors_are_reduced_as_one",
    "lists_of_tensors_are_gathered_and_scattered_as_one",
]


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [(1, case) for case in ALONE] + [(n, case) for n in (2, 3) for case in case_names(COLLECTIVES)],
)
def test_collectives(groups, world_size, case):
    groups["collectives", world_size].check(case)


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(("world_size", "case"), [(2, case) for case in case_names(TRAINING)])
def test_training(groups, world_size, case):
    groups["training", world_size].check(case)


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(("world_size", "case"), [(2, case) for case in DETAIL])
def test_detail(groups, world_size, case):
    groups["detail", world_size].check(case)
