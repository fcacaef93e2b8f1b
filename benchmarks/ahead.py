"""Compiles our kernels for a GPU that need not be here, and prints what each binary takes of a multiprocessor.

    PYTHONPATH=. python benchmarks/ahead.py [--whole] [--capability 90] [GROUP]...

Without `--whole` as far as Triton's own checks, which takes seconds and prints failures alone.
"""

from __future__ import annotations

import argparse
import sys

from moe_fuzz.bench.ahead import SHARED_BYTES, ahead, resources
from moe_fuzz.bench.ahead_calls import GROUPS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--whole", action="store_true", help="to machine code")
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()
    all_bad = 0
    seen: set[int] = set()
    for group in options.groups:
        bad = calls = 0
        for name, call in GROUPS[group]():
            calls += 1
            with ahead(options.capability, options.whole) as found:
                try:
                    call()
                except Exception as problem:  # noqa: BLE001 -- told, and counted
                    bad += 1
                    print(f"{group}, {name}: {type(problem).__name__}: {problem}", flush=True)
            if not options.whole:
                continue
            for of_kernel, binary in found.binaries:
                if id(binary) in seen:
                    continue
                seen.add(id(binary))
                took = resources(binary)
                too_large = took.shared > SHARED_BYTES
                bad += too_large
                print(f"{took.registers:4} registers {took.spilled:5} spilled {took.shared:7} shared"
                      f"{' TOO LARGE' if too_large else ''}  {group}, {name}: {of_kernel}", flush=True)  # fmt: skip
        print(f"{group}: {calls} calls, {bad} that would fail", flush=True)
        all_bad += bad
    return 1 if all_bad else 0


if __name__ == "__main__":
    sys.exit(main())
