"""Times the experts of a layer at one point: weights of a real size, answers verified, graphs interleaved. CUDA only.

Several calls with different tokens and ids make one graph, so that the weights come from memory, as in a model, where
the other layers' have passed through the L2 in between.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.bench import timing
from moe_fuzz.bench.layer_weights import make_weights, weight_bytes
from moe_fuzz.bench.layers import OP_NVFP4, bound_as
from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.reference.experts_bf16 import experts_bf16
from moe_fuzz.reference.experts_nvfp4 import experts_nvfp4
from moe_fuzz.targets.bind import Target, bind_at

_SAMPLE = 48  # tokens whose outputs are held against the reference
#: ‖out - reference‖ / ‖reference‖ over the sample. Each store in bfloat16 adds about 2^-9.5; a wrong row of 48 is 0.14.
_TOLERANCE = 2.0**-6


class Layers:
    """Measures one point after another; the weights of a model are made once."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._weights: tuple[tuple[str, str], dict[str, Tensor]] = ("", ""), {}
        self._ceilings: tuple[float, float] | None = None  # bytes and operations a microsecond

    def measure(self, point: Point, candidates: list[Candidate], rounds: int) -> None:
        self._say("doing", label="", what="weights")
        if self._ceilings is None:
            self._ceilings = timing.copy_bandwidth("cuda"), timing.product_rate("cuda")
        if self._weights[0] != (point.op, point.name):
            self._weights = ("", ""), {}  # two models' are never there together
            self._weights = (point.op, point.name), make_weights(point)
        sets = make_sets(point, self._weights[1])
        moved, worked = cost(point, sets)
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        eager: dict[str, timing.Call] = {}
        facts: dict[str, dict[str, Any]] = {}
        for candidate in candidates:
            self._say("doing", label=candidate.label, what="verification")
            try:
                target = bind_at(bound_as(candidate, point.op), candidate.label, candidate.target)
                if refusal := refuses(target, point):
                    self._left_out(candidate, "rejected", refusal)
                    continue
                error = verify(target, sets[0])
            except MoeFuzzError as problem:
                self._left_out(candidate, "unavailable", problem.message)
                continue
            except Exception as problem:  # noqa: BLE001 -- whatever it is, it is this candidate's: a line of the table
                self._left_out(candidate, "error", f"{type(problem).__name__}: {problem}")
                continue
            if not error <= _TOLERANCE:
                self._left_out(candidate, "wrong", f"relative error {error:.2e} on {_SAMPLE} tokens or fewer")
                continue
            facts[candidate.label] = {
                "error": error, "origin": target.info.origin, "workspace_bytes": workspace(_call(target, sets[0])),
                "weight_bytes": weight_bytes(_given(target, sets[0])),
            }  # fmt: skip
            calls = [_call(target, arguments) for arguments in sets]
            if not target.info.contract.graph:
                eager[candidate.label] = calls[0]
                facts[candidate.label]["eager"] = True
                continue
            self._say("doing", label=candidate.label, what="capture")
            try:
                graphs[candidate.label] = _warm(calls)
                facts[candidate.label]["launches"] = count_launches(calls[0])
            except Exception as problem:  # noqa: BLE001 -- likewise
                self._left_out(candidate, "error", f"capture: {type(problem).__name__}: {problem}")
                facts.pop(candidate.label)
        self._say("doing", label="", what="timing")
        times = timing.interleaved(graphs, len(sets), rounds) if graphs else {}
        for label, call in eager.items():
            times[label] = timing.eager(call, rounds)
        bandwidth, rate = self._ceilings
        floor = {"bytes_per_us": bandwidth, "flops_per_us": rate, "flops": worked,
                 "us": max(moved / bandwidth, worked / rate)}  # fmt: skip
        self._say("times", times=times, cold={}, facts=facts, floor=floor, bytes=round(moved))

    def _left_out(self, candidate: Candidate, status: str, reason: str) -> None:
        self._say("candidate", label=candidate.label, status=status, reason=reason.splitlines()[0][:200])
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # nothing runs in this process any more; the parent starts another
            raise SystemExit(f"the device is lost: {error}") from error


def make_sets(point: Point, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The arguments of several calls. Tokens choose experts evenly on average, as load balancing wants them to."""
    c, device = point.config, weights["w13"].device
    generator = torch.Generator(device).manual_seed(point.tokens)
    sets = []
    for _ in range(8 if point.tokens <= 64 else 2):
        logits = torch.randn(point.tokens, int(c["experts"]), device=device, generator=generator)
        chosen, ids = logits.softmax(dim=1).topk(int(c["top_k"]))
        x = torch.randn(point.tokens, int(c["hidden"]), device=device, generator=generator).bfloat16()
        sets.append({
            **weights, "x": x, "weights": chosen / chosen.sum(dim=1, keepdim=True), "ids": ids.int(),
            "activation": c["activation"], "gate_layout": c["gate_layout"], "out": torch.empty_like(x),
        })  # fmt: skip
    return sets


def cost(point: Point, sets: list[dict[str, Any]]) -> tuple[float, float]:
    """Bytes that a call has to move, and operations that it has to do, on average over the sets.

    The weights of every expert that has a token, once, and x and y once. What is written and read between the two
    products is an implementation's own affair.
    """
    c, moved, worked = point.config, 0.0, 0
    of_expert = (2 if c["activation"] == "relu2" else 3) * int(c["hidden"]) * int(c["inter"])
    each = 0.5 + 1 / 16 if point.op == OP_NVFP4 else 2.0  # bytes of a weight, with its share of a scale
    for arguments in sets:
        experts = arguments["ids"].long()
        if "expert_map" in arguments:
            experts = arguments["expert_map"][experts]
        experts = experts[experts >= 0]
        moved += each * of_expert * experts.unique().numel() + 2 * 2 * arguments["x"].numel()
        worked += 2 * of_expert * experts.numel()
    return moved / len(sets), worked / len(sets)


def refuses(target: Target, point: Point) -> str:
    """What of the point is outside the target's declared capabilities; empty where nothing is."""
    c, can = point.config, target.info.capabilities
    if int(c["local"]) < int(c["experts"]) and not can.expert_map:
        return "it takes no expert_map"
    if c["activation"] not in can.activations or c["gate_layout"] not in can.gate_layouts:
        return f"it has no {c['activation']} with the gate {c['gate_layout']}"
    if int(c["hidden"]) % can.min_multiple_h or int(c["inter"]) % can.min_multiple_i:
        return f"hidden must be a multiple of {can.min_multiple_h}, inter of {can.min_multiple_i}"
    return "it takes no biases" if c["bias"] and not can.biases else ""


def verify(target: Target, arguments: dict[str, Any]) -> float:
    """‖out - reference‖ / ‖reference‖ over a sample of the tokens; infinite where anything of `out` is not finite."""
    tokens = len(arguments["x"])
    arguments["out"].fill_(math.nan)
    found = _call(target, arguments)()
    if found.shape != arguments["x"].shape or not bool(found.isfinite().all()):
        return math.inf
    rows = torch.linspace(0, tokens - 1, min(tokens, _SAMPLE), device=found.device).long()
    given = {**_given(target, arguments), "out": None}
    sample = {**given, **{name: arguments[name][rows] for name in ("x", "weights", "ids")}}
    reference = experts_nvfp4 if target.info.op == OP_NVFP4 else experts_bf16
    expected = reference(**sample).double()
    difference, size = (found[rows].double() - expected).norm(), expected.norm()
    return float(difference / size) if size > 0 else float(difference)


def _call(target: Target, arguments: dict[str, Any]) -> timing.Call:
    given = _given(target, arguments)
    return partial(target, given if target.info.capabilities.out else {k: v for k, v in given.items() if k != "out"})


def _given(target: Target, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the op that the target is bound as: NVFP4 weights, or the same decoded."""
    if "decoded" not in arguments:
        return arguments
    rest = {name: value for name, value in arguments.items() if name != "decoded"}
    if target.info.op == OP_NVFP4:
        return rest
    packed = ("w13_scales", "w2_scales", "w13_alpha", "w2_alpha")
    return {name: value for name, value in rest.items() if name not in packed} | arguments["decoded"]


def workspace(call: timing.Call) -> int:
    """Bytes that a call allocates at once; 0 on a machine without a GPU, where nobody counts them."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _warm(calls: list[timing.Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    graph = timing.capture(calls, len(calls))
    graph.replay()
    torch.cuda.synchronize()
    return graph


def count_launches(call: timing.Call) -> int:
    """The nodes of the call's graph: kernels, copies and fills. 0 where this torch does not hand a graph out."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    nodes = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes))
    return int(nodes.value) if status == 0 else 0
