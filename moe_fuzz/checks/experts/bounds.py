"""The result in float64, and how far a target may be from it by its declared sums and stores: docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import activated, halves
from moe_fuzz.checks.experts.repeats import Repeats
from moe_fuzz.checks.experts.requantized import requantized
from moe_fuzz.checks.experts.rounding import LARGEST, TINY, U, depth, dtype_of, floor, gamma, store, ulp, unit
from moe_fuzz.checks.experts.slots import Batch, batches
from moe_fuzz.contract import Contract
from moe_fuzz.mirror import on_host
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_SHIFT = 2.0**8  # by which a target may have its decoded weights smaller while it sums up
_MOST_FACTOR = 2.0**100  # of global scales: what is far enough from the ends of float32


@dataclass(frozen=True)
class Numbers:
    """Of y [T, H], float64. Where the bound is infinite, nothing is claimed: x or a weight is not finite, or a number
    on the way may be too large for its dtype."""

    value: Tensor  # the exact result for these inputs; 0 where nothing is claimed
    bound: Tensor
    variance: Tensor  # of a target's error, where roundings are as of random numbers; empty unless asked for
    spread: Tensor  # [T, 2]: Σ s and Σ s² over the roundings of h, weighted as they reach y; empty likewise
    largest: Tensor  # [T]: the largest of these s
    open: Tensor  # bool [T]: a quantization on the way may fall either way, so that errors are not those of roundings

    def take(self, rows: Tensor | slice) -> Numbers:
        """Those of these rows, int64 [R]."""
        return Numbers(*(part[rows] if len(part) else part for part in vars(self).values()))


def evaluate(inputs: ExpertsInputs, expert: Tensor, contract: Contract, random: Tensor | None = None,
             free: bool = False) -> Numbers:  # fmt: skip
    """Values and bounds of the slots of `expert`, int64 [T, k], where -1 drops one. random: bool [T], the tokens whose
    roundings are those of random numbers; where there are some, variances too. free: a store of the contract may be
    left out, which the bound allows for."""
    return _Evaluation(inputs, contract, random is not None and bool(on_host(random).any()), free=free).run(expert)


def shared(inputs: ExpertsInputs, expert: Tensor, contract: Contract, random: Tensor) -> Tensor:
    """[T, H]: 1, or for how many tokens an error counts that others have as well: `Repeats.shared`. At least one token
    is random. It costs what `evaluate` does, and half of that again."""
    repeats = Repeats(random, expert, inputs.plain["w13"].shape[0], inputs.plain["x"].dtype)
    return repeats.shared(_Evaluation(inputs, contract, random=True, repeats=repeats).run(expert).value)


class _Evaluation:
    def __init__(
        self, inputs: ExpertsInputs, contract: Contract, random: bool, repeats: Repeats | None = None,
        free: bool = False,
    ) -> None:  # fmt: skip
        self.inputs, self.plain, self.contract, self.repeats = inputs, inputs.plain, contract, repeats
        self.random = random  # variances are asked for
        self.free = free  # a store may be left out: the bound holds that already, but for codes that are made of it
        self.activation = str(inputs.options["activation"])
        self.layout = str(inputs.options["gate_layout"])
        self.on_input = bool(inputs.options["apply_weight_on_input"])
        self.weighs_x = self.on_input and contract.weighted_x == "dtype" and not inputs.quantizes
        self.dtype = self.plain["x"].dtype
        self.most = torch.finfo(self.dtype).max
        self.u = unit(self.dtype, contract.truncates)
        self.floor = floor(self.dtype, contract.truncates)
        self.stored = "dtype" in (contract.activation, contract.intermediate)  # h is
        self.u_sum = unit(dtype_of(contract.accumulate, self.dtype))
        self.x, self.e_x = self.plain["x"], None  # [T, H] as it is multiplied, and how far a target's may be from it
        if inputs.quantizes:
            x = self.x.double()
            self.x, self.e_x = requantized(x, x, x, self.plain["x_global"], self.dtype, contract)

    def run(self, expert: Tensor) -> Numbers:
        x = self.plain["x"]
        tokens, hidden = x.shape
        rows = self.plain["w13"].shape[1]
        zeros = x.new_zeros((tokens, hidden), dtype=torch.float64)
        value, error, size = zeros, zeros.clone(), zeros.clone()
        variance = zeros.clone() if self.random else zeros[:0]
        spread = x.new_zeros((tokens if self.random else 0, 2), dtype=torch.float64)
        largest = x.new_zeros(tokens if self.random else 0, dtype=torch.float64)
        self.open = torch.zeros(tokens, dtype=torch.bool, device=x.device)
        if self.e_x is not None:
            self.open |= (self.e_x > 0).any(dim=1)
        for batch in batches(expert, rows * hidden, rows + hidden):
            token = batch.tokens
            v, e, var, s = self._slots(batch)
            v, e = batch.of_real(v), batch.of_real(e)
            value.index_add_(0, token, v)
            error.index_add_(0, token, e)
            size.index_add_(0, token, v.abs() + e)
            if var is not None and s is not None:
                s = batch.of_real(s)
                variance.index_add_(0, token, batch.of_real(var))
                spread.index_add_(0, token, torch.stack([s.sum(1), s.square().sum(1)], dim=1))
                largest.scatter_reduce_(0, token, s.amax(1), "amax")
        return self._sum(value, error, size, variance, spread, largest, expert)

    # ---- a slot -----------------------------------------------------------------------------------------------------

    def _slots(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of each slot: its contribution to y [e, n, H], how far a target's may be off, and where asked for the
        variance of that and the variances of h that it is made of, [e, n, I]."""
        weight = self.plain["weights"][batch.token, batch.slot].double()[..., None]  # [e, n, 1]
        own = most = weight.abs()  # most: of what a target may have in its place, which is off by e_weight
        e_weight = None
        if self.contract.weight_dtype == "dtype":
            e_weight = self.u * own + self.floor
            most = own + e_weight
        a, e_a, sharp = self._first(batch, weight, most, e_weight)
        size = a.abs().add_(e_a)
        wide = size.amax(dim=-1, keepdim=True) < (self.most if self.contract.gate_up == "dtype" else LARGEST)
        h, e_h, s = self._activate(a, e_a, sharp, size)
        size = h.abs().add_(e_h)
        known = size.amax(dim=-1, keepdim=True) < (self.most if self.stored else LARGEST)  # not where there is a NaN
        nothing = ~(known & wide & weight.isfinite())  # [e, n, 1]
        h, e_h, size = _without(nothing, h, e_h, size)
        if self.inputs.quantizes:
            h, e_h = self._requantized(batch, h, e_h)
            size = h.abs().add_(e_h)
        v, e, size, w = self._second(batch, h, e_h, size)
        product, held = v, LARGEST
        if "dtype" in (self.contract.down, self.contract.slot):
            held = self.most
        if not self.on_input:
            wide = v.abs()
            off = (most * e).addcmul_(own, wide + e, value=2 * U).add_(TINY)
            e = off if e_weight is None else off.addcmul_(e_weight, wide)
            v = v * weight
            size = size * own.clamp(min=1.0)
        if self.contract.slot == "dtype":
            e = v.abs().add_(e).mul_(self.u).add_(e).add_(self.floor)
        nothing = ~(size.add_(e) < held) | nothing
        v = _without(nothing, v)[0]
        e = _without(nothing, e, fill=torch.inf)[0]
        if s is None:
            return v, e, None, None
        s = _without(nothing[..., :1], s)[0]
        if self.repeats is not None:  # a store before the weight rounds alike whatever the weight
            self.repeats.see(batch, _without(nothing, product)[0] if self.contract.down == "dtype" else v, h, s)
        return v, e, *self._variance(batch, v, h, s, weight, w)

    def _first(
        self, batch: Batch, weight: Tensor, most: Tensor, e_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x @ w13.T, weighted and biased: [e, n, 2I], its error, and that of its sum on random data. most: the largest
        weight that a target may have in place of this one, as a size; e_weight: how far it may be from it."""
        x = self.x[batch.token].double()  # [e, n, H]
        w = self.inputs.matrix("w13", batch.experts).transpose(1, 2)  # [e, H, 2I]
        a = torch.bmm(x, w)
        w, x = w.abs_(), x.abs_()
        sizes = torch.bmm(x, w)
        largest = self._largest(w)
        below = w.shape[1] * (TINY * (1 + largest) + self.weighs_x * self.floor * largest)
        e_a = below.new_zeros(())
        if self.e_x is not None:
            e_a = torch.bmm(self.e_x[batch.token], w)
            sizes = sizes + e_a
        a, e_a, sizes, below = self._scaled("w13", batch, a, e_a, sizes, below)
        if self.on_input:  # the weight may meet x, or the product
            e_a = e_a * most if e_weight is None else e_a * most + e_weight * sizes
            own = weight.abs()
            e_a = e_a + self.weighs_x * self.u * most * sizes
            ends = self.most if self.weighs_x else LARGEST
            e_a = e_a.masked_fill(own * x.amax(dim=-1, keepdim=True) >= ends, torch.inf)
            a = (a * weight).masked_fill_(weight == 0, 0.0)
            before = sizes  # who weighs the product has it without its weight first, and that may overflow
            sizes = most * sizes
            below = below * (1 + own)
        if (b13 := self.plain.get("b13")) is not None:
            bias = b13[batch.experts].double()[:, None]
            a, sizes = a + bias, sizes + bias.abs()
        e_a = torch.add(e_a + below, sizes, alpha=gamma(self._depth(w.shape[1]), self.u_sum))
        e_a = _without(sizes >= LARGEST, e_a, fill=torch.inf)[0]
        if self.on_input:
            ends = self.most if self.contract.gate_up == "dtype" else LARGEST
            e_a = _without(before >= ends, e_a, fill=torch.inf)[0]
        sharp = _random_gamma(w.shape[1]) * sizes if self.random else None
        if self.contract.gate_up == "dtype":
            e_a += 2 * (self.u * (a.abs() + e_a) + self.floor)  # of the product, and with the bias
            if b13 is not None:
                e_a += self.u * sizes
            if sharp is not None:
                sharp = sharp + ulp(a, self.dtype)
        return a, e_a, sharp

    def _activate(
        self, a: Tensor, e_a: Tensor, sharp: Tensor | None, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """h [e, n, I] as it is stored, its error, and the variance of that on random data. size: |a| + e_a."""
        gate, up = halves(a, self.activation, self.layout)
        e_gate, e_up = halves(e_a, self.activation, self.layout)
        rounded = self.contract.activation == "dtype"
        h, e_h, f = activated(self.activation, gate, up, e_gate, e_up, halves(size, self.activation, self.layout),
                              self.u if rounded else 0.0, self.floor, self.contract.sigmoid == "tanh")  # fmt: skip
        if self.stored and not self.inputs.quantizes:  # else `_requantized` stores it
            e_h = h.abs().add_(e_h).mul_(self.u).add_(e_h).add_(self.floor)
        if sharp is None:
            return h, e_h, None
        if self.inputs.quantizes:  # what is left of it has no error, where it cannot fall either way
            return h, e_h, torch.zeros_like(h)
        steps = self._steps(h) * (1 + 4 * rounded)
        d_gate, d_up = halves(sharp, self.activation, self.layout)
        if up is None or d_up is None:
            passed = 2 * gate.clamp(min=0.0) * d_gate
            return h, e_h, steps + passed.square()
        factor = up.clamp(-7.0, 7.0) + 1.0 if self.activation == "swiglu_oai" else up
        return h, e_h, steps + (1.13 * factor * d_gate).square() + (f * d_up).square()

    def _requantized(self, batch: Batch, h: Tensor, e_h: Tensor) -> tuple[Tensor, Tensor]:
        """What NVFP4 leaves of the activation's result, stored before or not, and how far a target's may be from it."""
        low, high = h - e_h, h + e_h
        if self.stored:
            low, high = (store(part, self.dtype)[0] for part in (low, high))
            if self.contract.truncates:
                low, high = low - ulp(low, self.dtype), high + ulp(high, self.dtype)
            if self.free:
                low, high = torch.minimum(low, h - e_h), torch.maximum(high, h + e_h)
        dtype = self.dtype if self.stored else torch.float32
        h, e_h = requantized(low, high, h, self.plain["h_global"], dtype, self.contract)
        fell = (e_h > 0).any(dim=-1).flatten()[batch.at]
        self.open |= torch.zeros_like(self.open, dtype=torch.float32).index_add_(0, batch.tokens, fell.float()) > 0
        return h, e_h

    def _scaled(
        self, name: str, batch: Batch, value: Tensor, error: Tensor, size: Tensor, below: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums times the global scales, where there are: before that they must not overflow either, nor what of it is
        only a factor."""
        factor = self.inputs.factor(name, batch.experts)
        if factor is None:
            return value, error, size, below
        scale = self.plain.get("x_global" if name == "w13" else "h_global")
        both = factor if scale is None else factor / scale.double()
        usable = (both.abs() < _MOST_FACTOR) & ((both.abs() > 1 / _MOST_FACTOR) | (factor == 0))
        if scale is not None:
            usable = usable | ((factor.abs() < _MOST_FACTOR) & ~((scale >= TINY) & (scale < torch.inf)))  # all is 0
        lost = ~usable | (size >= LARGEST)
        known = torch.where(factor.isfinite(), factor, 0.0)
        large = known.abs()  # a factor may be below 0
        e_factor = self.u if self.contract.factor == "dtype" else 0.0
        value, error, size = value * known, error * large * (1 + e_factor), size * large
        error = (error + 2 * e_factor * size).masked_fill(lost, torch.inf)
        return value, error, size, below * _SHIFT * large + TINY

    def _largest(self, sizes: Tensor) -> Tensor:
        """The largest of the sizes of weights that are numbers: one expert's NaN is not a matter of the others."""
        return (sizes if self.inputs.finite_weights else sizes.nan_to_num(0.0, 0.0)).amax()

    def _depth(self, terms: int) -> float:
        """With global scales: their product or quotient, rounded twice, and the product with it."""
        return depth(terms) + (4 if self.inputs.has_factors else 0)

    def _second(self, batch: Batch, h: Tensor, e_h: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h @ w2.T, biased: [e, n, H], its error, and Σ|terms|; and the sizes of w2.T. size: |h| + e_h."""
        w = self.inputs.matrix("w2", batch.experts).transpose(1, 2)  # [e, I, H]
        v = torch.bmm(h, w)
        w = w.abs_()
        g = gamma(self._depth(h.shape[-1]), self.u_sum)
        sizes = torch.bmm(size, w)
        e = torch.bmm(e_h, w)
        v, e, sizes, below = self._scaled("w2", batch, v, e, sizes, h.shape[-1] * TINY * (1 + self._largest(w)))
        if (b2 := self.plain.get("b2")) is not None:
            bias = b2[batch.experts].double()[:, None]
            v, sizes = v + bias, sizes + bias.abs()
        e = torch.add(e, sizes, alpha=g).add_(below)
        if self.contract.down == "dtype":
            e = e + 2 * (self.u * (v.abs() + e) + self.floor)
            if b2 is not None:
                e = e + self.u * sizes
        return v, e, sizes, w

    # ---- random data ------------------------------------------------------------------------------------------------

    def _steps(self, values: Tensor) -> Tensor:
        """The variance of one rounding of each value. Of a subnormal number the error is not random: there its square's
        largest value."""
        step = ulp(values, self.dtype).square()
        return torch.where(values.abs() < torch.finfo(self.dtype).smallest_normal, step / 4, step / 12)

    def _variance(
        self, batch: Batch, v: Tensor, h: Tensor, s: Tensor, weight: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        """w: the sizes of w2.T, which nobody needs any more."""
        s = torch.addcmul(s, h, h, value=(4 * _random_gamma(h.shape[-1])) ** 2)
        scale = torch.ones_like(weight) if self.on_input else weight.square()
        factor = self.inputs.factor("w2", batch.experts)
        if factor is not None:
            scale = scale * factor.square().nan_to_num(0.0, 0.0)
        var = scale * torch.bmm(s, w.square_())
        if self.contract.down == "dtype":
            each = torch.ones_like(weight) if self.on_input else weight.abs()
            each = each.clamp(min=TINY)
            near = 2 * (v.abs() + 4 * var.sqrt()) / each
            if (b2 := self.plain.get("b2")) is not None:  # which may cancel a product that is stored before
                near = torch.maximum(near, (v / each - b2[batch.experts].double()[:, None]).abs())
            var = var + each.square() * 2 * self._steps(near)
        if self.contract.slot == "dtype":
            var = var + self._steps(v.abs() + 4 * var.sqrt())
        return var, s * scale

    # ---- a token ----------------------------------------------------------------------------------------------------

    def _sum(self, value: Tensor, error: Tensor, size: Tensor, variance: Tensor, spread: Tensor, largest: Tensor,
             expert: Tensor) -> Numbers:  # fmt: skip
        """The sum over slots, and its store."""
        top_k = expert.shape[1]
        narrow = self.contract.reduce == "dtype"
        bound = torch.add(error + top_k * narrow * self.floor, size, alpha=gamma(top_k + 2, self.u if narrow else U))
        bound = value.abs().add_(bound).mul_(self.u).add_(bound).add_(self.floor + TINY)
        bound = bound.masked_fill(~(size < (self.most if narrow else LARGEST)), torch.inf)
        if self.random:
            if narrow:
                variance = variance + 1.5 * top_k * self._steps(size)
            # Slots that are stored already lie on a grid, perhaps of half this store's steps: then one sum in two is a
            # tie, and what is lost is 0 or half a step, which is more than of a continuous number.
            ties = 1.5 if self.contract.slot == "dtype" or narrow else 1.0
            variance = variance + ties * self._steps(value.abs() + 4 * variance.sqrt())
        return Numbers(value, bound.nan_to_num(torch.inf, torch.inf), variance, spread, largest, self.open)


def _without(there: Tensor, *parts: Tensor, fill: float = 0.0) -> tuple[Tensor, ...]:
    """Each with `fill` there, bool. Nearly always that is nowhere: a host, which has the answer, asks first."""
    if there.device.type == "cpu" and not bool(there.any()):
        return parts
    return tuple(part.masked_fill(there, fill) for part in parts)


def _random_gamma(terms: int) -> float:
    """What `gamma` is on random data, where errors do not all have one sign."""
    return gamma(terms / 16 + 16)
