"""Our all-reduce with a norm as a target: its own kind of group is made from the one that a case has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares
from moe_fuzz.kernels import allreduce_rmsnorm as kernels
from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import ALWAYS, BACKENDS

#: A peer may still compile what this rank has compiled already; a rank that hangs is for the parent to find.
_PATIENCE = 20.0
_LEAST = 1 << 16  # bytes
_PROMISES: dict[str, Any] = {
    "contract": Contract(deterministic=True, batch_invariant=True, isolated=True, rounds=("residual",),
                         sum_order="rank"),
    "capabilities": Capabilities(out=True, alignment=1, any_strides=True, launches=("phases", "single"),
                                 processes=("cuda",), cuts=True, backends=BACKENDS,
                                 residual_in_place=True),
    "clauses": {"*": "the contract in the docstring of moe_fuzz.reference.allreduce_rmsnorm"},
}  # fmt: skip
_RANKS: dict[tuple[int, int], kernels.RankGroup] = {}  # of this process, by number and capacity


def _own(group: Any) -> kernels.Group:
    """The kernels' group for a group of the case. Where each rank has a process they live as long as that: making one
    is collective, and its memory is mapped on every GPU."""
    if group.rank is None:
        made: kernels.Group = kernels.LocalGroup(
            group.world, group.device, capacity=group.capacity, launches=group.launches, timeout_s=group.timeout_s
        )
        group.closes.append(made.close)
    else:
        capacity = max(_LEAST, 1 << (group.capacity - 1).bit_length()) if group.capacity < ALWAYS else group.capacity
        key = (group.number, capacity)
        if key not in _RANKS:
            _RANKS[key] = kernels.RankGroup(
                group.process_group, group.device, capacity=capacity, timeout_s=max(_PATIENCE, group.timeout_s)
            )
        made = _RANKS[key]
    group.signals.extend(made.signals)
    group.waits.append(made.check)
    return made


def _called(
    backend: str | None, x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own = group.made("builtin", partial(_own, group))
    return kernels.allreduce_rmsnorm(x, residual, gamma, eps, group=own, out=out, backend=backend)


@declares(**_PROMISES)
def allreduce_rmsnorm(
    x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any, backend: str | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The way that the dispatch table has for the size, or the one that is forced."""
    return _called(backend, x, residual, gamma, eps, group=group, out=out)


@declares(**_PROMISES)
def one_shot(
    x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every rank sums all rows."""
    return _called("one_shot", x, residual, gamma, eps, group=group, out=out)


@declares(**_PROMISES)
def two_shot(
    x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every rank sums its share of the rows, and tells the others."""
    return _called("two_shot", x, residual, gamma, eps, group=group, out=out)


@declares(**_PROMISES)
def split(
    x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, *, group: Any,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two shots, with several blocks for a row."""
    return _called("split", x, residual, gamma, eps, group=group, out=out)
