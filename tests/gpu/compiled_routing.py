"""The routers on a device: against the reference, in any layout of the logits, and right behind their producer.

Tests of a process of their own, which test_routing_cuda.py starts: kernels of pytest's own process are interpreted.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_fuzz.kernels import routing
from moe_fuzz.reference import routing as reference

ROUTERS = pytest.mark.parametrize("router", ["topk_softmax", "topk_sigmoid"])
#: The names are told apart by `-k`: test_routing_cuda.py runs each in a process of its own, side by side.
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["single", "brain", "half"]
)
SHAPES = [(1, 1), (8, 2), (13, 3), (16, 1), (16, 10), (60, 4), (64, 7), (128, 8), (384, 8), (512, 10), (1024, 9)]


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(experts)
    return (torch.randn(tokens, experts, generator=generator) * 3).to(dtype).cuda()


def bits(routed: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return routed[0].view(torch.int32), routed[1]


@ROUTERS
@DTYPES
@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_reference_layouts_and_batches(router, experts, top_k, dtype):
    logits = logits_of(70, experts, dtype)
    function, expected = getattr(routing, router), getattr(reference, router)(logits.cpu(), top_k, renormalize=True)
    whole = function(logits, top_k, renormalize=True)
    assert torch.equal(whole[1].cpu(), expected[1])
    torch.testing.assert_close(whole[0].cpu(), expected[0], rtol=1e-4, atol=1e-37)
    buffer = torch.empty(70 * experts + 1, dtype=dtype, device="cuda")
    views = {
        "misaligned": buffer[1:].view(70, experts),
        "columns": torch.empty(70, 2 * experts, dtype=dtype, device="cuda")[:, ::2],
        "transposed": torch.empty(experts, 70, dtype=dtype, device="cuda").t(),
    }
    #: Without renormalization a softmax is a sum over all experts. Few shapes: each is a binary more.
    modes = (True, False) if router == "topk_softmax" and top_k in (4, 9, 10) else (True,)
    for renormalize in modes:
        whole = function(logits, top_k, renormalize=renormalize)
        for name, view in views.items():
            view.copy_(logits)
            for got, want in zip(bits(function(view, top_k, renormalize=renormalize)), bits(whole), strict=True):
                assert torch.equal(got, want), (name, renormalize)
        for rows in (slice(0, 1), slice(5, 38), slice(69, 70)):
            alone = function(logits[rows], top_k, renormalize=renormalize)
            for got, want in zip(bits(alone), bits(whole), strict=True):
                assert torch.equal(got, want[rows]), (rows, renormalize)


@ROUTERS
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@DTYPES
@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_rows_it_cannot_rank(router, experts, top_k, dtype, renormalize, with_bias):
    logits = logits_of(9, experts, dtype)
    bias = torch.zeros(experts, device="cuda") if with_bias else None
    alone = getattr(routing, router)(logits, top_k, renormalize=renormalize, bias=bias)
    logits[1], logits[2, ::2], logits[3] = torch.nan, torch.nan, -torch.inf
    logits[4], logits[5, ::3] = torch.inf, torch.inf
    logits[6], logits[7, 1::2] = -torch.nan, -torch.nan
    weights, ids = getattr(routing, router)(logits, top_k, renormalize=renormalize, bias=bias)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < experts)).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    for got, want in zip(bits((weights, ids)), bits(alone), strict=True):
        assert torch.equal(got[[0, 8]], want[[0, 8]])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("experts", [32, 128, 256])
def test_the_best_of_many_rows_is_that_of_a_few(experts, renormalize):
    """The number of tokens chooses the kernel, and not the bits."""
    for router, dtype in itertools.product(("topk_softmax", "topk_sigmoid"), (torch.bfloat16, torch.float16)):
        function, logits = getattr(routing, router), logits_of(4099, experts, dtype)
        logits[1], logits[2, ::2], logits[3], logits[4] = -torch.nan, torch.nan, -torch.inf, torch.inf
        whole = bits(function(logits, 1, renormalize=renormalize, scale=2.5))
        for rows in (slice(0, 9), slice(3000, 4000), slice(3, 4099)):
            part = bits(function(logits[rows], 1, renormalize=renormalize, scale=2.5))
            assert all(torch.equal(got, want[rows]) for got, want in zip(part, whole, strict=True)), (router, rows)


@pytest.mark.parametrize("experts", [8, 128])
def test_waits_for_its_producer_in_a_graph(experts):
    """Launched while the kernel before it still runs, it must not read a logit of the step before."""
    steps = [logits_of(4096, experts, torch.bfloat16).roll(n, 1) for n in range(3)]
    source, logits = steps[0].clone(), torch.empty_like(steps[0])
    out = torch.empty(4096, 2, device="cuda"), torch.empty(4096, 2, device="cuda", dtype=torch.int32)
    routing.topk_softmax(logits.copy_(source), 2, renormalize=True, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):  # the logits change between any two calls
            torch.neg(source, out=logits)
            routing.topk_softmax(logits, 2, renormalize=True, out=out)
            logits.copy_(source)
            routing.topk_softmax(logits, 2, renormalize=True, out=out)
    for step in steps * 3:
        source.copy_(step)
        graph.replay()
        expected = reference.topk_softmax(step.cpu(), 2, renormalize=True)
        assert torch.equal(out[1].cpu(), expected[1])
