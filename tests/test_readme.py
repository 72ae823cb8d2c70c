"""The README tells the truth: its code runs, its tables list what the code has."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringcomm
from ringcomm import env, errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_block_runs_as_printed(number, tmp_path):
    source = BLOCKS[number]
    script = tmp_path / "block.py"
    script.write_text(source)
    launcher = []
    header = re.match(r"# torchrun --nproc-per-node (\d)\n", source)
    if header:
        pytest.importorskip("torch", reason="the block is launched by torchrun")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={header[1]}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_there_is_a_block_for_every_way_in():
    text = "".join(BLOCKS)
    for way in ("ringcomm.attach(", "ringcomm.init(", "ringcomm.codec(", "register_comm_hook("):
        assert way in text


def test_environment_variables_are_all_listed():
    own = [name for name in env.VARIABLES if name.startswith("RINGCOMM_")]
    assert own
    assert [name for name in env.VARIABLES if f"`{name}`" not in README] == []


def test_every_error_class_is_listed():
    names = [name for name in errors.__all__ if name != "RingcommError"]
    assert [name for name in names if f"`{name}`" not in README] == []


def test_every_public_name_resolves_and_has_a_docstring():
    missing = []
    for module_info in pkgutil.iter_modules(ringcomm.__path__, "ringcomm."):
        if module_info.ispkg or module_info.name.split(".")[-1].startswith("_"):
            continue
        module = importlib.import_module(module_info.name)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__:
                missing.append(f"{module_info.name}.{name}")
    for name in ringcomm.__all__:
        getattr(ringcomm, name)
    assert missing == []
