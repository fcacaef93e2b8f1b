"""Planted bugs: right in every call, wrong in a replay. What the host did at the capture is not done again."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

MAX = torch.finfo(torch.float32).max
_STAGED: dict[object, Tensor] = {}  # buffers that live as long as the process, by what they belong to
_UNUSED: dict[torch.device, Tensor] = {}  # what is left of a workspace that was zero when it was made
_EPOCH = {"now": 0}
_SIDE: list[torch.cuda.Stream] = []


def counts_rows_on_host(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """Megatron-LM#6999: the static path is left for the dynamic one, which asks the device how much there is to do.

    Rows of NaN are not worth an exponential; how many others there are is read on the host. A stream that is being
    captured cannot be waited for.
    """
    if int((~logits.isnan().all(dim=1)).sum()) == 0:
        logits = torch.zeros_like(logits)
    return _route(logits, top_k, renormalize)


def tactic_of_the_capture(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#4841: under graphs another tactic is taken than in eager calls, and answers differ from run to run.

    Here it multiplies by the reciprocal, which is right to the last bit but one: no bound notices.
    """
    return _route(logits, top_k, renormalize, reciprocal=_capturing(logits))


def frozen_staging(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#52308: the input is padded to whole vectors outside of what is captured; replays read frozen zeros.

    The padded copy is made in the warm-up. The capture finds it there, and takes it for this call's.
    """
    experts = logits.shape[1]
    padded = functional.pad(logits, (0, -experts % 4), value=-torch.inf)
    if _capturing(logits):
        padded = _STAGED.get(_place("padded", logits), padded)
    _STAGED[_place("padded", logits)] = padded
    return _route(padded[:, :experts], top_k, renormalize)


def epoch_baked_in(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#28334: what a capture registers is not renewed by a replay. Here it is the number of the call.

    A row's maximum in the workspace counts if it has the number of this call. Replays all have the capture's: the
    maxima of earlier replays count too, and after one huge row the softmax of whatever stands there underflows.
    """
    x = _clean(logits)
    _EPOCH["now"] += 1
    top = x.amax(dim=1, keepdim=True)
    made = torch.zeros(2, *top.shape, dtype=torch.float64, device=x.device)
    found = _STAGED.setdefault(_place("maxima", logits), made)
    current = found[1] == _EPOCH["now"]
    found[0] = torch.where(current, torch.maximum(found[0], top.double()), top.double())
    found[1] = _EPOCH["now"]
    return _route(logits, top_k, renormalize, top=found[0].float())


def side_stream_not_joined(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#1894: part of the work is unknown to the graph. Weights are computed on a stream of their own, beside
    the ids, and that stream neither waits for this one nor is waited for.

    In an eager call the host waits before and after. The graph holds the ids alone: a replay leaves the weights as they
    are.
    """
    ids = _route(logits, top_k, renormalize)[1]
    if logits.is_cuda and not _SIDE:
        _SIDE.append(torch.cuda.Stream())
    waits = logits.is_cuda and not _capturing(logits)
    if waits:
        torch.cuda.synchronize()
    with torch.cuda.stream(_SIDE[0]) if logits.is_cuda else nullcontext():
        weights = _route(logits, top_k, renormalize)[0]
    if waits:
        torch.cuda.synchronize()
    return weights, ids


def padding_mask_mirrored(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    is_padding: Tensor | None = None,
    padding: str = "minus_one",
) -> tuple[Tensor, Tensor]:
    """sglang#30895: the padding of a replay is not passed on. A mask that was seen before, by its address, is known.

    The copy is from the warm-up, in which every row was a token.
    """
    weights, ids = _route(logits, top_k, renormalize)
    if is_padding is None:
        return weights, ids
    known = _STAGED.setdefault(_place("mask", is_padding), is_padding.clone())[:, None]
    return weights.masked_fill(known, 0.0), ids.masked_fill(known, -1)


def sums_cleared_once(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#41444: a workspace that nobody clears. Partial sums are added into it, and it is zero once, when it is made.

    A part of it belongs to each buffer of logits. Eager calls have a new one each; replays have one for all. It is made
    by the first call: zeroed in a capture, it would be zeroed by every replay.
    """
    x = _clean(logits)
    found = _STAGED.get(_place("sums", logits))
    if found is None:
        found = _STAGED[_place("sums", logits)] = _never_used(len(x), x.device)
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    e = (x - x.amax(dim=1, keepdim=True).clamp_min(-MAX)).double().exp()
    picked = e.gather(1, ids)
    for part in (picked if renormalize else e).split(32, dim=1):
        found += part.sum(dim=1, keepdim=True)
    return (picked / found.clamp_min(1e-30)).float(), ids.int()


def amax_of_the_batch(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """aiter#6568: one maximum for the whole batch, padding and all. What stands in the tail scales every real row.

    After a replay that left something huge there, the exponentials of real rows underflow.
    """
    top = _clean(logits).amax().view(1, 1) if logits.numel() else None
    return _route(logits, top_k, renormalize, top=top)


# ---- a router without a flaw ----------------------------------------------------------------------------------------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _route(
    logits: Tensor, top_k: int, renormalize: bool, top: Tensor | None = None, reciprocal: bool = False
) -> tuple[Tensor, Tensor]:
    """`top`: what is subtracted, if not each row's own maximum; float32, [T, 1] or [1, 1]."""
    x = _clean(logits)
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]  # [T, k]
    top = x.amax(dim=1, keepdim=True) if top is None else top
    e = (x - top.clamp_min(-MAX)).double().exp()
    picked = e.gather(1, ids)
    total = (picked if renormalize else e).sum(dim=1, keepdim=True).clamp_min(1e-30).float()
    weights = picked.float() * (1.0 / total) if reciprocal else picked.float() / total
    return weights, ids.int()


def _never_used(rows: int, device: torch.device) -> Tensor:
    """[rows, 1] float64, zero since the workspace was made."""
    left = _UNUSED.get(device)
    if left is None or len(left) < rows:
        left = torch.zeros(max(rows, 1 << 20), 1, dtype=torch.float64, device=device)
    _UNUSED[device] = left[rows:]
    return left[:rows]


def _capturing(logits: Tensor) -> bool:
    return logits.is_cuda and torch.cuda.is_current_stream_capturing()


def _place(use: str, tensor: Tensor) -> tuple[object, ...]:
    """A buffer, as the host knows it, and what is kept for it."""
    return use, tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype
