"""A family of ops: they share inputs, observation and checks, so execute/ can run any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.ops.inputs import Inputs


def _rows_by_experts(case: Case, step_index: int) -> int:
    """Scaled: a device takes a hundred launches and several waits to judge a step, which several processes have to
    share; meanwhile a host judges a quarter of a million logits."""
    return case.steps[step_index].tokens * len(case.experts) // 8


@dataclass(frozen=True)
class Family:
    """What execute/ has to know of a family. Its checks register with `@check(name, …)` when they are imported."""

    name: str
    #: (case, step_index, device) -> the arguments of that step
    materialize: Callable[[Case, int, torch.device | str], Inputs]
    #: (*tensors) -> a frozen dataclass whose fields are the results in order; None for one that a target has not
    outputs: Callable[..., Any]
    #: (case, step_index, info, inputs, outputs, call, eager) -> a frozen dataclass with at least these fields, in this
    #: order, and `budget: dict[str, float]`, `shaped: bool`. `call` runs the target again, in fences, on other inputs;
    #: a graph is replayed. `eager` runs it without a graph where `call` is a replay, and is None in the eager mode.
    observe: Callable[..., Any]
    #: (observation) -> the wrong answers that no check rejected; empty when the case proves parity
    binding: Callable[[Any], list[str]]
    #: (observation without outputs) -> calls that the relations will ask for whatever the outputs are. On a GPU they
    #: are made with the step's own, so that the host waits once. `seen.call` is answered for these very objects.
    ahead: Callable[[Any], Sequence[Inputs]] = lambda seen: ()
    #: (case, info, inputs of all steps) -> for each step what its observation would cache, by name: None: nothing is
    #: saved by computing it for several steps at once
    together: Callable[..., Sequence[Mapping[str, Any]]] | None = None
    #: (inputs, *what a target tells `observe` between its stages) -> it in a sentence; None: the op has no stages
    describe: Callable[..., str] | None = None
    #: (case, step_index, inputs) -> counts of what the inputs are like, by name, which a campaign adds up; None: none
    statistics: Callable[[Case, int, Inputs], Mapping[str, float]] | None = None
    #: (case, target, device, options) -> a context in which the case runs, and the target as it is called there
    staged: Callable[..., AbstractContextManager[Any]] | None = None
    #: (case, step_index) -> elements that are made and judged: on the host where they are few, else on the device
    elements: Callable[[Case, int], int] = _rows_by_experts
    #: Its inputs are made and its checks run in torch's inference mode, without autograd's books, which take a tenth of
    #: the time of operations on a few elements. Nobody may write into what they made after that.
    inference: bool = False


def answered(seen: Any, outputs: Any) -> Any:
    """An observation made without outputs, with them. What was computed of the inputs before is not computed again."""
    whole = object.__new__(type(seen))
    whole.__dict__.update(seen.__dict__, outputs=outputs)  # fields and what is cached beside them
    return whole
