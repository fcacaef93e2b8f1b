"""Eager steps in the buffers of steps before them: what a target keeps by the address of a tensor is there again."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from moe_fuzz import sequences
from moe_fuzz.campaign.finding import features_of
from moe_fuzz.campaign.minimize import Reducer
from moe_fuzz.campaign.repro import render
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.cli.show import describe
from moe_fuzz.cli.source import Source
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts.inputs import materialize
from moe_fuzz.ops.space import Means
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, VIOLATION, Verdict
from tests.cpu.conftest import Batch
from tests.cpu.experts_seen import case_of as experts_case
from tests.cpu.repro_cases import HEALTHY, case_of, exhibit_of, finding_of, write

ROUTERS = """
import torch

KEPT, PLACES, GIVEN = {}, [], []

def right(logits, k, out=None):
    x = logits.float()
    weights, ids = torch.softmax(x, -1).topk(k)
    if out is None:
        return weights, ids.int()
    GIVEN.append([bool((one.view(torch.int32) == one.view(torch.int32)[0, 0]).all()) for one in out])
    out[0].copy_(weights)
    out[1].copy_(ids)
    return out

def by_address(logits, k, out=None):
    PLACES.append((logits.data_ptr(), *(one.data_ptr() for one in out or ())))
    key = logits.data_ptr(), logits.shape, logits.stride()
    if key not in KEPT:
        KEPT[key] = torch.softmax(logits.float(), -1).topk(k)
    weights, ids = KEPT[key]
    if out is None:
        return weights.clone(), ids.int()
    out[0].copy_(weights)
    out[1].copy_(ids)
    return out

def experts_once(x, w13, w2, weights, ids):
    if KEPT.setdefault(x.data_ptr(), ids.tolist()) != ids.tolist():
        raise RuntimeError("other ids than before")
    return torch.zeros_like(x)

def by_version(logits, k):
    key = logits.data_ptr(), logits.shape, logits.stride(), logits._version
    if key not in KEPT:
        KEPT[key] = torch.softmax(logits.float(), -1).topk(k)
    weights, ids = KEPT[key]
    return weights.clone(), ids.int()

def bias_is_a_weight(logits, k, bias=None):
    if bias is not None:
        kept = KEPT.setdefault(("bias", bias.data_ptr(), bias.shape, bias.stride()), bias.float().clone())
    scores = torch.softmax(logits.float(), -1)
    ids = (scores if bias is None else scores + kept).topk(k).indices
    return scores.gather(1, ids), ids.int()

def writes_before_it_once(logits, k, out=None):
    import ctypes
    found = right(logits, k, out)
    if len(GIVEN) > 1:
        ctypes.memset(out[1].data_ptr() - 1, 0, 1)
    return found
"""


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    path = tmp_path / "routers.py"
    path.write_text(ROUTERS)
    return path


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


def steps(*tokens: int) -> tuple[Step, ...]:
    return tuple(Step(Labels.range(count), refilled=True) for count in tokens)


def run(runner: Runner, case: Case) -> Verdict:
    get_space(case.op).validate(case)
    return runner.run(case, case.target, RunOptions())


def module(runner: Runner, case: Case) -> dict[str, list[object]]:
    return runner._bind(case.target).function.__globals__


# ---- the value ------------------------------------------------------------------------------------------------------


def test_a_case_says_it_of_each_step_but_the_first() -> None:
    case = case_of("topk_softmax@torch", steps=steps(3, 3))
    assert [step.refilled for step in case.steps] == [False, True]
    assert Case.loads(case.inline()) == case
    assert case.to_json()["steps"] == [{"rows": "0-2"}, {"rows": "0-2", "refilled": True}]
    fresh = case.over_buffers(False)
    assert fresh.to_json()["steps"] == [{"rows": "0-2"}] * 2, "an old line means what it meant"
    assert fresh.digest != case.digest
    assert not case.keep_steps([1]).refilled


@pytest.mark.parametrize(("mode", "refilled", "where"), [("eager", 1, "steps[1].refilled"), ("graph", True, "steps")])
def test_what_cannot_be_is_refused(mode: str, refilled: object, where: str) -> None:
    data = case_of("topk_softmax@torch", steps=steps(3, 3)).over_buffers(False).to_json(digest=False)
    data["mode"] = mode
    data["steps"][1]["refilled"] = refilled
    with pytest.raises(CaseError) as raised:
        Case.from_json(data)
    assert raised.value.where == where


def test_a_person_is_told() -> None:
    case = case_of("topk_softmax@torch", steps=steps(3, 3))
    told = "\n".join(describe(Source((case,), "here")))
    assert "step 1   3 tokens (rows 0-2), in the buffers of an earlier step where they fit" in told
    assert get_space(case.op).label(case).startswith("topk_softmax refilled T=3 T=3")
    assert "refilled buffers" in features_of(get_space(case.op), case)


# ---- the calls ------------------------------------------------------------------------------------------------------


def test_what_is_kept_by_address_shows_in_the_same_buffers_alone(runner: Runner, routers: Path) -> None:
    case = case_of(f"topk_softmax@{routers}:by_address", steps=steps(5, 5))
    verdict = run(runner, case)
    assert (verdict.kind, verdict.violations[0].check, verdict.violations[0].step) == (VIOLATION, "selection", 1)
    module(runner, case)["KEPT"].clear()
    assert run(runner, case.over_buffers(False)).kind == PASS


def test_buffers_are_of_a_batch_size(runner: Runner, routers: Path) -> None:
    """Another size has its own, and leaves those of the first alone."""
    target = f"topk_softmax@{routers}:by_address"
    case = case_of(target, steps=(*steps(5, 3, 5), replace(steps(5)[0], refilled=False)), out=True)
    found = module(runner, case)
    runner.run(case, target, RunOptions(checks=("structure",)))
    first, small, again, fresh = found["PLACES"][:4]
    assert first == again
    assert not {*first} & {*small}
    assert not {*first} & {*fresh}


def test_results_are_poisoned_and_guarded_anew(runner: Runner, routers: Path) -> None:
    case = case_of(f"topk_softmax@{routers}:writes_before_it_once", steps=steps(3, 3), out=True)
    found = module(runner, case)
    verdict = runner.run(case, case.target, RunOptions(checks=("structure", "canary")))
    assert found["GIVEN"][:2] == [[True, True]] * 2
    assert [(one.check, one.symptom, one.step) for one in verdict.violations] == [("canary", "ids:left", 1)]


def test_who_asks_whether_a_tensor_was_written_is_told(runner: Runner, routers: Path) -> None:
    case = case_of(f"topk_softmax@{routers}:by_version", steps=steps(5, 5, 5))
    assert run(runner, case).kind == PASS


def test_steps_of_two_sizes_may_lie_on_two_devices() -> None:
    """A large step is made on the GPU, a small one on the host: nothing of the two can be compared."""
    case = replace(experts_case(), steps=steps(3, 2))
    large, small = (materialize(case, index) for index in range(2))
    large = large.replace(**{name: tensor.to("meta") for name, tensor in large.plain.items()})
    assert not small.refills(large)
    assert not large.refills(small)


def test_weights_that_change_are_others(runner: Runner, routers: Path) -> None:
    """A target may keep what it has made of weights: only what changes from step to step is filled anew."""
    one, two = steps(5, 5)
    for fault in (Fault("broken_bias", "bias"), Fault("noncontiguous", "logits")):
        case = case_of(f"topk_softmax@{routers}:bias_is_a_weight", bias=True, experts=16,
                       steps=(one, replace(two, faults=(fault,))))  # fmt: skip
        verdict = run(runner, case)
        assert verdict.kind == PASS, verdict.violations


# ---- drawing and reducing -------------------------------------------------------------------------------------------


def test_half_of_the_sequences_are_in_the_same_buffers() -> None:
    info = TargetInfo("align@here", "align", Contract(graph=False), Capabilities(compiles=False))
    drawn = [case for case in islice(draw("align", info, "cpu", 5), 2000)
             if len(case.steps) > 1 and case.mode == "eager"]  # fmt: skip
    refilled = [case for case in drawn if case.refilled]
    alike = [case for case in refilled if len({step.tokens for step in case.steps}) < len(case.steps)]
    assert len(drawn) > 40
    assert 0.3 < len(refilled) / len(drawn) < 0.7
    assert len(alike) > len(refilled) / 2, "as in decoding, a batch size comes again and again"
    for case in refilled:
        assert len({tuple(fault for fault in step.faults if not fault.rows) for step in case.steps}) == 1
        get_space("align").validate(case)


def test_which_of_them_hangs_on_the_seed() -> None:
    space, chosen = get_space("align"), random.Random(1)
    plan = sequences.plan(sequences.SEQUENCE, (4,), (), chosen)
    config = case_of("align@here").config
    info = TargetInfo("align@here", "align", Contract(), Capabilities(compiles=False))
    one, two = (sequences.make(space, config, sequences.SEQUENCE, plan, seed, "align@here", Means.of(info, "cpu"))
                for seed in (1, 2))  # fmt: skip
    assert one.refilled
    assert not two.refilled
    assert [step.rows for step in one.steps] == [step.rows for step in two.steps]


def test_the_reducer_drops_it_unless_it_is_needed_and_leads_out_of_graphs_by_it() -> None:
    space = get_space("topk_softmax")
    case = case_of("topk_softmax@torch", mode="graph", experts=16, steps=steps(5, 3, 5)).over_buffers(False)

    def smallest(case: Case, needed: bool) -> Case:
        def fails(cases: tuple[Case, ...]) -> bool:
            last = cases[-1]
            shared = {step.tokens for step in last.steps}
            return len(last.steps) > 1 and (not needed or (bool(last.way) and len(shared) < len(last.steps)))

        return Reducer(space, fails, 60).run(case).case

    found = smallest(case, needed=True)
    assert (found.mode, found.refilled) == ("eager", True)
    assert [step.tokens for step in found.steps] == [1, 1]
    assert not smallest(found, needed=False).refilled


# ---- the script -----------------------------------------------------------------------------------------------------


def test_a_script_fills_the_same_buffers(runner: Runner, routers: Path, tmp_path: Path, batch: Batch) -> None:
    case = case_of(f"topk_softmax@{routers}:by_address", steps=steps(5, 2, 5), out=True)
    verdict = run(runner, case)
    text = render(finding_of(case, verdict), exhibit_of(runner, case))
    assert "the buffers of one are filled anew for another" in " ".join(text.split())
    path = write(tmp_path, "refilled", text)
    answers = batch([path], [path, HEALTHY])
    assert [code for code, _ in answers] == [1, 0], answers
    assert "HELD" not in render(finding_of(case, verdict), exhibit_of(runner, case.over_buffers(False)))


def test_so_does_the_script_of_another_op(runner: Runner, routers: Path, tmp_path: Path, batch: Batch) -> None:
    """Weights of three dimensions, of which a fold lies in memory, are among its buffers."""
    case = replace(experts_case(), steps=steps(3, 3), target=f"experts_bf16@{routers}:experts_once")
    verdict = runner.run(case, case.target, RunOptions(checks=("error",)))
    assert [(one.check, one.step) for one in verdict.violations] == [("error", 1)]
    path = write(tmp_path, "experts", render(finding_of(case, verdict), exhibit_of(runner, case)))
    [(code, said)] = batch([path])
    assert (code, "other ids than before" in said) == (1, True), said
