"""Times block shapes of `experts_bf16` on a GPU, each checked before it is timed; `--write` rewrites their table.

    python benchmarks/tune_experts.py [--models NAME,...] [--tokens 1,8,...] [--json FILE] [--write]

A time is that of a CUDA graph of several calls with different tokens and ids, so that weights come from memory, over
their number. The floor of a call is the larger of the bytes that it must move over the bandwidth of a copy, and of its
operations over the rate of a large product of random matrices, both measured first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.kernels.align import align
from moe_fuzz.kernels.experts_bf16 import blocks as table
from moe_fuzz.kernels.experts_bf16 import experts_bf16, workspace_bytes
from moe_fuzz.kernels.experts_bf16.blocks import Blocks, Plan
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference


@dataclass(frozen=True)
class Model:
    name: str
    experts: int  # that tokens are routed to
    local: int  # of them here
    hidden: int
    inter: int
    top_k: int


MODELS = (
    Model("qwen3-30b", 128, 128, 2048, 768, 8),
    Model("qwen3-vl-235b-tp4", 128, 128, 4096, 384, 8),
    Model("mixtral-8x7b", 8, 8, 4096, 14336, 2),
    Model("deepseek-v3-ep8", 256, 32, 7168, 2048, 8),
    Model("gpt-oss-120b", 128, 128, 2880, 2880, 4),
)

#: What is tried for each plan of the table, by its place: (m, n, d, group, warps, stages) of either product.
CANDIDATES = (
    [(16, 32, 128, 1, 4, 5), (16, 64, 64, 1, 4, 6), (16, 64, 128, 1, 4, 4), (16, 32, 256, 1, 4, 4)],
    [(16, 64, 128, 1, 4, 4), (32, 64, 128, 1, 4, 4), (32, 128, 64, 1, 4, 5)],
    [(32, 128, 64, 1, 4, 4), (64, 128, 64, 1, 4, 4), (64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 4, 3)],
    [(64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 4, 3), (64, 256, 64, 8, 4, 4), (128, 128, 64, 8, 4, 4),
     (128, 256, 64, 8, 8, 3)],
    [(128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (128, 256, 64, 16, 8, 4)],
)  # fmt: skip


@dataclass
class Load:
    """Several calls of one size, and what they should give."""

    model: Model
    w13: Tensor
    w2: Tensor
    calls: list[tuple[Tensor, Tensor, Tensor]]  # x, weights, ids
    expert_map: Tensor | None
    expected: Tensor  # of the first
    out: Tensor
    workspace: Tensor
    floor: float  # µs

    def call(self, plan: Plan, nth: int = 0) -> Tensor:
        x, weights, ids = self.calls[nth]
        return experts_bf16(
            x, self.w13, self.w2, weights, ids, expert_map=self.expert_map, out=self.out, workspace=self.workspace,
            plan=plan,
        )  # fmt: skip

    def time(self, plan: Plan) -> float:
        """µs of a call, infinite where the result is wrong."""
        self.out.fill_(math.nan)
        self.workspace.fill_(0xFF)  # NaN, and ids out of range
        found, expected = self.call(plan).double(), self.expected.double()
        error = float((found - expected).norm() / expected.norm())
        if not error < 2**-8:
            print(f"WRONG: {self.model.name} T {self.out.shape[0]}: relative error {error:.2e} with {text(plan)}")
            return math.inf
        return graph_time(lambda: [self.call(plan, nth) for nth in range(len(self.calls))]) / len(self.calls)


def graph_time(work: Callable[[], Any], replays: int = 12) -> float:
    """µs of `work`, captured: the median of several replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks))
    return times[len(times) // 2]


def ceilings() -> tuple[float, float]:
    """Bytes and bfloat16 operations a microsecond, measured."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() / graph_time(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return copied, 2 * 8192**3 / graph_time(lambda: a @ b)


def load(model: Model, w13: Tensor, w2: Tensor, tokens: int, bandwidth: float, rate: float) -> Load:
    expert_map = None
    if model.local < model.experts:
        expert_map = torch.full((model.experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[model.local : 2 * model.local] = torch.arange(model.local, dtype=torch.int32, device="cuda")
    calls, moved, worked = [], 0.0, 0.0
    count = 8 if tokens <= 64 else 2
    for _ in range(count):
        logits = torch.randn(tokens, model.experts, device="cuda")
        weights, ids = logits.softmax(1).topk(model.top_k)
        x = torch.randn(tokens, model.hidden, device="cuda", dtype=torch.bfloat16)
        calls.append((x, weights, ids.int()))
        here = ids if expert_map is None else expert_map[ids][expert_map[ids] >= 0]
        one = 3 * model.hidden * model.inter  # weights of an expert
        moved += (2 * one * here.unique().numel() + 4 * tokens * model.hidden) / count
        worked += 2 * one * here.numel() / count
    x, weights, ids = calls[0]
    expected = reference(x, w13, w2, weights, ids, expert_map=expert_map)
    size = workspace_bytes(tokens, model.top_k, model.hidden, model.inter, model.local)
    return Load(
        model, w13, w2, calls, expert_map, expected, torch.empty_like(x),
        torch.empty(size, dtype=torch.uint8, device="cuda"), max(moved / bandwidth, worked / rate),
    )  # fmt: skip


def tune(work: Load, nth: int) -> tuple[dict[str, float], str]:
    """The time of each plan tried, and the best: for each m the gate_up product first, then the other."""
    times: dict[str, float] = {}
    best: dict[int, tuple[float, Plan]] = {}
    tried = [Blocks(*c) for c in CANDIDATES[nth] if work.model.hidden % c[2] == 0 and work.model.inter % c[2] == 0]
    for part in ("gate_up", "down"):
        for blocks in tried:
            base = best[blocks.m][1] if blocks.m in best else Plan(0, blocks, blocks)
            plan = replace(base, gate_up=blocks) if part == "gate_up" else replace(base, down=blocks)
            if text(plan) in times:
                continue
            times[text(plan)] = took = work.time(plan)
            if blocks.m not in best or took < best[blocks.m][0]:
                best[blocks.m] = took, plan
    return times, min(times, key=lambda key: times[key])


def text(plan: Plan) -> str:
    return f"{_short(plan.gate_up)} {_short(plan.down)}"


def _short(b: Blocks) -> str:
    return f"{b.m}x{b.n}x{b.d}g{b.group}w{b.warps}s{b.stages}"


def _blocks(short: str) -> str:
    return "Blocks({})".format(", ".join(re.findall(r"\d+", short)))


def chosen(found: list[dict[str, Any]], nth: int) -> str | None:
    """The plan with the least loss against the best of every size, over the sizes that it serves."""
    rows = [row for row in found if row["plan"] == nth]
    shared = set.intersection(*(set(row["times"]) for row in rows)) if rows else set()
    if not shared:
        return None
    return min(shared, key=lambda key: sum(math.log(row["times"][key] / min(row["times"].values())) for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(m.name for m in MODELS))
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="rewrite the table with what was found")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e6:.2f} TB/s, product {rate / 1e6:.0f} TFLOP/s")
    for tokens in (1, 64, 512, 4096, 8192):
        ids = torch.randint(128, (tokens, 8), dtype=torch.int32, device="cuda")
        out = align(ids, 64, 128)
        took = graph_time(lambda ids=ids, out=out: align(ids, 64, 128, out=out))  # type: ignore[misc]
        print(f"align {tokens}x8 of 128: {took:.1f} µs")
    found = []
    for model in MODELS:
        if model.name not in options.models.split(","):
            continue
        w13 = torch.randn(model.local, 2 * model.inter, model.hidden, device="cuda", dtype=torch.bfloat16)
        w13 *= model.hidden**-0.5
        w2 = torch.randn(model.local, model.hidden, model.inter, device="cuda", dtype=torch.bfloat16)
        w2 *= model.inter**-0.5
        for tokens in map(int, options.tokens.split(",")):
            work = load(model, w13, w2, tokens, bandwidth, rate)
            now = table.choose(tokens * model.top_k, model.experts)
            nth = table.PLANS.index(now)
            times, best = tune(work, nth)
            times[text(now)] = before = times[text(now)] if text(now) in times else work.time(now)
            found.append({
                "model": model.name, "tokens": tokens, "plan": nth, "floor": work.floor, "now": before,
                "best": best, "times": times,
            })  # fmt: skip
            print(f"{model.name:18} T {tokens:4} plan {nth} floor {work.floor:7.1f} now {before:7.1f} "
                  f"({work.floor / before:4.0%}) best {times[best]:7.1f} ({work.floor / times[best]:4.0%}) {best}",
                  flush=True)  # fmt: skip
            del work
        del w13, w2
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"copy": bandwidth, "product": rate, "found": found}, indent=1))
    file = Path(table.__file__)
    source = file.read_text()
    for nth, plan in enumerate(table.PLANS):
        key = chosen(found, nth)
        print(f"plan {nth} (up to {plan.up_to} slots an expert): {key or 'not measured'}")
        if key:
            gate_up, down = map(_blocks, key.split())
            entry = re.compile(rf"( +Plan\({_number(plan.up_to)}, )Blocks\([^)]*\), Blocks\([^)]*\)")
            source, times_found = entry.subn(lambda m, new=f"{gate_up}, {down}": m[1] + new, source)  # type: ignore[misc]
            assert times_found == 1, f"the line of plan {nth} in {file}"
    if options.write:
        file.write_text(source)


def _number(value: float) -> str:
    return re.escape('float("inf")') if math.isinf(value) else str(value)


if __name__ == "__main__":
    main()
