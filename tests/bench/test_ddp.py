"""A short run of bench.ddp: who takes part, and that replicas are compared."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_three_ways_train_and_the_two_exact_ones_agree(tmp_path: Path) -> None:
    out = tmp_path / "ddp.json"
    command = [sys.executable, "-m", "bench.ddp", "--steps", "10", "--json", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["who"]: row for row in json.loads(out.read_text())["rows"]}
    # Every rank has data of its own, so replicas that do not communicate must differ.
    equal = {who: row["equal"] for who, row in rows.items()}
    assert equal == {"gloo": True, "ringcomm": True, "no communication": False}
    assert all(row["step_ms"] > 0 for row in rows.values())
    assert rows["no communication"]["exposed_ms"] == 0
