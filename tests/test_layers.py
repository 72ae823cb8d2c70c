"""The one-way layers of both trees, and an import that touches nothing (design 3, style "Python")."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A room may use its own files and any lower layer, not its neighbours.
CPP_LAYERS: list[set[str]] = [
    {"base"},
    {"wire"},
    {"reduce", "codec", "transport"},
    {"algo"},
    {"comm"},
    {"bind"},
    {"torch"},
]
# Lowest first. A module may use its own layer and any lower one.
PYTHON_LAYERS: list[set[str]] = [
    {"_version", "_core"},
    {"errors", "env", "machine", "reference"},
    {
        "arguments",
        "arrays",
        "codecs",
        "descriptors",
        "device",
        "meeting",
        "plan",
        "rendezvous",
        "store",
        "symmetric",
        "tuning",
        "work",
    },
    {"comm"},
    {"bootstrap"},
    {"adapter", "ddp", "nodes", "cupyx", "parallel"},
    {"backend"},
    {"train"},
    {"__init__", "demo", "info", "timings", "tune"},
]


def layer_of(room: str, layers: list[set[str]]) -> int:
    for idx, rooms in enumerate(layers):
        if room in rooms:
            return idx
    raise AssertionError(
        f"{room!r} stands in no layer: add it to the table in {Path(__file__).name}"
    )


def cpp_violations(rooms: dict[str, list[tuple[str, str]]]) -> list[str]:
    """`rooms`: room -> (file, included room)."""
    return [
        f"{file} includes {included}/"
        for room, includes in rooms.items()
        for file, included in includes
        if included != room and layer_of(included, CPP_LAYERS) >= layer_of(room, CPP_LAYERS)
    ]


def python_violations(modules: dict[str, list[tuple[str, str]]]) -> list[str]:
    """`modules`: top-level module of ringcomm -> (file, imported top-level module)."""
    return [
        f"{file} imports {imported}"
        for module, imports in modules.items()
        for file, imported in imports
        if imported != module
        and layer_of(imported, PYTHON_LAYERS) > layer_of(module, PYTHON_LAYERS)
    ]


def cpp_includes() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu"):
            continue
        file = path.relative_to(ROOT / "csrc")
        includes = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        found.setdefault(file.parts[0], []).extend(
            (str(file), include.split("/")[0]) for include in includes
        )
    return found


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Top-level modules of ringcomm that `source`, a module in `package`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            names = (
                [f"ringcomm.{alias.name}" for alias in node.names] if base == "ringcomm" else [base]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "ringcomm":
                yield parts[1] if len(parts) > 1 else "__init__"


def python_imports() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "ringcomm").rglob("*.py")):
        file = path.relative_to(ROOT)
        module = path.relative_to(ROOT / "ringcomm").parts[0].removesuffix(".py")
        imports = [
            # `from ringcomm import something` that is no module is something of ringcomm/__init__.py
            name if any((ROOT / "ringcomm").glob(f"{name}*")) else "__init__"
            for name in imported_modules(path.read_text(), ".".join(file.parent.parts))
        ]
        found.setdefault(module, []).extend((str(file), name) for name in imports)
    return found


def test_cpp_rooms_include_only_lower_rooms() -> None:
    includes = cpp_includes()
    assert {"base", "bind"} <= set(includes)
    for room in includes:
        layer_of(room, CPP_LAYERS)
    assert cpp_violations(includes) == []


def test_the_torch_adapter_reaches_the_core_through_its_c_table_only() -> None:
    included = {include for _, include in cpp_includes()["torch"]}
    assert included == {"bind", "torch"}
    assert all(
        line.split('"')[1] == "bind/c_table.h" or line.split('"')[1].startswith("torch/")
        for path in (ROOT / "csrc" / "torch").iterdir()
        for line in path.read_text().splitlines()
        if line.startswith('#include "')
    )
    assert '#include "' not in (ROOT / "csrc" / "bind" / "c_table.h").read_text()


def test_python_modules_import_only_lower_modules() -> None:
    imports = python_imports()
    assert {"__init__", "env", "info"} <= set(imports)
    for module in imports:
        layer_of(module, PYTHON_LAYERS)
    assert python_violations(imports) == []


def test_the_layer_checks_catch_violations() -> None:
    assert cpp_violations({"codec": [("codec/a.h", "base"), ("codec/a.h", "codec")]}) == []
    assert cpp_violations({"codec": [("codec/a.h", "reduce")]}) == ["codec/a.h includes reduce/"]
    assert cpp_violations({"base": [("base/a.h", "wire")]}) == ["base/a.h includes wire/"]
    assert python_violations({"ddp": [("ddp.py", "comm"), ("ddp.py", "parallel")]}) == []
    assert python_violations({"codecs": [("codecs.py", "comm")]}) == ["codecs.py imports comm"]
    source = (
        "import ringcomm.comm\nfrom ringcomm import env\nfrom . import plan\nfrom .codec import x\n"
    )
    assert list(imported_modules(source, "ringcomm")) == ["comm", "env", "plan", "codec"]
    assert list(imported_modules("from ..comm import x", "ringcomm.parallel")) == ["comm"]
    assert list(imported_modules("def f():\n    import ringcomm", "ringcomm")) == ["__init__"]
    with pytest.raises(AssertionError, match="no layer"):
        layer_of("attic", CPP_LAYERS)


def test_the_core_reads_no_environment() -> None:
    readers = [
        str(path)
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and "getenv" in path.read_text()
    ]
    assert readers == []


# NumPy and its threads are not ours, so it is imported first.
IMPORT_PROBE = """
import json, logging, os, sys, threading
import numpy

touched = []
def audit(event, args):
    if event in ("subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "socket.connect", "socket.bind"):
        touched.append(event)
sys.addaudithook(audit)

read = []
original = os._Environ.__getitem__
def spy(self, key):
    frame = sys._getframe(1)
    while frame is not None:
        if f"{os.sep}ringcomm{os.sep}" in frame.f_code.co_filename:
            read.append(os.fsdecode(key))
            break
        frame = frame.f_back
    return original(self, key)
os._Environ.__getitem__ = spy

tasks = len(os.listdir("/proc/self/task"))
root = logging.getLogger()
logging_before = (root.level, list(root.handlers))
MODULES
print(json.dumps({
    "torch": "torch" in sys.modules or "cupy" in sys.modules,
    "threads": len(os.listdir("/proc/self/task")) - tasks,
    "touched": touched,
    "environment": read,
    "logging": logging_before != (root.level, list(root.handlers))
        or logging.getLogger("ringcomm").level != 0
        or any(type(h) is not logging.NullHandler for h in logging.getLogger("ringcomm").handlers),
    "cuda": "libcuda" in open("/proc/self/maps").read(),
}))
"""
UNTOUCHED = {
    "torch": False,
    "threads": 0,
    "touched": [],
    "environment": [],
    "logging": False,
    "cuda": False,
}


def probe_import(statements: str) -> object:
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE.replace("MODULES", statements)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statements", ["import ringcomm", "import ringcomm._core", "import ringcomm.env, ringcomm.info"]
)
def test_importing_touches_nothing(statements: str) -> None:
    assert probe_import(statements) == UNTOUCHED


def test_the_import_probe_sees_what_it_watches(tmp_path: Path) -> None:
    guilty = tmp_path / "ringcomm" / "guilty.py"
    guilty.parent.mkdir()
    guilty.write_text(
        "import logging, os, subprocess, threading\n"
        "os.environ.get('HOME')\n"
        "subprocess.run(['true'])\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "logging.getLogger('ringcomm').setLevel(10)\n"
    )
    seen = probe_import(f"exec(compile(open({str(guilty)!r}).read(), {str(guilty)!r}, 'exec'))")
    assert isinstance(seen, dict)
    assert "HOME" in seen["environment"]
    assert "subprocess.Popen" in seen["touched"]
    assert seen["threads"] == 1
    assert seen["logging"]
