"""How GPUs are linked, as ``python -m ringcomm.info`` shows it and as a library in NVML's place tells it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.simt import emulated
from tests.simt.build import COMPILER


@pytest.mark.parametrize(("peers", "link"), [("1", "NVLink"), ("0", "none")])
def test_info_shows_how_devices_are_linked(peers: str, link: str) -> None:
    emulated.require()
    variables = {"RINGCOMM_SIMT_DEVICES": "2", "RINGCOMM_SIMT_PEERS": peers}
    facts = json.loads(emulated.python("-m", "ringcomm.info", "--json", **variables))["cuda"]
    assert facts["kernels"].endswith("that ringcomm's own tests emulate")
    assert facts["devices"] == 2
    assert [facts[f"links_{device}"].split() for device in range(2)] == [["-", link], [link, "-"]]
    assert facts["links_known_from"] == "emulation"


# A library of which GPUs 1 and 2 are linked by NVLink, and there is a GPU 3 as well; of GPU 4 it fails to tell.
FAKE_NVML = r"""
#include <cstdio>
#include <cstring>
static int devices[5];
extern "C" {
int nvmlInit_v2() { return INIT; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  unsigned number = 0;
  if (sscanf(uuid, "GPU-00000000-0000-0000-0000-0000000000%02x", &number) != 1) return 2;
  if (strlen(uuid) != 40 || number < 1 || number > 4) return 6;
  *device = &devices[number];
  return 0;
}
int nvmlDeviceGetP2PStatus(void* device, void* peer, int capability, int* status) {
  const long one = static_cast<int*>(device) - devices, other = static_cast<int*>(peer) - devices;
  if (capability != 2) return 2;
  *status = one + other == 3 ? 0 : 4;
  return one == 4 || other == 4 ? 15 : 0;
}
}
"""
ASK_NVML = """
import json
from ringcomm import _core
uuid = lambda number: [0] * 15 + [number]
pairs = ((1, 2), (2, 1), (1, 3), (1, 4), (9, 1))
print(json.dumps([_core.simt.linked_by_nvlink(uuid(a), uuid(b)) for a, b in pairs]))
"""


def ask_nvml(folder: Path, *flags: str) -> list[tuple[bool | None, str]]:
    (folder / "nvml.cpp").write_text(FAKE_NVML)
    library = folder / "libnvidia-ml.so.1"
    command = [COMPILER, "-shared", "-fPIC", *flags, str(folder / "nvml.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    text = emulated.python("-c", ASK_NVML, LD_LIBRARY_PATH=str(folder))
    return [(answer, reason) for answer, reason in json.loads(text)]


def test_nvml_names_links(tmp_path: Path) -> None:
    emulated.require()
    found = ask_nvml(tmp_path, "-DINIT=0")
    assert [answer for answer, _ in found] == [True, True, False, None, None]
    reasons = [reason for _, reason in found]
    assert reasons[:3] == [""] * 3
    assert "nvmlDeviceGetP2PStatus failed with 15" in reasons[3]
    assert "GPU-00000000-0000-0000-0000-000000000009 failed with 6" in reasons[4]


def test_nvml_that_cannot_be_asked_is_a_reason(tmp_path: Path) -> None:
    emulated.require()
    failed = ask_nvml(tmp_path, "-DINIT=9")
    assert failed == [(None, "nvmlInit_v2 failed with 9")] * len(failed)
    lacking = ask_nvml(tmp_path, "-DINIT=0", "-DnvmlDeviceGetP2PStatus=other")
    assert {reason for _, reason in lacking} == {"libnvidia-ml.so.1 has no nvmlDeviceGetP2PStatus"}
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    text = emulated.python("-c", ASK_NVML, LD_LIBRARY_PATH=str(tmp_path))
    assert all(answer is None and reason for answer, reason in json.loads(text))
