"""Candidates of the benchmark of experts that are one of our kernels, made to go one way."""

from __future__ import annotations

from functools import partial, update_wrapper

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.kernels.experts_nvfp4 import experts_nvfp4

_DECLARED = declares(
    contract=Contract(deterministic=True, accepts=PADDING_DIALECTS),
    capabilities=Capabilities(dtypes=("bfloat16", "float16"), out=True, alignment=1),
)
chosen = _DECLARED(update_wrapper(partial(experts_nvfp4), experts_nvfp4))
small = _DECLARED(update_wrapper(partial(experts_nvfp4, backend="small"), experts_nvfp4))
large = _DECLARED(update_wrapper(partial(experts_nvfp4, backend="large"), experts_nvfp4))
