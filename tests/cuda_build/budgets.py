"""The registers that kernels may need: kernel_budgets.json beside this, by source, kernel and architecture.

A kernel may need fewer. One that needs more, and one that is not in the file, is a decision: look at it, then run
``make kernel-budgets``.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.cuda_build.kernels import Kernel, table

FILE = Path(__file__).parent / "kernel_budgets.json"
HOW = "if that is what you want: make kernel-budgets (python -m tests.cuda_build --update)"

Rows = dict[str, dict[str, dict[str, int]]]


def read() -> tuple[str, Rows]:
    """The release of the toolkit that the budgets are of, and the budgets."""
    document = json.loads(FILE.read_text())
    return document["cuda"], document["most_registers"]


def write(release: str, found: dict[str, list[Kernel]]) -> None:
    lines = []
    for source, families in table(found).items():
        rows = [f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in families.items()]
        lines.append(f"    {json.dumps(source)}: {{\n" + ",\n".join(rows) + "\n    }")
    body = ",\n".join(lines)
    FILE.write_text(
        f'{{\n  "cuda": {json.dumps(release)},\n  "most_registers": {{\n{body}\n  }}\n}}\n'
    )


def differences(budget: Rows, source: str, kernels: list[Kernel]) -> list[str]:
    """What a source's kernels need more than they may, a sentence each."""
    said = []
    allowed = budget.get(source, {})
    needed = table({source: kernels}).get(source, {})
    for family in sorted(set(allowed) | set(needed)):
        if family not in allowed:
            said.append(f"{family} is new")
        elif family not in needed:
            said.append(f"{family} is gone")
        else:
            for arch, registers in needed[family].items():
                most = allowed[family].get(arch)
                if most is None:
                    said.append(f"{family} has no budget for {arch}")
                elif registers > most:
                    worst = max(
                        (k for k in kernels if k.family == family and f"sm_{k.arch}" == arch),
                        key=lambda kernel: kernel.registers,
                    )
                    said.append(
                        f"{family} needs {registers} registers on {arch}, not {most} ({worst.name})"
                    )
    return said
