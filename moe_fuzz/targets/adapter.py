"""Makes a bound call of a library into a router with the op's own arguments. Worker side."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from moe_fuzz.execute.barecall import ROUTED, BareCall, Buffers, looks_like
from moe_fuzz.targets.schema import BoundCall, Fixed

Router = Callable[..., tuple[torch.Tensor, torch.Tensor]]

Libraries = Mapping[str, str]  # variable that names another one -> files, joined as in PATH

_PAIR = ("result[0]", "result[1]")
_HIDDEN = "logits.new_empty((tokens, 1))"
_WRITTEN: Buffers = {**ROUTED, "token_expert_indices": ("int32", ("tokens", "top_k"))}

#: What a case gives, unless it says otherwise.
DEFAULTS: dict[str, Any] = {"renormalize": False, "bias": None, "scale": 1.0, "is_padding": None}


def into_outputs(call: BoundCall, libraries: Libraries) -> Router:
    """A router whose operator writes into the caller's buffers: weights [T, k] float32, ids [T, k] int32."""

    def route(
        logits: torch.Tensor, top_k: int, *, out: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (logits.shape[0], top_k)
        weights, ids = out or (
            logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
        )  # fmt: skip
        values = {**DEFAULTS, **options, "logits": logits, "weights": weights, "ids": ids}
        if call.takes("token_expert_indices"):  # a third output, which no op of ours has: fenced, and judged by nobody
            values["token_expert_indices"] = logits.new_empty(shape, dtype=torch.int32)
        call(values)
        surface_launch_error(logits)
        return weights, ids

    buffers = {name: buffer for name, buffer in _WRITTEN.items() if call.takes(name)}
    shown = looks_like(bare(call, {}, ("weights", "ids"), buffers, libraries))
    return signed(shown(route), [name for name in DEFAULTS if call.takes(name)] + ["out"])


def returning(call: BoundCall) -> Router:
    """A router that is a Python function of (hidden_states, gating_output, …) and returns (weights, ids, …)."""

    def route(logits: torch.Tensor, top_k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = logits.new_empty((logits.shape[0], 1))  # only its number of rows is looked at
        result = call({**DEFAULTS, **options, "logits": logits, "top_k": top_k, "hidden": hidden})
        surface_launch_error(logits)
        return result[0], result[1]

    shown = looks_like(bare(call, {"hidden": _HIDDEN}))
    return signed(shown(route), [name for name in DEFAULTS if call.takes(name)])


def grouped(call: BoundCall, libraries: Libraries | None = None) -> Router:
    """A router of groups that takes sigmoid's logits, and of any other scoring the scores.

    `scoring_func`, where it is taken, says which: 1 or 0. Where the scores with the bias added are asked for as well,
    they are computed here, and weights and ids come in other dtypes than the op's: so it was before vLLM 0.11.
    """

    def route(
        logits: torch.Tensor, top_k: int, *, scoring: str, bias: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fused = call.takes("scoring_func") and scoring == "sigmoid"
        scores = logits if fused else logits.sigmoid() if scoring == "sigmoid" else logits.softmax(dim=-1)
        hidden = logits.new_empty((logits.shape[0], 1))
        values = {**DEFAULTS, **options, "logits": logits, "scores": scores, "top_k": top_k, "bias": bias,
                  "scoring": scoring, "scoring_func": int(fused), "hidden": hidden}  # fmt: skip
        if call.takes("biased"):
            values["biased"] = scores + bias
        weights, ids = call(values)
        surface_launch_error(logits)
        return (weights.float(), ids.int()) if call.takes("biased") else (weights, ids)

    scores = "logits" if call.takes("scoring_func") else "logits.sigmoid()"
    scores = f"{scores} if scoring == 'sigmoid' else logits.softmax(dim=-1)"
    spelled = {"scores": scores, "biased": f"({scores}) + bias", "hidden": _HIDDEN,
               "scoring_func": "1 if scoring == 'sigmoid' else 0"}  # fmt: skip
    old = call.takes("biased")
    shown = looks_like(bare(call, spelled, ("result[0].float()", "result[1].int()") if old else _PAIR, {}, libraries))
    taken = ("n_group", "topk_group", "renormalize", "scale")
    return signed(shown(route), ["scoring", "bias", "group_score", *(name for name in taken if call.takes(name))])


def bare(
    call: BoundCall, spelled: Mapping[str, str], results: tuple[str, ...] = _PAIR, buffers: Buffers | None = None,
    libraries: Libraries | None = None,
) -> BareCall:  # fmt: skip
    """How a script without us makes the call. spelled: expressions for values that are not the op's own arguments."""
    given = [(name, repr(role.value) if isinstance(role, Fixed) else spelled.get(role, role))
             for name, role in call.plan if not isinstance(role, Fixed) or _literal(role.value)]  # fmt: skip
    return BareCall(call.place, tuple(f"{name}={value}" for name, value in given), results, buffers or {},
                    libraries or {}, surfaces_launch_error=True)  # fmt: skip


def _literal(value: object) -> bool:
    """Whether a fixed value can be written down. One that cannot is a Python function's default: it is left out."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return value is None or (isinstance(value, bool | int | float | str | torch.dtype) and finite)


def signed(route: Router, options: Iterable[str]) -> Router:
    """The router with a signature that names the options it takes: bind reads there what it may be given."""
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("logits", "top_k")]
    rest = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in options]  # all are given
    route.__signature__ = inspect.Signature([*first, *rest])  # type: ignore[attr-defined]
    return route


def surface_launch_error(logits: torch.Tensor) -> None:
    """Raises what a launch over an empty grid left behind, while it is still the target's.

    An operator that does not check its launches returns as if nothing were; the next launch that is checked reports the
    error, and that would be one of ours.
    """
    if logits.is_cuda and logits.shape[0] == 0:
        torch.zeros(1, device=logits.device)
