"""Planted bugs of experts: rows sorted by expert before the products, and what becomes of slots that have none."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.planted.experts_layer import Layer


class Permuted(Layer):
    """A right layer that gathers the rows of x by expert, and puts the outputs back to their slots."""

    def slots(self, expert: Tensor) -> Tensor:
        flat = expert.flatten()
        order = self.sorted_slots(flat)  # [N], those of expert 0 first
        token, slot = order // self.top_k, order % self.top_k
        rows = self.gathered(token, int((flat >= 0).sum()))
        y, end, x = torch.zeros((*expert.shape, self.hidden), dtype=rows.dtype, device=rows.device), 0, self.x
        self.x = rows
        for e, count in enumerate(torch.bincount(flat[flat >= 0], minlength=self.experts).tolist()):
            place = torch.arange(end, end + count, device=x.device)
            weight = self.weight(token[place], slot[place])[:, None]
            if count:
                y[token[place], slot[place]] = self.down(e, self.gate_up(e, place, weight), weight)
            end += count
        self.x = x
        return y

    def sorted_slots(self, flat: Tensor) -> Tensor:
        return torch.where(flat < 0, self.experts, flat).argsort(stable=True)

    def gathered(self, token: Tensor, kept: int) -> Tensor:
        """The rows of the sorted slots, of which `kept` have an expert."""
        return self.x[token]


class _DroppedFirst(Permuted):
    def sorted_slots(self, flat: Tensor) -> Tensor:
        return flat.argsort(stable=True)


def dropped_sorted_first(*tensors: Tensor, **options: Any) -> Tensor:
    """TransformerEngine#2908: a signed sort puts the slots without an expert first, and the rows of experts are counted
    from the start. Each expert takes the rows of others."""
    return _DroppedFirst.run(*tensors, **options)


class _UnwrittenMap(Permuted):
    on_device = True

    def gathered(self, token: Tensor, kept: int) -> Tensor:
        source = torch.empty(len(token), dtype=torch.int32, device=token.device)  # a row's token
        source[:kept] = token[:kept].int()
        rows = self.x.new_empty((len(token), self.hidden))
        if rows.numel():
            each = 1 if rows.is_cuda else triton.next_power_of_2(triton.cdiv(len(token), 4))
            _gather_kernel[(triton.cdiv(len(token), each),)](
                self.x, source, rows, len(token), self.hidden, *self.x.stride(),
                ROWS=each, SIZE=triton.next_power_of_2(self.hidden),
            )  # fmt: skip
        return rows


def map_of_dropped_unwritten(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#54747: slots of the id -1 get no entry in the map of rows, and the gather of all rows takes what stands
    there for a row of x."""
    return _UnwrittenMap.run(*tensors, **options)


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr, source_ptr, out_ptr, rows, columns, stride_r, stride_c, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)[None, :]
    source = tl.load(source_ptr + row, mask=row < rows, other=0).to(tl.int64)[:, None]
    ok = (row < rows)[:, None] & (column < columns)
    x = tl.load(x_ptr + source * stride_r + column * stride_c, mask=ok)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * columns + column, x, mask=ok)
