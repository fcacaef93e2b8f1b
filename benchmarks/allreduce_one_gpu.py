"""The ways of allreduce_rmsnorm with all ranks on one GPU: what waits, launches and norms cost where no link is slow.

    PYTHONPATH=. python benchmarks/allreduce_one_gpu.py [--json FILE]

Ranks share the multiprocessors here, so large messages say nothing of ranks with a GPU each; of small ones it shows
what splitting rows among blocks saves. Microseconds in CUDA graphs, interleaved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from moe_fuzz.bench import timing
from moe_fuzz.bench.child import environment
from moe_fuzz.kernels.allreduce_rmsnorm import LocalGroup, allreduce_rmsnorm
from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import BACKENDS
from moe_fuzz.kernels.allreduce_rmsnorm.launch import shape_of

_WORLDS, _HIDDEN, _TOKENS = (2, 4, 8), (2048, 4096, 7168), (1, 4, 16, 32, 64)
_LAUNCHES, _ROUNDS = 20, 15


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for world, hidden, tokens in itertools.product(_WORLDS, _HIDDEN, _TOKENS):
        group = LocalGroup(world, launches="single", capacity=4 << 20)
        x = torch.randn(world, tokens, hidden, device="cuda").bfloat16()
        residual, gamma = torch.randn(tokens, hidden, device="cuda").bfloat16(), torch.rand(hidden, device="cuda")
        out = (torch.empty_like(x), torch.empty_like(x))
        calls = {name: partial(allreduce_rmsnorm, x, residual, gamma, group=group, out=out, backend=name)
                 for name in BACKENDS}  # fmt: skip
        results = {name: call()[0].clone() for name, call in calls.items()}
        group.check()
        assert all(torch.equal(result, results["one_shot"]) for result in results.values()), "other bits"
        graphs = {name: timing.capture([call], _LAUNCHES) for name, call in calls.items()}
        times = timing.interleaved(graphs, _LAUNCHES, _ROUNDS)
        us = {name: statistics.median(samples) for name, samples in times.items()}
        *_, blocks, parts = shape_of(group, tokens, hidden, 2, "split")
        found.append({"ranks": world, "hidden": hidden, "tokens": tokens, "blocks": blocks, "parts": parts, "us": us})
        print(f"{world} ranks  H {hidden:4}  T {tokens:2}  {parts} parts  "
              + "  ".join(f"{name} {t:6.2f}" for name, t in us.items()), flush=True)  # fmt: skip
    if options.json:
        record = {"command": "python benchmarks/allreduce_one_gpu.py", "date": time.strftime("%Y-%m-%d"),
                  **environment(), "unit": "us", "points": found}  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
