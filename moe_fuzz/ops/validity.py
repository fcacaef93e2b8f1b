"""What makes a case valid, as far as all ops agree: its fields, their values, the places of faults. Free of torch.

Each function raises CaseError, which names the field and what it may be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moe_fuzz.case import Case, Fault, Scalar
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops.space import FaultPlace, Space


def require_fields(case: Case, expected: Collection[str]) -> None:
    """The config has these fields and no others."""
    for key in sorted(set(case.config) ^ set(expected)):
        raise CaseError(
            f"config.{key}",
            "is missing" if key in expected else "unknown field",
            f"the fields of {case.op} are {', '.join(sorted(expected))}",
        )


def require_labels(case: Case, key: str) -> Labels:
    """The labels in a field; none where it is no string of labels."""
    value = case.config[key]
    try:
        return Labels.parse(value) if isinstance(value, str) else Labels()
    except ValueError as error:
        raise CaseError(f"config.{key}", str(error)) from error


def require_experts(case: Case, most: int) -> Labels:
    """The labels of 1 to `most` experts."""
    labels = require_labels(case, "experts")
    if not 1 <= len(labels) <= most:
        raise CaseError("config.experts", f'must name 1 to {most} experts as a string like "0-59", '
                                          f"not {case.config['experts']!r}")  # fmt: skip
    return labels


def require_integer(case: Case, key: str, most: int) -> None:
    value = case.config[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CaseError(f"config.{key}", f"must be an integer from 1 to {most}, not {value!r}")


def require_values(case: Case, fields: Mapping[str, Sequence[Scalar]]) -> None:
    """Each of these fields has one of its values, of its type: True is not 1."""
    for key, values in fields.items():
        value = case.config[key]
        for one in values:  # no generator: a reducer asks for every case that it makes
            if value == one and type(value) is type(one):
                break
        else:
            raise CaseError(f"config.{key}", f"must be one of {', '.join(map(repr, values))}, not {value!r}")


def require_place(space: Space, case: Case, fault: Fault, where: str) -> FaultPlace:
    """The place of the fault, which the op has, in a mode in which it can be laid there."""
    place = next((p for p in space.places if (p.fault, p.tensor) == (fault.name, fault.tensor)), None)
    if place is None:
        raise CaseError(
            where,
            f"{space.op} knows no fault {fault.name!r} on {fault.tensor!r}",
            f"`moe-fuzz list faults` shows them: {', '.join(space.faults)}",
        )
    if case.mode not in place.modes:
        hint = f"use mode {' or '.join(place.modes)}"
        raise CaseError(where, f"{fault.name} cannot be laid in mode {case.mode}", hint)
    return place


def require_few_rows(place: FaultPlace, tokens: int, where: str) -> None:
    """A step of so many rows is not too long for the fault."""
    if place.max_rows is not None and tokens > place.max_rows:
        raise CaseError(where, f"{place.fault} is for {place.max_rows} rows at most, not {tokens}")


def require_rows(place: FaultPlace, fault: Fault, where: str) -> None:
    """The fault names rows if it is laid on rows, and only then."""
    if place.on_rows != bool(fault.rows):
        raise CaseError(f"{where}.rows", "must name rows" if place.on_rows else "must name no rows")


def require_stream(fault: Fault, where: str) -> None:
    """Only a fault that brings back old values names the step they are of."""
    if fault.stream is not None and fault.name != "stale_rows":
        raise CaseError(f"{where}.stream", "only stale_rows hold what another step had")
