"""What CUDA sources keep to, so that the emulator executes what nvcc compiles."""

import re

import pytest

from tests.simt.build import ROOT

CSRC = ROOT / "csrc"

# A pattern, and the only files of csrc that have it.
RULES = {
    "launches go through launch()": (r"<<<\w", {"base/launch.h"}),
    "PTX stands in one header": (r'asm volatile\("\w+\.\w', {"base/ptx.h"}),
    # There, __fmul_rn and a * b are the same product, because the host contracts nothing.
    "no code for the device only": (r"__CUDA_ARCH__", {"codec/block_quantize_math.h"}),
    "two headers know of the emulator": (r"RC_SIMT", {"base/launch.h", "base/ptx.h"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_cuda_sources_keep_to_the_rule(rule: str) -> None:
    pattern, allowed = RULES[rule]
    found = {
        str(path.relative_to(CSRC))
        for path in CSRC.rglob("*")
        if path.suffix in (".h", ".cu")
        and re.search(pattern, re.sub(r"//.*", "", path.read_text()))
    }
    assert found == allowed
