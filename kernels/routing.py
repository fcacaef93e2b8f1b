"""Routers in Triton. Their contracts are the docstrings of `reference/routing.py`.

Up to 16 experts a row lies in one thread (routing_threads.py), beyond that in one warp (routing_lanes.py). The best
one of many rows has a kernel of its own (routing_top1.py).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

if __package__:
    from .routing_lanes import list_length, network, topk_by_lanes
    from .routing_threads import topk_by_threads
    from .routing_top1 import top1
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from routing_lanes import list_length, network, topk_by_lanes
    from routing_threads import topk_by_threads
    from routing_top1 import top1

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")
_INTERPRETED = triton.knobs.runtime.interpret


def topk_softmax(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token by softmax score (+ bias), and their weights, in one launch.

    The contract is that of `reference/routing.py::topk_softmax`. Beyond it: computes in float32, is deterministic, a
    row's bits depend on that row alone, and ties fall to the lowest id.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _topk(False, logits, top_k, renormalize, bias, scale, is_padding, padding, out)


def topk_sigmoid(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token by sigmoid score (+ bias), and their weights, in one launch.

    The contract is that of `reference/routing.py::topk_sigmoid`. Beyond it: computes in float32, is deterministic, a
    row's bits depend on that row alone, and ties fall to the lowest id.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _topk(True, logits, top_k, renormalize, bias, scale, is_padding, padding, out)


def _topk(
    sigmoid: bool,
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None,
    scale: float,
    is_padding: Tensor | None,
    padding: str,
    out: tuple[Tensor, Tensor] | None,
    nan_safe: bool = True,  # False leaves out what it costs that NaN and +inf are safe, for the benchmark that says so
) -> tuple[Tensor, Tensor]:
    shape, dtype, device = logits.shape, logits.dtype, logits.device
    if len(shape) != 2 or dtype not in DTYPES or not 1 <= shape[1] <= 1024:
        raise ValueError("logits must be [T, E] in float32, bfloat16 or float16 with 1 <= E <= 1024, "
                         f"not {list(shape)} {dtype}")
    tokens, experts = shape
    if not 1 <= top_k <= min(experts, 32):
        raise ValueError(f"top_k must be from 1 to min(E, 32) = {min(experts, 32)}, not {top_k}")
    if not 0.0 <= scale <= LARGEST[torch.float32]:
        raise ValueError(f"scale must be a finite float32 >= 0, not {scale}")
    if padding not in DIALECTS:
        raise ValueError(f"padding must be one of {', '.join(DIALECTS)}, not {padding!r}")
    _expect("bias", bias, (experts,), torch.float32, device)
    _expect("is_padding", is_padding, (tokens,), torch.bool, device)
    if out is None:
        weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)  # [T, k]
        ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)  # [T, k]
    else:
        weights, ids = out
        _expect("out[0]", weights, (tokens, top_k), torch.float32, device)
        _expect("out[1]", ids, (tokens, top_k), torch.int32, device)
        if not (weights.is_contiguous() and ids.is_contiguous()):
            raise ValueError("out must be contiguous; route into contiguous buffers and copy")
    if tokens == 0:
        return weights, ids

    flagged = 0 if is_padding is None or padding == "distinct" else 2 if padding == "garbage" else 1
    wide = bias is not None or dtype == torch.float32
    stride_t, stride_e = logits.stride()
    flags = is_padding if flagged else None
    flags_stride = flags.stride(0) if flags is not None else 0
    padding_id = -1 if padding == "minus_one" else experts if padding == "num_experts" else 0
    constants = _constants(sigmoid, bool(renormalize), flagged, nan_safe, dtype, device)
    packed = stride_e == 1 and (stride_t == experts or tokens == 1)
    if _is_top1(tokens, experts, top_k, wide or not packed, summed=not (sigmoid or renormalize)):
        block = _top1(tokens, experts)
        top1[(-(-tokens // block["ROWS"]),)](
            logits, flags, weights, ids,
            tokens, stride_t, stride_e, flags_stride, float(scale), padding_id,
            PACKED=packed, EXPERTS=experts,
            **constants, **block,
        )  # fmt: skip
    elif not wide and experts in (1, 2, 4, 8, 16) and top_k in KNOWN_K:
        block = _threads(tokens, experts)
        topk_by_threads[(-(-tokens // block["ROWS"]),)](
            logits, flags, weights, ids,
            tokens, stride_t, stride_e, flags_stride, float(scale), padding_id,
            PACKED=packed, EXPERTS=experts, TOP_K=top_k,
            **constants, **block,
        )  # fmt: skip
    else:
        block = _lanes(tokens, experts, top_k, wide, processors(logits.device))
        topk_by_lanes[(-(-tokens // block["ROWS"]),)](
            logits, bias, flags, weights, ids,
            tokens, experts, top_k, stride_t, stride_e, bias.stride(0) if bias is not None else 0, flags_stride,
            float(scale), padding_id,
            HAS_BIAS=bias is not None, WIDE=wide, **constants, **block,
        )  # fmt: skip
    return weights, ids


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        raise ValueError(f"{name} must be {list(shape)} {dtype} on {device}, "
                         f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


#: The k of the models that people serve (moe_fuzz/ops/routing/presets.py): a binary for each. At 4096 tokens of
#: 512 experts a k that is known saves 18 % (H200). Any other k shares a binary that is faster to compile.
KNOWN_K = (1, 2, 4, 6, 8, 10, 22)

#: Rows that are many enough for routing_top1.py. In the interpreter few are, so that it is run there at all.
_MANY = 8 if _INTERPRETED else 1024

#: Triton's arithmetic of powers and quotients takes the host longer than all else before a launch.
_kept = lru_cache(maxsize=1024)

# What follows lays rows over threads. All sums stay within a row, in an order that the config alone decides (E, k, the
# dtype, the bias), so the rest is free to choose, and a row's bits depend on that row alone.


def _is_top1(tokens: int, experts: int, top_k: int, other: bool, summed: bool) -> bool:
    """Whether routing_top1.py serves the call: where nothing is summed all kernels give a row the same bits, so even
    the number of tokens may choose. A warp there takes several rows, for half the instructions a row; few rows are
    sooner done by many warps."""
    return top_k == 1 and experts in (32, 64, 128, 256) and tokens >= _MANY and not other and not summed


@_kept
def _constants(
    sigmoid: bool, renormalize: bool, flagged: int, nan_safe: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    pdl = launches_early(device)
    return {"SIGMOID": sigmoid, "RENORMALIZE": renormalize, "FLAGGED": flagged, "NAN_SAFE": nan_safe,
            "LARGEST": LARGEST[dtype], "PDL": pdl, **({"launch_pdl": True} if pdl else {})}  # fmt: skip


@_kept
def _top1(tokens: int, experts: int, interpreted: bool = _INTERPRETED) -> dict[str, Any]:
    """How rows lie in `top1`. 4096 of them are 256 programs: all of those run at once, and few have to be started."""
    if interpreted:
        rows = interpreted_rows(tokens, experts)
        return {"ROWS": rows, "SPREAD": rows // 2}
    return {"ROWS": 16, "SPREAD": 8, "num_warps": experts // 32}  # two loads of a thread, 16 bytes each


@_kept
def _threads(tokens: int, experts: int) -> dict[str, Any]:
    """How rows lie in `topk_by_threads`. One warp a program: 4096 rows are 128 warps, for 132 multiprocessors."""
    chunk = min(experts, 8)  # 16 bytes
    return {"ROWS": interpreted_rows(tokens, experts) if _INTERPRETED else 32, "CHUNK": chunk,
            "HALVINGS": chunk.bit_length() - 1, "NETWORK": network(experts), "num_warps": 1}  # fmt: skip


@_kept
def _lanes(
    tokens: int, experts: int, top_k: int, wide: bool, processors: int, interpreted: bool = _INTERPRETED
) -> dict[str, Any]:
    """How rows lie in `topk_by_lanes`."""
    warps = 4
    if interpreted and ((experts + top_k) % 4 or experts > 384):
        # Each step costs the same whatever its size: all of a row is one, longer than a warp. One shape in four lies as
        # on a GPU, for lists are to be run as well, of every length: which shapes do must not be the experts' alone.
        lanes, each = max(64, triton.next_power_of_2(experts)), 1
        rows = interpreted_rows(tokens, lanes)
    else:
        lanes = min(32, triton.next_power_of_2(experts))
        # Sorting longer lists takes the compiler seconds, each time anew in fuzzing, so four warps share them. But they
        # meet twice for each expert taken: a row of 512 with k = 22 takes them 6,560 instructions, and one warp 1,656.
        longest = 12 if wide and not (top_k > 16 and top_k in KNOWN_K) else 16
        if experts > lanes * longest:
            lanes = 128
        else:
            warps = warps_for(-(-tokens * lanes // 32), processors)
        each = list_length(triton.cdiv(experts, lanes))
        rows = 32 * warps // lanes  # one element of a list a thread, so that no layout is the compiler's to choose
        if interpreted:
            rows = interpreted_rows(tokens, lanes * each)
    known = top_k in KNOWN_K
    return {"ROWS": rows, "LANES": lanes, "EACH": each, "FULL": experts == lanes * each, "SORTED": known,
            "NETWORK": network(each) if known else (), "TOP_K": top_k if known else 0, "num_warps": warps}  # fmt: skip


def warps_for(work: int, processors: int) -> int:
    """Warps of a program, where `work` warps have work to do: 4, or 16 where no multiprocessor gets more of it by that.

    A fourth as many programs have sooner started: 4096 rows of 64 experts take 8 % less time (H200). But in larger
    portions work spreads less evenly. Of 132 multiprocessors that share 2500 warps in fours, none has more than 20; in
    sixteens some have 32. And of more than 64 warps not all run at once: the fewer a program has, the sooner the next
    takes its place.
    """
    fine, coarse = (n * -(-work // (n * processors)) for n in (4, 16))  # the most that a multiprocessor gets
    return 16 if fine == coarse <= 64 else 4


def interpreted_rows(tokens: int, width: int) -> int:
    """In the interpreter a program costs the same whatever its block: there are at most 2."""
    return min(triton.next_power_of_2(triton.cdiv(tokens, 2)), (1 << 20) // width)


@cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels may start while the one before them still runs (programmatic dependent launch, Hopper on).

    That saves 0.15 us of a launch, and is safe: the first thing that a kernel here does is to wait until all that went
    before it in the stream is complete and visible, whether that kernel knows of dependents or not; so nothing is read
    or written any earlier. None of them says early that its own dependents may start: they start when it ends.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and not _INTERPRETED
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of anything else, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
