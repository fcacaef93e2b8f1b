"""Tokens whose numbers are another's, so that their roundings are too: how many of them a token's errors count for.

Roundings of random numbers are independent. Those of the same number are the same: where a product is 0 or is lost
beside its bias, all tokens of an expert have one row, and a thousand of them tell no more than one. Derived in
docs/numerics.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fuzz.checks.experts.rounding import ulp
from moe_fuzz.checks.experts.slots import Batch
from moe_fuzz.mirror import on_host, uploaded

_SAME = 2.0**-40  # relative: sums of the same terms in float64
_NOTHING = 1e-12  # a correlation


class Repeats:
    """Sees the slots of all batches of a layer, and then says what they have in common."""

    def __init__(self, counted: Tensor, expert: Tensor, experts: int, dtype: torch.dtype) -> None:
        """counted: bool [T], the tokens that are judged by statistics. expert: int64 [T, k], -1 where one is dropped.
        dtype: that of y."""
        self.counted, self.expert, self.experts, self.dtype = counted, expert, experts, dtype
        self.v, self.h = _Spread(experts, dtype), _Spread(experts, dtype)
        self.size = torch.zeros(0)  # [E, I]: Σ of the variances of h
        self.keys = torch.zeros((*expert.shape, 4), dtype=torch.float64, device=expert.device)  # of v and h, with sizes

    def see(self, batch: Batch, v: Tensor, h: Tensor, s: Tensor) -> None:
        """v: [e, n, H], the slots as they are stored. h: [e, n, I], and the variances s of its roundings."""
        counted = self.counted[batch.token]
        real = batch.real & counted  # [e, n]
        counts = real.double()[:, None]
        self.v.add(batch.experts, v, counts)
        self.h.add(batch.experts, h, counts)
        if not len(self.size):
            self.size = s.new_zeros((self.experts, s.shape[2]))
        self.size.index_add_(0, batch.experts, torch.bmm(counts, s).squeeze(1))
        rounded = (s > 0).any(dim=2)
        keys = torch.stack([*_key(v), *(part * rounded for part in _key(h))], dim=2)  # [e, n, 4]
        keys = keys.masked_fill(~real[..., None], 0.0)
        self.keys.view(-1, 4)[batch.places] = batch.of_real(keys)

    def shared(self, value: Tensor) -> Tensor:
        """Of each element of y, 1 and the sum of its error's correlations with those of other tokens at most, [T, H].

        value: y [T, H]. Of tokens that are not counted it means nothing.
        """
        one = value.new_ones(1, 1).expand_as(value)
        if not len(self.size):
            return one
        used = self.size.sum(dim=1, keepdim=True)
        of_h = (self.size * self.h.likeness()).sum(dim=1, keepdim=True) / used.clamp(min=1e-300)  # [E, 1]
        alike = torch.maximum(self.v.likeness(), of_h)  # [E, H]
        member = value.new_zeros((len(value), self.experts))
        member.scatter_add_(1, self.expert.clamp(min=0), (self.expert >= 0).double())
        others = (self.v.count - 1).clamp(min=0)[:, None]
        equal = torch.maximum(self._equal(0), self._equal(2)) - 1  # [T, k]
        equal = equal * (1 - alike.amin(dim=1))[self.expert.clamp(min=0)]  # which are not among those alike
        row = self._rows_alike(value)
        most = torch.stack([(alike * others).max(), equal.max(), row.max()]).max()
        of_slots = member @ (alike * others) + equal.sum(dim=1, keepdim=True)
        shared = 1 + torch.maximum(of_slots, row).clamp(max=max(0, int(on_host(self.counted).sum()) - 1))
        return torch.where(most < _NOTHING, one, shared)

    def _rows_alike(self, value: Tensor) -> Tensor:
        """[T, H]: the correlations of the last store with those of tokens that have the same experts."""
        ordered = on_host(self.expert).sort(dim=1).values
        groups = ordered.unique(dim=0, return_inverse=True)[1]
        group = uploaded(groups, self.expert.device)
        rows = _Spread(int(groups.max()) + 1, self.dtype)
        rows.add(group, value[:, None], self.counted.double()[:, None, None])
        others = (rows.count - 1).clamp(min=0)[:, None]
        return (rows.likeness() * others)[group]

    def _equal(self, at: int) -> Tensor:
        """[T, k]: how many counted slots of the same expert have the row of this one, which is not all zero."""
        key, size = (part.flatten() for part in self.keys[..., at : at + 2].unbind(dim=-1))
        some = ((self.expert >= 0) & self.counted[:, None]).flatten() & (size > 0)
        expert = torch.where(some, self.expert.flatten(), self.experts)  # the others behind all experts
        order = key.argsort()
        order = order[expert[order].argsort(stable=True)]
        key, size, expert = key[order], size[order], expert[order]
        new = torch.ones_like(expert)
        new[1:] = ((expert[1:] != expert[:-1]) | ((key[1:] - key[:-1]).abs() > _SAME * size[1:])).long()
        run = new.cumsum(0) - 1
        counts = torch.zeros_like(key).index_add_(0, run, torch.ones_like(key))
        found = torch.empty_like(key)
        found[order] = torch.where(some[order], counts[run], 1.0)
        return found.view(self.expert.shape)


class _Spread:
    """Moments of rows by group, in one pass."""

    def __init__(self, groups: int, dtype: torch.dtype) -> None:
        self.groups, self.dtype = groups, dtype
        self.count = self.sums = self.squares = self.largest = torch.zeros(0)

    def add(self, groups: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Of each of e groups, int64 [e], n rows [e, n, D]. counts: float64 [e, 1, n], 1 where they are real, else 0.
        """
        if not len(self.count):
            self.count = rows.new_zeros(self.groups)
            self.sums = rows.new_zeros((self.groups, rows.shape[2]))
            self.squares, self.largest = self.sums.clone(), self.sums.clone()
        self.count.index_add_(0, groups, counts.sum(dim=(1, 2)))
        self.sums.index_add_(0, groups, torch.bmm(counts, rows).squeeze(1))
        self.squares.index_add_(0, groups, torch.bmm(counts, rows.square()).squeeze(1))
        largest = rows.abs().mul_(counts.transpose(1, 2)).amax(dim=1)
        self.largest.scatter_reduce_(0, groups[:, None].expand_as(largest), largest, "amax")

    def likeness(self) -> Tensor:
        """[G, D]: the correlation of the roundings of two numbers of a group, in the mean.

        Of numbers d steps apart it is 6/π² Σ cos(2π m d)/m², and where d is normal of variance 2 s² it is less than
        exp(-4 π² s²). 0 does not round, so numbers that are all 0 have none.
        """
        count = self.count.clamp(min=1)[:, None]
        variance = (self.squares / count - (self.sums / count).square()).clamp(min=0)
        steps = variance / ulp(self.largest, self.dtype).square()
        return torch.exp(-4 * math.pi**2 * steps).masked_fill(self.largest == 0, 0.0)


def _key(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows [e, n, D] a number that two rows have in common if they are the same, and else by no chance; and how
    large its terms are. Both [e, n]."""
    at = torch.arange(1, rows.shape[2] + 1, dtype=torch.float64, device=rows.device)
    factors = 0.5 + (at * 0.6180339887498949).frac()
    return rows @ factors, rows.abs() @ factors
