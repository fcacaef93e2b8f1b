"""Runs cases in a worker process: materialize, fence, call, check, and say what came of it."""

from __future__ import annotations

import contextlib
import time
import traceback
from dataclasses import replace
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import CaseError, EnvironmentProblem
from moe_fuzz.execute import clock
from moe_fuzz.execute.call import TargetError
from moe_fuzz.execute.compiling import watch_compilers, watch_dynamo
from moe_fuzz.execute.exhibit import exhibit
from moe_fuzz.execute.interpreter import patch_language_once
from moe_fuzz.execute.routing import RoutingStep
from moe_fuzz.fence import open_arena
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target, bind
from moe_fuzz.verdict import CRASH, OOM, PASS, REJECTED, VIOLATION, Verdict, Violation


class Runner:
    """One per worker process. It keeps the targets it has loaded, and nothing else from case to case."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._targets: dict[str, Target] = {}
        self._seen: set[tuple[object, ...]] = set()  # configs of targets that compile unseen
        watch_compilers()
        if device == "cpu":
            patch_language_once()
        elif not torch.cuda.is_available():
            raise EnvironmentProblem("there is no CUDA device that torch can use",
                                     "--device cpu runs the same kernels in Triton's interpreter")
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
        if refusal:
            return Verdict(REJECTED, detail=refusal)
        with self._patience(case, bound):
            return self._steps(case, bound, options)

    def _steps(self, case: Case, bound: Target, options: RunOptions) -> Verdict:
        started = time.perf_counter()
        verdict = Verdict(PASS)
        for index in range(len(case.steps)):
            verdict = self._step(case, index, bound, options, verdict)
            if verdict.kind != PASS:
                break
        return replace(verdict, seconds=time.perf_counter() - started)

    def exhibit(self, case: Case, target: str) -> dict[str, Any]:
        """All that a script needs to make the calls of this case without moe-fuzz: see execute/exhibit.py."""
        get_space(case.op).validate(case)
        return exhibit(case, self._bind(target), self.device)

    def _bind(self, target: str) -> Target:
        if target not in self._targets:
            with clock.stopped("load"):
                self._targets[target] = bind(target)
        return self._targets[target]

    def _patience(self, case: Case, target: Target) -> contextlib.AbstractContextManager[None]:
        """For the first case of a config of a target that compiles unseen: its clock stands still throughout."""
        watch_dynamo()  # a target may load it in its first call
        key = (target.info.name, case.op, case.mode, *case.config.items())
        if not target.info.capabilities.jit or key in self._seen:
            return contextlib.nullcontext()
        self._seen.add(key)
        return clock.stopped("compile")

    def _step(self, case: Case, index: int, target: Target, options: RunOptions, before: Verdict) -> Verdict:
        with open_arena(self.device, options.fence, str(case.config["edge"])) as arena:
            step = RoutingStep(case, index, target, arena, options)
            violations: list[Violation] = []
            detail = ""
            try:
                violations = step.judge()
            except MemoryError as error:
                return Verdict(OOM, detail=str(error))
            except DeviceLost as lost:
                said = traceback.format_exception(lost.__context__) if lost.__context__ else []
                return Verdict(CRASH, (Violation("crash", lost.symptom, str(lost)),), detail="".join(said))
            except TargetError as error:
                if error.out_of_memory:
                    return Verdict(OOM, detail=error.text)
                judged = options.checks is None or "error" in options.checks
                violations, detail = [error.violation] if judged else [], error.text
            return Verdict(
                VIOLATION if violations else PASS,
                tuple(violations),
                fence_seconds=before.fence_seconds + arena.seconds,
                parity=step.parity and (index == 0 or before.parity),
                budget=max(before.budget, step.budget),
                detail=detail,
            )
