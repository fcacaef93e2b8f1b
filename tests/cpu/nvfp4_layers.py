"""Layers with weights in NVFP4 for the tests of `experts_nvfp4`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4
from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4 as reference
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import E2M1, E4M3, pack, swizzle
from tests.cpu import experts_layers


@dataclass
class Layer:
    """The arguments of a call."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    w13_scales: Tensor
    w2_scales: Tensor
    w13_alpha: Tensor
    w2_alpha: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str | None, **more: Any) -> Tensor:
        """By a backend of the kernel, or by the reference."""
        operands = (self.x, self.w13, self.w2, self.weights, self.ids, self.w13_scales, self.w2_scales, self.w13_alpha,
                    self.w2_alpha)  # fmt: skip
        options = {**self.options, **more}
        found = experts_nvfp4(*operands, **options, backend=backend) if backend else reference(*operands, **options)
        assert isinstance(found, Tensor)
        return found

    def swizzled(self, padding: int = 0x7F) -> Layer:
        """The same with swizzled scales, whose padding holds this byte."""
        made = []
        for scales in (self.w13_scales, self.w2_scales):
            rows, columns = scales.shape[1:]
            padded = torch.full((len(scales), rows + -rows % 128, columns + -columns % 4), padding, dtype=torch.uint8)
            padded[:, :rows, :columns] = scales
            made.append(torch.stack([swizzle(table) for table in padded]))
        return replace(self, w13_scales=made[0], w2_scales=made[1],
                       options={**self.options, "scale_layout": "swizzled"})  # fmt: skip


def encoded(wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes of values that are powers of two times -2..2 in each block, under scales that differ."""
    blocks = wanted.double().view(*wanted.shape[:2], -1, 16)
    amax = blocks.abs().amax(dim=3)
    shift = torch.randint(-1, 2, amax.shape, generator=generator)
    scale = torch.where(amax > 0, 2.0 ** (torch.log2(amax.clamp(min=2.0**-20)).floor() + shift - 1), 1.0)  # [E, R, B]
    table = torch.cat([E2M1, -E2M1]).double()
    code = (blocks[..., None] / scale[..., None, None] - table).abs().argmin(dim=4)
    byte = (E4M3.double() - scale[..., None]).abs().argmin(dim=3).to(torch.uint8)
    packed = torch.stack([pack(rows.flatten(1).to(torch.uint8)) for rows in code])
    made = torch.stack([values(c, s) for c, s in zip(packed, byte, strict=True)])
    assert torch.equal(made, wanted.double())
    return packed, byte


def layer_of(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, seed: int = 0, **options: Any) -> Layer:
    """A layer of these values, each expert with a global scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    alphas = [2.0 ** torch.randint(-3, 1, (len(w13),), generator=generator).float() for _ in range(2)]
    codes13, scales13 = encoded(w13.double() / alphas[0][:, None, None], generator)
    codes2, scales2 = encoded(w2.double() / alphas[1][:, None, None], generator)
    return Layer(x, codes13, codes2, weights, ids, scales13, scales2, *alphas, options)


def integers(*sizes: int, seed: int = 0, **options: Any) -> Layer:
    plain, more = experts_layers.integers(*sizes, seed=seed, **options)
    return layer_of(*plain, seed, **more)


def sources(*sizes: int, seed: int = 0) -> tuple[Layer, Tensor]:
    plain, expected = experts_layers.sources(*sizes, seed=seed)
    return layer_of(*plain, seed), expected


def randoms(seed: int = 0, activation: str = "silu", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def bytes_(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    rows = 32 if activation == "relu2" else 64
    return Layer(
        torch.randn(7, 48, generator=generator).to(dtype), bytes_(0, 256, 4, rows, 24), bytes_(0, 256, 4, 48, 16),
        torch.randn(7, 3, generator=generator).abs(),
        torch.randint(0, 4, (7, 3), dtype=torch.int32, generator=generator),
        bytes_(0x20, 0x40, 4, rows, 3), bytes_(0x20, 0x40, 4, 48, 2),  # 2^-3 to 1.875
        torch.rand(4, generator=generator) / 8, torch.rand(4, generator=generator) / 4,
        {"activation": activation, **options},
    )  # fmt: skip


def quantized(layer: Layer, x_global: float, h_global: float) -> Layer:
    globals_ = {"x_global": torch.tensor([x_global]), "h_global": torch.tensor([h_global])}
    return replace(layer, options={**layer.options, "activations": "nvfp4", **globals_})
