"""vLLM's experts with weights in NVFP4 on GPUs without FP4: `moe_wna16_marlin_gemm`, called as vLLM's own layers call
it (fused_marlin_moe.py). Worker side.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.execute import clock
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.adapter import surface_launch_error
from moe_fuzz.targets.marlin_layout import MarlinWeights, marlin_weights
from moe_fuzz.targets.schema import BoundCall, Fixed, Names, bind_operator
from moe_fuzz.targets.vllm_align import align

Experts = Callable[..., Tensor]
Given = tuple[Tensor, Tensor, Tensor]  # codes, scales and global scales of a projection
Prepare = Callable[[Given, Given, torch.dtype], tuple[MarlinWeights, MarlinWeights]]

#: float4_e2m1f of vLLM's scalar types: exponent and mantissa of 8 bits each, signed, a bias of 32 bits, finite alone.
_E2M1 = 2 | 1 << 8 | 1 << 16 | 1 << 49
#: From 0.20 to 0.33. g_idx, perm and is_k_full are gone since 0.31. What has no value here is of other formats.
_NAMES: Names = {
    **{name: name for name in ("a", "b_q_weight", "b_scales", "global_scale", "workspace", "sorted_token_ids",
                               "expert_ids", "topk_weights", "moe_block_size", "top_k", "mul_topk_weights", "size_m",
                               "size_n", "size_k")},
    "c_or_none": "c", "num_tokens_past_padded": "padded", "num_tokens_post_padded": "padded",
    "b_type_id": Fixed(_E2M1), "is_k_full": Fixed(True), "use_atomic_add": Fixed(False),
    "use_fp32_reduce": Fixed(True), "is_zp_float": Fixed(False), "thread_k": Fixed(-1), "thread_n": Fixed(-1),
    "blocks_per_sm": Fixed(-1), "is_ep": Fixed(False),
    **dict.fromkeys(("b_bias_or_none", "a_scales", "b_zeros_or_none", "g_idx_or_none", "perm_or_none"), Fixed(None)),
}  # fmt: skip
_REQUIRED = ("a", "c", "b_q_weight", "b_scales", "global_scale", "workspace", "sorted_token_ids", "expert_ids",
             "padded", "topk_weights", "moe_block_size", "size_m", "size_n", "size_k")  # fmt: skip

#: Sums are float32. A product without weights is multiplied by the global scale there and stored in the dtype of x. One
#: with weights is stored first, multiplied by weight * global scale, rounded to that dtype, and stored again: as many
#: roundings as are declared, but what is stored first has no global scale yet, and is 2^-119 of the number in bfloat16,
#: 2^-7 in float16. What that loses at the ends of a dtype no contract allows: docs/targets.md, causes M, N and O.
#: silu and its product with the up-projection are rounded each.
_CONTRACT = Contract(gate_up="dtype", activation="dtype", down="dtype", weight_dtype="dtype")
#: A tile is 64 or 128 rows by 128 or 64 columns of the weights, and takes whole ones. An expert has scales within
#: 16 powers of two, where the other recipes have 18.
_CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float16"), strided=False, int64_ids=False, max_experts=992, zero_tokens=False,
    min_multiple_h=128, min_multiple_i=64, activations=("silu", "relu2"), gate_layouts=("first",), biases=False,
    layouts=("linear",), recipes=("dense",), devices=("cuda",),
)  # fmt: skip
_SURVIVES = "no caller survives an access outside the tensors it passed"
_DEFECT = "NaN and Inf in float16, of NVFP4 through Marlin, were mended as a defect: vllm#33972"
_CLAUSES = {
    **dict.fromkeys(("finite:nan", "finite:infinite"), _DEFECT),
    "written": "its caller adds up every slot of every token",
    **dict.fromkeys(("crash", "fence", "canary"), _SURVIVES),
    "capture": "vLLM captures it with the model",
}
_UNPROMISED = {
    "bound": "tests/kernels/moe/test_moe.py compares to 4e-2",
    "finite @ fault:extreme_weights": "no router of vLLM's gives weights that large",
    "error @ T=0": "callers pad an idle rank to a token; a batch of none does not reach this operator",
    "finite:nonfinite-lost": "nvfp4_marlin_process_scales takes scales to be 0 or more; nothing is said of NaN and Inf",
    "* @ fault:num_experts_ids": "vLLM's own padding is -1",
    "* @ fault:sentinel_ids": "no router of vLLM writes another id than an expert's or -1",
}


def experts_nvfp4() -> Experts:
    """`_moe_C::moe_wna16_marlin_gemm`, twice, with vLLM's align before. Raises EnvironmentProblem.

    The weights are put into Marlin's order in each call, and in each replay of a graph: relations write other weights
    into the same tensors, and no version that torch counts tells of it.
    """
    return _experts(prepared)


def served() -> Experts:
    """The same as a server calls it, for measurements: weights are made ready when their tensors are first seen. Those
    must be written by torch alone, and not between a graph's capture and its replay. Raises EnvironmentProblem."""
    return _experts(Prepared())


def _experts(prepare: Prepare) -> Experts:
    _require_tensor_cores()
    library = extension.load(sources.VLLM)
    call = bind_operator(library.operator("moe_wna16_marlin_gemm"), _NAMES, _REQUIRED)
    layer = Layer(call, align())

    @declares(_CONTRACT, _CAPABILITIES, _CLAUSES, _UNPROMISED, library.origin(call.text))
    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, w13_scales: Tensor, w2_scales: Tensor,
        w13_alpha: Tensor, w2_alpha: Tensor, *, expert_map: Tensor | None = None, activation: str = "silu",
        apply_weight_on_input: bool = False, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        gate_up, down = prepare((w13, w13_scales, w13_alpha), (w2, w2_scales, w2_alpha), x.dtype)
        found = layer.run(x, gate_up, down, weights, ids, expert_map, activation, apply_weight_on_input, out)
        surface_launch_error(x)
        return found

    return experts


def prepared(gate_up: Given, down: Given, dtype: torch.dtype) -> tuple[MarlinWeights, MarlinWeights]:
    """Codes, scales and global scales of both projections in Marlin's order. ValueError where the format does not hold
    their scales; a graph's capture cannot ask."""
    made = marlin_weights(*gate_up, dtype), marlin_weights(*down, dtype)
    if gate_up[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return made  # a part of the graph: each replay makes them anew
    if bool(made[0].problem | made[1].problem):
        raise ValueError("Marlin's scales have 16 powers of two above 0 for an expert, no sign and no NaN")
    return made


class Prepared:
    """`prepared`, and its last result again while the same tensors are given that torch has not written since."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], tuple[MarlinWeights, MarlinWeights]] | None = None

    def __call__(self, gate_up: Given, down: Given, dtype: torch.dtype) -> tuple[MarlinWeights, MarlinWeights]:
        given = (*gate_up, *down)
        if self._last is not None:
            (references, versions, of_dtype), made = self._last
            if of_dtype == dtype and all(r() is t and v == t._version for r, v, t in zip(references, versions, given,
                                                                                        strict=True)):  # fmt: skip
                return made
        made = prepared(gate_up, down, dtype)
        if not (gate_up[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self._last = ([weakref.ref(t) for t in given], [t._version for t in given], dtype), made
        return made


class Layer:
    """The calls of a layer."""

    def __init__(self, call: BoundCall, plan: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self._call, self._plan = call, plan
        self._locks: dict[torch.device, Tensor] = {}
        self._loaded: set[tuple[torch.device, torch.dtype]] = set()

    def run(
        self, x: Tensor, gate_up: MarlinWeights, down: MarlinWeights, weights: Tensor, ids: Tensor,
        expert_map: Tensor | None, activation: str, on_input: bool, out: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (tokens, hidden), top_k = x.shape, ids.shape[1]
        experts, width, inter = len(gate_up.codes), gate_up.scales.shape[2], down.scales.shape[1] * 16
        slots = tokens * top_k
        block = next((m for m in (8, 16, 32, 48) if slots / experts / m < 0.9), 64)  # as vLLM chooses it
        plan = self._plan(ids, block, experts if expert_map is None else len(expert_map), expert_map)
        first = x.new_empty((slots, width))
        h = x.new_empty((slots, inter))
        y = x.new_empty((slots, hidden))
        self._multiply(x, gate_up, first, plan, weights, block, top_k, on_input)
        _activate(first, h, activation)
        if expert_map is not None:
            y.zero_()  # slots of other ranks: nothing writes them
        self._multiply(h, down, y, plan, weights, block, 1, not on_input)
        out = torch.empty_like(x) if out is None else out
        return torch.sum(y.view(tokens, top_k, hidden), dim=1, out=out)

    def _multiply(
        self, a: Tensor, by: MarlinWeights, c: Tensor, plan: tuple[Tensor, Tensor, Tensor], weights: Tensor,
        block: int, top_k: int, weighted: bool,
    ) -> None:  # fmt: skip
        if a.device not in self._locks:
            count = 4 * torch.cuda.get_device_properties(a.device).multi_processor_count
            self._locks[a.device] = torch.zeros(count, dtype=torch.int32, device=a.device)  # each call leaves zeros
        with self._loading(a):
            self._launch(a, by, c, plan, weights, block, top_k, weighted)

    def _loading(self, a: Tensor) -> contextlib.AbstractContextManager[None]:
        """Around the first launch for a dtype: no code in the library is for sm_90 (MARLIN_MOE_ARCHS, 8.0+PTX), and the
        driver compiles all kernels of a dtype from PTX there: 9 s for float16 and 19 s for bfloat16, on one core, and
        again in each process until one of them lives to see its result kept. What the launched kernel takes counts: a
        launch does not wait for it."""
        key = (a.device, a.dtype)
        if key in self._loaded:
            return contextlib.nullcontext()
        self._loaded.add(key)
        return clock.stopped("compile")

    def _launch(
        self, a: Tensor, by: MarlinWeights, c: Tensor, plan: tuple[Tensor, Tensor, Tensor], weights: Tensor,
        block: int, top_k: int, weighted: bool,
    ) -> None:  # fmt: skip
        self._call({
            "a": a, "c": c, "b_q_weight": by.codes, "b_scales": by.scales, "global_scale": by.globals,
            "workspace": self._locks[a.device], "sorted_token_ids": plan[0], "expert_ids": plan[1], "padded": plan[2],
            "topk_weights": weights, "moe_block_size": block, "top_k": top_k, "mul_topk_weights": weighted,
            "size_m": a.shape[0], "size_n": c.shape[1], "size_k": a.shape[1],
        })  # fmt: skip


def _require_tensor_cores() -> None:
    if not torch.cuda.is_available():
        raise EnvironmentProblem("vLLM's Marlin kernels need a GPU, and torch sees none here",
                                 "experts_nvfp4@builtin runs on any device")  # fmt: skip
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise EnvironmentProblem(f"with activations in 16 bits, vLLM's Marlin kernels need sm_80 or later; this GPU is "
                                 f"sm_{major}{minor}", "experts_nvfp4@builtin runs on any device")  # fmt: skip


def _activate(a: Tensor, h: Tensor, activation: str) -> None:
    """h of the first product, rounded as vLLM's silu_and_mul and relu2 round: they are in another of its libraries."""
    slots, inter = h.shape
    block = min(triton.next_power_of_2(inter), 1024)
    _activate_kernel[(slots, triton.cdiv(inter, block))](
        a, h, inter, a.shape[1], SILU=activation == "silu", BLOCK=block, num_warps=4
    )


@triton.jit(do_not_specialize=["inter", "width"])
def _activate_kernel(a_ptr, h_ptr, inter, width, SILU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = column < inter
    gate = tl.load(a_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        up = tl.load(a_ptr + row * width + inter + column, mask=inside, other=0.0).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(h_ptr.dtype.element_ty).to(tl.float32) * up
    else:
        gate = tl.where(gate < 0.0, 0.0, gate)  # keeps a NaN
        gate = gate * gate
    tl.store(h_ptr + row * inter + column, gate.to(h_ptr.dtype.element_ty), mask=inside)
