"""The process that owns the GPU: verifies candidates, captures their graphs, times them. Started by bench/drive.py.

A request is one line of JSON on stdin, {"point", "candidates", "rounds", "launches"}; answers are lines on stdout:
`ready` once, then for each point `doing` before anything that may not come back, `candidate` for each that is not timed
and why, and `times` at its end. What targets print goes to stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import torch

from moe_fuzz.bench import layers, timing
from moe_fuzz.bench.layer_child import Layers
from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.targets.bind import Target, bind
from moe_fuzz.verdict import PASS, REJECTED
from moe_fuzz.worker.gpus import driver_version

_COLD_COPIES = 64  # sets of inputs; where together they pass the L2 twice, a cold time is taken too
EMPTY, COPY = "(empty)", "(copy)"  # beside the candidates in a round
_UNFENCED = RunOptions(fence=FenceOptions(hard=(), readonly=(), own="off"))
Say = Callable[..., None]


class Bench:
    """Measures one point after another in this process."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._runner = Runner("cuda")
        self._bandwidth = 0.0

    def measure(self, point: Point, candidates: list[Candidate], rounds: int, launches: int) -> None:
        graphs: dict[str, Any] = {}
        cold: dict[str, Any] = {}
        facts: dict[str, dict[str, Any]] = {}
        shelf = _Shelf()  # the tensors that graphs read and write
        moved = 0
        for candidate in candidates:
            self._say("doing", label=candidate.label, what="verification")
            try:
                target = bind(candidate.target)
                problem, nan_safe = verify(self._runner, target, point)
            except MoeFuzzError as error:
                self._say("candidate", label=candidate.label, status="unavailable", reason=error.message)
                continue
            if problem:
                self._say("candidate", label=candidate.label, status=problem[0], reason=problem[1])
                _leave_if_lost()
                continue
            self._say("doing", label=candidate.label, what="capture")
            calls, moved = _calls(target, point, shelf)
            try:
                graphs[candidate.label] = _warm(calls[:1], launches)
                if len(calls) > 1:
                    cold[candidate.label] = _warm(calls, len(calls))
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is this candidate's, and a line of the table
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._say("candidate", label=candidate.label, status="error", reason=reason)
                _leave_if_lost()
                continue
            facts[candidate.label] = {"nan_safe": nan_safe, "origin": target.info.origin}
        if not graphs:
            self._say("times", times={}, cold={}, facts=facts, floor={}, bytes=moved)
            return
        self._say("doing", label="", what="timing")
        self._bandwidth = self._bandwidth or timing.copy_bandwidth("cuda")
        graphs[EMPTY] = _warm([timing.empty_launch("cuda")], launches)
        graphs[COPY] = _warm([timing.copy_launch(moved, "cuda")], launches)
        times = timing.interleaved(graphs, launches, rounds)
        floor = {"empty": times.pop(EMPTY), "copy": times.pop(COPY), "bytes_per_us": self._bandwidth}
        colds = timing.interleaved(cold, _COLD_COPIES, rounds) if cold else {}
        self._say("times", times=times, cold=colds, facts=facts, floor=floor, bytes=moved)


def verify(runner: Runner, target: Target, point: Point) -> tuple[tuple[str, str] | None, str]:
    """(status and reason why it must not be timed, or None; what its NaN rows came to).

    A candidate is held to its answers on ordinary rows. Where the point has NaN rows it runs once more with them, and
    the checks it then breaks are told, not held against it: not every project promises anything there.
    """
    verdict = runner.run(point.case(target.info, nan=False), target.info.name, _UNFENCED)
    if verdict.kind == REJECTED:
        return ("rejected", verdict.detail), ""
    if verdict.kind != PASS:
        said = verdict.violations[0].message if verdict.violations else verdict.detail
        return ("wrong", f"{verdict.kind}: {said}"[:200]), ""
    if not point.nan_every:
        return None, ""
    again = runner.run(point.case(target.info, nan=True), target.info.name, _UNFENCED)
    return None, "safe" if again.kind == PASS else ", ".join(v.check for v in again.violations) or again.kind


def _leave_if_lost() -> None:
    """After an illegal access nothing runs in this process any more; the parent starts another."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the device is lost: {error}") from error


def _copies(size: int) -> int:
    """Sets of inputs of so many bytes."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return _COLD_COPIES if size * _COLD_COPIES > 2 * l2 else 1


class _Shelf:
    """Tensors on the GPU that the candidates of a point share, until it is measured.

    How far a line of the L2 lies from a multiprocessor depends on its address, and a kernel of one row waits for few
    lines: with tensors of their own, one of two equal kernels is faster. No two candidates run at once.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}

    def input(self, copy: int, name: str, tensor: torch.Tensor, digest: bytes) -> torch.Tensor:
        """The one of that copy, name and content."""
        key = (copy, name, tensor.dtype, tensor.shape, tensor.stride(), digest)
        if key not in self._tensors:
            self._tensors[key] = tensor.to("cuda")
        return self._tensors[key]

    def output(self, copy: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        key = (copy, number, dtype, shape)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device="cuda")
        return self._tensors[key]


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _calls(target: Target, point: Point, shelf: _Shelf) -> tuple[list[timing.Call], int]:
    """The call on each set of tensors, and the bytes one call has to move."""
    inputs = FAMILIES[target.info.op].materialize(point.case(target.info, nan=True), 0, "cpu")
    digests = {name: _digest(tensor) for name, tensor in inputs.plain.items()}
    calls: list[timing.Call] = []
    moved = 0
    for copy in range(_copies(sum(tensor.numel() * tensor.element_size() for tensor in inputs.plain.values()))):
        tensors = {name: shelf.input(copy, name, tensor, digests[name]) for name, tensor in inputs.plain.items()}
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        arguments: dict[str, Any] = {**inputs.options, **tensors}
        results = enumerate(inputs.results.values())
        out = tuple(shelf.output(copy, number, tuple(shape), dtype) for number, (shape, dtype) in results)
        if target.info.capabilities.out:
            arguments["out"] = out if len(out) > 1 else out[0]
        moved += sum(tensor.numel() * tensor.element_size() for tensor in out)
        calls.append(partial(target, arguments))
    return calls, moved


def _warm(calls: list[timing.Call], launches: int) -> Any:
    """The graph of the calls, after they have run and been replayed once."""
    for call in calls:
        call()
    graph = timing.capture(calls, launches)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def environment() -> dict[str, Any]:
    """Machine and versions, as a result file states them."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("moe-fuzz", "triton", "numpy", "vllm", "sglang", "sglang-kernel", "sgl-kernel", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_properties(0)
    machine = {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "l2_bytes": gpu.L2_cache_size,
               "driver": driver_version(), "cores": len(os.sched_getaffinity(0))}  # fmt: skip
    return {"machine": machine, "versions": found}


def serve() -> int:
    """Answers requests until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(kind: str, **more: Any) -> None:
        channel.write(json.dumps({"kind": kind, **more}) + "\n")

    try:
        bench, of_layers = Bench(say), Layers(say)
        say("ready", **environment(), seconds=time.process_time())
    except MoeFuzzError as error:
        say("failed", reason=error.message, hint=error.hint)
        return error.exit_code
    for line in sys.stdin:
        _answer(bench, of_layers, json.loads(line))
    return 0


def _answer(bench: Bench, of_layers: Layers, request: Mapping[str, Any]) -> None:
    point = Point.from_json(request["point"])
    candidates = [Candidate(**candidate) for candidate in request["candidates"]]
    if point.op in layers.OPS:
        of_layers.measure(point, candidates, request["rounds"])
    else:
        bench.measure(point, candidates, request["rounds"], request["launches"])
