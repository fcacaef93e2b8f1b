"""The families of ops that can be run; importing this registers all of their checks."""

from __future__ import annotations

from collections.abc import Mapping

from moe_fuzz.checks.align.family import FAMILY as ALIGN
from moe_fuzz.checks.allreduce.family import FAMILY as ALLREDUCE
from moe_fuzz.checks.experts.family import FAMILY as EXPERTS
from moe_fuzz.checks.family import Family
from moe_fuzz.checks.layer.family import FAMILY as LAYER
from moe_fuzz.checks.nvfp4.family import FAMILY as NVFP4
from moe_fuzz.checks.routing.family import FAMILY as ROUTING
from moe_fuzz.ops import OPS, get_space

_BY_NAME = {family.name: family for family in (ROUTING, ALIGN, EXPERTS, LAYER, NVFP4, ALLREDUCE)}

#: op -> its family
FAMILIES: Mapping[str, Family] = {op: _BY_NAME[get_space(op).family] for op in OPS}
