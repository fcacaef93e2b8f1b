"""One defect, two smallest cases: taken for one finding where nothing speaks for two, and told."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.faces import face_of, same_defect, with_faults_of
from moe_fuzz.campaign.findings import add_face, load_findings, write_finding
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, Fault
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from tests.cpu.campaign_fakes import GOOD, SPACE, FakePool, Listener, always_good, bad, campaign, toy, when
from tests.cpu.repro_cases import case_of, finding_of
from tests.cpu.test_findings import finding

ROUTING = get_space("topk_softmax")


def nan_or_ties(case: Case) -> bool:
    """One defect that either fault sets off, from eight experts on."""
    return len(case.experts) >= 8 and bool({"nan_rows", "ties"} & set(case.fault_names))


# ---- in a campaign


def test_one_defect_that_two_faults_set_off_is_one_finding(tmp_path):
    """It was two: neither fault can be reduced to the other."""
    for seed in range(4):
        folder, listener = tmp_path / str(seed), Listener()
        summary = campaign(folder, when(nan_or_ties), listener, seed=seed, cases=400).run()
        [found] = summary.new
        [face] = found.faces
        assert {found.case.fault_names, face.case.fault_names} == {("nan_rows",), ("ties",)}
        assert face.id != found.id
        assert summary.cases == 400
        [note] = [event.message for event in listener.of(events.Note) if "also shows" in event.message]
        assert "each fails with the faults of the other" in note
        assert load_findings(StateDir(folder)) == [found]
        report = (folder / "findings" / found.id / "report.md").read_text()
        assert f"moe-fuzz replay {face.case.inline()}" in report
        assert "a defect of its own" in report


def test_what_a_face_explains_is_not_examined_again(tmp_path):
    summary = campaign(tmp_path, when(nan_or_ties), cases=400).run()
    more = campaign(tmp_path, when(nan_or_ties), seed=99, cases=400)
    again = more.run()
    assert (again.exit_code, again.new, len(again.known)) == (0, (), 1)
    assert again.known[0].times_seen > summary.new[0].times_seen


def test_a_finding_is_fixed_when_all_its_faces_are(tmp_path):
    """Were they two defects after all, and one of them repaired, the other goes on being known."""
    [found] = campaign(tmp_path, when(nan_or_ties), cases=400).run().new
    left = found.faces[0].case.fault_names[0]
    half = campaign(tmp_path, when(lambda case: nan_or_ties(case) and left in case.fault_names), seed=3).run()
    assert ([f.id for f in half.known], half.fixed) == ([found.id], ())
    none = campaign(tmp_path, always_good, seed=4).run()
    assert [f.id for f in none.fixed] == [found.id]


def test_two_defects_stay_two(tmp_path):
    """One needs many experts, the other does not: the faults of one set off nothing in the other's config."""

    def either(case):
        many = "nan_rows" in case.fault_names and len(case.experts) >= 8
        return many or ("ties" in case.fault_names and case.config["bias"])

    for seed in range(3):
        summary = campaign(tmp_path / str(seed), when(either), seed=seed, cases=500).run()
        assert {f.case.fault_names for f in summary.new} == {("nan_rows",), ("ties",)}
        assert not any(f.faces for f in summary.new)


def test_another_symptom_is_another_defect(tmp_path):
    def judge(case, history, options):
        return bad("routing", case.fault_names[0]) if nan_or_ties(case) and len(case.fault_names) == 1 else GOOD

    assert len(campaign(tmp_path, judge, cases=400).run().new) == 2


def test_nothing_new_hides_behind_a_finding_of_an_earlier_campaign(tmp_path):
    """Somebody may have looked at that one; what they did not see must be told as new."""
    [first] = campaign(tmp_path, when(lambda case: nan_or_ties(case) and "ties" in case.fault_names)).run().new
    summary = campaign(tmp_path, when(nan_or_ties), seed=8, cases=400).run()
    assert [f.id for f in summary.known] == [first.id]
    assert [f.case.fault_names for f in summary.new] == [("nan_rows",)]


def test_the_order_in_which_two_findings_come_does_not_matter(tmp_path):
    """One that needs much, and then one that needs less: the other way round the first would never have been one."""
    wide, plain = toy(64, 1, 1, ["ties"], bias=True), toy(64, 1, 1, ["ties"])
    for at, order in enumerate(itertools.permutations([wide, plain])):
        allowed = {order[0].digest}

        def judge(case, history, options, allowed=allowed):
            return bad() if case.digest in allowed else GOOD

        pool = FakePool(judge)
        made = campaign(tmp_path / str(at), judge, pool=pool, cases=1, minimize_seconds=1e-9)
        for case in order:
            allowed.add(case.digest)
        made._resume = lambda made=made, order=order: [
            made._triage.offer((-1, n), bad_case(case)) for n, case in enumerate(order)
        ]
        [found] = made.run().new
        assert (found.case, len(found.faces)) == (order[0], int(order[0] == wide))


def bad_case(case):
    from moe_fuzz.campaign.badcase import BadCase

    return BadCase(case.target, case, bad())


# ---- by itself


def never(case, finding):
    raise AssertionError("nothing was to be run")


def test_what_is_not_alike_is_not_tried():
    one = finding(case=toy(faults=["ties"]), features=("fault:ties",), scope=("fault:ties",))
    for other in (
        replace(one, symptom="range"), replace(one, check="finite"), replace(one, target="toy@b"),
        replace(one, site="f.py in g"), replace(one, sequence=(toy(),)),
    ):  # fmt: skip
        assert same_defect(SPACE, one, other, never) == ""


@pytest.mark.parametrize("answers", [(True, True), (True, False), (False, True)])
def test_both_must_fail_with_the_faults_of_the_other(answers):
    one = finding(case=toy(faults=["ties"]), features=("fault:ties",), scope=("fault:ties",))
    other = replace(one, case=toy(3, faults=["nan_rows"]), features=("fault:nan_rows",), scope=("fault:nan_rows",))
    says = dict(zip((("nan_rows", 8), ("ties", 3)), answers, strict=True))
    found = same_defect(SPACE, one, other, lambda case, _: says[case.fault_names[0], len(case.experts)])
    assert bool(found) is all(answers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_a_planted_bug_that_two_faults_set_off(runner: Runner):
    """Where no finite score claims a slot, chance does: in a row of NaN as in a masked one. The reducer stops at
    either, as chance has it, and arrival_fill was two findings or more."""
    target = "topk_softmax@planted.arrival_fill"
    found = []
    for name in ("nan_rows", "neg_inf_rows"):
        case = case_of(target, tokens=1, experts=33, top_k=8, faults=(Fault(name, "logits", Labels.of([0])),))
        verdict = runner.run(case, target, RunOptions())
        assert verdict.key == ("determinism", "ids")
        features = ("E>1", f"fault:{name}")
        found.append(replace(finding_of(case, verdict), features=features, scope=features))
    tried = []

    def fails(case, finding):
        tried.append(case.fault_names)
        return runner.run(case, target, RunOptions()).key == finding.raw

    assert "nan_rows and neg_inf_rows" in same_defect(ROUTING, *found, fails)
    assert tried == [("nan_rows",), ("neg_inf_rows",)]


def test_faults_are_laid_on_the_rows_of_those_they_replace():
    nan = Fault("nan_rows", "logits", Labels.of([2]))
    one = case_of("topk_softmax@torch", tokens=4, faults=(nan, Fault("misaligned", "logits")))
    other = case_of("topk_softmax@torch", faults=(Fault("extreme_bias", "bias"),), bias=True)
    swapped = with_faults_of(ROUTING, one, other)
    assert swapped.steps[0].faults == (Fault("extreme_bias", "bias"),)
    assert swapped.config["bias"] is True
    back = with_faults_of(ROUTING, other, one)
    assert back.steps[0].faults == (replace(nan, rows=Labels.range(3)), Fault("misaligned", "logits"))
    assert with_faults_of(ROUTING, replace(one, steps=one.steps * 2), other) is None


def test_a_face_is_kept_on_disk(tmp_path):
    one = finding()
    other = finding("fedcba9876", case=toy(8, faults=["ties"]), features=("fault:ties",), label="toy T=4 E=8 k=2")
    with StateDir(tmp_path) as state:
        write_finding(state, one)
        kept = add_face(state, one, face_of(other, "because"))
        assert load_findings(state) == [kept]
        assert (kept.ids, kept.times_seen) == ({one.id, other.id}, 2)
        data = json.loads((tmp_path / "findings" / one.id / "finding.json").read_text())
        del data["faces"]  # as written before there were faces
        state.write_json(f"findings/{one.id}/finding.json", data)
        assert load_findings(state)[0].faces == ()
