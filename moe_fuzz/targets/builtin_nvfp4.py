"""Our NVFP4 experts as targets: by whichever backend the sizes ask for, and each backend alone.

Apart from `builtin`, because what they can do is asked of the kernels: a change of those touches all that the module
that asks hands out.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares
from moe_fuzz.kernels import experts_nvfp4 as kernels
from moe_fuzz.ops.nvfp4.space import GLOBAL_SCALES

_PROMISES: dict[str, Any] = {
    "contract": Contract(deterministic=True, rounding="exact", nonfinite="reference", accepts=PADDING_DIALECTS),
    "clauses": {"*": "the contract in the docstring of moe_fuzz.reference.experts_nvfp4"},
}
_CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float16"), out=True, alignment=1, any_strides=True, global_scales=GLOBAL_SCALES,
    nan_scales=True, signed_scales=True, nan_biases=True, backends=kernels.BACKENDS, one_host_path=True,
)  # fmt: skip
experts_nvfp4 = declares(
    **_PROMISES,
    capabilities=replace(_CAPABILITIES, activation_formats=kernels.formats(), devices=kernels.devices()),
    origin=f"{kernels.__name__}, {kernels.rule()}",
)(kernels.experts_nvfp4)


def _forced(backend: str, capabilities: Capabilities) -> Any:
    """The factory of a target that is one backend of `experts_nvfp4`, whatever the sizes."""

    def factory() -> Any:
        @declares(**_PROMISES, capabilities=replace(capabilities, backends=()))
        @functools.wraps(kernels.experts_nvfp4)
        def forced(*arguments: Any, **options: Any) -> Any:
            return kernels.experts_nvfp4(*arguments, **options, backend=backend)

        return forced

    return factory


small = _forced("small", _CAPABILITIES)
large = _forced("large", replace(_CAPABILITIES, activation_formats=("as_given",)))
