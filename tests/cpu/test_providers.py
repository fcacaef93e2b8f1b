"""Serving libraries as targets: every release's schema is bound as it is, and what cannot be bound says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.contract import TargetInfo
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.targets import sources
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import PASS, VIOLATION
from tests.cpu import fake_library
from tests.cpu.fake_library import RELEASES, Operator, schemas
from tests.cpu.loaded_libraries import VARIABLE, nothing_loaded, refused

_COUNTER = itertools.count()
Released = Callable[..., None]
Change = Callable[[str, Operator], Operator] | None


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_loaded(monkeypatch):
        yield


def provider_of(release: str) -> str:
    return "vllm" if release.startswith("vllm") else "sglang"


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Released:
    """Makes the operators of a release what the provider's library holds, in a namespace that nobody used before."""

    def make(release: str, texts: list[str] | None = None, change: Change = None) -> None:
        provider = provider_of(release)
        name = f"fake_{next(_COUNTER)}"
        fake_library.register(name, list(schemas(release).values()) if texts is None else texts, change)
        source = replace(getattr(sources, provider.upper()), package="no_such_package", namespace=name)
        monkeypatch.setattr(sources, provider.upper(), source)
        file = tmp_path / "empty.py"
        file.write_text("")
        monkeypatch.setenv(VARIABLE[provider], str(file))

    return make


def targets(release: str) -> list[str]:
    """The operators of a release that are targets of ours."""
    ops = {"moe_fused_gate": "grouped_topk"}
    return [f"{ops.get(name, name)}@{provider_of(release)}" for name in schemas(release)]


#: What follows from each release's schema: (renormalize, bias, scale, is_padding).
EXPECTED = {
    ("vllm 0.10.2", "topk_softmax"): ((False,), False, False, False),
    ("vllm 0.11.2", "topk_softmax"): ((False, True), False, False, False),
    ("vllm 0.12.0", "topk_softmax"): ((False, True), False, False, False),
    ("vllm 0.16.0", "topk_softmax"): ((False, True), True, False, False),
    ("vllm 0.16.0", "topk_sigmoid"): ((False, True), True, False, False),
    ("vllm 0.20.0", "topk_softmax"): ((False, True), True, False, False),
    ("vllm 0.20.0", "topk_sigmoid"): ((False, True), True, False, False),
    ("vllm 0.24.0", "topk_softmax"): ((False, True), True, False, False),
    ("vllm 0.24.0", "topk_sigmoid"): ((False, True), True, False, False),
    ("vllm 0.27.0", "topk_softmax"): ((False, True), True, False, True),
    ("vllm 0.27.0", "topk_sigmoid"): ((False, True), True, True, True),
    ("vllm 0.33.0", "topk_softmax"): ((False, True), True, False, True),
    ("vllm 0.33.0", "topk_sigmoid"): ((False, True), True, True, True),
    ("sgl-kernel 0.3.21", "topk_softmax"): ((False, True), False, False, False),
    ("sgl-kernel 0.3.21", "topk_sigmoid"): ((False, True), True, False, False),
    ("sglang-kernel 0.4.2", "topk_softmax"): ((False, True), False, False, False),
    ("sglang-kernel 0.4.2", "topk_sigmoid"): ((False, True), True, False, False),
    ("sglang-kernel 0.4.10", "topk_softmax"): ((False, True), False, False, False),
    ("sglang-kernel 0.4.10", "topk_sigmoid"): ((False, True), True, False, False),
}  # fmt: skip


def test_every_router_of_every_release_is_expected() -> None:
    known = {(release, name) for release in RELEASES for name in schemas(release) if name.startswith("topk_")}
    assert known == set(EXPECTED)


@pytest.mark.parametrize(("release", "op"), EXPECTED)
def test_what_a_target_takes_follows_from_the_schema(released: Released, release: str, op: str) -> None:
    released(release)
    info = bind(f"{op}@{provider_of(release)}").info
    can = info.capabilities
    assert (can.renormalize, can.bias, can.scale, can.is_padding) == EXPECTED[release, op]
    assert info.contract.padding == (("minus_one",) if can.is_padding else ("distinct",))
    assert (can.devices, can.strided, can.out) == (("cpu",), False, True)  # the fake has a kernel for the CPU alone
    assert schemas(release)[op].partition("(")[2] in info.origin
    assert TargetInfo.from_json(info.to_json()) == info


#: What follows for grouped routing: (sigmoid, batch_invariant, n_shared, scorings).
GROUPED = {
    "vllm 0.10.2": ("exp", False, 0, ("softmax", "sigmoid")),
    "vllm 0.11.2": ("tanh", True, 0, ("softmax", "sigmoid")),
    "vllm 0.33.0": ("tanh", True, 0, ("softmax", "sigmoid")),
    "sgl-kernel 0.3.21": ("exp", True, 2, ("sigmoid",)),
    "sglang-kernel 0.4.2": ("exp", True, 2, ("sigmoid",)),
}


@pytest.mark.parametrize("release", GROUPED)
def test_what_a_router_of_groups_takes_follows_from_the_schema(released: Released, release: str) -> None:
    released(release)
    info = bind(f"grouped_topk@{provider_of(release)}").info
    can, contract = info.capabilities, info.contract
    assert (contract.sigmoid, contract.batch_invariant, can.n_shared, can.scorings) == GROUPED[release]
    assert (can.group_scores, can.bias_required, can.expert_map) == (("top2_sum",), True, False)
    assert (can.scale, can.is_padding, can.max_n_group) == (True, False, 32)
    assert can.renormalize == ((False, True) if release.startswith("vllm") else (True,))


def test_the_release_that_lost_moe_fused_gate_is_told(released: Released) -> None:
    released("sglang-kernel 0.4.10")
    assert "registers no operator" in refused("grouped_topk@sglang")


def test_sizes_that_moe_fused_gate_refuses_are_not_drawn(released: Released) -> None:
    released("sglang-kernel 0.4.2")
    info, space = bind("grouped_topk@sglang").info, get_space("grouped_topk")
    cases = list(itertools.islice(strategies.grid(space, info, "cuda", seed=2), 60))
    assert not any(space.refusal(case, info) for case in cases)
    sizes = {(len(case.experts), len(case.experts) // int(case.config["n_group"])) for case in cases}
    assert all(experts & (experts - 1) == 0 and 8 <= size <= 32 for experts, size in sizes)
    assert len(sizes) > 4


def fuzz(target: str, count: int) -> list[str]:
    """Verdicts of the first cases of the grid; violations by check and symptom."""
    runner, options = Runner("cpu"), RunOptions()
    info = runner.describe(target)
    said = []
    for case in itertools.islice(strategies.grid(get_space(info.op), info, "cpu", seed=5), count):
        verdict = runner.run(case, target, options)
        said.append(verdict.kind if verdict.kind != VIOLATION else ":".join(verdict.key))
    return said


@pytest.mark.parametrize("release", RELEASES)
def test_a_right_operator_passes_under_each_releases_schema(released: Released, release: str) -> None:
    released(release)
    for target in targets(release):
        assert set(fuzz(target, 200 if release in ("vllm 0.33.0", "sglang-kernel 0.4.2") else 25)) == {PASS}, target


def test_a_wrong_operator_is_found(released: Released) -> None:
    def doubles(name: str, right: Operator) -> Operator:
        def operator(weights: torch.Tensor, ids: torch.Tensor, *rest: object) -> None:
            right(weights, ids, *rest)
            if ids.shape[1] > 1:
                ids[:, 1] = ids[:, 0]

        return operator

    released("vllm 0.33.0", change=doubles)
    said = set(fuzz("topk_softmax@vllm", 40))
    assert "ids:duplicate" in said
    info = bind("topk_softmax@vllm").info
    assert info.classify("ids", "duplicate", ["fault:nan_rows"])[0] == "contract"
    assert info.classify("ids", "duplicate", ["fault:extreme_bias"])[0] == "robustness"


@pytest.mark.parametrize(
    ("release", "target", "check", "symptom", "features", "class_", "says"),
    [
        # rows of NaN and Inf have a test of their own; a finite row whose scores underflow has none
        ("vllm 0.33.0", "topk_softmax@vllm", "finite", "nan on an undefined row", [], "contract", "vllm#39391"),
        ("vllm 0.33.0", "topk_sigmoid@vllm", "finite", "nan", ["bias"], "robustness", "2^-128"),
        ("vllm 0.33.0", "topk_softmax@vllm", "finite", "infinite", ["fault:negative_bias"], "robustness", "2^-128"),
        ("vllm 0.33.0", "topk_softmax@vllm", "selection", "inversion", ["fault:negative_bias"], "contract", "randn"),
        ("vllm 0.33.0", "grouped_topk@vllm", "selection", "group", ["groups>8"], "contract", "32 groups"),
        ("vllm 0.33.0", "grouped_topk@vllm", "weights", "off", [], "robustness", "2e-2"),
        ("vllm 0.33.0", "grouped_topk@vllm", "order", "ascending", [], "robustness", "sorted"),
        ("sglang-kernel 0.4.2", "grouped_topk@sglang", "finite", "nan", [], "contract", "sglang#31017"),
        ("sglang-kernel 0.4.2", "grouped_topk@sglang", "finite", "nan on an undefined row", [], "robustness", "30079"),
        ("sglang-kernel 0.4.2", "topk_sigmoid@sglang", "finite", "negative", ["bias"], "contract", "1e-3"),
        ("sglang-kernel 0.4.2", "topk_sigmoid@sglang", "finite", "infinite", ["fault:extreme_bias"], "robustness", ""),
        ("sglang-kernel 0.4.2", "topk_softmax@sglang", "error", "RuntimeError", ["T=0"], "robustness", "sglang#22455"),
    ],
)
def test_findings_are_classed_by_what_the_project_says(
    released: Released, release: str, target: str, check: str, symptom: str, features: list[str], class_: str, says: str
) -> None:
    released(release)
    found, clause = bind(target).info.classify(check, symptom, features)
    assert found == class_
    assert says in clause


def test_weights_beside_minus_one_are_free_but_the_id_is_not(released: Released) -> None:
    def ignores_padding(name: str, right: Operator) -> Operator:
        return lambda *given: right(*given[:-1], None)

    released("vllm 0.33.0", change=ignores_padding)
    assert "padding:id" in fuzz("topk_softmax@vllm", 60)


def test_the_third_output_is_memory_of_its_own(released: Released) -> None:
    seen = []

    def watch(name: str, right: Operator) -> Operator:
        def operator(*given: Any) -> None:
            seen.append(given[2])
            right(*given)

        return operator

    released("vllm 0.24.0", change=watch)
    bind("topk_softmax@vllm")({"logits": torch.randn(3, 8), "top_k": 2, "renormalize": True})
    assert (tuple(seen[0].shape), seen[0].dtype) == ((3, 2), torch.int32)


# ---- what cannot be bound -------------------------------------------------------------------------------------------


def test_an_unknown_mandatory_argument_is_refused(released: Released) -> None:
    text = schemas("vllm 0.33.0")["topk_softmax"].replace("bool renormalize", "bool renormalize, int expert_offset")
    released("vllm 0.33.0", [text])
    said = refused("topk_softmax@vllm")
    assert "'expert_offset'" in said
    assert "docs/targets.md" in said


def test_an_unknown_optional_argument_is_left_out(released: Released) -> None:
    text = schemas("vllm 0.33.0")["topk_softmax"].replace(") -> ()", ", Tensor? mask, int sentinel=7) -> ()")
    released("vllm 0.33.0", [text])
    weights, ids = bind("topk_softmax@vllm")({"logits": torch.randn(3, 8), "top_k": 2})
    assert (weights.shape, ids.dtype) == ((3, 2), torch.int32)


def test_a_schema_without_an_output_is_refused(released: Released) -> None:
    released("sglang-kernel 0.4.2", ["topk_softmax(Tensor! topk_weights, Tensor gating_output) -> ()"])
    assert "no argument for the ids" in refused("topk_softmax@sglang")


def test_an_operator_that_the_release_lacks_is_told(released: Released) -> None:
    released("vllm 0.33.0", [schemas("vllm 0.33.0")["topk_sigmoid"]])
    assert "registers no operator" in refused("topk_softmax@vllm")
