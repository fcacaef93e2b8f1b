"""Times launch shapes of allreduce_rmsnorm across ranks: threads a multiprocessor, bytes a warp, registers a thread.

    python benchmarks/tune_allreduce.py [--ranks 2]

Every shape is timed at every size, in turn, in one run; the fastest of each size stands beside the one in use. What the
threads and registers keep free for a second group is lost where a shape takes more: `launch.py` says why.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from pathlib import Path

from moe_fuzz.bench.ranks import run_ranks

MESSAGES = [(1, 2048), (1, 7168), (16, 2048), (64, 2048), (64, 4096), (64, 7168), (256, 2048), (512, 4096),
            (1024, 4096)]  # fmt: skip
#: Threads, bytes a warp, registers. All blocks must be resident at once: a multiprocessor has 65536 registers.
SHAPES = [shape for shape in itertools.product((512, 1024), (512, 1024, 2048), (64, 128))
          if shape[0] * shape[2] <= 65536]  # fmt: skip
IN_USE = (512, 512, 64)


def rank() -> None:
    import torch
    import torch.distributed as dist

    from moe_fuzz.bench.allreduce_child import captured
    from moe_fuzz.bench.timing import interleaved
    from moe_fuzz.kernels.allreduce_rmsnorm import RankGroup, allreduce_rmsnorm, launch

    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=os.environ["INIT_METHOD"], rank=number, world_size=world,
                            device_id=device)  # fmt: skip
    group = RankGroup(capacity=16 << 20)
    for tokens, hidden in MESSAGES:
        x, residual = torch.randn(2, tokens, hidden, device=device).bfloat16()
        gamma, out = torch.rand(hidden, device=device).bfloat16(), (torch.empty_like(x), torch.empty_like(x))
        graphs = {}
        for shape, backend in itertools.product(SHAPES, ("one_shot", "two_shot")):
            if backend == "two_shot" and tokens * hidden < 1 << 17:
                continue
            launch._THREADS, launch._WARP_BYTES, launch._REGISTERS = shape

            def call(x=x, residual=residual, gamma=gamma, out=out, backend=backend):
                return allreduce_rmsnorm(x, residual, gamma, group=group, out=out, backend=backend)

            call()
            group.check()
            graphs[f"{backend} {shape}"] = captured(call, 20)
        samples = interleaved(graphs, 20, 9)
        slowest = torch.tensor([samples[name] for name in graphs], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times = {name: statistics.median(row) for name, row in zip(graphs, slowest.tolist(), strict=True)}
        best = sorted(times, key=lambda name: times[name])[:4]
        used = {name: time for name, time in times.items() if name.endswith(str(IN_USE))}
        if number == 0:
            print(f"T {tokens} H {hidden} ({tokens * hidden * 2 >> 10} KB): in use "
                  + ", ".join(f"{name.split()[0]} {time:.2f}" for name, time in used.items()) + " us; best "
                  + ", ".join(f"{name} {times[name]:.2f}" for name in best), flush=True)  # fmt: skip
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    print(run_ranks(Path(__file__).resolve(), parser.parse_args().ranks, [], 300.0))
