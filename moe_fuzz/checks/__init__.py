"""The checks: pure functions over an observation (inputs, outputs, reference) that return violations.

Each registers by decorator, in its own file, for a family of ops; a space names the checks of its op by string.
The order is that of attribution: what an earlier check found broken about a row, later ones do not judge again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_fuzz.verdict import Violation

Check = Callable[[Any], list[Violation]]

#: family -> check name -> function. `parity` checks judge values against the reference; binding is proved on them.
CHECKS: dict[str, dict[str, Check]] = {}
PARITY: dict[str, list[str]] = {}
#: family -> the checks that call the target again on other inputs, and so cost as much as a step each.
RELATIONS: dict[str, list[str]] = {}


#: check -> (observation) -> bool [T], the rows that it finds wrong. Of those that judge row by row, and say so: binding
#: then asks for many answers at once.
ROWS: dict[Check, Callable[[Any], Any]] = {}


def check(
    family: str, name: str, *, parity: bool = False, relation: bool = False, rows: Callable[[Any], Any] | None = None
) -> Callable[[Check], Check]:
    """Registers a check of a family of ops under its name."""

    def register(function: Check) -> Check:
        if rows is not None:
            ROWS[function] = rows
        CHECKS.setdefault(family, {})[name] = function
        if parity:
            PARITY.setdefault(family, []).append(name)
        if relation:
            RELATIONS.setdefault(family, []).append(name)
        return function

    return register
