"""Tries to break the bound of experts by brute force: prints the largest error over bound, exits 1 if that exceeds 1.

    python benchmarks/prove_bound.py [--count 1000000] [--seed 0]

First dot products: adversarial terms in adversarial orders, each partial sum rounded or cut off to float32, and as
tensor cores do it, groups of 16 aligned to their largest and cut off. Then small layers of experts by such sums, with
all activations by rough exponentials, biases, weights on either side, and every store that a contract can declare,
rounded or cut off. `--count` of each.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.checks.experts.bounds import evaluate
from moe_fuzz.checks.experts.rounding import TINY, depth, gamma
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.reference.experts_bf16 import ACTIVATIONS, GATE_LAYOUTS

ORDERS = ("as they come", "large first", "small first", "one sign first", "a tree", "tensor cores")
STORES = ("float32", "dtype")


class Random:
    """A generator of torch with a few draws of its own."""

    def __init__(self, seed: int) -> None:
        self.torch = torch.Generator().manual_seed(seed)

    def below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.torch))

    def among(self, values: Any) -> Any:
        return values[self.below(len(values))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch, dtype=torch.float64)

    def signs(self, *shape: int) -> Tensor:
        return 2.0 * torch.randint(2, shape, generator=self.torch, dtype=torch.float64) - 1

    def ladder(self, spread: int, *shape: int) -> Tensor:
        """Both signs, magnitudes from 2^-spread to 2^spread, mantissas of few bits or of many."""
        power = torch.randint(-spread, spread + 1, shape, generator=self.torch).double()
        mantissa = 1 + torch.rand(shape, generator=self.torch, dtype=torch.float64)
        return self.signs(*shape) * mantissa * torch.exp2(power)


# ---- a device that rounds as badly as it may ------------------------------------------------------------------------


@dataclass
class Device:
    random: Random
    order: str
    cuts: bool  # float32 sums cut off instead of rounding
    truncates: bool  # stores likewise
    accumulate: torch.dtype = torch.float32  # of partial sums

    def single(self, values: Tensor) -> Tensor:
        """float64 to what float32 holds of it."""
        return cut(values, 24) if self.cuts else values.float().double()

    def partial(self, values: Tensor) -> Tensor:
        return self.single(values) if self.accumulate == torch.float32 else values.to(self.accumulate).double()

    def sum(self, terms: Tensor) -> Tensor:
        """The last dimension in the order of this device, each partial sum rounded."""
        if self.order == "tensor cores":
            return self._aligned(terms)
        if self.order == "a tree":
            while terms.shape[-1] > 1:
                if terms.shape[-1] % 2:
                    terms = torch.cat([terms, torch.zeros_like(terms[..., :1])], dim=-1)
                terms = self.partial(terms[..., ::2] + terms[..., 1::2])
            return self.partial(terms[..., 0])
        if self.order == "one sign first":
            terms = terms.sort(dim=-1).values
        elif self.order != "as they come":
            by_size = terms.abs().argsort(dim=-1, descending=self.order == "large first")
            terms = terms.gather(-1, by_size)
        total = self.partial(terms[..., 0])
        for at in range(1, terms.shape[-1]):
            total = self.partial(total + terms[..., at])
        return total

    def _aligned(self, terms: Tensor) -> Tensor:
        """Sixteen at a time: each is cut off at 2^-24 of the largest of them and the sum so far, and so is the sum."""
        total = torch.zeros_like(terms[..., 0])
        for group in terms.split(16, dim=-1):
            together = torch.cat([total[..., None], group], dim=-1)
            largest = together.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-140)
            step = torch.exp2(torch.floor(torch.log2(largest)) - 24)
            total = self.partial(cut(((together / step).trunc() * step).sum(dim=-1), 24))
        return total

    def store(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.truncates:
            return values.to(dtype).double()
        if dtype == torch.bfloat16:
            return cut(values, 8)
        low = cut(values, 11)
        tiny = values.abs() < 2.0**-14
        return torch.where(tiny, (values * 2.0**24).trunc() * 2.0**-24, low)

    def spoiled(self, values: Tensor, ulps: float) -> Tensor:
        """With a relative error of up to so many units of roundoff: its extremes as often as none."""
        error = torch.randint(-1, 2, values.shape, generator=self.random.torch).double() * ulps * 2.0**-24
        return self.single(values * (1 + error))


def cut(values: Tensor, bits: int) -> Tensor:
    """Cut off to so many bits of significand; no exponent is too small."""
    mantissa, exponent = torch.frexp(values)
    scale = 2.0**bits
    return torch.ldexp((mantissa * scale).trunc() / scale, exponent)


# ---- dot products ---------------------------------------------------------------------------------------------------


def terms_of(random: Random, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Two factors [rows, size] in bfloat16, adversarial: what cancels, what is lost beside a large one."""
    kind = random.below(5)
    if kind == 0:
        a, b = random.normal(rows, size), random.normal(rows, size)
    elif kind == 1:
        a, b = random.ladder(14, rows, size), random.ladder(6, rows, size)
    elif kind == 2:  # pairs that cancel but for their last bits
        a, b = random.ladder(4, rows, size), random.normal(rows, size)
        half = size // 2
        last = torch.randint(-1, 2, (rows, half), generator=random.torch).double()
        a[:, half : 2 * half] = -a[:, :half] * (1 + 2.0**-7 * last)
        b[:, half : 2 * half] = b[:, :half]
    elif kind == 3:  # all of one sign and of one binade: every rounding goes the same way
        a, b = 1 + random.normal(rows, size).abs() % 1, 1 + random.normal(rows, size).abs() % 1
    else:  # one that is large, and many below half a step of it
        a, b = random.normal(rows, size) * 2.0 ** -(10 + random.below(8)), random.normal(rows, size)
        a[:, random.below(size)] = 2.0 ** random.below(6)
    return a.bfloat16().double(), b.bfloat16().double()


def dot_products(random: Random, count: int) -> float:
    """The largest error over bound of `count` dot products."""
    worst, done, rows = 0.0, 0, 2000
    while done < count:
        size = random.among((1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 96))
        a, b = terms_of(random, rows, size)
        device = Device(random, random.among(ORDERS), bool(random.below(2)), False)
        terms = a * b
        off = (device.sum(terms) - terms.sum(dim=-1)).abs()
        worst = max(worst, float((off / (gamma(depth(size)) * terms.abs().sum(dim=-1) + size * TINY)).max()))
        done += rows
    return worst


# ---- layers ---------------------------------------------------------------------------------------------------------


def layer_of(random: Random) -> tuple[ExpertsInputs, Contract]:
    """A small layer of adversarial data, and a contract."""
    dtype = random.among((torch.bfloat16, torch.bfloat16, torch.float16))
    spread = 5 if dtype == torch.bfloat16 else 2
    tokens, top_k, experts = 24, random.among((1, 2, 3, 7)), random.among((1, 2, 5))
    hidden, inter = random.among((1, 2, 5, 16, 33, 48)), random.among((1, 3, 8, 17, 40))
    activation = random.among(ACTIVATIONS)
    rows = inter * (1 if activation == "relu2" else 2)

    def draw(*shape: int) -> Tensor:
        kind = random.below(3)
        values = random.normal(*shape) if kind == 0 else random.ladder(spread, *shape)
        if kind == 2 and shape[-1] > 1:  # neighbours nearly cancel
            half = shape[-1] // 2
            values[..., half : 2 * half] = -values[..., :half] * (1 + 2.0**-6)
        return values / math.sqrt(shape[-1])

    plain = {
        "x": (draw(tokens, hidden) * 2.0 ** (random.below(5) - 1)).to(dtype),
        "w13": draw(experts, rows, hidden).to(dtype),
        "w2": draw(experts, hidden, inter).to(dtype),
        "weights": random.among((random.normal(tokens, top_k), random.ladder(3, tokens, top_k))).float(),
        "ids": torch.randint(-1, experts + 1, (tokens, top_k), generator=random.torch, dtype=torch.int32),
    }
    if random.below(2):
        kept = random.among((dtype, torch.float32))
        plain |= {"b13": random.normal(experts, rows).to(kept), "b2": random.normal(experts, hidden).to(kept)}
    options = {"activation": activation, "gate_layout": random.among(GATE_LAYOUTS),
               "apply_weight_on_input": bool(random.below(2))}  # fmt: skip
    stores = {name: random.among(STORES) for name in
              ("gate_up", "activation", "intermediate", "down", "weight_dtype", "weighted_x", "reduce")}  # fmt: skip
    contract = Contract(
        accumulate=random.among(("float32", "float32", "float32", "bfloat16")), **stores,
        slot=random.among(("dtype", "float32", "none")), truncates=bool(random.below(2)),
        sigmoid=random.among(("exp", "tanh")),
    )  # fmt: skip
    return ExpertsInputs(options, plain), contract


class Target:
    """A layer as a device of the contract may compute it."""

    def __init__(self, inputs: ExpertsInputs, contract: Contract, device: Device) -> None:
        self.inputs, self.contract, self.device = inputs, contract, device
        self.dtype = inputs.plain["x"].dtype

    def run(self) -> Tensor:
        plain, device, options = self.inputs.plain, self.device, self.inputs.options
        expert = expert_of_slot(plain["ids"], len(plain["w2"]), plain.get("expert_map"))
        here, on_input = expert.clamp(min=0), options["apply_weight_on_input"]
        weight = plain["weights"].double()[..., None]  # [T, k, 1]
        if self.contract.weight_dtype == "dtype":
            weight = device.store(weight, self.dtype)
        x, w13, w2 = (plain[name].double() for name in ("x", "w13", "w2"))
        x = x[:, None, None]  # [T, 1, 1, H]
        stored = self.contract.weighted_x == "dtype"
        early = on_input and (stored or bool(device.random.below(2)))
        if early:
            x = device.single(x * weight[..., None])
            x = device.store(x, self.dtype) if stored else x
        terms = x * w13[here]  # [T, k, 2I, H]
        a = device.sum(device.single(terms) if early and not stored else terms)
        if on_input and not early:
            a = device.single(a * weight)
        a = self._biased(a, "b13", here, self.contract.gate_up)
        h = self._active(a)
        if self.contract.intermediate == "dtype":
            h = device.store(h, self.dtype)
        terms = h[:, :, None] * w2[here]  # [T, k, H, I]
        narrow = self.contract.intermediate == "dtype"
        v = self._biased(device.sum(terms if narrow else device.single(terms)), "b2", here, self.contract.down)
        if not on_input:
            v = device.single(v * weight)
        if self.contract.slot == "dtype":
            v = device.store(v, self.dtype)
        v = v.masked_fill((expert < 0)[..., None], 0.0).transpose(1, 2)  # [T, H, k]
        if self.contract.reduce == "float32":
            return device.store(replace(device, accumulate=torch.float32).sum(v), self.dtype)
        total = torch.zeros_like(v[..., 0])
        for slot in range(v.shape[-1]):
            total = device.store(total + v[..., slot], self.dtype)
        return total

    def _biased(self, a: Tensor, name: str, here: Tensor, declared: str) -> Tensor:
        narrow = declared == "dtype"
        if narrow and self.device.random.below(2):
            a = self.device.store(a, self.dtype)
        if (bias := self.inputs.plain.get(name)) is not None:
            a = self.device.single(a + bias.double()[here])
        return self.device.store(a, self.dtype) if narrow else a

    def _active(self, a: Tensor) -> Tensor:
        """In float32 with an exponential good to 2^-22 and a division of 2 ulps; or each operation in x's dtype."""
        device, kind = self.device, self.inputs.options["activation"]
        gate, up = a, a
        if kind != "relu2":
            layout = self.inputs.options["gate_layout"]
            one, two = (a[..., ::2], a[..., 1::2]) if layout == "interleaved" else a.chunk(2, dim=-1)
            gate, up = (two, one) if layout == "up_first" else (one, two)
        narrow = self.contract.activation == "dtype"

        def kept(values: Tensor) -> Tensor:
            return device.store(values, self.dtype) if narrow else values

        if kind == "relu2":
            return kept(device.single(gate.clamp(min=0.0).square()))
        if kind == "gelu":
            inner = device.single(gate * device.single(torch.tensor(math.sqrt(0.5), dtype=torch.float64)))
            erf = device.spoiled(torch.erf(inner), 4)
            f = device.single(device.single(0.5 * gate) * device.single(1 + erf))
            return kept(device.single(kept(f) * up))
        if kind == "silu":
            return kept(device.single(kept(device.single(gate * self._sigmoid(gate))) * up))
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        z = kept(device.single(gate * torch.tensor(1.702).double()))
        f = kept(device.single(gate * kept(self._sigmoid(z))))
        return kept(device.single(f * kept(device.single(up + 1.0))))

    def _sigmoid(self, z: Tensor) -> Tensor:
        device = self.device
        if self.contract.sigmoid == "tanh":
            return device.single(0.5 * device.spoiled(torch.tanh(0.5 * z), 2) + 0.5)
        power = device.single(-z * torch.tensor(1.4426950408889634).float().double())
        exponential = device.spoiled(torch.exp2(power.clamp(max=129.0)), 4)
        exponential = exponential.masked_fill(exponential >= 2.0**128, torch.inf)
        return device.spoiled(1 / device.single(1 + exponential), 4)


def layers(random: Random, count: int) -> tuple[dict[str, float], int]:
    """The largest error over bound of `count` elements of y, by activation, and how many had a bound."""
    worst, claimed, done = dict.fromkeys(ACTIVATIONS, 0.0), 0, 0
    while done < count:
        inputs, contract = layer_of(random)
        expert = expert_of_slot(inputs.plain["ids"], len(inputs.plain["w2"]), None)
        numbers, dtype = evaluate(inputs, expert, contract), inputs.plain["x"].dtype
        accumulate = getattr(torch, contract.accumulate)
        device = Device(random, random.among(ORDERS), bool(random.below(2)), contract.truncates, accumulate)
        y = Target(inputs, contract, device).run()
        known = numbers.bound.isfinite() & (numbers.value.abs() + numbers.bound < torch.finfo(dtype).max)
        share = torch.where(known, (y - numbers.value).abs() / numbers.bound, 0.0)
        share = share.nan_to_num(torch.inf, torch.inf)  # a NaN where a number is claimed
        done, claimed = done + y.numel(), claimed + int(known.sum())
        activation = str(inputs.options["activation"])
        worst[activation] = max(worst[activation], float(share.max()))
    return worst, claimed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random, started = Random(options.seed), time.monotonic()
    dots = dot_products(random, options.count)
    print(f"{options.count} dot products: largest error / bound {dots:.3f}")
    worst, claimed = layers(random, options.count)
    print(f"{options.count} elements of layers, {claimed} with a bound, by activation: "
          + ", ".join(f"{name} {share:.3f}" for name, share in worst.items()))  # fmt: skip
    print(f"{time.monotonic() - started:.0f} s")
    return int(not max(dots, *worst.values()) <= 1)


if __name__ == "__main__":
    sys.exit(main())
