"""The recipe `cancel`: sums that need 13 bits on their way and few at their end, so that whoever keeps them in 16 bits
shows, and whoever sums in float32 does not, in any order of any tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_fuzz.planted.experts_layer import Fp4Layer, Layer
from tests.cpu.experts_seen import case_of, fp4_case_of, judge, observe

pytestmark = pytest.mark.usefixtures("one_thread")

Sum = Callable[[list[Tensor], torch.dtype], Tensor]


def carried(parts: list[Tensor], kept: torch.dtype) -> Tensor:
    """An accumulator of this dtype."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = (total + part).to(kept).float()
    return total


def split(parts: list[Tensor], kept: torch.dtype) -> Tensor:
    """Split-K: two programs take every second tile each, and store what they have in this dtype."""
    return stored([parts[::2], parts[1::2]], kept)


def halved(parts: list[Tensor], kept: torch.dtype) -> Tensor:
    """Split-K: each takes half of the tiles, one after the other."""
    return stored([parts[: len(parts) // 2], parts[len(parts) // 2 :]], kept)


def stored(programs: list[list[Tensor]], kept: torch.dtype) -> Tensor:
    return torch.stack([torch.stack(part).sum(0).to(kept).float() for part in programs if part]).sum(0)


def tiled(base: type[Layer], tile: int, back: bool, add: Sum, kept: torch.dtype, which: str) -> type[Layer]:
    class Tiled(base):  # type: ignore[valid-type, misc]
        def first(self, x: Tensor, w: Tensor) -> Tensor:
            return self.summed(x, w, kept if which == "w13" else torch.float32)

        def second(self, h: Tensor, w: Tensor) -> Tensor:
            return self.summed(h, w, kept if which == "w2" else torch.float32)

        def summed(self, a: Tensor, w: Tensor, kept: torch.dtype) -> Tensor:
            parts = [self.product(a[:, at : at + tile], w[:, at : at + tile]) for at in range(0, a.shape[1], tile)]
            return add(parts[::-1] if back else parts, kept)

    return Tiled


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("add", [carried, split, halved])
@pytest.mark.parametrize("base", [Layer, Fp4Layer])
@pytest.mark.parametrize("which", ["w13", "w2"])
def test_sums_in_16_bits_are_found_in_any_tiles(which: str, base: type[Layer], add: Sum, dtype: str) -> None:
    made = case_of if base is Layer else fp4_case_of
    sizes = {"hidden": 512, "intermediate": 32} if which == "w13" else {"hidden": 32, "intermediate": 512}
    case = made(recipe="cancel", dtype=dtype, rows=6, experts=2, **sizes)
    for tile in (16, 32, 64, 128, 256):
        for back in (False, True):
            for kept in (torch.float32, getattr(torch, dtype)):
                layer = tiled(base, tile, back, add, kept, which)
                found = judge(observe(case, lambda inputs, layer=layer: layer.run(**inputs.plain, **options(inputs))))
                assert ("exact" in found) == (kept != torch.float32), (tile, back, kept, found)


def options(inputs):  # type: ignore[no-untyped-def]
    return {name: value for name, value in inputs.options.items() if name != "backend"}
