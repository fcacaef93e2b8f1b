"""Routers for gates end to end: a sound one, and planted bugs of each kind that a gate tells apart.

`GATE_MARKS` names a directory in which those that do not always fail remember what they did.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from moe_fuzz.contract import Capabilities, Contract, declares

Result = tuple[torch.Tensor, torch.Tensor]
_PROMISES = declares(
    Contract(deterministic=True, ordered=True),
    Capabilities(alignment=1, renormalize=(False,), dtypes=("float32",), max_experts=16, max_top_k=4),
    clauses={"*": "the docstring"},
)


@_PROMISES
def sound(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Result:
    """logits [T, E] -> weights [T, k] float32, ids [T, k] int32; a row of NaN counts as a row of zeros."""
    scores = logits.double()  # [T, E]
    undefined = ~(scores < torch.inf).all(dim=1, keepdim=True) | ((scores > -torch.inf).sum(1, keepdim=True) < top_k)
    weights = torch.softmax(torch.where(undefined, 0.0, scores), dim=1)
    found = torch.topk(weights, top_k, dim=1)
    return found.values.float(), found.indices.to(torch.int32)


@_PROMISES
def odd(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Result:
    """The last expert of an odd number is never looked at."""
    experts = logits.shape[1]
    return sound(logits[:, :-1] if experts % 2 and experts > top_k else logits, top_k)


@_PROMISES
def overrun(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Result:
    """Reads logits in pairs, and so one too far behind an odd number of them."""
    if logits.numel() % 2:
        ctypes.string_at(logits.data_ptr() + logits.numel() * logits.element_size(), logits.element_size())
    return sound(logits, top_k)


@_PROMISES
def once(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Result:
    """Wrong in the first process that calls it with an odd number of experts: the last of them is never looked at, and
    where that was not chosen, no weight is right."""
    weights, ids = sound(logits, top_k)
    wrong = len(logits) and logits.shape[1] % 2 and _once()
    return (-1.0 - weights, odd(logits, top_k)[1]) if wrong else (weights, ids)


@_PROMISES
def seldom(logits: torch.Tensor, top_k: int, renormalize: bool = False) -> Result:
    """Wrong in every third process that calls it with an odd number of experts."""
    return odd(logits, top_k) if logits.shape[1] % 2 and _third() else sound(logits, top_k)


_ONCE: list[bool] = []  # whether this process is the first
_TURN: list[int] = []  # of this process


def _once() -> bool:
    if not _ONCE:
        _ONCE.append(_first("once"))
    return _ONCE[0]


def _third() -> bool:
    if not _TURN:
        _TURN.append(next(number for number in range(10_000) if _first(f"turn-{number}")))
    return _TURN[0] % 3 == 0


def _first(name: str) -> bool:
    """Whether nobody asked by this name before, in any process."""
    try:
        (Path(os.environ["GATE_MARKS"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
