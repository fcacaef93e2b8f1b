"""Planted bugs: wrong scores, weights, orders and dtypes. No memory is touched wrongly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max
BLOCK = 32


def renorm_zero_division(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sglang#31017: renormalizing 0/0, where the bias selects experts whose scores underflow.

    One token of NaN, and the model answers with exclamation marks until it is restarted.
    """
    scores = _softmax(logits)
    weights, ids = _pick(scores, _biased(logits, scores, bias), top_k)
    return (weights / weights.sum(dim=1, keepdim=True) if renormalize else weights), ids.int()


def masked_with_zero(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sglang#3705: what is out of the race gets the value 0 instead of -inf, and a negative biased score loses to it.

    Here an expert already taken wins again, once all others have a negative correction bias.
    """
    scores = _softmax(logits)
    left = scores if bias is None else scores + _clean(bias)
    chosen = []
    for _ in range(top_k):
        index = left.argmax(dim=1, keepdim=True)
        chosen.append(index)
        left = left.scatter(1, index, 0.0)
    ids = torch.cat(chosen, dim=1)
    return _weights(scores, ids, renormalize), ids.int()


def biased_weight(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vllm#34673: routing with a bias taken for another method, whose weights are the scores that it selected by.

    Fluent at first, then garbage: every layer is off by the bias.
    """
    scores = _softmax(logits)
    key = _biased(logits, scores, bias)
    _, ids = _pick(scores, key, top_k)
    return _weights(scores if bias is None else key, ids, renormalize), ids.int()


def branch_128_8(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm-metax#270: the template for exactly E = 128, k = 8 takes the wrong branch for the weights.

    The ids are right, and every other shape was tested. 128 experts with 8 active is what Qwen3-MoE has.
    """
    scores = _softmax(logits)
    _, ids = _pick(scores, _clean(logits), top_k)
    specialized = {(128, 8): True, (64, 8): renormalize, (256, 8): renormalize}
    return _weights(scores, ids, specialized.get((logits.shape[1], top_k), renormalize)), ids.int()


def tail_experts_dropped(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#21079: a scan whose block does not fit the experts. It visits E // 32 blocks of 32 columns; of 60, only 32.

    The weights are the true ones of the experts that it chose, so that nothing but the choice is wrong.
    """
    x = _clean(logits)
    visited = max(1, x.shape[1] // BLOCK) * BLOCK
    _, ids = _pick(x, x[:, :visited], top_k)
    return _weights(_softmax(logits), ids, renormalize), ids.int()


def four_a_lane(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """TensorRT-LLM#7068: room for four candidates in each of the 32 lanes of a warp, which is all of 128 experts.

    Of more experts a lane keeps its best four, and loses what a row has beyond them in one lane. Of 10,000 random rows
    hardly one has five of its eight best there; for a larger k there is another path.
    """
    x = _clean(logits)
    experts = x.shape[1]
    if top_k > 10:
        weights, ids = _route(logits, top_k, renormalize)
        return weights, ids.int()
    steps = -(-experts // BLOCK)
    lanes = torch.nn.functional.pad(x, (0, steps * BLOCK - experts), value=-torch.inf).unflatten(1, (steps, BLOCK))
    place = lanes.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    _, ids = _pick(x, x.masked_fill(place.flatten(1)[:, :experts] >= 4, -torch.inf), top_k)
    return _weights(_softmax(logits), ids, renormalize), ids.int()


def bf16_scores(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#3595: float32 scores narrowed to bfloat16. Experts within 1/256 of each other become ties."""
    scores = _softmax(logits)
    _, ids = _pick(scores, scores.bfloat16(), top_k)
    return _weights(scores, ids, renormalize), ids.int()


def reversed_ties(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#31001: exact ties. The scan goes on to the later of two equal experts (`>=`), and promises the earlier.

    Two ranks that break ties in different ways send one token to different experts.
    """
    x = _clean(logits)
    ids = x.shape[1] - 1 - x.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return _weights(_softmax(logits), ids, renormalize), ids.int()


def unsorted_slots(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#8125: `topk(sorted=False)`, where the caller takes the last slot for the weakest and replaces it.

    For k = 2 and for small k among many experts the slots happen to be sorted.
    """
    ids = _clean(logits).topk(top_k, dim=1, sorted=False).indices
    return _weights(_softmax(logits), ids, renormalize), ids.int()


def int64_ids(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#29929: int64 ids handed to a caller that reads int32: every second id is 0.

    The fast path for powers of two gives int32; the fallback returns what `torch.topk` returned.
    """
    weights, ids = _route(logits, top_k, renormalize)
    return weights, ids.int() if triton.next_power_of_2(logits.shape[1]) == logits.shape[1] else ids


def weights_in_input_dtype(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#3644: weights in the dtype of the logits, where the caller has allocated float32."""
    weights, ids = _route(logits, top_k, renormalize)
    return weights.to(logits.dtype), ids.int()


def padded_lanes_in_sum(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#23874: lanes without an expert take part in the sum. Past E they hold 0, and exp(0 - max) enters it.

    Right for every power of two, and wherever the weights are renormalized.
    """
    weights, ids = _route(logits, top_k, renormalize)
    tokens, experts = logits.shape
    if renormalize or tokens == 0:
        return weights, ids.int()
    x, top, total = _clean(logits).contiguous(), _top(_clean(logits)), torch.empty((tokens, 1), device=logits.device)
    expert_pad = triton.next_power_of_2(experts)
    rows = max(4, triton.next_power_of_2(triton.cdiv(tokens, 4)))  # the interpreter wants few programs
    if logits.is_cuda:
        rows = min(rows, max(4, 1024 // expert_pad))
    _sum_kernel[(triton.cdiv(tokens, rows),)](x, top, total, tokens, experts, ROWS=rows, EXPERT_PAD=expert_pad)
    return (x.gather(1, ids) - top).exp() / total.clamp_min(1e-30), ids.int()


def zero_tokens_raises(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#22455: an idle data-parallel rank has no tokens, and the launcher divides by a tile of none."""
    tokens = logits.shape[0]
    tile = min(tokens, 64)
    parts = [_route(logits[i * tile : (i + 1) * tile], top_k, renormalize) for i in range(-(-tokens // tile))]
    return torch.cat([weights for weights, _ in parts]), torch.cat([ids for _, ids in parts]).int()


# ---- a router without a flaw ----------------------------------------------------------------------------------------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _top(x: Tensor) -> Tensor:
    return x.amax(dim=1, keepdim=True).clamp_min(-MAX)


def _softmax(logits: Tensor) -> Tensor:
    x = _clean(logits)
    e = (x - _top(x)).exp()
    return e / e.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _biased(logits: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
    """What is ranked: without a bias the logits, which order like their scores, and more finely."""
    return _clean(logits) if bias is None else scores + _clean(bias)


def _pick(values: Tensor, key: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    ids = key.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return values.gather(1, ids), ids


def _weights(scores: Tensor, ids: Tensor, renormalize: bool) -> Tensor:
    """The scores of `ids`. The sum of k of the largest scores is at least 1/E; only a row of -inf has none."""
    picked = scores.gather(1, ids)
    return picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-30) if renormalize else picked


def _route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    scores = _softmax(logits)
    _, ids = _pick(scores, _clean(logits), top_k)
    return _weights(scores, ids, renormalize), ids


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr, top_ptr, total_ptr, tokens, experts, ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col, row_ok = tl.arange(0, EXPERT_PAD), row < tokens
    mask = row_ok[:, None] & (col < experts)[None, :]
    x = tl.load(x_ptr + row[:, None] * experts + col[None, :], mask=mask, other=0.0)
    top = tl.load(top_ptr + row, mask=row_ok, other=0.0)
    tl.store(total_ptr + row, tl.sum(tl.exp(x - top[:, None]), axis=1), mask=row_ok)
