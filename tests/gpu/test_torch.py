"""The torch backend and the DDP hook on tensors of GPUs. What is promised stands in torch_cases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.case_groups import SECONDS, Group, case_names, wanted_cases
from tests.simt import emulated

pytest.importorskip("torch")

CASES = Path(__file__).parent / "torch_cases.py"
RANKS = 2
# With CUDA, where several processes share the GPU: plain; torch's memory from VMM; with the MPS daemon.
KINDS = {
    "simt": {"RINGCOMM_DEVICE": "simt", "RINGCOMM_SIMT_DEVICES": "1"},
    "cuda": {"RC_TEST_STEPS": "1000"},
    "expandable": {"RC_TEST_STEPS": "50", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    "mps": {"RC_TEST_STEPS": "50"},
}


@pytest.fixture(scope="module")
def groups() -> dict[str, Any]:
    return {}


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind in KINDS for case in case_names(CASES)]
)
def test_torch(
    request: pytest.FixtureRequest,
    groups: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    case: str,
) -> None:
    variables = dict(KINDS[kind])
    if kind == "simt":
        emulated.require()
    else:
        request.getfixturevalue("cuda")
    if kind == "mps":
        variables |= request.getfixturevalue("mps")
    if kind not in groups:
        groups[kind] = Group(
            "ringcomm",
            CASES,
            RANKS,
            wanted_cases(request, f"[{kind}-"),
            tmp_path_factory.mktemp(kind),
            **({"package": emulated.package()} if kind == "simt" else {}),
            **variables,
        )
    groups[kind].check(case)
