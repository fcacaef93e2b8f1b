"""A memory fault carries no address. Running the case again with one tensor fenced at a time names the culprit.

Does it still crash when only this is fenced? One worker is asked in a row, and names the tensor by its death: first
with soft guards alone (a fault that needs no hard one is a wild access and stays a crash), then tensor by tensor, then
whether it is a write into an input itself. What it says counts when fresh workers say so, of which the side and the
kind of access are asked. A fault that is seen sometimes, or after other cases, is searched with fresh workers alone, of
ever fewer tensors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from moe_fuzz.campaign.confirm import Key, in_order, matching, rerun
from moe_fuzz.campaign.interfaces import Cases, Pool
from moe_fuzz.case import Case
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, HANG, OOM, Verdict, Violation

MEMORY_FAULTS = ("SIGSEGV", "SIGBUS", "illegal-access")
OWN = "own"  # memory that the target allocated itself; the fence calls it own0, own1, … in the order of allocation
_ALL_OWN = tuple(f"{OWN}{number}" for number in range(257))


#: What a crash on a GPU is called, where no process died of a signal (fence/cuda_driver.py).
DEVICE_FAULTS = ("illegal-access", "device-assert", "misaligned-access", "illegal-instruction", "invalid-address-space",
                 "invalid-pc", "stack-error", "launch-failure")  # fmt: skip
_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}


def launch_site(pool: Pool, cases: Cases, target: str, options: RunOptions, key: Key) -> str:
    """Where the kernel was launched that broke the device or never came back: `routing.py:40 in topk`; empty where it
    cannot be told. A launch does not wait for its kernel, so the cases run once more in a worker whose launches do."""
    verdict = rerun(pool, cases, target, options, _BLOCKING)
    found = matching(verdict, key)
    return found.site if found is not None else ""


def is_device_fault(key: Key) -> bool:
    """Whether the stack of the process says nothing of where it happened."""
    return (key[0] == "crash" and key[1] in DEVICE_FAULTS) or key[0] == "hang"


def is_memory_fault(key: Key) -> bool:
    return key[0] == "crash" and key[1] in MEMORY_FAULTS


def is_about_memory(check: str, key: Key) -> bool:
    """Whether a sanitizer may know more: of the check that a finding is of, and what a worker told."""
    return check in ("fence", "canary") or is_memory_fault(key) or (key[0] == "crash" and key[1] in DEVICE_FAULTS)


def locate(
    pool: Pool, cases: Cases, target: str, options: RunOptions, verdict: Verdict, key: Key, tensors: Mapping[str, str],
    tries: int = 1, at_once: int = 1,
) -> Violation:  # fmt: skip
    """The memory fault of the last case as a violation of check `fence`; the crash itself if no fence explains it.

    Symptoms: `logits:right:read`, `ids:left:write`, `logits:inside:write` (an input was written to), `own:right:read`
    (memory of the target's own). `tries`: runs a question, for a fault that is seen sometimes. `at_once`: questions
    asked at the same time, each of a worker with the memory of one; with more of them there are fewer rounds.
    """
    crash = matching(verdict, key)
    assert crash is not None
    there = {name: role for name, role in tensors.items() if _is_there(cases[-1], name)}
    fenced = [*there, OWN]
    inputs = [name for name, role in there.items() if role == "input"]
    questions = _Questions(pool, cases, target, options, key, tries, at_once)
    if len(cases) == 1 and tries == 1:
        # To judge a case takes most of its time, and a fault mostly shows in the calls of the case itself. Of several
        # steps the first that is wrong ends a case, which takes its checks to know.
        bare = (replace(options, checks=()),) if len(cases[0].steps) == 1 else ()
        for one in dict.fromkeys((*bare, options)):
            found = _by_a_row(replace(questions, options=one), crash, fenced, inputs)
            if found is not None:
                return found
    # Several cases leave something behind in a process, and so may one: then each question has a worker of its own.
    if questions.crashes(questions.soft):
        return crash
    culprit = questions.first(fenced, questions.hard)
    if culprit is not None and (found := _past_an_edge(questions, crash, culprit)) is not None:
        return found
    written = questions.first(inputs, questions.readonly)
    return _located(crash, written, "inside", "write") if written is not None else crash


def _by_a_row(questions: _Questions, crash: Violation, fenced: Sequence[str], inputs: Sequence[str]
              ) -> Violation | None:  # fmt: skip
    """What one worker says, asked in a row, and fresh ones say too; None where it or they say nothing."""
    hard, readonly = [questions.hard([name]) for name in fenced], [questions.readonly([name]) for name in inputs]
    fences = [questions.soft, *hard, *readonly]
    at = questions.in_a_row(fences)
    if at is None:
        return None
    if at == 0:
        return crash
    if at <= len(fenced):
        return _past_an_edge(questions, crash, fenced[at - 1])
    name = inputs[at - 1 - len(fenced)]
    return _located(crash, name, "inside", "write") if questions.crashes(fences[at]) else None


def _past_an_edge(questions: _Questions, crash: Violation, name: str) -> Violation | None:
    """What fresh workers say of this tensor alone."""
    fence, at_once = questions.hard([name]), questions.at_once
    right, write, left = replace(fence, sides="right"), replace(fence, access="write"), replace(fence, sides="left")
    told = questions.ask([right, write, left] if at_once > 2 else [right, write])
    on_right, writes = told[:2]
    if on_right or (told[2] if at_once > 2 else questions.crashes(left)):
        return _located(crash, name, "right" if on_right else "left", "write" if writes else "read")
    return _located(crash, name, "both", "write" if writes else "read") if writes or questions.crashes(fence) else None


@dataclass(frozen=True)
class _Questions:
    """Does it still crash when only this is fenced?"""

    pool: Pool
    cases: Cases
    target: str
    options: RunOptions
    key: Key
    tries: int
    at_once: int

    @property
    def soft(self) -> FenceOptions:
        """Soft guards stay everywhere: without them an overrun lands in somebody's heap, and crashes when it likes."""
        return FenceOptions(hard=(), sides="both", access="any", readonly=(), own=self.options.fence.own)

    def hard(self, names: Sequence[str]) -> FenceOptions:
        every = tuple(part for name in names for part in (_ALL_OWN if name == OWN else (name,)))
        return replace(self.soft, hard=every)

    def readonly(self, names: Sequence[str]) -> FenceOptions:
        return replace(self.soft, readonly=tuple(names))

    def crashes(self, fence: FenceOptions) -> bool:
        """What a fresh worker says, or several where it is seen sometimes."""
        asked = (rerun(self.pool, self.cases, self.target, replace(self.options, fence=fence))
                 for _ in range(self.tries))  # fmt: skip
        return any(matching(verdict, self.key) is not None for verdict in asked)

    def ask(self, fences: Sequence[FenceOptions]) -> list[bool]:
        """All of them, as many at a time as there may be."""
        if self.at_once == 1 or len(fences) == 1:
            return [self.crashes(fence) for fence in fences]
        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(self.crashes, fences))

    def in_a_row(self, fences: Sequence[FenceOptions]) -> int | None:
        """The first of these under which the cases crash, asked of one worker, which survives the answers before it: to
        start one takes far longer than to run a case. None: under none, or it was lost otherwise."""
        with self.pool.fresh() as worker:
            for at, fence in enumerate(fences):
                verdict = in_order(worker, self.cases, self.target, replace(self.options, fence=fence))[-1]
                if matching(verdict, self.key) is not None:
                    return at
                if verdict.spent or verdict.kind in (CRASH, HANG, OOM):
                    return None
        return None

    def first(self, names: Sequence[str], fence: Callable[[Sequence[str]], FenceOptions]) -> str | None:
        """The first of these that crashes under its fence, None if none does. Where one does, so do several at once:
        each round of questions leaves one part in at_once + 1 of what may be the answer."""
        low, high = 0, len(names)  # the answer is one of [low, high]; past the last: none
        while low < high:
            parts = min(self.at_once, high - low) + 1
            ends = [low + (high - low + 1) * part // parts for part in range(1, parts)]  # of the parts but the last
            told = self.ask([fence(names[low:end]) for end in ends])
            hit = next((at for at, crashed in enumerate(told) if crashed), None)
            bounds = [low, *ends, high + 1]
            at = hit if hit is not None else len(ends)
            low, high = bounds[at], bounds[at + 1] - 1
        return names[low] if low < len(names) else None


def _is_there(case: Case, tensor: str) -> bool:
    """An optional tensor bears the name of the field of the config that asks for it."""
    return case.config.get(tensor, True) not in (False, "none")


def _located(crash: Violation, tensor: str, side: str, access: str) -> Violation:
    name = "memory that the target allocated itself" if tensor == OWN else tensor
    if side == "inside":
        message = f"writes into {name}, an input"
    else:
        edge = f"the {side} edge" if side != "both" else "an edge"
        message = f"{access}s past {edge} of {name}"
    return Violation("fence", f"{tensor}:{side}:{access}", message, tensor=tensor, got=crash.symptom, site=crash.site,
                     after=crash.after)  # fmt: skip
