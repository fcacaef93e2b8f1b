"""Which of the targets that are asked for can be had here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from moe_fuzz.campaign.interfaces import Pool, Space
from moe_fuzz.campaign.plan import not_here, nothing_left
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.restriction import Restriction


@dataclass
class Available:
    known: dict[str, tuple[TargetInfo, Space]] = field(default_factory=dict)
    problems: dict[str, EnvironmentProblem] = field(default_factory=dict)  # of those that cannot be had
    left_out: set[str] = field(default_factory=set)  # of these, by the restriction


def available(
    targets: Iterable[str], pool: Pool, space_of: Callable[[str], Space], device: str,
    restriction: Restriction | None = None,
) -> Available:  # fmt: skip
    found = Available()
    for target in targets:
        try:
            info = pool.describe(target)
        except EnvironmentProblem as problem:
            found.problems[target] = problem
            continue
        space = space_of(info.op)
        elsewhere = not_here(space, info, device)
        refusal = restriction.refusal(space, info) if restriction else ""
        if elsewhere is not None:
            found.problems[target] = elsewhere
        elif refusal:
            found.problems[target] = nothing_left(refusal)
            found.left_out.add(target)
        else:
            found.known[target] = (info, space)
    return found
