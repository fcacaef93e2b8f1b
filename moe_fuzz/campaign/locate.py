"""A memory fault carries no address. Running the case again with one tensor fenced at a time names the culprit.

Each question goes to a fresh worker: does it still crash when only this is fenced? First with soft guards alone (a
fault that needs no hard one is a wild access and stays a crash), then tensor by tensor, then the side, then the kind of
access, and last whether it is a write into an input itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from moe_fuzz.campaign.confirm import Key, matching, rerun
from moe_fuzz.campaign.interfaces import Cases, Pool
from moe_fuzz.case import Case
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import Verdict, Violation

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
    asked at the same time, each of a worker with the memory of one: those that a serial search would ask next.
    """
    crash = matching(verdict, key)
    assert crash is not None

    def crashes(fence: FenceOptions) -> bool:
        with_fence = replace(options, fence=fence)
        return any(matching(rerun(pool, cases, target, with_fence), key) is not None for _ in range(tries))

    def answers(fences: Iterable[FenceOptions]) -> Iterator[bool]:
        """In order; nobody is asked behind the answer that ended the search, but for those that were beside it."""
        waiting = list(fences)
        while waiting:
            some, waiting = waiting[:at_once], waiting[at_once:]
            if len(some) == 1:
                yield crashes(some[0])
                continue
            with ThreadPoolExecutor(len(some)) as threads:
                yield from list(threads.map(crashes, some))

    def first(fences: Sequence[FenceOptions]) -> int | None:
        return next((at for at, answer in enumerate(answers(fences)) if answer), None)

    # Soft guards stay everywhere: without them an overrun lands in somebody's heap, and crashes when it likes.
    soft = FenceOptions(hard=(), sides="both", access="any", readonly=(), own=options.fence.own)
    there = {name: role for name, role in tensors.items() if _is_there(cases[-1], name)}
    fenced = {name: replace(soft, hard=(name,)) for name in there} | {OWN: replace(soft, hard=_ALL_OWN)}
    culprit = first([soft, *fenced.values()])
    if culprit == 0:
        return crash
    if culprit is not None:
        name = list(fenced)[culprit - 1]
        fence = fenced[name]
        right, writes = answers([replace(fence, sides="right"), replace(fence, access="write")])
        side = "right" if right else "left" if crashes(replace(fence, sides="left")) else "both"
        return _located(crash, name, side, "write" if writes else "read")
    inputs = [name for name, role in there.items() if role == "input"]
    written = first([replace(soft, readonly=(name,)) for name in inputs])
    return _located(crash, inputs[written], "inside", "write") if written is not None else crash


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
