"""Quantizing to NVFP4 in plain PyTorch, as the tests of serving libraries write it beside their kernels."""

from __future__ import annotations

import torch

from moe_fuzz.contract import Capabilities, Contract, declares


@declares(
    contract=Contract(deterministic=True, batch_invariant=True, scale_padding="zero"),
    capabilities=Capabilities(compiles=False, alignment=1, any_strides=True, activations=("silu",),
                              scale_dtypes=("float32", "bfloat16")),
)
def nvfp4_quantize(
    x: torch.Tensor, global_scale: torch.Tensor, layout: str = "linear", *, activation: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales by reciprocals, rounds by thresholds: what is as good as the contract's bytes, and seldom not the same.

    x [M, K], with activation="silu" [M, 2K], global_scale [1] float32 or bfloat16 -> codes [M, K/2] uint8, scales
    float8_e4m3fn.
    """
    if activation:
        gate, up = x.float().chunk(2, dim=1)
        x = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    rows, columns = x.shape
    blocks, scale = x.float().reshape(rows, columns // 16, 16), global_scale.float()
    amax = blocks.abs().amax(dim=-1)
    scales = (scale * (amax * (1.0 / 6.0))).clamp(max=448.0).to(torch.float8_e4m3fn)  # [M, K/16]
    per_unit = scales.float() * (1.0 / scale)
    inverse = torch.where(per_unit == 0, 0.0, 1.0 / per_unit)
    value = (blocks * inverse[..., None]).clamp(-6.0, 6.0)
    size = value.abs()
    code = sum(((size > limit) for limit in (0.25, 1.25, 2.5, 5.0)), start=torch.zeros_like(size, dtype=torch.int32))
    code = code + (size >= 0.75).int() + (size >= 1.75).int() + (size >= 3.5).int()
    code = (code + 8 * (value < 0)).to(torch.uint8).view(rows, columns)
    codes = code[:, ::2] | code[:, 1::2] << 4
    if layout == "linear":
        return codes, scales
    held = torch.zeros((-(-rows // 128) * 128, -(-columns // 64) * 4), dtype=torch.uint8, device=x.device)
    held[:rows, : columns // 16] = scales.view(torch.uint8)
    tiles = held.view(held.shape[0] // 128, 4, 32, held.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return codes, tiles.reshape(held.shape).view(torch.float8_e4m3fn)
