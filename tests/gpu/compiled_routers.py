"""What test_routers_cuda.py asks of compiled routers: `python compiled_routers.py CHECK OP [SCORING]`.

It is a process of its own. Tests beside it set TRITON_INTERPRET for their whole process, and Triton reads it once.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from moe_fuzz.kernels import grouped_topk, routing
from moe_fuzz.reference import grouped_topk as grouped_reference
from moe_fuzz.reference import routing as reference

NAN, INF = math.nan, math.inf
ROUTERS = {
    "topk_softmax": (routing.topk_softmax, reference.topk_softmax),
    "topk_sigmoid": (routing.topk_sigmoid, reference.topk_sigmoid),
    "grouped_topk": (grouped_topk.grouped_topk, grouped_reference.grouped_topk),
}
#: experts, groups, groups kept, k
SHAPES = [(8, 8, 3, 3), (60, 5, 2, 4), (160, 8, 3, 6), (256, 8, 4, 8), (384, 1, 1, 8), (1024, 64, 16, 32),
          (1023, 3, 2, 32)]  # fmt: skip


def logits_of(tokens: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)) * 3).to(dtype)


def calls(op: str, scorings: tuple[str, ...] = ("softmax", "sigmoid")) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(experts, top_k, keywords) of an op. Only the grouped router has a choice of scorings."""
    for experts, n_group, topk_group, top_k in SHAPES:
        if op != "grouped_topk":
            yield experts, top_k, {}
            continue
        for scoring, group_score in itertools.product(scorings, ("max", "top2_sum")):
            groups = {"n_group": n_group, "topk_group": topk_group, "scoring": scoring, "group_score": group_score}
            yield experts, top_k, groups


def agrees(op: str) -> None:
    """Well separated logits without a bias: ids are equal. Sums of two may be near ties: those the checks judge.

    Float64 on the CPU is slow, so of many tokens every 37th is asked.
    """
    kernel, right = ROUTERS[op]
    for tokens, (experts, top_k, groups) in itertools.product((1, 130, 4096), calls(op)):
        order = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
        logits = order / 256.0  # 0 to 4: no sigmoid is saturated
        weights, ids = (t.cpu() for t in kernel(logits.cuda(), top_k, renormalize=True, scale=2.5, **groups))
        asked = torch.arange(0, tokens, 37)
        expected = right(logits[asked], top_k, renormalize=True, scale=2.5, **groups)
        if groups.get("group_score") != "top2_sum":
            assert torch.equal(ids[asked], expected[1]), (tokens, experts, groups)
            torch.testing.assert_close(weights[asked], expected[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(weights.sum(1), torch.full((tokens,), 2.5), rtol=1e-5, atol=0)


def hostile_rows(op: str, *scorings: str) -> None:
    """Rows of NaN, infinities and extremes name distinct experts, and leave the others as they are."""
    kernel = ROUTERS[op][0]
    negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    rows = [[NAN], [negative_nan], [-INF], [INF], [INF, NAN, -INF], [3e38, -3e38], [NAN, 1.0], [0.0]]
    for renormalize, (experts, top_k, groups) in itertools.product((False, True), calls(op, scorings)):
        hostile = torch.tensor([(row * experts)[:experts] for row in rows])
        healthy = logits_of(40, experts).float()
        for bias in (None, torch.tensor(([NAN, INF, -INF, 1.0, 3e38] * experts)[:experts]).cuda()):
            both = torch.cat([healthy, hostile]).cuda()
            weights, ids = kernel(both, top_k, renormalize=renormalize, bias=bias, **groups)
            assert (ids.sort(1).values.diff(dim=1) > 0).all(), (experts, groups)
            assert ((ids >= 0) & (ids < experts)).all()
            assert weights.isfinite().all()
            assert (weights >= 0).all()
            alone = kernel(healthy.cuda(), top_k, renormalize=renormalize, bias=bias, **groups)
            assert torch.equal(weights[:40], alone[0]), (experts, groups)
            assert torch.equal(ids[:40], alone[1]), (experts, groups)


def rows_alone(op: str) -> None:
    """A row's bits depend on that row alone; nor on where it lies: rows of a slice are aligned otherwise."""
    kernel = ROUTERS[op][0]
    for dtype, (experts, top_k, groups) in itertools.product((torch.float32, torch.bfloat16), calls(op)):
        logits = logits_of(300, experts, dtype).cuda()
        whole = kernel(logits, top_k, **groups)
        for rows in (slice(0, 1), slice(1, 2), slice(7, 8), slice(3, 300), slice(0, 17)):
            part = kernel(logits[rows], top_k, **groups)
            assert torch.equal(part[0], whole[0][rows]), (dtype, experts, groups, rows)
            assert torch.equal(part[1], whole[1][rows]), (dtype, experts, groups, rows)


def slots(op: str) -> None:
    """Shared slots, mapped ids, dialects and `out`, as the reference has them."""
    kernel, right = ROUTERS[op]
    logits = torch.rand(70, 160, generator=torch.Generator().manual_seed(1)).argsort(dim=1) / 64.0
    table = torch.randperm(480, generator=torch.Generator().manual_seed(2))[:160].int()
    flags = torch.arange(70) % 7 == 3
    groups = {"n_group": 8, "topk_group": 3, "n_shared": 2}
    for padding in ("distinct", "minus_one", "num_experts", "zero_weight", "garbage"):
        out, wanted = ((torch.full((70, 8), 0.5), torch.full((70, 8), 77, dtype=torch.int32)) for _ in range(2))
        device = tuple(tensor.cuda() for tensor in out)
        flagged = {"is_padding": flags.cuda(), "padding": padding}
        kernel(logits.cuda(), 6, **groups, expert_map=table.cuda(), **flagged, out=device)
        right(logits, 6, **groups, expert_map=table, is_padding=flags, padding=padding, out=wanted)
        assert torch.equal(device[1].cpu(), wanted[1]), padding
        torch.testing.assert_close(device[0].cpu(), wanted[0], rtol=1e-5, atol=0)


if __name__ == "__main__":
    {check.__name__: check for check in (agrees, hostile_rows, rows_alone, slots)}[sys.argv[1]](*sys.argv[2:])
