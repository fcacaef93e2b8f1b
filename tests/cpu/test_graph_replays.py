"""Graph modes without a GPU: replays over static buffers, each judged like a call; and what a raising check leaves."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import OOM, PASS, VIOLATION, Verdict

SPACE = get_space("topk_softmax")
ROUTERS = """
import torch
from moe_fuzz import Contract, declares

CALLS = []
SEEN = {}

def right(logits, top_k, out=None, reciprocal=False):
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=1e300) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    e = (x - x.amax(dim=1, keepdim=True).clamp_min(-1e300)).exp()
    picked, total = e.gather(1, ids).float(), e.sum(1, keepdim=True).clamp_min(1e-30).float()
    weights, ids = (picked * (1 / total) if reciprocal else picked / total), ids.int()
    if out is None:
        return weights, ids
    out[0].copy_(weights)
    out[1].copy_(ids)
    return out

promise = declares(contract=Contract(deterministic=True))

@promise
def counts(logits, top_k, out=None):
    CALLS.append((logits.data_ptr(), tuple(logits.shape)))
    return right(logits, top_k, out)

@promise
def tuned_on_an_address_seen_twice(logits, top_k):
    SEEN[logits.data_ptr()] = SEEN.get(logits.data_ptr(), 0) + 1
    return right(logits, top_k, reciprocal=SEEN[logits.data_ptr()] >= 2)

@promise
def keeps_the_first_answer(logits, top_k, out=None):
    found = right(logits, top_k)
    if out is None:
        return found
    key = out[0].data_ptr()
    if key not in SEEN:  # the buffers are filled already
        SEEN[key] = True
        out[0].copy_(found[0])
        out[1].copy_(found[1])
    return out

@promise
def off_then_raises(logits, top_k):
    CALLS.append(1)
    if len(CALLS) % 2 == 0:
        raise RuntimeError("the second call is one too many")
    weights, ids = right(logits, top_k)
    return weights * 1.5, ids

@promise
def off_then_wider(logits, top_k):
    CALLS.append(1)
    weights, ids = right(logits, top_k)
    return (weights * 1.5, ids) if len(CALLS) % 2 else (torch.cat([weights, weights], 1), torch.cat([ids, ids], 1))

@promise
def off_then_out_of_memory(logits, top_k):
    CALLS.append(1)
    if len(CALLS) % 2 == 0:
        raise MemoryError("no more")
    weights, ids = right(logits, top_k)
    return weights * 1.5, ids

@promise
def raises_on_eight(logits, top_k):
    if len(logits) == 8:
        raise RuntimeError("eight")
    return right(logits, top_k)

def nobody_said(logits, top_k):
    return right(logits, top_k)
"""


@pytest.fixture
def runner() -> Runner:
    return Runner("cpu")  # of each test, so that the module-level state above is new


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "routers.py"
    path.write_text(ROUTERS)
    return path


def step(tokens: int, padding: int = 0, *faults: Fault) -> Step:
    rows = Labels.range(tokens)
    return Step(rows, rows.last(padding), faults)


def run(runner: Runner, target: str, *steps: Step, mode: str = "graph", **config: object) -> Verdict:
    made = Case("topk_softmax", {**SIMPLEST, "experts": "0-15", "top_k": 3, **config}, steps, 3, mode)  # type: ignore[arg-type]
    SPACE.validate(made)
    return runner.run(made, f"topk_softmax@{target}", RunOptions())


def checks(verdict: Verdict) -> list[tuple[str, str]]:
    return [(v.check, v.symptom) for v in verdict.violations]


NAN = Fault("nan_rows", "logits", Labels.parse("6-7"))
STALE = Fault("stale_rows", "logits", Labels.parse("5-7"), 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["graph", "piecewise"])
@pytest.mark.parametrize("config", [{}, {"out": True, "is_padding": True, "padding": "minus_one"},
                                    {"is_padding": True, "padding": "garbage", "bias": True}])  # fmt: skip
def test_our_kernel_passes(runner: Runner, mode: str, config: dict[str, object]) -> None:
    verdict = run(runner, "builtin", step(8), step(8, 2, NAN), step(4, 4), step(8, 3, STALE), mode=mode, **config)
    assert verdict.kind == PASS, verdict.violations


@pytest.mark.interpreter
def test_drawn_cases_pass(runner: Runner) -> None:
    """Replays count as parity as calls do."""
    info = runner.describe("topk_softmax@builtin")
    drawn = (c for c in strategies.grid(SPACE, info, "cpu", 11) if len(c.steps) > 1)
    verdicts = [(case, runner.run(case, info.name, RunOptions())) for case in itertools.islice(drawn, 20)]
    assert [(SPACE.label(case), v.violations) for case, v in verdicts if v.kind != PASS] == []
    assert any(v.parity for case, v in verdicts if case.mode == "graph")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("checks", "parity"), [(None, True), (("determinism",), True), (("structure",), False), ((), False)]
)
def test_parity_is_for_those_who_compare_numbers(runner: Runner, checks: tuple[str, ...] | None, parity: bool) -> None:
    """A relation is asked of the last step alone, and is compared with all the same."""
    rows = tuple(Step(Labels.range(8)) for _ in range(3))
    case = Case("topk_softmax", SIMPLEST | {"experts": "0-15", "top_k": 2}, rows, 5, "graph")
    verdict = runner.run(case, "topk_softmax@builtin", RunOptions(checks))
    assert (verdict.kind, verdict.parity) == (PASS, parity), verdict.violations


def test_buffers_are_static_and_made_the_largest_first(runner: Runner, file: Path) -> None:
    verdict = run(runner, f"{file}:counts", step(2), step(8), step(2, 1), step(8, 4))
    assert verdict.kind == PASS, verdict.violations
    calls = runner._bind(f"topk_softmax@{file}:counts").function.__globals__["CALLS"]
    assert [shape for _, shape in calls[:2]] == [(8, 16), (2, 16)]  # the warm-up calls
    at = {shape: address for address, shape in calls[:2]}
    replays = [address for address, shape in calls if address == at[shape]]
    assert len(replays) >= 2 + 4 + 1  # each warm-up, each step, and the last step once more
    assert len(calls) - len(replays) >= 4  # an eager call beside each replay, in buffers of its own


def test_a_replay_that_differs_from_an_eager_call_in_its_last_bit(runner: Runner, file: Path) -> None:
    """Inside every bound, the same each time: only `replay` sees it. No fence recycles an address inside a case."""
    verdict = run(runner, f"{file}:tuned_on_an_address_seen_twice", *(step(16) for _ in range(2)))
    assert {v.check for v in verdict.violations} == {"replay"}
    assert verdict.violations[0].step == 0
    assert verdict.violations[0].message.startswith("step 0: row ")


def test_outputs_are_poisoned_before_each_replay(runner: Runner, file: Path) -> None:
    verdict = run(runner, f"{file}:keeps_the_first_answer", step(8), step(8), out=True)
    assert ("written", "weights:unwritten") in checks(verdict)
    assert run(runner, f"{file}:counts", step(8), step(8), out=True).kind == PASS


def test_a_later_step_is_judged_as_the_first_and_named(runner: Runner) -> None:
    """The mask is that of the warm-up: the step with padding shows it, wherever it stands."""
    for before in range(3):
        verdict = run(runner, "planted.padding_mask_mirrored", *[step(8)] * before, step(8, 2), step(8),
                      is_padding=True, padding="minus_one")  # fmt: skip
        found = next(v for v in verdict.violations if v.check == "padding")
        assert (found.step, found.symptom, found.where[0]) == (before, "id", 6)
        assert f"step {before}: padding row 6" in found.message


def test_a_target_that_raises_in_the_warm_up(runner: Runner, file: Path) -> None:
    verdict = run(runner, f"{file}:raises_on_eight", step(2), step(8), step(2))
    assert (verdict.kind, checks(verdict)) == (VIOLATION, [("error", "RuntimeError")])
    assert verdict.violations[0].step == 1
    assert verdict.violations[0].message.endswith("(warming up the bucket of 8 tokens)")
    assert run(runner, f"{file}:raises_on_eight", step(2), step(4)).kind == PASS


def test_who_does_not_declare_it_is_not_drawn_graphs(runner: Runner, file: Path) -> None:
    info = runner.describe(f"topk_softmax@{file}:nobody_said")
    assert not info.contract.graph
    assert SPACE.modes(info) == ("eager",)
    assert "graph" in SPACE.modes(runner.describe(f"topk_softmax@{file}:counts"))
    assert run(runner, f"{file}:nobody_said", step(4), step(4, 1)).kind == PASS  # asked for by name, it is run


# ---- violations found so far are kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "then"),
    [("off_then_raises", ("error", "RuntimeError")), ("off_then_wider", ("structure", "weights:shape"))],
)
def test_what_a_check_found_stays_when_a_later_one_raises(
    runner: Runner, file: Path, name: str, then: tuple[str, str]
) -> None:
    verdict = run(runner, f"{file}:{name}", step(4), mode="eager")
    assert verdict.kind == VIOLATION
    assert [v.check for v in verdict.violations] == ["weights", then[0]]
    assert checks(verdict)[1] == then
    assert verdict.violations[1].message.endswith("(when `determinism` called it again)")
    assert bool(verdict.detail) == (name == "off_then_raises")


def test_what_a_check_found_stays_when_memory_ends(runner: Runner, file: Path) -> None:
    verdict = run(runner, f"{file}:off_then_out_of_memory", step(4), mode="eager")
    assert verdict.kind == OOM  # the worker is replaced all the same
    assert [v.check for v in verdict.violations] == ["weights"]
