"""Candidates of the benchmark of experts that are one of our kernels, made to go one way."""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4, rule

_DECLARED = declares(
    contract=Contract(deterministic=True, accepts=PADDING_DIALECTS),
    capabilities=Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1),
    origin=f"moe_fuzz.kernels.experts_nvfp4, {rule()}",
)
chosen = _DECLARED(update_wrapper(partial(experts_nvfp4), experts_nvfp4))
small = _DECLARED(update_wrapper(partial(experts_nvfp4, backend="small"), experts_nvfp4))
large = _DECLARED(update_wrapper(partial(experts_nvfp4, backend="large"), experts_nvfp4))


def _filled(x: Tensor, w13: Tensor, w2: Tensor, *operands: Any, **options: Any) -> Tensor:
    """Ours, with what a grouped GEMM's caller launched before vllm#31837: for each product three fills, of the strides
    of a, b and c of every expert."""
    for w in (w13, w2):
        for stride in (2 * w.shape[2], 2 * w.shape[2], w.shape[1]):
            torch.full((len(w),), stride, dtype=torch.int64, device=w.device)
    return experts_nvfp4(x, w13, w2, *operands, **options)


three_fills = _DECLARED(update_wrapper(_filled, experts_nvfp4))
