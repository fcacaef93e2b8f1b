"""Routers that a graph shows something of; loaded by the workers of test_graph_cuda.py, never by the tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.contract import Contract, declares

Pair = tuple[Tensor, Tensor]
_promise = declares(contract=Contract(deterministic=True))
_KEPT: dict[object, Tensor] = {}


def _right(logits: Tensor, top_k: int) -> Pair:
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=1e300) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    e = (x - x.amax(dim=1, keepdim=True).clamp_min(-1e300)).exp()
    return (e.gather(1, ids) / e.sum(1, keepdim=True).clamp_min(1e-30)).float(), ids.int()


@_promise
def right(logits: Tensor, top_k: int) -> Pair:
    return _right(logits, top_k)


@_promise
def reads_past_in_the_graph(logits: Tensor, top_k: int) -> Pair:
    """The element behind the last one, and only in replays."""
    past = logits.numel() if torch.cuda.is_current_stream_capturing() else 0
    seen = torch.empty(1, dtype=torch.float32, device=logits.device)
    _read_kernel[(1,)](logits, seen, past)
    return _right(logits, top_k)


@triton.jit(do_not_specialize=["at"])
def _read_kernel(source, target, at):  # type: ignore[no-untyped-def]
    tl.store(target, tl.load(source + at).to(tl.float32))


@_promise
def raises_while_capturing(logits: Tensor, top_k: int) -> Pair:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not while capturing")
    return _right(logits, top_k)


@_promise
def waits_for_the_device(logits: Tensor, top_k: int) -> Pair:
    torch.cuda.synchronize()
    return _right(logits, top_k)


def waits_and_promises_nothing(logits: Tensor, top_k: int) -> Pair:
    torch.cuda.synchronize()
    return _right(logits, top_k)


@_promise
def keeps_its_ids(logits: Tensor, top_k: int) -> Pair:
    """Where k = E the set of ids never changes: they are made once, outside of any graph, and never written again."""
    key = logits.device, tuple(logits.shape)
    if key not in _KEPT:
        _KEPT[key] = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape).int().contiguous()
    ids = _KEPT[key]
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=1e300)
    return torch.softmax(x.clamp_min(-1e300), dim=1).float(), ids
