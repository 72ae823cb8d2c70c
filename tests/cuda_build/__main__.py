"""``python -m tests.cuda_build [--update]``: what every kernel needs on every architecture.

Prints, by kernel, the most registers of its instances, stack, spills and static shared memory, and whether each
instance moves 16 bytes at a time. ``--update`` writes the registers to kernel_budgets.json.
"""

from __future__ import annotations

import argparse
import sys

from tests.cuda_build import budgets
from tests.cuda_build.kernels import CompilationError, Kernel, compile_all
from tests.cuda_build.toolkit import toolkit


def yes(values: list[bool | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "?"
    return "yes" if all(known) else "some" if any(known) else "no"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--update", action="store_true", help="write kernel_budgets.json")
    args = parser.parse_args()
    about = toolkit()
    if not about.nvcc:
        print(about.reason, file=sys.stderr)
        return 1
    print(f"nvcc {about.release} ({about.nvcc}), {about.disassembler or 'no nvdisasm'}")
    found: dict[str, list[Kernel]] = {}
    failed = False
    for source, kernels in compile_all().items():
        if isinstance(kernels, CompilationError):
            print(kernels, file=sys.stderr)
            failed = True
        else:
            found[source] = kernels
    archs = [f"sm_{arch}" for arch in about.archs]
    print(
        f"{'kernel':52} {'of':>4} {' '.join(f'{a:>6}' for a in archs)}  stack spill  smem  load16 store16"
    )
    for source, families in budgets.table(found).items():
        for family, row in families.items():
            members = [k for k in found[source] if k.family == family]
            instances = len({k.name for k in members})
            registers = " ".join(f"{row.get(arch, 0):6}" for arch in archs)
            most = [
                max(getattr(k, what) for k in members) for what in ("stack", "spills", "shared")
            ]
            print(
                f"{source + ' ' + family:52} {instances:4} {registers}  {most[0]:5} {most[1]:5} {most[2]:5}"
                f"  {yes([k.wide_load for k in members]):>6} {yes([k.wide_store for k in members]):>7}"
            )
    if failed:
        return 1
    if args.update:
        budgets.write(about.release, found)
        print(f"wrote {budgets.FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
