"""Moves of the reducer that mean the same for every op: simpler runs, plainer faults, the other edge. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from moe_fuzz.case import ALL_MODES, Case, Fault


def simpler_runs(case: Case, modes: Sequence[str] = ALL_MODES) -> Iterator[Case]:
    """In each of the modes before its own, each step in new memory, and with its steps numbered anew. modes: those of
    the op, the simplest first."""
    for mode in modes[: modes.index(case.mode)]:
        yield from in_simpler_mode(case, mode)
    if case.refilled:
        yield case.over_buffers(False)
    if any(step.stream is not None for step in case.steps):  # where nothing hangs on old values
        yield replace(case, steps=tuple(replace(step, stream=None) for step in case.steps))


def in_simpler_mode(case: Case, mode: str) -> Iterator[Case]:
    """In a mode before its own; of eager calls also over the same buffers, which is all that some need of a graph."""
    simpler = replace(case, mode=mode)
    yield simpler
    if mode == ALL_MODES[0] and len(case.steps) > 1:
        yield simpler.over_buffers(True)


def plainer_faults(
    case: Case, *kinds: Sequence[str], fits: Callable[[Fault], bool] = lambda fault: True
) -> Iterator[Case]:  # fmt: skip
    """Each fault on rows replaced by those listed before it: one bug, seen through many faults, is one finding.

    kinds: faults that may stand for each other, the plainest first. fits: whether the case has room for a fault.
    """
    for index, step in enumerate(case.steps):
        for number, fault in enumerate(step.faults):
            names = next((names for names in kinds if fault.name in names), None)
            if names is None:
                continue
            others = (replace(fault, name=name, stream=None) for name in names[: names.index(fault.name)])
            plainer = [other for other in others if fits(other)]
            plainer += [replace(fault, stream=None)] if fault.stream is not None else []
            for other in plainer:
                faults = (*step.faults[:number], other, *step.faults[number + 1 :])
                yield case.with_step(index, replace(step, faults=faults))


def with_fitting_faults(case: Case, fits: Callable[[Fault], bool]) -> Case:
    """Without the faults that the config no longer has room for."""
    for index, step in enumerate(case.steps):
        kept = tuple(fault for fault in step.faults if fits(fault))
        if kept != step.faults:
            case = case.with_step(index, replace(step, faults=kept))
    return case


def flush_left(case: Case) -> Iterator[Case]:
    """With its tensors at the left edge: an access before a tensor is seen at any size only if it lies flush left."""
    if case.config["edge"] == "right":
        yield case.with_config(edge="left")
