"""Which declaration would make a wrong answer a right one. For a person; nothing is judged by it.

A kernel that stores a product in bfloat16 on the way is wrong unless it says so. If it has nearly all bits of an answer
with that store, then it should hear which word of its contract is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe_fuzz.checks.binding import rejected
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.checks.experts.values import rounded
from moe_fuzz.contract import Contract

_KNOWN = "_moe_fuzz_declaration"
_MOST = 1 << 18  # elements of the projections that are multiplied again, a dozen times
_FAR = 16  # bounds
_MOSTLY = 0.9  # of the elements have the bits of that answer
_FEWER = 4  # times: of the elements that have not, beside those that have not the bits of the contract's own
#: What a contract may say of stores: each alone, and what libraries do together. Of two that give the same bits the
#: first is said: nobody is to declare that he rounds where he may as well not.
_WAYS: tuple[Mapping[str, str], ...] = (
    {"slot": "none"},
    {"intermediate": "float32"},
    {"intermediate": "float32", "slot": "none"},
    {"gate_up": "dtype"},
    {"activation": "dtype"},
    {"down": "dtype"},
    {"weight_dtype": "dtype"},
    {"weighted_x": "dtype"},
    {"weight_dtype": "dtype", "weighted_x": "dtype"},
    {"reduce": "dtype"},
    {"slot": "none", "reduce": "dtype"},
    {"gate_up": "dtype", "down": "dtype"},
    {"gate_up": "dtype", "activation": "dtype"},
    {"gate_up": "dtype", "activation": "dtype", "down": "dtype"},
    {"gate_up": "dtype", "activation": "dtype", "down": "dtype", "slot": "none"},
    {"gate_up": "dtype", "activation": "dtype", "down": "dtype", "weight_dtype": "dtype"},
    {"gate_up": "dtype", "activation": "dtype", "down": "dtype", "reduce": "dtype"},
    {"gate_up": "dtype", "activation": "dtype", "down": "dtype", "weight_dtype": "dtype", "reduce": "dtype"},
)


def declaration(seen: ExpertsObservation) -> str:
    """`; a target that declares Contract(gate_up="dtype") may answer so`, or nothing."""
    if _KNOWN not in seen.__dict__:  # several checks ask, of the same answer
        said = ", ".join(f'{name}="{value}"' for name, value in _way(seen).items())
        seen.__dict__[_KNOWN] = f"; a target that declares Contract({said}) may answer so" if said else ""
    return str(seen.__dict__[_KNOWN])


def _way(seen: ExpertsObservation) -> Mapping[str, str]:
    """The way that y has the most bits of, and that makes parity hold."""
    if seen.brief or 3 * seen.experts * seen.x.shape[1] * seen.inputs.inter > _MOST:
        return {}
    error = (seen.y - seen.numbers.value).abs()
    if not seen.inputs.quantizes and bool((seen.judged & (error > _FAR * seen.numbers.bound)).any()):
        return {}  # no store does that but by way of a code, and most defects do: a reducer has not to wait
    contract, judged = seen.info.contract, int(seen.judged.sum())
    own = _off(seen, contract)
    off, number = min((_off(seen, _with(contract, way)), number) for number, way in enumerate(_WAYS))
    if off > (1 - _MOSTLY) * judged or off * _FEWER > own or not own:
        return {}
    info = replace(seen.info, contract=_with(contract, _WAYS[number]), declared=True)
    wrong = rejected(replace(seen, info=info, budget={}, brief=True), "experts")
    return {} if wrong else _WAYS[number]


def _with(contract: Contract, way: Mapping[str, str]) -> Contract:
    return Contract(**{**vars(contract), **way})


def _off(seen: ExpertsObservation, contract: Contract) -> int:
    """The judged elements that have not the bits of the answer with each store of this contract. Slots that are added
    in few bits are added as they stand, or as a loop over the experts comes to them."""
    answers = [rounded(seen.inputs, seen.expert, contract)]
    if contract.reduce == "dtype":
        expert, order = seen.expert.sort(dim=1)
        answers.append(rounded(seen.inputs.replace(weights=seen.weights.gather(1, order)), expert, contract))
    return min(int(((seen.y != answer) & seen.judged).sum()) for answer in answers)
