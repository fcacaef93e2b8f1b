"""One rank of the all-reduce benchmark: makes the candidates, verifies them, times them in graphs. Child side.

Every rank does the same in the same order. A candidate's time is the slowest rank's, sample by sample.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.bench import allreduce_choice as choice
from moe_fuzz.bench.timing import interleaved
from moe_fuzz.kernels.allreduce_rmsnorm import RankGroup, allreduce_rmsnorm
from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import BACKENDS, caps_of, entry
from moe_fuzz.kernels.allreduce_rmsnorm.launch import arch_of
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm as reference

Call = Callable[[], tuple[Tensor, Tensor]]
EPS = 1e-6


@dataclass
class Bench:
    """What all sizes share."""

    rank: int
    world: int
    launches: int
    rounds: int
    group: RankGroup
    symmetric: Tensor  # uint8, for torch's all-reduces
    left_out: dict[str, str] = field(default_factory=dict)  # candidate -> why

    def point(self, tokens: int, hidden: int) -> choice.Point | None:
        generator = torch.Generator("cuda").manual_seed(tokens)
        x, residual = (torch.randint(-8, 9, shape, generator=generator, device="cuda").bfloat16() / 2
                       for shape in ((self.world, tokens, hidden), (tokens, hidden)))  # fmt: skip
        gamma = torch.rand(hidden, generator=generator, device="cuda").bfloat16()
        want = reference(x, residual, gamma, EPS)
        graphs = {}
        for name, call in self.candidates(x[self.rank].contiguous(), residual, gamma).items():
            problem = self.verified(call, want)
            if problem:
                self.left_out.setdefault(name, f"{tokens} x {hidden}: {problem}")
                continue
            graphs[name] = captured(call, self.launches)
        if not graphs:
            return None
        samples = interleaved(graphs, self.launches, self.rounds)
        slowest = torch.tensor([samples[name] for name in graphs], device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        medians = {name: statistics.median(row) for name, row in zip(graphs, slowest.tolist(), strict=True)}
        unfused: dict[str, dict[str, float]] = {}
        for name in medians:
            if name not in BACKENDS:
                unfused.setdefault(name.partition(" ")[0], {})[name] = medians[name]
        fused = {name: medians[name] for name in BACKENDS if name in medians}
        if len(fused) < len(BACKENDS):
            return None
        return choice.Point(hidden, tokens, tokens * hidden * 2, fused, unfused)

    def candidates(self, x: Tensor, residual: Tensor, gamma: Tensor) -> dict[str, Call]:
        """Each reads the same x and the same residual at every call. What torch's all-reduces read is theirs already,
        in symmetric memory; ours copies what others must see."""
        out, total = (torch.empty_like(x), torch.empty_like(x)), torch.empty_like(x)
        shared = self.symmetric[: x.numel() * 2].view(x.dtype).view(x.shape)
        name = self.group.process_group.group_name

        def fused(backend: str) -> Call:
            return lambda: allreduce_rmsnorm(x, residual, gamma, EPS, group=self.group, out=out, backend=backend)

        def one_shot() -> tuple[Tensor, Tensor]:
            torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", name, total)
            return add_rmsnorm(total, residual, gamma, *out)

        def two_shot() -> tuple[Tensor, Tensor]:
            torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)
            return add_rmsnorm(shared, residual, gamma, *out)

        def nccl() -> tuple[Tensor, Tensor]:
            dist.all_reduce(own)
            return add_rmsnorm(own, residual, gamma, *out)

        # Summed in place: their bits are of the first call, and later ones grow, which takes no other time.
        own = x.clone()
        shared.copy_(x)
        torch.cuda.synchronize()
        dist.barrier()
        found: dict[str, Call] = {backend: fused(backend) for backend in BACKENDS}
        found["symm_mem one_shot + norm"] = one_shot
        found["symm_mem two_shot + norm"] = two_shot
        found["nccl + norm"] = nccl
        return {label: call for label, call in found.items() if label not in self.left_out}

    def verified(self, call: Call, want: tuple[Tensor, Tensor]) -> str:
        """Why it is not timed, the same on every rank; "" if it is right."""
        try:
            normed, total = call()
            self.group.check()
            wrong = (total != want[1]).sum().item()
            error = (normed.float() - want[0].float()).abs().max().item() / want[0].float().abs().max().item()
            problem = f"{wrong} sums are wrong" if wrong else f"norm off by {error:.2g}" if error > 0.02 else ""
        except (RuntimeError, AttributeError, TypeError) as caught:
            problem = f"{type(caught).__name__}: {caught}".splitlines()[0]
        said: list[str | None] = [None] * self.world
        dist.all_gather_object(said, problem)
        return next((text for text in said if text), "")


def captured(call: Call, launches: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # NCCL's watchdog asks for events from a thread of its own; that must not end the capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(launches):
            call()
    return graph


def main(arguments: list[str]) -> int:
    """One JSON line on rank 0's standard output."""
    asked: dict[str, Any] = json.loads(arguments[0])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=os.environ["INIT_METHOD"], rank=rank, world_size=world,
                            device_id=device)  # fmt: skip
    began, largest = time.monotonic(), max(asked["bytes"])
    group = RankGroup(capacity=2 * largest, device=device)
    symmetric = symm_mem.empty(2 * largest, dtype=torch.uint8, device=device)
    symm_mem.rendezvous(symmetric, group.process_group)
    bench = Bench(rank, world, asked["launches"], asked["rounds"], group, symmetric)
    points: list[choice.Point] = []
    for hidden in asked["hidden"]:
        for tokens in dict.fromkeys(max(1, round(size / (2 * hidden))) for size in asked["bytes"]):
            late = torch.tensor([time.monotonic() - began > asked["seconds"]], device=device, dtype=torch.int32)
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item():
                bench.left_out[f"H {hidden} from T {tokens} on"] = "time was up"
                break
            point = bench.point(tokens, hidden)
            if point is not None:
                points.append(point)
            if rank == 0:
                print(f"H {hidden} T {tokens}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    if rank == 0:
        print(json.dumps(report(points, bench, asked["calibrate"])), flush=True)
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # what groups give back at exit may wait for each other


def report(points: list[choice.Point], bench: Bench, calibrate: bool) -> dict[str, Any]:
    arch, links = arch_of(bench.group.device), bench.group.links
    about = f"measured on {bench.world} x {torch.cuda.get_device_name()}, {datetime.now(UTC).date()}"
    caps = choice.caps_of_points(points, about) if calibrate and points else caps_of(bench.world, arch, links)
    return {
        "world": bench.world, "arch": arch, "links": links, "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "launches": bench.launches, "rounds": bench.rounds,
        "caps": entry(caps), "source": caps.source,
        "calibrated": calibrate, "left_out": bench.left_out,
        "points": [{"hidden": p.hidden, "tokens": p.tokens, "bytes": p.message, "fused": dict(p.fused),
                    "unfused": {k: dict(v) for k, v in p.unfused.items()},
                    "choice": choice.chosen(p, caps, None)[0]} for p in points],
        "crossover": {str(hidden): {family: choice.crossover([p for p in points if p.hidden == hidden], family)
                                    for family in sorted({f for p in points for f in p.unfused})}
                      for hidden in dict.fromkeys(p.hidden for p in points)},
        "misses": choice.misses(points, caps),
    }  # fmt: skip


def add_rmsnorm(
    total: Tensor, residual: Tensor, gamma: Tensor, normed: Tensor, residual_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The second kernel of an unfused call: a row a program."""
    tokens, hidden = total.shape
    columns = triton.next_power_of_2(hidden)
    _add_rmsnorm_kernel[(tokens,)](
        total, residual, gamma, normed, residual_out, hidden, EPS, COLUMNS=columns,
        num_warps=min(16, max(1, columns // 256)),
    )  # fmt: skip
    return normed, residual_out


@triton.jit
def _add_rmsnorm_kernel(  # type: ignore[no-untyped-def]
    total_ptr, residual_ptr, gamma_ptr, normed_ptr, out_ptr, hidden, eps, COLUMNS: tl.constexpr
):
    column = tl.arange(0, COLUMNS)
    where, inside = tl.program_id(0).to(tl.int64) * hidden + column, column < hidden
    total = tl.load(total_ptr + where, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, mask=inside, other=0.0).to(tl.float32)
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + where, stored, mask=inside)
    value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / hidden + eps)
    tl.store(normed_ptr + where, (value * scale * gamma).to(normed_ptr.dtype.element_ty), mask=inside)
