"""torch's own DistributedTest on ringcomm: what Gloo passes must pass.

    python -m tests.torch_suite --world-size 2 [--filter REGEX] [--fast]

What Gloo passes stands in gloo.json per torch version and world size; for others it is found out first
(``--record`` writes it down). Exceptions, with reasons, stand in exceptions.py. Needs the packages
expecttest and hypothesis.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.torch_suite.exceptions import DISGUISED, EXCEPTIONS

HERE = Path(__file__).parent
RECORD = HERE / "gloo.json"
# --fast leaves out what repeats another test with a group, a type or a profiler more.
REPEATS = re.compile("full_group|complex|_profiler|_group_|coalesced_.*(max|min|product)")


def run(backend: str, world_size: int, tests: list[str]) -> dict[str, dict[str, Any]]:
    """Test -> result of tests/torch_suite/runner.py; all tests if none is named."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "tests.torch_suite.runner", backend, str(world_size)]
        subprocess.run([*command, file.name, *tests], check=True, cwd=HERE.parents[1])
        results = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    return {result["test"]: result for result in results}


def passed_by_gloo(world_size: int, record: bool) -> list[str]:
    import torch

    version = ".".join(torch.__version__.split(".")[:2])
    recorded = json.loads(RECORD.read_text())
    known = recorded.setdefault(version, {}).get(str(world_size))
    if known is None or record:
        print(
            f"finding out what Gloo passes with torch {version} and {world_size} ranks", flush=True
        )
        results = run("gloo", world_size, [])
        known = sorted(test for test, found in results.items() if found["outcome"] == "pass")
        if record:
            recorded[version][str(world_size)] = known
            RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return list(known)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torch_suite", description=__doc__)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--filter", default="", help="a regular expression")
    parser.add_argument("--fast", action="store_true", help="leave out repetitions")
    parser.add_argument("--record", action="store_true", help="write down what Gloo passes")
    options = parser.parse_args()
    n = options.world_size
    excepted = {test: reason for test, (smallest, reason) in EXCEPTIONS.items() if n >= smallest}
    wanted = [
        test
        for test in passed_by_gloo(n, options.record)
        if re.search(options.filter, test)
        and test not in excepted
        and not (options.fast and REPEATS.search(test))
    ]
    results: dict[str, dict[str, Any]] = {}
    for backend in ("ringcomm", "disguised"):
        tests = [test for test in wanted if (test in DISGUISED) == (backend == "disguised")]
        if tests:
            results |= run(backend, n, tests)
    bad = [result for result in results.values() if result["outcome"] != "pass"]
    for result in bad:
        print(f"--- {result['test']}: {result['outcome']}\n{result['reason']}")
    seconds = sum(result["seconds"] for result in results.values())
    for test, reason in excepted.items():
        print(f"not run: {test}: {reason}")
    print(
        f"torch's suite, {n} ranks: {len(results) - len(bad)} of {len(wanted)} tests that Gloo passes pass "
        f"({len(excepted)} exceptions, {seconds:.0f} s)"
    )
    return 1 if bad or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
