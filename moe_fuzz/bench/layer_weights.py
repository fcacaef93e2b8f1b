"""Weights of a real size for the benchmark of experts: in bfloat16, or in NVFP4 and the same decoded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.bench.layers import OP_NVFP4
from moe_fuzz.bench.points import Point
from moe_fuzz.reference.experts_nvfp4 import values

_WEIGHTS = ("w13", "w2", "w13_scales", "w2_scales", "w13_alpha", "w2_alpha")


def make_weights(point: Point, device: str = "cuda") -> dict[str, Any]:
    """w13, w2 and, where the model has them, b13, b2 and the map of a rank that is not the first. In NVFP4, scales and
    alphas, too, and as `decoded` the w13 and w2 in bfloat16 that they stand for, to the bit."""
    c = point.config
    experts, local, hidden, inter = (int(c[name]) for name in ("experts", "local", "hidden", "inter"))
    rows = inter if c["activation"] == "relu2" else 2 * inter
    generator = torch.Generator(device).manual_seed(1)

    def draw(scale: float, *shape: int) -> Tensor:
        made = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)
        return made.mul_(scale)

    def bytes_(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=torch.uint8, generator=generator)

    made: dict[str, Any] = {}
    if point.op != OP_NVFP4:
        made |= {"w13": draw(hidden**-0.5, local, rows, hidden), "w2": draw(inter**-0.5, local, hidden, inter)}
    else:
        for name, height, depth in (("w13", rows, hidden), ("w2", hidden, inter)):
            made[name] = bytes_(0, 256, local, height, depth // 2)
            made[f"{name}_scales"] = bytes_(0x30, 0x40, local, height, depth // 16)  # 1/2 to 15/8
            # codes have a mean square of 8.6, scales of 1.3; a power of two, so that bfloat16 holds the product
            alpha = 2.0 ** round(math.log2((11 * depth) ** -0.5))
            made[f"{name}_alpha"] = torch.full((local,), alpha, device=device)
        made["decoded"] = {name: _decoded(made, name) for name in ("w13", "w2")}
    if c["bias"]:
        made |= {"b13": draw(0.1, local, rows), "b2": draw(0.1, local, hidden)}
    if local < experts:
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
        expert_map[local : 2 * local] = torch.arange(local, dtype=torch.int32, device=device)
        made["expert_map"] = expert_map
    return made


def weight_bytes(arguments: dict[str, Any]) -> int:
    """Bytes of all experts' weights, with their scales."""
    tensors = [arguments[name] for name in _WEIGHTS if name in arguments]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _decoded(made: dict[str, Any], name: str) -> Tensor:
    codes, scales, alphas = made[name], made[f"{name}_scales"], made[f"{name}_alpha"]
    found = torch.empty((*codes.shape[:2], codes.shape[2] * 2), dtype=torch.bfloat16, device=codes.device)
    for expert, alpha in enumerate(alphas.tolist()):
        found[expert] = values(codes[expert], scales[expert]) * alpha
    return found
