"""Operators registered under the schemas of real releases, computed on the CPU by our reference.

upstream_schemas.json holds, for each release, the text that its library registers, as read in the library's file. What
a release's schema makes of a target can thus be seen without the release: `register`, then bind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_fuzz.reference import routing
from moe_fuzz.reference.grouped_topk import grouped_topk

RELEASES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("upstream_schemas.json").read_text())
_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators with it

Operator = Callable[..., Any]


def schemas(release: str) -> dict[str, str]:
    """Operator -> schema, of a release such as `vllm 0.33.0`."""
    return {text.partition("(")[0]: text for text in RELEASES[release]["schemas"]}


def register(namespace: str, texts: Sequence[str], change: Callable[[str, Operator], Operator] | None = None) -> None:
    """Defines the operators and implements them for the CPU; `change` may replace an implementation: to break it."""
    library = torch.library.Library(namespace, "DEF")
    _KEPT.append(library)
    for text in texts:
        name = text.partition("(")[0]
        library.define(text)
        arguments = [a.name for a in getattr(getattr(torch.ops, namespace), name).default._schema.arguments]
        operator = _IMPLEMENTATIONS[name](arguments)
        library.impl(name, change(name, operator) if change else operator, "CPU")


def stub(folder: Path, namespace: str, release: str, lines: str = "change = None") -> Path:
    """A Python file that stands in for the release's library: what MOE_FUZZ_VLLM_LIB may name."""
    root = Path(__file__).resolve().parents[2]
    file = folder / "operators.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom tests.cpu import fake_library\n{lines}\n"
        f"fake_library.register({namespace!r}, list(fake_library.schemas({release!r}).values()), change)\n"
    )
    return file


def _writing(score: str) -> Callable[[list[str]], Operator]:
    def make(arguments: list[str]) -> Operator:
        def operator(*given: Any) -> None:
            value = dict(zip(arguments, given, strict=False))
            weights, ids, logits = value["topk_weights"], value["topk_indices"], value["gating_output"]
            assert value.get("moe_softcapping", 0.0) == 0.0
            if "token_expert_indices" in value:
                value["token_expert_indices"].fill_(1)
            found = getattr(routing, score)(
                logits, ids.shape[1],
                renormalize=value.get("renormalize", False),
                bias=value.get("bias", value.get("correction_bias")),
                scale=value.get("routed_scaling_factor", 1.0),
                is_padding=value.get("is_padding"), padding="distinct",
            )  # fmt: skip
            weights.copy_(found[0])
            ids.copy_(found[1])
            if value.get("is_padding") is not None:  # as vLLM does: the id says "skip", the weight stays
                ids.masked_fill_(value["is_padding"][:, None], -1)

        return operator

    return make


def _vllm_grouped(arguments: list[str]) -> Operator:
    def operator(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value = dict(zip(arguments, given, strict=False))
        scores, old = value["scores"], "scores_with_bias" in value
        biased = value["scores_with_bias"] if old else None
        if not old:
            scores = 0.5 * torch.tanh(0.5 * scores) + 0.5 if value["scoring_func"] == 1 else scores
            biased = scores + value["bias"]
        tokens, experts = scores.shape
        best = biased.view(tokens, value["n_group"], experts // value["n_group"]).topk(2, dim=2).values.sum(dim=2)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _top(best, value["topk_group"]), True)
        kept = kept.repeat_interleave(experts // value["n_group"], dim=1)
        ids = _top(biased.masked_fill(~kept, -torch.inf).masked_fill(biased == -torch.inf, -3e38), value["topk"])
        weights = scores.nan_to_num(0.0, 0.0, 0.0).gather(1, ids)
        if value["renormalize"]:
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
        weights = weights * value["routed_scaling_factor"]
        return weights, ids if old else ids.int()

    return operator


def _gate(arguments: list[str]) -> Operator:
    def operator(*given: Any) -> list[torch.Tensor]:
        value = dict(zip(arguments, given, strict=False))
        assert value["apply_routed_scaling_factor_on_output"]
        shared = value["num_fused_shared_experts"]
        weights, ids = grouped_topk(
            value["input"], value["topk"] - shared, n_group=value["num_expert_group"], topk_group=value["topk_group"],
            scoring="sigmoid", group_score="top2_sum", renormalize=True, bias=value["bias"],
            scale=value["routed_scaling_factor"], n_shared=shared,
        )  # fmt: skip
        return [weights, ids]

    return operator


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the largest, NaN as the smallest, the first of equals first."""
    return values.nan_to_num(-3.1e38, 3e38).sort(dim=1, descending=True, stable=True).indices[:, :count]


_IMPLEMENTATIONS: dict[str, Callable[[list[str]], Operator]] = {
    "topk_softmax": _writing("topk_softmax"),
    "topk_sigmoid": _writing("topk_sigmoid"),
    "grouped_topk": _vllm_grouped,
    "moe_fused_gate": _gate,
}
