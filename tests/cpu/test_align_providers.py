"""moe_align_block_size of vLLM and SGLang as targets: bound by schema, its buffers those of the callers.

The schemas are as vLLM's torch_bindings.cpp and SGLang's common_extension.cc write them; the operators behind them are
ours, and the plan they make is the reference's, laid out as each library lays it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_fuzz import strategies
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.execute.runner import Runner
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.reference.align import align as reference
from moe_fuzz.targets import extension, sources
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import PASS, VIOLATION

_COMMON = "Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, "
OLD = f"moe_align_block_size({_COMMON}Tensor! num_tokens_post_pad) -> ()"
MAPPED = OLD.replace(") -> ()", ", Tensor? maybe_expert_map) -> ()")
NEW = MAPPED.replace(") -> ()", ", Tensor!? scatter_idx=None) -> ()")
SGLANG = OLD.replace(") -> ()", ", Tensor! cumsum_buffer, bool pad_sorted_token_ids) -> ()")
SGLANG_NEW = SGLANG.replace(") -> ()", ", bool ignore_invalid_expert=False) -> ()")

_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators with it
_COUNTER = itertools.count()
Operator = Callable[..., None]
Registered = Callable[[str, str, Operator], None]


def vllm(ids: Any, experts: int, block: int, held: Any, owner: Any, total: Any, expert_map: Any = None,
         scatter_idx: Any = None) -> None:  # fmt: skip
    """The plan at the front, N and -1 behind it."""
    assert scatter_idx is None
    found = reference(ids, block, experts, expert_map=expert_map)
    held.fill_(ids.numel())
    owner.fill_(-1)
    held[: len(found[0])].copy_(found[0])
    owner[: len(found[1])].copy_(found[1])
    total.copy_(found[2])


def sglang(ids: Any, buckets: int, block: int, held: Any, owner: Any, total: Any, cumsum: Any, pads: bool,
           ignores: bool = False) -> None:  # fmt: skip
    """-1 has the first bucket; past the last block expert_ids is left alone."""
    assert pads
    assert not ignores
    assert len(cumsum) == buckets + 1
    assert len(held) % 4 == 0
    found = reference(ids + 1, block, buckets)
    held.fill_(ids.numel())
    held[: len(found[0])].copy_(found[0])
    used = int(found[2]) // block
    owner[:used].copy_(found[1][:used] - 1)
    total.copy_(found[2])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registered]:
    """Makes an operator what the provider's library holds, in a namespace that nobody used before."""

    def make(provider: str, text: str, operator: Operator) -> None:
        name = f"fake_align_{next(_COUNTER)}"
        library = torch.library.Library(name, "DEF")
        _KEPT.append(library)
        library.define(text)
        library.impl("moe_align_block_size", operator, "CPU")
        upper = provider.upper()
        monkeypatch.setattr(sources, upper, replace(getattr(sources, upper), package="no_such_package", namespace=name))
        file = tmp_path / "empty.py"
        file.write_text("")
        monkeypatch.setenv(f"MOE_FUZZ_{upper}_LIB", str(file))
        extension.load.cache_clear()

    extension.load.cache_clear()
    yield make
    extension.load.cache_clear()


def fuzz(target: str, count: int) -> list[str]:
    """Verdicts of the first cases of the grid; violations by check and symptom."""
    runner = Runner("cpu")
    info = runner.describe(target)
    said = []
    for case in itertools.islice(strategies.grid(get_space("align"), info, "cpu", seed=5), count):
        verdict = runner.run(case, target, RunOptions())
        said.append(verdict.kind if verdict.kind != VIOLATION else ":".join(verdict.key))
    return said


@pytest.mark.parametrize(
    ("provider", "text", "operator", "mapped"),
    [("vllm", OLD, vllm, False), ("vllm", MAPPED, vllm, True), ("vllm", NEW, vllm, True),
     ("sglang", SGLANG, sglang, False), ("sglang", SGLANG_NEW, sglang, False)],
    ids=["vllm until 0.12", "vllm 0.14", "vllm 0.31", "sglang 0.4.2", "sglang 0.4.10"],
)  # fmt: skip
def test_a_right_operator_passes_under_each_schema(registered, provider, text, operator, mapped):
    registered(provider, text, operator)
    info = bind(f"align@{provider}").info
    assert info.capabilities.expert_map is mapped
    assert info.capabilities.devices == ("cpu",)
    assert info.capabilities.absent == ("inverse",)
    assert text.partition("(")[2][:40] in info.origin
    assert set(fuzz(f"align@{provider}", 120)) == {PASS}


def test_the_bug_of_releases_before_0_27_is_found(registered):
    """vllm#47785: -1 is below num_experts, and an index."""

    def unguarded(ids, experts, block, held, owner, total, expert_map=None):
        vllm(torch.where(ids == -1, experts - 1, ids), experts, block, held, owner, total, expert_map)

    registered("vllm", MAPPED, unguarded)
    said = set(fuzz("align@vllm", 60)) - {PASS}
    assert said
    assert {word.partition(":")[0] for word in said} <= {"count", "slots", "fill"}
    info = bind("align@vllm").info
    assert info.classify("count", "too many", ["fault:minus_one_ids"])[0] == "contract"
    assert info.classify("count", "too many", ["fault:sentinel_ids"])[0] == "robustness"


def test_a_tail_of_expert_zero_is_found_where_it_is_promised(registered):
    def zeros(ids, experts, block, held, owner, total, expert_map=None):
        vllm(ids, experts, block, held, owner, total, expert_map)
        owner.clamp_(min=0)

    registered("vllm", MAPPED, zeros)
    assert set(fuzz("align@vllm", 40)) == {PASS, "tail:expert"}


def test_dropped_slots_among_those_of_an_expert_are_found(registered):
    def last(ids, buckets, block, held, owner, total, *rest):
        sglang(torch.where(ids < 0, buckets - 2, ids), buckets, block, held, owner, total, *rest)

    registered("sglang", SGLANG, last)
    said = {word.partition(":")[0] for word in fuzz("align@sglang", 60)} - {PASS}
    assert said
    assert said <= {"count", "experts", "slots", "written"}  # an expert_ids that ends too early is left as it was


def test_a_store_past_a_callers_buffer_is_found(registered):
    """The room is exactly what the caller allocates."""

    def overruns(ids, experts, block, held, owner, total, expert_map=None):
        vllm(ids, experts, block, held, owner, total, expert_map)
        if len(held) % 4:
            ctypes.c_int32.from_address(held.data_ptr() + 4 * len(held)).value = ids.numel()

    registered("vllm", MAPPED, overruns)
    assert {word.partition(":")[0] for word in fuzz("align@vllm", 40)} == {PASS, "canary"}


def test_an_argument_that_nobody_knows_is_refused(registered):
    registered("vllm", OLD.replace("int block_size", "int block_size, int lora_id"), lambda *given: None)
    with pytest.raises(EnvironmentProblem, match="'lora_id'"):
        bind("align@vllm")


def test_a_library_without_it_says_so(registered, monkeypatch):
    registered("sglang", SGLANG, sglang)
    monkeypatch.setattr(sources, "SGLANG", replace(sources.SGLANG, namespace="fake_align_of_nobody"))
    with pytest.raises(EnvironmentProblem, match="registers no operator"):
        bind("align@sglang")
