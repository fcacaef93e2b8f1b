"""Runs cases in a worker process: materialize, fence, call, check, and say what came of it."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError, EnvironmentProblem
from moe_fuzz.execute import clock, meeting, trail
from moe_fuzz.execute.call import CaptureFailed, TargetError, site_of
from moe_fuzz.execute.compiling import watch_compilers, watch_dynamo
from moe_fuzz.execute.eager import EagerSteps
from moe_fuzz.execute.exhibit import exhibit
from moe_fuzz.execute.graph import GraphSteps
from moe_fuzz.execute.heap import keep_freed_memory
from moe_fuzz.execute.interpreter import hasten, tell_of_programs
from moe_fuzz.execute.interpreter_language import complete
from moe_fuzz.execute.interpreter_nan import pick
from moe_fuzz.execute.interpreter_values import correct
from moe_fuzz.execute.ranks import RankSteps
from moe_fuzz.execute.steps import Steps
from moe_fuzz.execute.tape import answer_who_asks
from moe_fuzz.fence import allocator, cuda_driver
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target, bind
from moe_fuzz.verdict import CRASH, OOM, PASS, REJECTED, UNINTERPRETED, VIOLATION, Verdict, Violation

ALLOCATOR, MEMORY = "MOE_FUZZ_ALLOCATOR", "MOE_FUZZ_GPU_MEMORY"  # variables, see worker/protocol.py


class Runner:
    """One per worker process. It keeps the targets it has loaded, and nothing else from case to case."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._targets: dict[str, Target] = {}
        self._seen: set[tuple[object, ...]] = set()  # configs of targets that compile unseen
        watch_compilers()
        if device == "cpu":
            hasten()
            correct()
            pick()
            complete()
            tell_of_programs()
            answer_who_asks()
        else:
            _start_cuda()
        keep_freed_memory()
        torch.set_num_threads(1)  # a worker is one core's work; the pool decides how many there are

    def describe(self, target: str) -> TargetInfo:
        """What the target promises and can take; loads it."""
        return self._bind(target).info

    def run(self, case: Case, target: str, options: RunOptions) -> Verdict:
        """One case from tensors to verdict. What the target does wrong is in the verdict, never raised.

        After a crash on CUDA (an illegal access, a device assertion) this process can run nothing more.
        """
        bound = self._bind(target)
        space = get_space(case.op)
        if bound.info.op != case.op:
            raise CaseError("op", f"{target} implements {bound.info.op}, not {case.op}")
        refusal = space.refusal(case, bound.info)
        if self.device not in bound.info.capabilities.devices:
            refusal = f"{target} does not run on {self.device}"
        if self.device == "cuda" and case.mode != "eager" and options.fence.own == "all":
            refusal = "torch captures no graph while another allocator is in its place; use --fence torch"
        if case.processes > 1 and not (meeting.present() and meeting.size() == case.processes):
            refusal = f"this process is not one of {case.processes} that run the case together"
        if refusal:
            return Verdict(REJECTED, detail=refusal)
        with self._patience(case, bound):
            return self._steps(case, bound, options)

    def _steps(self, case: Case, bound: Target, options: RunOptions) -> Verdict:
        started, stood = time.perf_counter(), clock.stood()
        trail.clear()
        kind = RankSteps if case.processes > 1 else EagerSteps if case.mode == "eager" else GraphSteps
        steps = kind(case, bound, options, self.device)
        with steps.staged():
            verdict = _verdict(steps)
        # What a call that failed has left between the ranks is no burden for the next case.
        spent = verdict.spent or (case.processes > 1 and verdict.bad)
        seconds, compiled = time.perf_counter() - started, clock.stood() - stood
        return replace(verdict, seconds=seconds, compile_seconds=compiled, spent=spent)

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        """All that a script needs to make the calls of this case without moe-fuzz: see execute/exhibit.py."""
        get_space(case.op).validate(case)
        return exhibit(case, self._bind(target), self.device)

    def _bind(self, target: str) -> Target:
        if target not in self._targets:
            with clock.stopped("load"):
                bound = bind(target)
                self._targets[target] = replace(bound, info=_here(bound.info, self.device))
        return self._targets[target]

    def _patience(self, case: Case, target: Target) -> contextlib.AbstractContextManager[None]:
        """For the first case of a config of a target that compiles unseen: its clock stands still throughout."""
        watch_dynamo()  # a target may load it in its first call
        key = (target.info.name, case.op, case.mode, *case.config.items())
        if not target.info.capabilities.jit or key in self._seen:
            return contextlib.nullcontext()
        self._seen.add(key)
        return clock.stopped("compile")


def _here(info: TargetInfo, device: str) -> TargetInfo:
    """What the target can take on this device: of ranks that run at the same time, or in processes of their own."""
    can, narrowed = info.capabilities, ""
    if device == "cpu":  # programs of one launch run one after the other there
        launches = tuple(name for name in can.launches if name != "single") or can.launches[:1]
        # Interpreted kernels run phase by phase, so that a burst shows little, and ranks cost time.
        burst, world = (1, 4) if "single" in can.launches and "cpu" not in can.processes else (8, 8)
        if info.op == "allreduce_rmsnorm" and world < can.max_world:
            narrowed = f"interpreted, phase by phase: at most {world} ranks, and a burst of one other call"
        can = replace(can, launches=launches, max_burst=min(burst, can.max_burst), max_world=min(world, can.max_world))
    if device not in can.processes:
        can = replace(can, max_processes=1)
    return replace(info, capabilities=can, narrowed=narrowed)


def _verdict(steps: Steps) -> Verdict:
    """Runs the steps, and says what came of them. What they found before something ended them is told too."""
    kind, detail, spent = PASS, "", False
    first: tuple[Violation, ...] = ()
    try:
        steps.run()
    except MemoryError as error:
        kind, detail = OOM, str(error)
    except DeviceLost as lost:
        starved = allocator.installed()
        if starved is not None and starved.failed is not None:  # the kernel was given a null pointer
            kind, detail = OOM, str(starved.failed)
        else:
            said = traceback.format_exception(lost.__context__) if lost.__context__ else []
            first = (Violation("crash", lost.symptom, str(lost), site=_launch(lost), after=trail.told()),)
            kind, detail = CRASH, "".join(said)
    except TargetError as error:  # all others are violations already
        kind, detail = OOM, error.text
        if error.uninterpreted:
            kind, detail = REJECTED, f"Triton's interpreter has not {error.uninterpreted}: it runs on a GPU alone"
            steps.stats[f"{UNINTERPRETED}/{error.uninterpreted}"] += 1
    except CaptureFailed as failed:
        kind, detail, spent = PASS, failed.error.text, True
        if failed.error.out_of_memory:  # no word on whether it can be captured
            kind = OOM
        elif steps.target.info.contract.graph:
            steps.add("capture", _cannot_be_captured(failed.error.violation))
        else:
            kind = REJECTED
    violations = (*first, *steps.violations)
    return Verdict(
        VIOLATION if kind == PASS and violations else kind,
        violations,
        fence_seconds=steps.fence_seconds,
        parity=steps.parity and kind == PASS and not spent and not violations,
        budget=steps.budget,
        detail=detail or steps.detail,
        stats=dict(steps.stats),
        spent=spent,
    )


def _cannot_be_captured(raised: Violation) -> Violation:
    message = f"cannot be captured into a CUDA graph: {raised.got}"
    return replace(raised, check="capture", message=message, expected="a graph")


def _start_cuda() -> None:
    """Starts CUDA in this process as its environment says: the GPU, the allocator, the memory."""
    if os.environ.get(ALLOCATOR) == "all":
        allocator.install()
    if not torch.cuda.is_available():
        raise EnvironmentProblem("there is no CUDA device that torch can use",
                                 "--device cpu runs the same kernels in Triton's interpreter")  # fmt: skip
    torch.cuda.init()
    if meeting.present():
        torch.cuda.set_device(meeting.rank())
    torch.cuda.current_stream().synchronize()  # the context exists from here on, and costs no case its seconds
    if budget := int(os.environ.get(MEMORY, "0")):
        from moe_fuzz.fence.cuda_placed import POOL  # it has kernels of Triton's, which a process on a CPU interprets

        cuda_driver.limit(budget)
        POOL.max_bytes = min(POOL.max_bytes, budget // 4)
        if allocator.installed() is None:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))


def _launch(lost: DeviceLost) -> str:
    """Where the kernel was launched that broke the context. Known only where every launch waits for its end."""
    if os.environ.get("CUDA_LAUNCH_BLOCKING") != "1" or lost.__context__ is None:
        return ""
    return site_of(lost.__context__)
