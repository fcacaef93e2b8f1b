"""The space of grouped_topk: what it adds to that of the other routers. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

from moe_fuzz.case import Case, Scalar
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing import space, text
from moe_fuzz.ops.routing.presets import GROUPED_MODELS
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.ops.validity import require_integer
from moe_fuzz.sizes import any_number

#: Counts that some number of groups divides, powers of two or not, and two that only a single group does.
EXPERTS = (1, 2, 4, 6, 8, 9, 10, 12, 16, 24, 32, 33, 60, 61, 64, 72, 96, 128, 129, 160, 192, 256, 257, 288, 320, 384,
           512, 576, 1024)  # fmt: skip
#: What does not divide the experts gives way to the next smaller number that does, so these ask for a size.
N_GROUP = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
TOPK_GROUP = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 24, 31, 32, 48, 63, 64)
ALL_GROUPS = TOPK_GROUP[-1] + 1  # as topk_group: however many there are
N_SHARED = (0, 1, 2, 3, 4, 5, 8)

FIELDS: dict[str, tuple[Scalar, ...]] = {
    "scoring": ("softmax", "sigmoid"),
    "group_score": ("max", "top2_sum"),
    "n_shared": N_SHARED,
    "expert_map": (False, True),
}
_GROUP_FAULTS = ("tied_groups", "near_tied_groups", "masked_groups")


@dataclass(frozen=True)
class GroupedSpace(space.RoutingSpace):
    """grouped_topk: groups, two scorings, two group scores, fused shared experts and a map of ids."""

    checks: ClassVar[Mapping[str, str]] = text.GROUPED_CHECKS
    faults: ClassVar[Mapping[str, str]] = text.GROUPED_FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = (
        *(FaultPlace(name, "logits", on_rows=True) for name in _GROUP_FAULTS),
        *space.PLACES,
        FaultPlace("overlapping_map", "expert_map", on_rows=False, needs="expert_map"),
        FaultPlace("noncontiguous", "expert_map", on_rows=False, needs="expert_map"),
    )
    sizes: ClassVar[tuple[str, ...]] = ("experts", "top_k", "n_group", "topk_group")
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = {**FIELDS, **space.FIELDS}
    row_faults: ClassVar[tuple[str, ...]] = (*space.ROW_FAULTS, *_GROUP_FAULTS)
    beside: ClassVar[Mapping[str, str]] = {**space.BESIDE, "tied_groups": "tied_bias"}

    @cached_property
    def simplest(self) -> Mapping[str, Scalar]:
        return {"n_group": 1, "topk_group": 1, **super().simplest}

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        return {"logits": "input", "bias": "input", "is_padding": "input", "expert_map": "input",
                "weights": "output", "ids": "output"}  # fmt: skip

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can = info.capabilities
        plain = {axis.name: axis for axis in super().axes(info)}
        plain["experts"] = replace(plain["experts"], values=can.numbers_of_experts(EXPERTS))
        most = max(plain["experts"].values, default=0)
        groups = [n for n in N_GROUP if can.min_n_group <= n <= can.max_n_group and n <= int(most)]
        return (
            *plain.values(),
            Axis("n_group", groups, often=(1,) * 5 if 1 in groups else (), between=any_number),
            Axis("topk_group", [*(g for g in TOPK_GROUP if g < max(groups, default=1)), ALL_GROUPS],
                 often=(ALL_GROUPS,), between=any_number),
            Axis("scoring", can.scorings),
            Axis("group_score", can.group_scores),
            # One group with neither is another kernel's, and is drawn with each dialect.
            Axis("n_shared", [n for n in N_SHARED if n <= can.n_shared], often=(0,) * 6),
            Axis("expert_map", (False, True) if can.expert_map else (False,), often=(False,)),
        )

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        can, drawn = info.capabilities, dict(config)
        # A count that no number of groups in reach divides gives way to the next one below, else above it.
        counts = sorted((int(e) for e in self.axes(info)[0].values), key=lambda e: (e > int(drawn["experts"]), -e))
        candidates = ((count, _n_groups(count, can)) for count in (int(drawn["experts"]), *counts))
        drawn["experts"], groups = next((found for found in candidates if found[1]), (drawn["experts"], (1,)))
        fitting = [n for n in groups if n <= int(drawn["n_group"])]
        drawn["n_group"] = max(fitting) if fitting else min(groups)
        # Wrapped, not cut off: else most cases would keep all of their few groups, and choose none.
        n_group, kept = int(drawn["n_group"]), int(drawn["topk_group"])
        most = min(n_group, max(can.max_kept // (int(drawn["experts"]) // n_group), 1))
        drawn["topk_group"] = most if kept == ALL_GROUPS else (kept - 1) % most + 1
        if can.top_k_by_groups:
            drawn["top_k"] = min(int(drawn["top_k"]), n_group * int(drawn["topk_group"]))
        if can.group_score_by_bias:
            drawn["group_score"] = _score_by_bias(drawn)
        return super().complete(drawn, info)

    def mended(self, config: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """E % n_group == 0 and top_k <= topk_group * E / n_group hold again."""
        count = len(Labels.parse(str(config["experts"])))
        n_group = max(n for n in _divisors(count) if n <= int(config["n_group"]))
        topk_group = min(int(config["topk_group"]), n_group)
        top_k = min(int(config["top_k"]), topk_group * (count // n_group))
        return {**config, "n_group": n_group, "topk_group": topk_group, "top_k": top_k}

    def validate(self, case: Case) -> None:
        super().validate(case)
        config, count = case.config, len(case.experts)
        require_integer(case, "n_group", count)
        require_integer(case, "topk_group", count)
        if config["expert_map"] and case.experts.last(1).spans[0][0] >= 1 << 20:
            raise CaseError("config.experts", "labels from 2^20 on leave no room for the physical ids of expert_map")
        n_group, topk_group = int(config["n_group"]), int(config["topk_group"])
        if count % n_group:
            raise CaseError("config.n_group", f"must divide the {count} experts, not {n_group}")
        if topk_group > n_group:
            raise CaseError("config.topk_group", f"must be at most n_group = {n_group}, not {topk_group}")
        left = topk_group * (count // n_group)
        if int(config["top_k"]) > left:
            raise CaseError("config.top_k", f"must be at most the {left} experts of {topk_group} groups")

    def refusals(self, case: Case, info: TargetInfo) -> Iterator[tuple[object, str]]:
        yield from super().refusals(case, info)
        can, config = info.capabilities, case.config
        n_group, size = int(config["n_group"]), len(case.experts) // int(config["n_group"])
        yield not can.min_n_group <= n_group <= can.max_n_group, f"{n_group} groups"
        yield not can.min_group_size <= size <= can.max_group_size, f"groups of {size}"
        kept, slots = int(config["topk_group"]), n_group * int(config["topk_group"])
        yield kept * size > can.max_kept, f"{kept} groups of {size}"
        yield can.top_k_by_groups and int(config["top_k"]) > slots, f"top_k over n_group * topk_group = {slots}"
        yield config["scoring"] not in can.scorings, f"scoring={config['scoring']}"
        unbound = can.group_score_by_bias and config["group_score"] != _score_by_bias(config)
        yield config["group_score"] not in can.group_scores or unbound, (
            f"group_score={config['group_score']} with{'' if config['bias'] else 'out'} a bias"
        )
        yield int(config["n_shared"]) > can.n_shared, f"n_shared={config['n_shared']}"
        yield config["expert_map"] and not can.expert_map, "expert_map"

    def features(self, case: Case) -> frozenset[str]:
        config, count = case.config, len(case.experts)
        n_group = int(config["n_group"])
        found = {f"groups>{limit}" for limit in (1, 8, 32) if n_group > limit}
        found |= {"topk_group<n_group"} if int(config["topk_group"]) < n_group else set()
        found |= {"topk_group>1"} if int(config["topk_group"]) > 1 else set()
        found |= {"one expert a group"} if n_group == count > 1 else set()
        size = count // n_group
        found |= {"group size not a power of two"} if n_group > 1 and size & (size - 1) else set()
        found |= {f"{name}={config[name]}" for name in ("scoring", "group_score") if config[name] != FIELDS[name][0]}
        found |= {name for name in ("n_shared", "expert_map") if config[name]}
        found |= {"n_shared>2"} if int(config["n_shared"]) > 2 else set()
        return super().features(case) | found

    def simplify(self, case: Case) -> Iterator[Case]:
        yield from super().simplify(case)
        for name in ("n_group", "topk_group"):
            for fewer in range(1, int(case.config[name])):
                simpler = replace(case, config=self.mended({**case.config, name: fewer}))
                if simpler.config[name] == fewer:  # else it is one of those before
                    yield simpler
        if case.config["bias"] and case.config["group_score"] == "top2_sum":  # one cannot go first in a target that
            yield self.without_orphans(case.with_config(bias=False, group_score="max"))  # binds the rule to the bias

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        count, n_group, top_k = len(Labels.parse(str(config["experts"]))), int(config["n_group"]), int(config["top_k"])
        if not means.interpreted:
            return 0.007 + tokens * (6e-7 + 1e-7 * count + 1e-7 * top_k)
        padded = (1 << (n_group - 1).bit_length()) << (count // n_group - 1).bit_length()
        kept = int(config["topk_group"])
        searches = top_k + (kept / 4 if kept < n_group else 0)
        return 0.08 + 2e-3 * searches + tokens * padded * (9e-7 + 7e-8 * searches)


def _n_groups(count: int, can: Capabilities) -> tuple[int, ...]:
    """The numbers of groups into which a target takes so many experts."""
    return tuple(
        n for n in _divisors(count)
        if can.min_n_group <= n <= can.max_n_group
        and can.min_group_size <= count // n <= can.max_group_size
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _divisors(count: int) -> tuple[int, ...]:
    """The numbers of groups that so many experts have: ascending."""
    return tuple(n for n in range(1, count + 1) if count % n == 0)


def _score_by_bias(config: Mapping[str, Scalar]) -> str:
    return "top2_sum" if config["bias"] else "max"


SPACES = (
    GroupedSpace("grouped_topk", "the k best experts of the best groups of experts, fused shared experts, mapped ids",
                 GROUPED_MODELS),
)  # fmt: skip
