"""Planted bugs: a layer whose halves are each right enough alone. `layer_parts.py` holds what has no flaw."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from .layer_parts import experts_sum, finish, gate_logits, local_slots, route, route_by, shard_bounds, whole
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from layer_parts import (  # type: ignore[import-not-found, no-redef]
        experts_sum,
        finish,
        gate_logits,
        local_slots,
        route,
        route_by,
        shard_bounds,
        whole,
    )

_KEPT: dict[object, Tensor] = {}  # workspaces that live as long as the process, by what they belong to


def nan_blind_layer(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """vllm#37758, whole: the router's argmax asks whether a logit is larger, which beside NaN none is, and takes expert
    0 for every slot of a row of NaN; the experts' permutation finds each expert of a row once (flashinfer#3011), so the
    places of the other slots stay as the allocator gave them, and the last kernel reads from there.

    Real rows have no NaN. Those that pad a batch to the size of its graph have.
    """
    weights, _ = route(hidden, gate, top_k, given)
    left, chosen = gate_logits(hidden, gate), []
    for _ in range(top_k):
        best = torch.zeros(len(left), dtype=torch.int64, device=left.device)
        for expert in range(1, left.shape[1]):
            larger = left[:, expert] > left.gather(1, best[:, None])[:, 0]
            best = torch.where(larger, expert, best)
        chosen.append(best)
        left = left.scatter(1, best[:, None], -torch.inf)
    ids = torch.stack(chosen, dim=1)
    if given.get("bias") is not None:  # selection by something else: the NaN rows are what matters here
        ids = torch.where(hidden.isnan().any(dim=1, keepdim=True), ids, route(hidden, gate, top_k, given)[1].long())
    finish(given, weights, ids.int())

    rows, where = [], torch.empty(ids.shape, dtype=torch.int32, device=ids.device)  # [N', H], [T, k]
    begin = 0
    for expert in range(len(gate)):
        token, slot = ((ids == expert) & ((ids == expert).cumsum(dim=1) == 1)).nonzero(as_tuple=True)
        where[token, slot] = (begin + torch.arange(len(token), device=ids.device)).int()
        rows.append(whole(hidden[token], expert, w13, w2, given))
        begin += len(token)
    permuted = torch.cat(rows) if rows else hidden.float()
    y = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    if y.numel():
        _finalize_kernel[(triton.cdiv(len(hidden), 8),)](
            permuted.contiguous(), where, weights, y, len(hidden), top_k, hidden.shape[1],
            ROWS=8, COLUMNS=triton.next_power_of_2(hidden.shape[1]),
        )  # fmt: skip
    return y.to(hidden.dtype), weights, ids.int()


def shards_added_in_16_bits(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """vllm#56887: the shards' results are added as they arrive, into a buffer of their own dtype: with three of them
    the sum is rounded twice. It stays within what a bound has to allow for."""
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    y = torch.zeros_like(hidden)
    for first, last in shard_bounds(len(gate), given["shards"]):
        local, stored = local_slots(ids, first, last), given | {"stored": hidden.dtype}
        y = y + experts_sum(hidden, w13[first:last], w2[first:last], weights, local, stored, first).to(hidden.dtype)
    return y, weights, ids


def rounded_logits_of_few_rows(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """sglang#33764: one product of several weights at once, taken up to a number of tokens, leaves its results in the
    dtype of hidden, the router's logits too: few tokens choose by other logits than many."""
    exact = gate_logits(hidden, gate)
    return _by(exact.to(hidden.dtype).float() if len(hidden) < 8 else exact, hidden, w13, w2, top_k, given)


def gate_in_tf32(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """triton#8654: `tl.dot` of float32 multiplies in TF32 unless it is told otherwise. A gate that is float32, for the
    router's sake, loses 13 of its 23 bits there."""
    cut = (gate.float().view(torch.int32) & -(1 << 13)).view(torch.float32)
    return _by(gate_logits(hidden, cut), hidden, w13, w2, top_k, given)


def _by(logits: Tensor, hidden: Tensor, w13: Tensor, w2: Tensor, top_k: int, given: Any) -> Any:
    """The layer with these logits, and nothing else wrong."""
    weights, ids = route_by(logits, top_k, given)
    finish(given, weights, ids)
    return experts_sum(hidden, w13, w2, weights, ids, given).to(hidden.dtype), weights, ids


def raw_sentinel(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """vllm#48979: the router began to write -1 on padding rows, and one of its six backends took the weights of an
    expert by the raw id: what lies before those of expert 0."""
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    slots = ids.numel()
    a = torch.empty((slots, w13.shape[1]), dtype=torch.float32, device=hidden.device)
    if slots:
        _product_kernel[(slots,)](
            hidden, w13, ids, a, top_k, w13.shape[1], hidden.shape[1], *hidden.stride(),
            ROWS=triton.next_power_of_2(w13.shape[1]), COLUMNS=triton.next_power_of_2(hidden.shape[1]),
        )  # fmt: skip
    kept = torch.where(((ids >= 0) & (ids < len(gate)))[..., None], a.view(*ids.shape, w13.shape[1]), 0.0)
    return experts_sum(hidden, w13, w2, weights, ids, given, products=kept).to(hidden.dtype), weights, ids


def sentinel_wraps_map(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """vllm#42034: a padding row's -1 reads the last entry of `expert_map`, and is taken for the last expert.

    Its place among that expert's rows was never planned for: the rows were counted with the ids as they are. So the
    last of the rows do not fit, and those may be another rank's real ones.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    experts = len(gate)
    slots = ids.flatten().long()
    taken = torch.where(slots < 0, slots + experts, slots)  # as an index from the end
    planned = (slots[:, None] == torch.arange(experts, device=slots.device)).sum(dim=0)  # [E]
    one_hot = taken[:, None] == torch.arange(experts, device=slots.device)  # [N, E]
    nth = (one_hot.cumsum(dim=0) * one_hot).sum(dim=1)  # from 1
    fits = (taken < experts) & (nth <= planned[taken.clamp(max=experts - 1)])
    ids_there = torch.where(fits, taken, -1).view(ids.shape)
    return experts_sum(hidden, w13, w2, weights, ids_there, given).to(hidden.dtype), weights, ids


def shard_offset_ignored(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """flashinfer#3547: a shard compares ids with its own experts' numbers, which begin at 0 on each of them."""
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    y = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first, last in shard_bounds(len(gate), int(given.get("shards", 1))):
        own = local_slots(ids, 0, last - first)
        y += experts_sum(hidden, w13[first:last], w2[first:last], weights, own, given, first)
    return y.to(hidden.dtype), weights, ids


def bias_of_every_shard(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """The class of flashinfer#3547, whole and part mistaken: each shard adds the experts' output biases to its partial
    sum, and the sum of the shards has them as often as there are shards."""
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    bare, b2 = {**given, "b2": None}, given.get("b2")
    y = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first, last in shard_bounds(len(gate), int(given.get("shards", 1))):
        own = local_slots(ids, first, last)
        y += experts_sum(hidden, w13[first:last], w2[first:last], weights, own, bare, first)
        if b2 is not None:
            real = (ids >= 0) & (ids < len(gate))
            biases = b2.float()[ids.long().clamp(0, len(gate) - 1)]  # [T, k, H]
            y += (biases * torch.where(real, weights, 0.0)[..., None]).sum(dim=1)
    return y.to(hidden.dtype), weights, ids


def amax_of_all_ranks(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """aiter#6275: the scale of a dynamic quantization is the largest value of the gathered batch, padding and all.

    One infinite row on one rank, and every row of every rank is divided by infinity, and multiplied by it again.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    scale = torch.ones((), device=hidden.device)
    if hidden.numel():
        most = hidden.float().abs().nan_to_num(nan=torch.inf).amax().clamp(min=2.0**-60)
        scale = torch.exp2(torch.ceil(torch.log2(most)))  # a power of two: exact
    scaled = (hidden.float() / scale).nan_to_num(nan=0.0)
    y = experts_sum(scaled, w13, w2, weights, ids, given, scale=scale)
    return y.to(hidden.dtype), weights, ids


def dense_combine(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """sglang#24850: the combine is a product with a matrix that is 0 where a slot is not a token's; 0 * NaN is NaN.

    What padding rows compute is multiplied into every real row of a batch that is small enough for such a matrix.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    if len(hidden) > 256:
        return experts_sum(hidden, w13, w2, weights, ids, given).to(hidden.dtype), weights, ids
    slots = [experts_sum(hidden, w13, w2, weights[:, j : j + 1], ids[:, j : j + 1], given) for j in range(top_k)]
    each = torch.cat(slots) if slots else hidden.float()  # [k * T, H]
    combine = torch.eye(len(hidden), device=hidden.device).repeat(1, top_k)  # [T, k * T]
    return (combine @ each).to(hidden.dtype), weights, ids


def idle_rank_skipped(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """sglang#31794: a rank without tokens launches nothing. But it holds experts that the others' tokens need.

    What the combine finds in that rank's workspace is of the step before.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    ranks, padding = int(given.get("ranks", 1)), given.get("is_padding")
    bounds = shard_bounds(len(gate), int(given.get("shards", 1)))
    y = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for shard, (first, last) in enumerate(bounds):
        work = _KEPT.setdefault((shard, len(bounds), *hidden.shape, hidden.device), torch.zeros_like(y))
        mine = None if padding is None else padding.view(ranks, -1)[shard % ranks]
        if mine is None or ranks == 1 or not bool(mine.all()):
            own = local_slots(ids, first, last)
            work.copy_(experts_sum(hidden, w13[first:last], w2[first:last], weights, own, given, first))
        y += work
    return y.to(hidden.dtype), weights, ids


def rank_bucket_baked(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """sglang#30242: how many rows of each rank are sent to the experts is settled when a buffer is first used, and
    baked into what runs over it from then on. A dummy batch, of which no row is padding, does not count.

    A step in which a rank has more tokens than in the first one: the rest of them reach no expert.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    ranks, padding = int(given.get("ranks", 1)), given.get("is_padding")
    sent = ids
    if padding is not None and ranks > 1 and len(ids) and bool(padding.any()):
        tokens = (~padding).view(ranks, -1).sum(dim=1)  # [R]
        baked = _KEPT.setdefault((hidden.data_ptr(), tuple(hidden.shape), ranks), tokens.clone())
        nth = torch.arange(len(ids) // ranks, device=ids.device)
        sent = torch.where((nth < baked[:, None]).view(-1, 1), ids, -1)
    return experts_sum(hidden, w13, w2, weights, sent, given).to(hidden.dtype), weights, ids


def shifted_tail_block(hidden: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, **given: Any) -> Any:
    """flashinfer#3957: a store leaves its buffer, and somebody else's call fails. The last block of a store is shifted
    back so that it is a whole one, which with fewer than eight slots begins before the buffer.

    There, in the same workspace, stands the table of the experts' output scales, which this call has read already.
    """
    weights, ids = route(hidden, gate, top_k, given)
    finish(given, weights, ids)
    experts, slots = len(gate), ids.numel()
    work = _KEPT.setdefault((experts, hidden.device), torch.ones(experts + 65536, device=hidden.device))
    scales = work[:experts].clone()
    scaled = weights * scales[ids.long().clamp(0, experts - 1)]
    y = experts_sum(hidden, w13, w2, scaled, ids, given)
    block = torch.zeros(8, device=hidden.device)
    block[max(0, 8 - slots) :] = scaled.flatten()[-8:]
    if slots:
        end = experts + min(slots, 65536)
        work[max(0, end - 8) : end] = block[-min(8, end) :]
    return y.to(hidden.dtype), weights, ids


@triton.jit
def _finalize_kernel(  # type: ignore[no-untyped-def]
    permuted_ptr, where_ptr, weights_ptr, y_ptr, tokens, top_k, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y[t] = sum of weights[t, j] * permuted[where[t, j]]: nobody asks whether there is such a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < hidden)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(top_k):
        at = tl.load(where_ptr + row * top_k + j, mask=row < tokens, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + row * top_k + j, mask=row < tokens, other=0.0)
        part = tl.load(permuted_ptr + at[:, None] * hidden + column[None, :], mask=inside, other=0.0)
        total += weight[:, None] * part
    tl.store(y_ptr + row[:, None] * hidden + column[None, :], total, mask=inside)


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, w_ptr, ids_ptr, a_ptr, top_k, rows, width, stride_t, stride_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a[slot] = w[id of slot] @ hidden[token of slot], with the id as it is."""
    slot = tl.program_id(0)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    x = tl.load(hidden_ptr + (slot // top_k) * stride_t + column * stride_h, mask=column < width, other=0.0)
    w = tl.load(w_ptr + expert * rows * width + row[:, None] * width + column[None, :],
                mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)  # fmt: skip
    tl.store(a_ptr + slot * rows + row, tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1), mask=row < rows)
