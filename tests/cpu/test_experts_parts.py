"""moe_permute and moe_unpermute, moe_sum, and SGLang's shuffle as parts of experts: bound by schema, judged as experts.

The schemas are those that the libraries of these releases register; the operators behind them are ours, and leave what
the library leaves: rows past the last expert's, slots of no expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import PASS, VIOLATION

Operator = Callable[..., Any]
Registered = Callable[[str, Mapping[str, Operator]], None]

_SUM = "moe_sum(Tensor input, Tensor! output) -> ()"
_SKIPPING = _SUM.replace(") -> ()", ", Tensor? topk_ids=None, Tensor? expert_map=None) -> ()")
_PERMUTE = (
    "moe_permute(Tensor input, Tensor topk_ids, Tensor token_expert_indices, Tensor? expert_map, int n_expert, "
    "int n_local_expert, int topk, Tensor! permuted_input, Tensor! expert_first_token_offset, "
    "Tensor! inv_permuted_idx, Tensor! permuted_idx) -> ()"
)
_SCRATCH = _PERMUTE.replace("moe_permute(", "moe_permute_with_scratch(").replace(
    ") -> ()",
    ", Tensor! sort_workspace, Tensor! permuted_experts_id, Tensor! sorted_row_idx, Tensor! topk_ids_for_sort) -> ()",
)
_SIZE = "moe_permute_sort_workspace_size(int num_expanded_rows, int n_expert) -> int"
_UNPERMUTE = (
    "moe_unpermute(Tensor permuted_hidden_states, Tensor topk_weights, Tensor inv_permuted_idx, "
    "Tensor? expert_first_token_offset, int topk, Tensor! hidden_states) -> ()"
)
_SCATTER = "moe_prepare_scatter(Tensor topk_ids) -> ()"  # only looked for
_OLD = (_SUM, _PERMUTE, _UNPERMUTE)
_REDUCE = "moe_sum_reduce(Tensor input, Tensor output, float routed_scaling_factor) -> ()"
_PREPARE = (
    "prepare_moe_input(Tensor topk_ids, Tensor expert_offsets, Tensor? blockscale_offsets, Tensor problem_sizes1, "
    "Tensor problem_sizes2, Tensor input_permutation, Tensor output_permutation, int num_experts, int n, int k) -> ()"
)
_SHUFFLE = "shuffle_rows(Tensor input, Tensor dst2src_map, Tensor output) -> ()"
_APPLY = "apply_shuffle_mul_sum(Tensor input, Tensor output, Tensor permutation, Tensor? factors) -> ()"

RELEASES = {
    "vllm 0.20.0": _OLD,
    "vllm 0.24.0": (*_OLD, _SCRATCH, _SIZE),
    "vllm 0.33.0": (_SKIPPING, _PERMUTE, _UNPERMUTE, _SCRATCH, _SIZE, _SCATTER),
    "sglang 0.4.2": (_SUM, _REDUCE, _PREPARE, _SHUFFLE, _APPLY),
}
_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators with it
_COUNTER = itertools.count()


# ---- operators as they should be ------------------------------------------------------------------------------------


def moe_sum(slots: Any, out: Any, ids: Any = None, expert_map: Any = None) -> None:
    total = torch.zeros(out.shape)
    for j in range(slots.shape[1]):
        here = torch.ones(len(slots), dtype=torch.bool)
        if ids is not None:
            here = ids[:, j] >= 0
            if expert_map is not None:
                here = here & (expert_map[ids[:, j].clamp(min=0).long()] >= 0)
        total += slots[:, j].float().masked_fill(~here[:, None], 0.0)
    out.copy_(total)


def moe_permute(x: Any, ids: Any, slots: Any, expert_map: Any, n_expert: int, n_local: int, top_k: int, rows: Any,
                ends: Any, inverse: Any, order: Any, *scratch: Any) -> None:  # fmt: skip
    assert ids.dtype == slots.dtype == inverse.dtype == order.dtype == torch.int32
    flat = ids.reshape(-1).long()
    bad = (flat < 0) | (flat >= n_expert)
    if expert_map is not None:
        local = expert_map[flat.masked_fill(bad, 0)].long()
        flat = torch.where(bad | (local < 0), flat.clamp(min=0) + n_expert, local)
    else:
        flat = flat.masked_fill(bad, 2 * n_expert)
    expert, where = flat.sort(stable=True)
    counts = torch.bincount(flat[flat < n_local], minlength=n_local)
    ends[0] = 0
    ends[1:] = counts.cumsum(0)
    inverse.view(-1)[where] = torch.arange(len(flat), dtype=torch.int32)
    here = expert < n_local
    order[: int(here.sum())] = slots.reshape(-1)[where[here]]
    rows[: int(here.sum())] = x[where[here] // top_k]


def moe_unpermute(y: Any, weights: Any, inverse: Any, ends: Any, top_k: int, out: Any) -> None:
    total, inverse = torch.zeros(out.shape), inverse.view(out.shape[0], top_k).long()
    for j in range(top_k):
        here = inverse[:, j] < int(ends[-1])
        total[here] += weights[here, j, None] * y[inverse[here, j]].float()
    out.copy_(total)


def in_dtype(slots: Any, out: Any) -> None:
    total = torch.zeros_like(out)
    for j in range(slots.shape[1]):
        total = total + slots[:, j]
    out.copy_(total)


def moe_sum_reduce(slots: Any, out: Any, factor: float) -> None:
    assert factor == 1.0
    moe_sum(slots, out)


def prepare_moe_input(ids: Any, ends: Any, blockscale: Any, sizes1: Any, sizes2: Any, token: Any, place: Any,
                      experts: int, n: int, k: int) -> None:  # fmt: skip
    assert blockscale is None
    flat = ids.reshape(-1).long()
    order = flat.sort(stable=True).indices.flip(0)  # any order inside an expert will do
    order = order[flat[order].sort(stable=True).indices]
    ends[0] = 0
    ends[1:] = torch.bincount(flat, minlength=experts).cumsum(0)
    token.copy_(order // ids.shape[1])
    place[order] = torch.arange(len(order), dtype=torch.int32)


def shuffle_rows(x: Any, token: Any, rows: Any) -> None:
    rows.copy_(x[token.long()])


def apply_shuffle_mul_sum(y: Any, out: Any, place: Any, factors: Any) -> None:
    assert factors.dtype == out.dtype
    top_k = len(place) // len(out) if len(out) else 1
    weighted = y[place.long()].float() * factors.float()[:, None]
    out.copy_(weighted.view(-1, top_k, out.shape[1]).sum(dim=1))


RIGHT: dict[str, Operator] = {
    "moe_sum": moe_sum,
    "moe_permute": moe_permute,
    "moe_permute_with_scratch": moe_permute,
    "moe_permute_sort_workspace_size": lambda rows, experts: 16 + rows,
    "moe_unpermute": moe_unpermute,
    "moe_prepare_scatter": lambda ids: None,
    "moe_sum_reduce": moe_sum_reduce,
    "prepare_moe_input": prepare_moe_input,
    "shuffle_rows": shuffle_rows,
    "apply_shuffle_mul_sum": apply_shuffle_mul_sum,
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registered]:
    """Makes the operators of a release, some replaced, what the provider's library holds."""

    def make(release: str, other: Mapping[str, Operator]) -> None:
        name, upper = f"fake_parts_{next(_COUNTER)}", release.partition(" ")[0].upper()
        library = torch.library.Library(name, "DEF")
        _KEPT.append(library)
        operators = {**RIGHT, **({"moe_sum": in_dtype} if upper == "SGLANG" else {}), **other}
        for text in RELEASES[release]:
            operator = text.partition("(")[0]
            library.define(text)
            key = "CompositeExplicitAutograd" if operator.endswith("_size") else "CPU"  # it is given no tensor
            library.impl(operator, operators[operator], key)
        monkeypatch.setattr(sources, upper, replace(getattr(sources, upper), package="no_such_package", namespace=name))
        file = tmp_path / "empty.py"
        file.write_text("")
        monkeypatch.setenv(f"MOE_FUZZ_{upper}_LIB", str(file))
        extension.load.cache_clear()

    extension.load.cache_clear()
    yield make
    extension.load.cache_clear()


def fuzz(variant: str, count: int, enough: int | None = None) -> list[str]:
    """Verdicts of the first cases of the grid, violations by check and symptom; until `enough` of them are wrong."""
    runner, target = Runner("cpu"), f"experts_bf16@{variant}"
    info = runner.describe(target)
    said = []
    for case in itertools.islice(strategies.grid(get_space("experts_bf16"), info, "cpu", seed=5), count):
        if enough and len(said) - said.count(PASS) >= enough:
            break
        verdict = runner.run(case, target, RunOptions())
        said.append(verdict.kind if verdict.kind != VIOLATION else ":".join(verdict.key))
    return said


#: Release and target -> (reduce, slot, dialects, takes a map).
EXPECTED = {
    ("vllm 0.20.0", "vllm.moe_sum"): ("dtype", "dtype", 3, True),
    ("vllm 0.24.0", "vllm.moe_sum"): ("dtype", "dtype", 3, True),
    ("vllm 0.33.0", "vllm.moe_sum"): ("float32", "dtype", 3, True),
    ("vllm 0.20.0", "vllm.moe_permute"): ("float32", "none", 2, True),
    ("vllm 0.24.0", "vllm.moe_permute"): ("float32", "none", 2, True),
    ("vllm 0.33.0", "vllm.moe_permute"): ("float32", "none", 4, True),
    ("sglang 0.4.2", "sglang.moe_sum"): ("dtype", "dtype", 3, True),
    ("sglang 0.4.2", "sglang.moe_sum_reduce"): ("float32", "dtype", 3, True),
    ("sglang 0.4.2", "sglang.shuffle"): ("float32", "none", 2, False),
}


@pytest.mark.parametrize(("release", "variant"), EXPECTED)
def test_right_operators_pass_under_each_releases_schema(registered: Registered, release: str, variant: str) -> None:
    registered(release, {})
    info = bind(f"experts_bf16@{variant}").info
    can, contract = info.capabilities, info.contract
    assert (contract.reduce, contract.slot, len(contract.accepts), can.expert_map) == EXPECTED[release, variant]
    assert (can.devices, can.out, can.min_multiple_h) == (("cpu",), True, 8 if contract.slot == "none" else 1)
    assert "Tensor" in info.origin
    assert TargetInfo.from_json(info.to_json()) == info
    assert set(fuzz(variant, 20 if release in ("vllm 0.20.0", "vllm 0.24.0") else 50)) == {PASS}


# ---- operators that are not -----------------------------------------------------------------------------------------


def whole_vectors_only(slots: Any, out: Any, factor: float) -> None:
    """Leaves what a vector of 16 elements does not reach."""
    full, whole = torch.empty_like(out), out.shape[1] // 16 * 16 or out.shape[1]
    moe_sum_reduce(slots, full, factor)
    out[:, :whole] = full[:, :whole]


def second_has_no_place(*given: Any) -> None:
    """Of neighbours with the same expert the second gets no place of its own (flashinfer#3011)."""
    moe_permute(*given)
    ids, inverse = given[1], given[9]
    inverse[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0


def scale_of_slot_zero(y: Any, weights: Any, *rest: Any) -> None:
    moe_unpermute(y, weights[:, :1].expand_as(weights).contiguous(), *rest)


def every_row_counts(y: Any, weights: Any, inverse: Any, ends: Any, *rest: Any) -> None:
    moe_unpermute(y, weights, inverse, torch.full_like(ends, len(y)), *rest)


def ignores_ids(slots: Any, out: Any, ids: Any = None, expert_map: Any = None) -> None:
    moe_sum(slots, out)


def ignores_map(slots: Any, out: Any, ids: Any = None, expert_map: Any = None) -> None:
    moe_sum(slots, out, ids)


_VALUES, _LEFT_OUT = {"exact", "bound"}, {"finite", "dropped", "shards"}


@pytest.mark.parametrize(
    ("variant", "name", "operator", "checks"),
    [
        ("vllm.moe_sum", "moe_sum", ignores_ids, _LEFT_OUT),
        ("vllm.moe_sum", "moe_sum", ignores_map, _LEFT_OUT),
        ("vllm.moe_permute", "moe_permute_with_scratch", second_has_no_place, _VALUES | _LEFT_OUT),
        ("vllm.moe_permute", "moe_unpermute", scale_of_slot_zero, _VALUES),
        ("vllm.moe_permute", "moe_unpermute", every_row_counts, _LEFT_OUT),
        ("sglang.moe_sum_reduce", "moe_sum_reduce", whole_vectors_only, {"written"}),
    ],
)
def test_a_wrong_operator_is_found(
    registered: Registered, variant: str, name: str, operator: Operator, checks: set[str]
) -> None:
    registered("vllm 0.33.0" if variant.startswith("vllm") else "sglang 0.4.2", {name: operator})
    said = {word.partition(":")[0] for word in fuzz(variant, 120, enough=3)} - {PASS}
    assert said
    assert said <= checks
    info = bind(f"experts_bf16@{variant}").info
    assert {info.classify(check)[0] for check in said} == {"contract"}
    assert {info.classify(check, "", ["T=0"])[0] for check in said} == {"robustness"}


def test_a_sum_in_16_bits_breaks_a_promise_of_32_alone(registered: Registered) -> None:
    """As moe_sum was until 0.24, under the schema of 0.33."""
    registered("vllm 0.33.0", {"moe_sum": lambda slots, out, ids=None, expert_map=None: in_dtype(
        slots.masked_fill(slots.isnan(), 0.0), out)})  # fmt: skip
    said = {word.partition(":")[0] for word in fuzz("vllm.moe_sum", 120, enough=8)} - {PASS}
    assert said & {"exact", "bound", "statistical"}


@pytest.mark.parametrize(("provider", "variant"), [("vllm", "moe_permute"), ("vllm", "moe_sum"), ("sglang", "shuffle")])
def test_a_library_without_it_says_so(
    registered: Registered, monkeypatch: pytest.MonkeyPatch, provider: str, variant: str
) -> None:
    registered("vllm 0.33.0" if provider == "vllm" else "sglang 0.4.2", {})
    upper = provider.upper()
    monkeypatch.setattr(sources, upper, replace(getattr(sources, upper), namespace="fake_parts_of_nobody"))
    with pytest.raises(EnvironmentProblem, match="registers no operator"):
        bind(f"experts_bf16@{provider}.{variant}")


def test_a_list_says_that_the_library_alone_is_enough() -> None:
    if sources.installed("vllm"):
        pytest.skip("vLLM is installed here")
    lib = {"MOE_FUZZ_VLLM_LIB": "/a/_moe_C.abi3.so"}
    assert sources.whereabouts("vllm", "moe_permute", lib) == "MOE_FUZZ_VLLM_LIB: _moe_C.abi3.so"
    assert sources.whereabouts("vllm", "moe_sum", {}) == "nothing: no package vllm, no MOE_FUZZ_VLLM_LIB"
