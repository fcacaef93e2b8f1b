"""The result where its bits are known: no sum on the way can be rounded, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import CURVES, halves
from moe_fuzz.checks.experts.requantized import requantized
from moe_fuzz.checks.experts.rounding import PRECISION, TINY, depth, dtype_of, gamma, store, unit_of
from moe_fuzz.checks.experts.slots import Batch, batches
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_ROUGH = 2.0**-20  # how far an activation in float32 may be off where it is the identity


def exact_answer(inputs: ExpertsInputs, expert: Tensor, contracts: Sequence[Contract]) -> tuple[Tensor, Tensor]:
    """The result [T, H] of the slots of `expert`, int64 [T, k] with -1 for none, after every store that the contract
    declares; and where its bits are known for certain, bool. Of several contracts, where all give the same bits.

    They are where Σ|terms| of every sum is below 2^24 of the unit that all its terms are multiples of (2^8 in bfloat16,
    2^11 in float16), where the gate is large enough to pass its activation unchanged, and where no store that may stand
    before or behind a bias, or cut off or round, loses anything.
    """
    y, known = _Exact(inputs, contracts[0]).run(expert)
    for contract in contracts[1:]:
        other, sure = _Exact(inputs, contract, free=True).run(expert)
        known = known & sure & (other == y)
    return y, known


class _Exact:
    def __init__(self, inputs: ExpertsInputs, contract: Contract, free: bool = False) -> None:
        """free: where an activation's result is not stored, its bits are not known, but what they may do to y is."""
        self.inputs, self.plain, self.options, self.contract = inputs, inputs.plain, inputs.options, contract
        self.stored = "dtype" in (contract.activation, contract.intermediate)  # h is
        self.free = free and not self.stored
        self.dtype = self.plain["x"].dtype
        self.room = 2.0 ** PRECISION[dtype_of(self.contract.accumulate, self.dtype)]

    def run(self, expert: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(self.plain["x"].shape, dtype=torch.float64, device=expert.device)
        size, unit = torch.zeros_like(total), torch.full_like(total, torch.inf)
        unknown = torch.zeros_like(total)
        error = torch.zeros_like(total)
        rows = self.plain["w13"].shape[1]
        for batch in batches(expert, rows * total.shape[1], rows + total.shape[1]):
            token = batch.tokens
            made, e, sure = self._slots(batch)
            v, known = batch.of_real(made), batch.of_real(sure)
            total.index_add_(0, token, v)
            if e is not None:
                error.index_add_(0, token, batch.of_real(e))
            size.index_add_(0, token, v.abs())
            unit.scatter_reduce_(0, token[:, None].expand_as(v), unit_of(v), "amin")
            unknown.index_add_(0, token, (~known).double())
        narrow = dtype_of(self.contract.reduce, self.dtype)
        summed = size < 2.0 ** PRECISION[narrow] * unit
        if narrow == torch.float32:  # what is off anyway may be rounded as well
            error = torch.where(error > 0, error + gamma(expert.shape[1] + 2) * (size + error), 0.0)
            summed = summed | (error > 0)
        known = (expert >= 0).any(dim=1)[:, None] & (unknown == 0) & summed & self._sure(total, error)
        y, whole = store(total, self.dtype)
        return y, known & y.isfinite() & (whole | (not self.contract.truncates))

    def _sure(self, values: Tensor, error: Tensor) -> Tensor:
        """Where all that is within the error of a value is stored as the same number."""
        return store(values - error, self.dtype)[0] == store(values + error, self.dtype)[0]

    def _slots(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """The contribution of each slot [e, n, H], as it is stored; how far a target's may be from it, where it may;
        and where that much is known."""
        on_input = bool(self.options["apply_weight_on_input"])
        weight = self.plain["weights"][batch.token, batch.slot].double()[..., None]  # [e, n, 1]
        x, sure = self._quantized(self.plain["x"][batch.token].double(), "x_global", self.dtype)
        if self.contract.weight_dtype == "dtype":
            sure = sure & store(weight, self.dtype)[1]
        if on_input and self.contract.weighted_x == "dtype" and not self.inputs.quantizes:
            sure = sure & store(x * weight, self.dtype)[1].all(dim=-1, keepdim=True)
        bias = self.plain["b13"][batch.experts].double()[:, None] if "b13" in self.plain else None
        a, sums, _, _ = self._product(x, "w13", batch, bias, weight if on_input else None, self.contract.gate_up)
        h, stores = self._activated(a)  # [e, n, I], of a [e, n, 2I]
        known = sure & sums.all(dim=-1, keepdim=True) & stores.all(dim=-1, keepdim=True)  # [e, n, 1]
        h = h.masked_fill(~known, 0.0)
        rough = self._rough(h)
        h, sure = self._quantized(h, "h_global", self.dtype if self.stored else torch.float32, rough)
        bias = self.plain["b2"][batch.experts].double()[:, None] if "b2" in self.plain else None
        v, sums, size, bits = self._product(h, "w2", batch, bias, None, self.contract.down)
        known = known & sure & sums
        e = self._reached(h, rough, batch)
        if not on_input:
            v = v * weight
            e = e if e is None else e * weight.abs()
            # Whoever weighs the terms and then adds them up rounds each sum, where these have more bits than it.
            long = bits * (weight.abs() / unit_of(weight)) >= self.room
            known = known & (long | store(v, torch.float32)[1])
            if self.room < 2.0 ** PRECISION[torch.float32]:
                known = known & ~long
            elif bool(long.any()):
                off = torch.where(long, gamma(depth(h.shape[-1]) + 4) * size * weight.abs() + TINY, 0.0)
                e = off if e is None else e + off
            if self.contract.slot != "dtype" and self.contract.down == "dtype":  # else this is the store below
                known = known & self._kept(v, self.contract.down)
        if self.contract.slot == "dtype":
            if e is not None:
                known, e = known & self._sure(v, e), None
            v, whole = store(v, self.dtype)
            known = known & (whole | (not self.contract.truncates))
        return v, e, known & v.isfinite()

    def _rough(self, h: Tensor) -> Tensor | None:
        """How far an activation's result that is not stored may be from h [e, n, I]; None where it is known. `relu2`,
        whose result is a float32, is."""
        return h.abs() * _ROUGH if self.free and self.options["activation"] != "relu2" else None

    def _reached(self, h: Tensor, rough: Tensor | None, batch: Batch) -> Tensor | None:
        """How far the second product [e, n, H] may be off by that, its weight and its bias included: as the terms lie
        on no grid any more, float32 rounds their sum. What codes are made of leaves no error."""
        if rough is None or self.inputs.quantizes:
            return None
        w = self.inputs.matrix("w2", batch.experts).transpose(1, 2).abs()
        factor = self.inputs.factor("w2", batch.experts)
        size = torch.bmm(h.abs() + rough, w)
        moved = torch.bmm(rough, w)
        if factor is not None:
            size, moved = size * factor.abs(), moved * factor.abs()
        if "b2" in self.plain:
            size = torch.where(moved > 0, size + self.plain["b2"][batch.experts].double()[:, None].abs(), 0.0)
        return moved + gamma(depth(h.shape[-1]) + 4) * size

    def _quantized(
        self, values: Tensor, scale: str, dtype: torch.dtype, error: Tensor | None = None
    ) -> tuple[Tensor, Tensor | bool]:
        """What is multiplied of x or h [e, n, D], stored in `dtype` before, and which rows it is known for, [e, n, 1].
        error: how far a target's values may be off."""
        if not self.inputs.quantizes:
            return values, True
        low, high = (values, values) if error is None else (values - error, values + error)
        found, left = requantized(low, high, values, self.plain[scale], dtype, self.contract)
        return found, ~(left > 0).any(dim=-1, keepdim=True)

    def _product(
        self, x: Tensor, name: str, batch: Batch, bias: Tensor | None, weight: Tensor | None, declared: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x @ w.T, weighted and biased; where neither a sum on the way can be rounded nor a store in the declared
        dtype, which may stand before the weight, before the bias, or behind both; Σ|terms|, and over their unit. A
        global scale is a power of two, or nothing is known."""
        w = self.inputs.matrix(name, batch.experts).transpose(1, 2)
        result, size, unit = torch.bmm(x, w), torch.bmm(x.abs(), w.abs()), _of_rows(x) * _least(w)
        if (factor := self.inputs.factor(name, batch.experts)) is not None:
            power = self._power(name, factor)
            result, size, unit = result * factor, size * factor.abs(), unit * factor.abs()
            result, size = result.nan_to_num(0.0), torch.where(power, size, torch.inf)
        kept = self._kept(result, declared)
        if weight is not None:
            result, size, unit = result * weight, size * torch.maximum(weight.abs(), torch.ones_like(weight)), (
                unit * _of_rows(weight).clamp(max=1.0))  # fmt: skip
            kept = kept & self._kept(result, declared)
        if bias is not None:
            result, size, unit = result + bias, size + bias.abs(), torch.minimum(unit, _least(bias))
            kept = kept & self._kept(result, declared)
        bits = size / unit
        return result, kept & (bits < self.room), size, bits

    def _power(self, name: str, factor: Tensor) -> Tensor:
        """bool [e, 1, 1]: whether an expert's global scale, and that of what it multiplies, are powers of two."""
        scale = self.plain.get("x_global" if name == "w13" else "h_global")
        parts = [factor] if scale is None else [factor, scale.double().nan_to_num(1.0, 1.0).clamp(min=TINY)]
        powers = [torch.frexp(part.abs()).mantissa == 0.5 for part in parts]
        return powers[0] if scale is None else powers[0] & powers[1]

    def _kept(self, values: Tensor, declared: str) -> Tensor:
        """Where a store loses nothing."""
        return store(values, dtype_of(declared, self.dtype))[1]

    def _activated(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """h [e, n, I] as it is stored, and where its bits are known: the gate is large enough to pass unchanged."""
        activation = str(self.options["activation"])
        gate, up = halves(a, activation, str(self.options["gate_layout"]))
        if up is None:
            h = CURVES[activation].of(gate)
            stored, known = store(h, torch.float32)
        else:
            # The gate passes, but for what a division that is not correctly rounded leaves of it. Only where a store
            # takes that away, and no tie is near, the bits are known. A store that cuts off may find it below a step.
            h = gate * up
            near = [store(h * (1 + off * _ROUGH), self.dtype)[0] for off in (-1, 1)]
            known = (near[0] == near[1]) & (CURVES[activation].of(gate).float() == gate)
            stored, known = h, known & (self.stored or self.free) & (not self.contract.truncates)
        if self.stored:
            stored, whole = store(h, self.dtype)
            known = known & (whole | (not self.contract.truncates))
        return stored, known & stored.isfinite()


def _of_rows(values: Tensor) -> Tensor:
    """The unit of all values of each row of [e, n, .], as [e, n, 1]: what another token holds makes no sum inexact."""
    return unit_of(values).amin(dim=2, keepdim=True)


def _least(values: Tensor) -> Tensor:
    """The unit of all values of each of e matrices [e, ., .], as [e, 1, 1]."""
    return unit_of(values).amin(dim=(1, 2), keepdim=True)
