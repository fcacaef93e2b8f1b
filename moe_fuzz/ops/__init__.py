"""The ops under test. Each family is a folder: space.py (what cases may be, no torch) and inputs.py (tensors)."""

from __future__ import annotations

import difflib

from moe_fuzz.case import Case
from moe_fuzz.errors import UsageError
from moe_fuzz.ops.align.space import SPACES as _ALIGN
from moe_fuzz.ops.allreduce.space import SPACES as _ALLREDUCE
from moe_fuzz.ops.experts.fp4 import SPACES as _FP4
from moe_fuzz.ops.experts.space import SPACES as _EXPERTS
from moe_fuzz.ops.layer.space import SPACES as _LAYER
from moe_fuzz.ops.nvfp4.space import SPACES as _NVFP4
from moe_fuzz.ops.routing.grouped import SPACES as _GROUPED
from moe_fuzz.ops.routing.space import SPACES as _ROUTING
from moe_fuzz.ops.space import Space

_SPACES: dict[str, Space] = {
    space.op: space
    for space in (*_ROUTING, *_GROUPED, *_ALIGN, *_EXPERTS, *_FP4, *_LAYER, *_NVFP4, *_ALLREDUCE)
}
OPS: tuple[str, ...] = tuple(sorted(_SPACES))


def get_space(op: str) -> Space:
    """The space of an op; UsageError naming the nearest one if there is none of that name."""
    if op not in _SPACES:
        near = difflib.get_close_matches(op, OPS, n=1)
        raise UsageError(
            f"there is no op {op!r}", f"did you mean {near[0]!r}?" if near else f"the ops are: {', '.join(OPS)}"
        )
    return _SPACES[op]


def load_case(text: str) -> Case:
    """A case from its JSON or inline form, validated whole."""
    case = Case.loads(text)
    get_space(case.op).validate(case)
    return case
