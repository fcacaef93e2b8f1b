"""The names of targets. Free of torch: it says where an implementation is to be found, and never imports one.

A full name is `op@source`, where source is a provider (`builtin`, `torch`), one of several that a provider has
(`planted.nan_argmax`), `package.module:function`, or `/path/file.py:function`; a trailing `()` means "call it to get
the implementation".
Other packages add providers through the entry-point group `moe_fuzz.targets`, with a target's name as the entry's name:

    [project.entry-points."moe_fuzz.targets"]
    "topk_softmax@acme" = "acme.fuzzing:router"
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from moe_fuzz.errors import UsageError
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.planted.catalog import PLANTED

ENTRY_POINTS = "moe_fuzz.targets"
_OWN = {f"{op}@{module}": f"moe_fuzz.targets.{module}:{op}" for op in OPS for module in ("builtin", "torch")}
#: Of serving libraries, which need not be installed: factories, since what a release takes is known once it is loaded.
_LIBRARIES = {
    "align@sglang": "moe_fuzz.targets.sglang_align:align()",
    "align@vllm": "moe_fuzz.targets.vllm_align:align()",
    "allreduce_rmsnorm@builtin.one_shot": "moe_fuzz.targets.builtin_allreduce:one_shot",
    "allreduce_rmsnorm@builtin.split": "moe_fuzz.targets.builtin_allreduce:split",
    "allreduce_rmsnorm@builtin.two_shot": "moe_fuzz.targets.builtin_allreduce:two_shot",
    "allreduce_rmsnorm@flashinfer": "moe_fuzz.targets.library_allreduce:flashinfer()",
    "allreduce_rmsnorm@torch.nccl": "moe_fuzz.targets.library_allreduce:nccl()",
    "allreduce_rmsnorm@torch.one_shot": "moe_fuzz.targets.library_allreduce:symm_mem_one_shot()",
    "allreduce_rmsnorm@torch.two_shot": "moe_fuzz.targets.library_allreduce:symm_mem_two_shot()",
    "allreduce_rmsnorm@vllm": "moe_fuzz.targets.library_allreduce:vllm()",
    "experts_bf16@sglang": "moe_fuzz.targets.library_experts:sglang()",
    "experts_bf16@sglang.moe_sum": "moe_fuzz.targets.sglang_parts:moe_sum()",
    "experts_bf16@sglang.moe_sum_reduce": "moe_fuzz.targets.sglang_parts:moe_sum_reduce()",
    "experts_bf16@sglang.shuffle": "moe_fuzz.targets.sglang_parts:shuffle()",
    "experts_bf16@torch.grouped": "moe_fuzz.targets.torch_experts:grouped",
    "experts_bf16@vllm": "moe_fuzz.targets.library_experts:vllm()",
    "experts_bf16@vllm.moe_permute": "moe_fuzz.targets.vllm_parts:moe_permute()",
    "experts_bf16@vllm.moe_sum": "moe_fuzz.targets.vllm_parts:moe_sum()",
    "experts_nvfp4@builtin.large": "moe_fuzz.targets.builtin_nvfp4:large()",
    "experts_nvfp4@builtin.small": "moe_fuzz.targets.builtin_nvfp4:small()",
    "experts_nvfp4@vllm": "moe_fuzz.targets.vllm_marlin:experts_nvfp4()",
    "grouped_topk@flashinfer": "moe_fuzz.targets.flashinfer:grouped_topk()",
    "grouped_topk@flashinfer.one_group": "moe_fuzz.targets.flashinfer:grouped_topk_one_group()",
    "grouped_topk@sglang": "moe_fuzz.targets.sglang:grouped_topk()",
    "grouped_topk@sglang.triton": "moe_fuzz.targets.sglang_triton:grouped_topk()",
    "grouped_topk@vllm": "moe_fuzz.targets.vllm:grouped_topk()",
    "grouped_topk@vllm.fused_grouped_topk": "moe_fuzz.targets.vllm:grouped_topk_function()",
    "nvfp4_quantize@flashinfer": "moe_fuzz.targets.library_nvfp4:flashinfer()",
    "nvfp4_quantize@vllm": "moe_fuzz.targets.library_nvfp4:vllm()",
    "topk_sigmoid@sglang": "moe_fuzz.targets.sglang:topk_sigmoid()",
    "topk_sigmoid@sglang.triton": "moe_fuzz.targets.sglang_triton:topk_sigmoid()",
    "topk_sigmoid@vllm": "moe_fuzz.targets.vllm:topk_sigmoid()",
    "topk_sigmoid@vllm.fused_topk": "moe_fuzz.targets.vllm:topk_sigmoid_fused_topk()",
    "topk_sigmoid@vllm.fused_topk_bias": "moe_fuzz.targets.vllm:topk_sigmoid_fused_topk_bias()",
    "topk_softmax@sglang": "moe_fuzz.targets.sglang:topk_softmax()",
    "topk_softmax@sglang.triton": "moe_fuzz.targets.sglang_triton:topk_softmax()",
    "topk_softmax@vllm": "moe_fuzz.targets.vllm:topk_softmax()",
    "topk_softmax@vllm.fused_topk": "moe_fuzz.targets.vllm:topk_softmax_fused_topk()",
    "topk_softmax@vllm.fused_topk_bias": "moe_fuzz.targets.vllm:topk_softmax_fused_topk_bias()",
}
_LOCATION = re.compile(r"(?P<place>.+):(?P<attribute>[A-Za-z_][\w.]*)(?P<call>\(\))?")


@dataclass(frozen=True)
class KnownTarget:
    """A target that has a name of its own, and where its implementation lies: `module:attribute`."""

    name: str
    location: str

    @property
    def op(self) -> str:
        return self.name.partition("@")[0]

    @property
    def provider(self) -> str:
        return self.name.partition("@")[2].partition(".")[0]


def known(planted: bool = False) -> tuple[KnownTarget, ...]:
    """Our own targets and those of installed packages; the planted bugs only on request."""
    found = _OWN | _LIBRARIES
    found |= {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS) if "@" in entry.name}
    if planted:
        found |= {bug.target: f"moe_fuzz.planted.{bug.module}:{bug.function}" for bug in PLANTED}
    return tuple(KnownTarget(name, location) for name, location in sorted(found.items()))


def split(name: str) -> tuple[str, str]:
    """(op, source) of a full name; UsageError unless the op exists."""
    op, at, source = name.partition("@")
    if not at or not source:
        raise UsageError(f"{name!r} is not a target", "write op@provider, such as topk_softmax@builtin")
    return get_space(op).op, source


def locate(name: str) -> str:
    """`module:attribute` or `/path/file.py:attribute` (with `()` for a factory) of a full name."""
    _, source = split(name)
    if _LOCATION.fullmatch(source):
        return source
    found = {target.name: target.location for target in known(planted=True)}
    if name not in found:
        raise UsageError(f"there is no target {name!r}", _suggest(name, sorted(found)))
    return found[name]


def resolve(text: str, op: str | None = None) -> tuple[str, ...]:
    """The full names that a user's TARGET stands for: op@provider, op, provider, module:function, file.py:function."""
    targets = known()
    if "@" in text:
        name = "@".join(split(text))
        locate(name)
        return (_absolute(name),)
    match = _LOCATION.fullmatch(text)
    if match:
        ops = (op,) if op else OPS
        if len(ops) != 1:
            raise UsageError(f"which op does {text} implement?", f"add --op OP, one of {', '.join(OPS)}")
        return (_absolute(f"{get_space(ops[0]).op}@{text}"),)
    if text in OPS:
        return tuple(target.name for target in targets if target.op == text)
    provided = tuple(target.name for target in targets if target.provider == text and op in (None, target.op))
    if provided:
        return provided
    names = [*OPS, *(t.name for t in targets), *(t.provider for t in targets)]
    raise UsageError(f"there is no target {text!r}", _suggest(text, names))


def _absolute(name: str) -> str:
    """A file's path made absolute, and the file looked for: a finding must be replayable from any directory."""
    op, source = split(name)
    match = _LOCATION.fullmatch(source)
    if not match or not match["place"].endswith(".py"):
        return name
    path = Path(match["place"]).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "a target in a file is written path/to/file.py:function")
    return f"{op}@{path}:{match['attribute']}{match['call'] or ''}"


def _suggest(text: str, names: list[str]) -> str:
    near = difflib.get_close_matches(text, names, n=1)
    return (
        f"did you mean {near[0]!r}?"
        if near
        else "`moe-fuzz list targets` shows all; or give file.py:function with --op"
    )
