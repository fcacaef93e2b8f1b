"""Confirmation and location: what fresh workers must say before a violation becomes a finding, and who is to blame."""

from __future__ import annotations

import itertools
import threading

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.confirm import PATIENCE, RECENT, confirm
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.campaign.locate import is_device_fault, launch_site, locate
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.triage import Triage
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, HANG, Verdict, Violation
from moe_fuzz.worker.watch import HISTORY
from tests.cpu.campaign_fakes import GOOD, OPTIONS, SPACE, TARGET, FakePool, Listener, bad, campaign, crash, toy
from tests.cpu.experts_seen import case_of

KEY = ("routing", "wrong")
EXPERTS = get_space("experts_bf16")


def confirmed(judge, history=(), key=KEY):
    return confirm(FakePool(judge), TARGET, toy(), history, key, OPTIONS)


# ---- confirm


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [([1, 1, 1], "always"), ([0, 1, 0], "sometimes 1/3"), ([1, 0, 1], "sometimes 2/3"), ([0, 0, 0], None)],
)
def test_three_tries(pattern, expected):
    runs = iter(pattern)
    found = confirmed(lambda case, history, options: bad() if next(runs) else GOOD)
    assert (found and found.reproduces) == expected
    assert next(runs, None) is None


def test_another_symptom_does_not_confirm():
    assert confirmed(lambda case, history, options: bad("routing", "other")) is None


def test_the_same_violation_may_stand_second():
    both = Verdict("violation", (Violation("ids", "range", ""), *bad().violations))
    assert confirmed(lambda case, history, options: both).reproduces == "always"


def test_its_history_is_tried_last():
    def judge(case, history, options):
        return bad() if toy(seed=7) in history and case == toy() else GOOD

    history = (toy(seed=6), toy(seed=7), toy(seed=8))
    found = confirmed(judge, history)
    assert (found.sequence, found.case) == (history, toy())
    assert confirmed(judge, history[:1]) is None


@pytest.mark.parametrize(("needed", "kept"), [(40, 100), (20, RECENT)])
def test_a_long_history_is_tried_where_a_short_one_shows_nothing(needed, kept):
    """Such as a counter that goes wrong: `HISTORY` cases are remembered, and the last of them are tried before."""
    assert HISTORY >= 100
    history = tuple(toy(seed=seed) for seed in range(1, 101))
    found = confirmed(lambda case, ran, options: bad() if len(ran) >= needed else GOOD, history)
    assert found.sequence == history[-kept:]


def test_one_hang_is_enough():
    runs = itertools.count()

    def judge(case, history, options):
        next(runs)
        return bad("hang", "deadline", HANG)

    assert confirmed(judge, key=("hang", "deadline")).reproduces == "always"
    assert next(runs) == 1


def test_what_is_only_slow_has_not_hung():
    deadlines = []

    def judge(case, history, options):
        deadlines.append(options.deadline)
        return bad("hang", "deadline", HANG) if options.deadline < 2 * RunOptions().deadline else GOOD

    assert confirmed(judge, key=("hang", "deadline")) is None
    assert set(deadlines) == {PATIENCE * RunOptions().deadline}


# ---- locate


def fault(tensor, side="right", access="read"):
    """A kernel that steps over one edge of one tensor."""

    def judge(case, history, options):
        fence = options.fence
        name = "own0" if tensor == "own" else tensor
        fenced = fence.own != "off" and (fence.hard is None or name in fence.hard)
        return crash(site="k.py:3 in f") if fenced and fence.sides in ("both", side) and (
            fence.access == "any" or access == "write"
        ) else GOOD  # fmt: skip

    return judge


def located(judge, case=None, key=("crash", "SIGSEGV")):
    case = case or toy(bias=True)
    pool = FakePool(judge)
    return locate(pool, (case,), TARGET, RunOptions(), crash(key[1], site="k.py:3 in f"), key, SPACE.tensors)


@pytest.mark.parametrize("tensor", ["logits", "bias", "ids", "own"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_tensor_side_and_access_are_named(tensor, side, access):
    found = located(fault(tensor, side, access))
    assert (found.check, found.symptom) == ("fence", f"{tensor}:{side}:{access}")
    assert (found.tensor, found.site, found.got) == (tensor, "k.py:3 in f", "SIGSEGV")
    assert f"{access}s past the {side} edge of" in found.message


def test_a_write_into_an_input():
    def judge(case, history, options):
        return crash() if options.fence.is_readonly("bias") and case.config["bias"] else GOOD

    found = located(judge, toy(bias=True))
    assert (found.symptom, found.tensor) == ("bias:inside:write", "bias")
    assert found.message == "writes into bias, an input"


def test_a_tensor_that_the_case_has_not_is_not_asked_about():
    asked = []

    def judge(case, history, options):
        asked.extend(options.fence.hard or ())
        return GOOD

    located(judge, toy(bias=False))
    assert asked[:3] == ["logits", "ids", "own0"]


def test_a_wild_access_stays_a_crash():
    found = located(lambda case, history, options: crash())
    assert (found.check, found.symptom) == ("crash", "SIGSEGV")


def test_what_no_single_tensor_explains_stays_a_crash():
    def judge(case, history, options):
        return crash() if options.fence.hard is None else GOOD

    assert located(judge).check == "crash"


def test_one_worker_names_the_tensor_and_fresh_ones_bear_it_out():
    pool = FakePool(fault("ids"))
    locate(pool, (toy(bias=True),), TARGET, RunOptions(), crash(), ("crash", "SIGSEGV"), SPACE.tensors)
    assert pool.fresh_runs == 1 + 1 + 1  # until it dies; right, write
    assert not pool.leased


def test_a_sequence_is_searched_with_fresh_workers_alone():
    asked = []

    def judge(case, history, options):
        if case.config["bias"]:
            asked.append(history)
            return fault("ids")(case, history, options)
        return GOOD

    pool = FakePool(judge)
    cases = (toy(bias=False), toy(bias=True))
    found = locate(pool, cases, TARGET, RunOptions(), crash(), ("crash", "SIGSEGV"), SPACE.tensors)
    assert found.symptom == "ids:right:read"
    assert asked == [cases[:1]] * pool.fresh_runs
    assert pool.fresh_runs == 1 + 2 + 1 + 1  # none, two halves, right, write


def test_what_a_worker_keeps_of_its_first_answer_hides_nothing():
    """Memory that the target keeps is fenced as it was when it was made: asked in a row, this worker survives."""

    def judge(case, history, options):
        return GOOD if history else fault("own")(case, history, options)

    assert located(judge).symptom == "own:right:read"


def test_it_asks_without_checks_and_with_them_where_only_their_calls_fault():
    asked = []

    def judge(case, history, options):
        asked.append(options.checks)
        return GOOD if options.checks == () else fault("ids")(case, history, options)

    assert located(judge).symptom == "ids:right:read"
    first = asked.index(None)
    assert first > len(SPACE.tensors)
    assert set(asked[:first]) == {()}
    assert set(asked[first:]) == {None}
    asked.clear()
    located(lambda case, history, options: (asked.append(options.checks), fault("ids")(case, history, options))[1])
    assert set(asked) == {()}


@pytest.mark.parametrize("at_once", [2, 3, 8])
@pytest.mark.parametrize("tensor", ["logits", "bias", "ids", "own", "inside", "wild", "none"])
def test_questions_beside_each_other_have_the_answers_of_a_row(tensor, at_once):
    def judge(case, history, options):
        if tensor == "inside":
            return crash() if options.fence.is_readonly("bias") else GOOD
        return {"wild": crash(), "none": GOOD}.get(tensor) or fault(tensor, "left", "write")(case, history, options)

    asked = (toy(bias=True),), TARGET, RunOptions(), crash(), ("crash", "SIGSEGV"), SPACE.tensors
    assert locate(FakePool(judge), *asked, at_once=at_once) == locate(FakePool(judge), *asked)


def test_questions_are_asked_at_the_same_time():
    together = threading.Barrier(3)

    def judge(case, history, options):
        if options.fence.sides != "both" or options.fence.access != "any":
            together.wait(timeout=10.0)  # right, write, left
        return fault("bias")(case, history, options)

    pool = FakePool(judge)
    found = locate(pool, (toy(bias=True),), TARGET, RunOptions(), crash(), ("crash", "SIGSEGV"), SPACE.tensors,
                   at_once=3)  # fmt: skip
    assert found.symptom == "bias:right:read"
    assert pool.fresh_runs == 1 + 3


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("tensor", [*EXPERTS.tensors, "own"])
def test_many_tensors_take_few_questions_of_fresh_workers(tensor, at_once):
    """Where a fault shows sometimes: each is asked for several times."""
    pool = FakePool(fault(tensor))
    case, key = case_of(bias="same", expert_map="shard"), ("crash", "SIGSEGV")
    asked = (case,), TARGET, RunOptions(), crash(), key, EXPERTS.tensors
    assert locate(pool, *asked, tries=2, at_once=at_once).symptom == f"{tensor}:right:read"
    assert pool.fresh_runs <= 2 * (1 + (4 if at_once == 1 else 6) + 3)


# ---- the whole way


def test_a_hang_is_reduced(tmp_path):
    def judge(case, history, options):
        return bad("hang", "deadline", HANG) if len(case.experts) % 2 == 0 else GOOD

    [finding] = campaign(tmp_path, judge, cases=50, max_findings=1).run().new
    assert (finding.check, len(finding.case.experts)) == ("hang", 2)


def test_a_bug_that_comes_and_goes_is_minimized_all_the_same(tmp_path):
    runs = itertools.count()

    def judge(case, history, options):
        return bad() if "ties" in case.fault_names and next(runs) % 3 else GOOD

    [finding] = campaign(tmp_path, judge, cases=100).run().new
    assert finding.reproduces.startswith("sometimes")
    assert (finding.case.fault_names, finding.case.steps[0].tokens) == (("ties",), 1)


def test_a_worker_killed_by_somebody_else_is_told_and_flaky(tmp_path):
    def judge(case, history, options):
        first = len(pool.leased) == 20 and not pool.fresh_runs
        return Verdict(CRASH, (Violation("crash", "killed:SIGKILL", "killed"),)) if first else GOOD

    pool, listener = FakePool(judge), Listener()
    summary = campaign(tmp_path, judge, listener, pool=pool, cases=50).run()
    assert (summary.exit_code, summary.flaky) == (0, 1)
    assert [event.reason for event in listener.of(events.WorkerLost)] == ["killed:SIGKILL"]


def test_what_a_case_shows_whose_worker_was_killed_is_looked_at_as_any_other(tmp_path):
    """It shows what is known already, and behind that what no other case does."""
    loud, rare = bad("ids", "loud"), bad("parity", "rare")

    def judge(case, history, options):
        if case == hidden:
            return Verdict("violation", (*loud.violations, *rare.violations))
        return loud if case.config["bias"] else GOOD

    class Killing(FakePool):
        """The worker is killed in the rare case, where it runs for the first time."""

        def judge(self, case, history, options):
            if case == hidden and hidden not in self.leased:
                self.leased.append(case)
                return Verdict(CRASH, (Violation("crash", "killed:SIGKILL", "killed"),))
            return super().judge(case, history, options)

    hidden = None
    whole = campaign(tmp_path / "seen", judge, cases=60)
    whole.run()
    hidden = next(case for case in reversed(whole.pool.leased) if case.config["bias"])
    for name, pool in (("undisturbed", FakePool(judge)), ("killed", Killing(judge))):
        listener = Listener()
        summary = campaign(tmp_path / name, judge, listener, pool=pool, cases=60).run()
        assert {finding.symptom for finding in summary.new} == {"loud", "rare"}, name
        assert summary.flaky == 0
        assert not list((tmp_path / name / "pending").iterdir())
    assert [event.reason for event in listener.of(events.WorkerLost)] == ["killed:SIGKILL"]


def test_a_case_whose_workers_are_killed_each_time_is_a_finding(tmp_path):
    def judge(case, history, options):
        return crash("killed:SIGKILL") if "ties" in case.fault_names else GOOD

    [finding] = campaign(tmp_path, judge, cases=60).run().new
    assert (finding.symptom, finding.case.fault_names) == ("killed:SIGKILL", ("ties",))


@pytest.mark.parametrize(("symptom", "doubted"), [("misaligned-access", 1), ("SIGSEGV", 0)])
def test_a_gpu_whose_faults_no_case_brings_back_is_doubted(tmp_path, symptom, doubted):
    def judge(case, history, options):
        return Verdict(CRASH, (Violation("crash", symptom, symptom),)) if case.digest in struck else GOOD

    class Struck(FakePool):
        """At three moments, whatever the case: the first time that it runs."""

        def judge(self, case, history, options):
            struck.discard(case.digest)
            if not getattr(self._local, "fresh", False) and len(self.leased) in (9, 19, 29):
                struck.add(case.digest)
            return super().judge(case, history, options)

    struck: set[str] = set()
    pool, listener = Struck(judge), Listener()
    summary = campaign(tmp_path, judge, listener, pool=pool, cases=50).run()
    assert (summary.exit_code, summary.flaky) == (0, 3)
    assert sum("Is the GPU sound?" in note.message for note in listener.of(events.Note)) == doubted


def test_when_the_time_is_up_one_of_each_kind_is_reported_and_the_rest_stays_pending(tmp_path):
    def judge(case, history, options):
        if "ties" in case.fault_names or case.config["bias"]:
            return bad("routing", "a")
        return bad("routing", "b") if "nan_rows" in case.fault_names else GOOD

    summary = campaign(tmp_path, judge, cases=None, seconds=1.5, minimize_seconds=1e-9).run()
    assert {finding.symptom for finding in summary.new} == {"a", "b"}
    assert not any(finding.minimal for finding in summary.new)
    assert summary.unexamined >= len(list((tmp_path / "pending").iterdir()))
    assert summary.exit_code == 1


def test_a_rare_kind_is_examined_before_the_second_of_a_loud_one(tmp_path):
    loud = [toy(experts, bias=experts == 8, dtype="float16" if experts == 3 else "float32") for experts in (8, 3, 1)]
    rare = toy(faults=["nan_rows"])

    def judge(case, history, options):
        return bad("routing", "rare") if case.fault_names else bad("routing", "loud") if case in loud else GOOD

    pool, told = FakePool(judge), Listener()
    examiner = Examiner(pool, pool.describe(TARGET), SPACE, OPTIONS, "cpu")
    with StateDir(tmp_path) as state:
        triage = Triage(state, {TARGET: examiner}, told, lambda bad: None, lambda: None)
        for at, case in enumerate([*loud, rare]):
            triage.offer((0, at), BadCase(TARGET, case, judge(case, (), OPTIONS), ()))
        while triage.work(lambda: 60.0):
            pass
    assert [event.symptom for event in told.of(events.FindingConfirming)] == ["loud", "rare", "loud", "loud"]


def test_what_a_case_lacked_its_finding_does_not_need(tmp_path):
    """The smallest failing number of experts is even, which the bug does not ask for: odd ones are explained too."""

    def judge(case, history, options):
        return bad() if len(case.experts) >= 8 else GOOD

    summary = campaign(tmp_path, judge, cases=400).run()
    [finding] = summary.new
    assert (finding.features, finding.scope) == (("E even",), ())
    assert summary.cases == 400


# ---- a verdict of several violations


def test_a_loud_bug_in_every_case_does_not_hide_the_others(tmp_path):
    """int64 ids in every verdict, and behind them a NaN that only some cases show."""

    def judge(case, history, options):
        found = [Violation("structure", "ids:dtype", "")]
        if "nan_rows" in case.fault_names:
            found.append(Violation("finite", "nan", "a weight is NaN"))
        return Verdict("violation", tuple(found))

    summary = campaign(tmp_path, judge, cases=120).run()
    assert {(f.check, f.symptom) for f in summary.new} == {("structure", "ids:dtype"), ("finite", "nan")}


def test_what_the_minimal_case_shows_besides_is_the_same_bug(tmp_path):
    both = Verdict("violation", (Violation("structure", "dtype", ""), Violation("weights", "off", "")))
    summary = campaign(tmp_path, lambda case, history, options: both, cases=120).run()
    assert [f.check for f in summary.new] == ["structure"]


@pytest.mark.parametrize("key", [("crash", "illegal-access"), ("crash", "device-assert"), ("hang", "deadline")])
def test_a_launch_is_named_by_a_worker_whose_launches_wait(key):
    environments = []

    class Noting(FakePool):
        def fresh(self, environment=None):
            environments.append(environment)
            return super().fresh(environment)

    pool = Noting(lambda case, history, options: bad(*key) if key[0] == "hang" else crash(key[1], site="k.py:3 in f"))
    assert is_device_fault(key)
    site = launch_site(pool, (toy(),), TARGET, RunOptions(), key)
    assert site == ("" if key[0] == "hang" else "k.py:3 in f")
    assert environments == [{"CUDA_LAUNCH_BLOCKING": "1"}]
    assert launch_site(FakePool(lambda *_: GOOD), (toy(),), TARGET, RunOptions(), key) == ""
    assert not is_device_fault(("crash", "SIGSEGV"))  # the stack of the process says where
