"""`align` and `experts_bf16` on a GPU: every plan of the table against exact answers, graphs, and offsets past 2^31.

Each check runs in a process of its own, which is this file as a script: side by side they compile on many cores, where
one process would compile for more than a minute.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from moe_fuzz.kernels.experts_bf16.blocks import PLANS

CHECKS: dict[str, Callable[[], None]] = {}


def on_device(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def integers(tokens: int, top_k: int, experts: int, hidden: int, inter: int, **options: Any) -> tuple[Any, ...]:
    """As in tests/cpu/test_experts_bf16.py: sums whose bits do not depend on their order. x, w13, w2, weights, ids."""
    import torch

    generator = torch.Generator("cuda").manual_seed(tokens)
    dtype = options.get("dtype", torch.bfloat16)

    def draw(low: int, high: int, *shape: int, sparse: float = 1.0) -> torch.Tensor:
        values = torch.randint(low, high + 1, shape, generator=generator, device="cuda", dtype=torch.int8)
        return (values * (torch.rand(shape, generator=generator, device="cuda") < sparse)).to(dtype)

    x = draw(-1, 1, tokens, hidden)
    x[:, 0] = 1
    w13 = draw(-1, 1, experts, inter * (1 if options.get("gateless") else 2), hidden, sparse=min(1.0, 12 / hidden))
    if not options.get("gateless"):
        w13[:, :inter] = 0
        w13[:, :inter, 0] = 32
    w2 = draw(-2, 2, experts, hidden, inter, sparse=min(1.0, 200 / inter))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32)
    return x, w13, w2, 2.0 ** draw(-1, 1, tokens, top_k).float(), ids


@on_device
def align_agrees_with_the_reference() -> None:
    import torch

    from moe_fuzz.kernels.align import align
    from moe_fuzz.reference.align import align as reference

    # each size of a chunk and of the table of experts is a binary of its own, and compiling is what takes the time
    for tokens, top_k, block, experts, mapped in (
        (0, 8, 16, 8, False), (1, 8, 16, 128, False), (32, 8, 16, 257, True), (33, 8, 16, 128, False),
        (129, 8, 64, 60, True), (4096, 8, 64, 128, False), (8192, 8, 128, 1100, True), (65537, 1, 128, 1, False),
        (1000, 4, 7, 4097, False),
    ):  # fmt: skip
        ids = torch.randint(-2, experts + 2, (tokens, top_k), dtype=torch.int32, device="cuda")
        ids[: tokens // 3] = 0  # a hot expert
        expert_map = torch.randint(-1, experts, (experts,), dtype=torch.int32, device="cuda") if mapped else None
        expected = reference(ids, block, experts, expert_map=expert_map)
        for _ in range(3):
            out = tuple(torch.full_like(t, 0x7F7F7F7F) for t in expected)
            got = align(ids, block, experts, expert_map=expert_map, out=out)
            same = [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
            assert all(same), (tokens, top_k, block, experts, mapped, same)


def a_plan_is_exact_on_integers(nth: int) -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16
    from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

    plan = PLANS[nth]
    # Sizes that no block divides, sizes that all divide; slots grouped by the programs in the first plans, which serve
    # few slots, and by `align`. Every combination is a binary, and compiling is what takes the time.
    few = ((1, 8, 17, 256, 512), (41, 3, 5, 200, 77)) if nth < 2 else ()
    for tokens, top_k, experts, hidden, inter in (*few, (333, 2, 3, 513, 264), (700, 8, 60, 256, 256)):
        for dtype in (torch.bfloat16, torch.float16) if tokens == 333 and nth == 0 else (torch.bfloat16,):
            arguments = integers(tokens, top_k, experts, hidden, inter, dtype=dtype)
            expected = reference(*arguments)
            got = experts_bf16(*arguments, plan=plan)
            assert torch.equal(got, expected), (nth, tokens, dtype, int((got != expected).sum()))
            for _ in range(3):
                assert torch.equal(experts_bf16(*arguments, plan=plan), got), (nth, tokens, "again")


for number in range(len(PLANS)):  # each by itself: they share no binary
    CHECKS[f"plan_{number}_is_exact_on_integers"] = functools.partial(a_plan_is_exact_on_integers, number)


@on_device
def activations_layouts_and_biases_agree() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16
    from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

    for tokens in (5, 500):
        x, w13, w2, weights, ids = integers(tokens, 4, 8, 160, 96)
        w13, w2 = torch.randn_like(w13) / 8, torch.randn_like(w2) / 8
        b13, b2 = torch.randn_like(w13[:, :, 0]), torch.randn_like(w2[:, :, 0], dtype=torch.float32)
        for activation, layout in (
            ("silu", "up_first"), ("gelu", "first"), ("swiglu_oai", "interleaved"), ("relu2", "first"),
        ):  # fmt: skip
            for on_input in (False, True):
                rows = 96 if activation == "relu2" else 192
                options: dict[str, Any] = {
                    "activation": activation, "gate_layout": layout, "apply_weight_on_input": on_input,
                    "b13": b13[:, :rows], "b2": b2,
                }  # fmt: skip
                got = experts_bf16(x, w13[:, :rows], w2, weights, ids, **options).double()
                expected = reference(x, w13[:, :rows], w2, weights, ids, **options).double()
                # A store may round the other way where float32 and float64 straddle a tie, which is up to 2^-7 of it:
                # at a slot and, as seldom, at y. One more at h is small beside them.
                far = (got - expected).abs() / expected.abs().amax(1, keepdim=True).clamp(min=1e-30)
                assert (far <= 2 * 2**-7).all(), (activation, layout, on_input, tokens, far.max().item())


@on_device
def dropped_slots_count_for_nothing() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16, workspace_bytes

    for tokens in (8, 600):
        x, w13, w2, weights, ids = integers(tokens, 8, 12, 128, 64)
        dropped = (ids < 0) | (ids >= 12)
        ids[1], dropped[1] = -1, True
        expected = experts_bf16(x, w13, w2, weights.masked_fill(dropped, 0), ids)
        x[1] = math.nan
        workspace = torch.full((workspace_bytes(tokens, 8, 128, 64, 12),), 0xFF, dtype=torch.uint8, device="cuda")
        out = torch.full_like(x, math.nan)
        got = experts_bf16(x, w13, w2, weights.masked_fill(dropped, math.nan), ids, out=out, workspace=workspace)
        assert torch.equal(got, expected)
        assert not got[1].any()
        # NaN in a row that counts stays in it
        ids[1] = torch.arange(8, dtype=torch.int32, device="cuda")
        for activation in ("silu", "swiglu_oai", "relu2"):  # whose comparisons may lose a NaN
            rows = w13[:, :64] if activation == "relu2" else w13
            got = experts_bf16(x, rows, w2, weights, ids, activation=activation)
            assert got[1].isnan().all(), activation
            assert not got[torch.arange(tokens, device="cuda") != 1].isnan().any(), activation


@on_device
def shards_sum_to_the_whole() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16

    for tokens in (4, 300):
        x, w13, w2, weights, ids = integers(tokens, 4, 12, 64, 48)
        w2 = w2 / 64  # so that no store rounds
        whole, total = experts_bf16(x, w13, w2, weights, ids).float(), torch.zeros(tokens, 64, device="cuda")
        for first in (0, 4, 8):
            expert_map = torch.full((12,), -1, dtype=torch.int32, device="cuda")
            expert_map[first : first + 4] = torch.arange(4, dtype=torch.int32, device="cuda")
            part = slice(first, first + 4)
            total += experts_bf16(x, w13[part], w2[part], weights, ids, expert_map=expert_map).float()
        assert (total - whole).abs().max() <= 2**-7 * whole.abs().max(), tokens


@on_device
def a_graph_replays_other_inputs_without_a_sync() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16

    for tokens in (4, 300):
        inputs = integers(tokens, 4, 10, 96, 80)
        out = torch.empty_like(inputs[0])
        experts_bf16(*inputs, out=out)  # compiles
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            experts_bf16(*inputs, out=out)
        for seed in range(4):
            x, _, _, weights, ids = integers(tokens + seed, 4, 10, 96, 80)
            for static, new in zip((inputs[0], inputs[3], inputs[4]), (x, weights, ids), strict=True):
                static.copy_(new[:tokens])
            if seed == 3:
                inputs[4].fill_(-1)
            graph.replay()
            got = out.clone()
            torch.cuda.set_sync_debug_mode("error")
            eager = experts_bf16(*inputs)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got, eager), (tokens, seed)


@on_device
def overlapping_launches_give_the_same_bits() -> None:
    from dataclasses import replace

    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16
    from moe_fuzz.kernels.experts_bf16.blocks import choose

    for tokens in (4, 600):
        plan = replace(choose(tokens * 4, 10), overlaps=False)
        draws = [integers(tokens + seed, 4, 10, 512, 384) for seed in range(8)]
        draws = [tuple(t[:tokens] if t.shape[0] >= tokens and t.dim() == 2 else t for t in draw) for draw in draws]
        expected = [experts_bf16(*draw, plan=plan) for draw in draws]
        early = replace(plan, overlaps=True)
        # one right after the other, in the same memory: what starts too early reads what the call before has left
        workspace = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")
        for _ in range(20):
            got = [experts_bf16(*draw, plan=early, workspace=workspace) for draw in draws]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), tokens
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(draws[0][0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for draw in draws:
                experts_bf16(*draw, plan=early, workspace=workspace, out=out)
        for _ in range(20):
            graph.replay()
        assert torch.equal(out, expected[-1]), (tokens, "graph")


@on_device
def weights_past_2_to_31_elements() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16
    from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

    experts, inter, hidden = 9, 8192, 16384
    for tokens in (3, 200):
        x, w13, w2, weights, ids = integers(tokens, 2, 1, hidden, inter)
        wide13 = torch.zeros(experts, 2 * inter, hidden, dtype=x.dtype, device="cuda")
        wide2 = torch.zeros(experts, hidden, inter, dtype=x.dtype, device="cuda")
        wide13[-1], wide2[-1] = w13[0], w2[0]
        assert wide13.numel() > 2**31
        got = experts_bf16(x, wide13, wide2, weights, torch.where(ids == 0, experts - 1, -1).int())
        assert torch.equal(got, reference(x, w13, w2, weights, ids))


@on_device
def tokens_past_2_to_31_elements() -> None:
    import torch

    from moe_fuzz.kernels.experts_bf16 import experts_bf16
    from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

    tokens, hidden = 2**20 + 100, 2048
    x, w13, w2, weights, ids = integers(100, 1, 2, hidden, 16)
    wide = torch.full((tokens, hidden), math.nan, dtype=x.dtype, device="cuda")
    wide[-100:] = x
    all_ids = torch.full((tokens, 1), -1, dtype=torch.int32, device="cuda")
    all_ids[-100:] = ids
    got = experts_bf16(wide, w13, w2, weights[:1].expand(tokens, 1), all_ids)
    assert torch.equal(got[-100:], reference(x, w13, w2, weights[:1].expand(100, 1), ids))
    assert not got[:-100].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_device(name: str) -> None:
    command = [sys.executable, "-P", __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    import torch

    for chosen in sys.argv[1:] or CHECKS:
        torch.manual_seed(0)
        CHECKS[chosen]()
