"""An error of our own ends no campaign: the case has no verdict, and the exit code says so in the end."""

from __future__ import annotations

from moe_fuzz.campaign import events
from moe_fuzz.campaign.broken import reason
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.report import text
from moe_fuzz.verdict import BROKEN, Verdict
from tests.cpu.campaign_fakes import GOOD, TARGET, Listener, campaign, nan_on_odd, toy, when
from tests.cpu.gate_runs import KNOWN, gate, statuses

BROKE = Verdict(BROKEN, detail="RuntimeError: no such row (inputs.py:7 in rows)\nTraceback: …", spent=True)


def on_large_ones(case, history, options):
    """Of the strategies' sizes 61 and 64 experts."""
    return BROKE if len(case.experts) in (61, 64) else GOOD


def notes(listener):
    return [event.message for event in listener.of(events.Note) if "itself failed" in event.message]


def test_the_others_run_and_the_exit_code_is_not_clean(tmp_path):
    listener = Listener()
    summary = campaign(tmp_path, on_large_ones, listener, cases=200).run()
    assert summary.cases == 200
    assert summary.verdicts["pass"] > 20
    assert summary.verdicts["broken"] > 20
    assert summary.exit_code == 4
    assert summary.reason == f"moe-fuzz itself failed on {summary.verdicts['broken']} cases"
    [told] = notes(listener)
    assert "RuntimeError: no such row (inputs.py:7 in rows)" in told
    assert f"a case of {TARGET}" in told
    assert "moe-fuzz replay mfz1:" in told
    assert not load_findings(campaign(tmp_path, on_large_ones, listener)._state)
    assert "moe-fuzz itself failed in it" in "\n".join(text.summary(summary, "here"))


def test_a_finding_beside_it_is_found(tmp_path):
    def judge(case, history, options):
        return BROKE if len(case.experts) == 64 else when(nan_on_odd)(case, history, options)

    summary = campaign(tmp_path, judge, cases=300).run()
    assert summary.verdicts["broken"]
    assert [finding.check for finding in summary.new] == ["routing"]
    assert summary.exit_code == 1
    assert summary.reason == f"there are findings, and moe-fuzz itself failed on {summary.verdicts['broken']} cases"
    red = gate(tmp_path / "gate", judge).run()
    assert red.exit_code == 1
    assert red.reason.endswith(f"; moe-fuzz itself failed on {red.verdicts['broken']} cases")


def test_each_place_is_told_once_and_five_at_most(tmp_path):
    def judge(case, history, options):
        place = len(case.experts) * 10 + int(case.config["top_k"])
        return Verdict(BROKEN, detail=f"ValueError: {case.seed} (inputs.py:{place} in rows)\n…")

    listener = Listener()
    summary = campaign(tmp_path, judge, listener, cases=100).run()
    assert (summary.verdicts, summary.exit_code) == ({"broken": 100}, 4)
    assert len(notes(listener)) == 5


def test_a_gate_is_neither_green_nor_red(tmp_path):
    listener = Listener()
    summary = gate(tmp_path, on_large_ones, listener).run()
    assert (summary.exit_code, summary.verdicts.keys()) == (4, {"pass", "broken"})
    assert len(notes(listener)) == 1


def test_the_ledgers_entry_that_broke_us_is_not_taken_for_mended(tmp_path):
    summary = gate(tmp_path, lambda case, history, options: BROKE, entries=(KNOWN,)).run()
    assert statuses(summary) == {"known-nan": "not-run"}
    assert summary.exit_code == 4


def test_a_gate_whose_entry_alone_broke_us_is_not_green(tmp_path):
    def judge(case, history, options):
        return BROKE if case.digest == KNOWN.cases[0].digest else GOOD

    summary = gate(tmp_path, judge, entries=(KNOWN,)).run()
    assert statuses(summary) == {"known-nan": "not-run"}
    assert (summary.exit_code, summary.reason) == (4, "moe-fuzz itself failed on 1 case")


def test_what_broke_us_when_it_was_run_again_is_told(tmp_path):
    """The round that was running when a campaign was killed."""
    victim = toy(experts=64, seed=99)
    with StateDir(tmp_path) as state:
        state.begin_round("0", TARGET, (victim,))
    listener = Listener()
    summary = campaign(
        tmp_path, lambda case, history, options: BROKE if case == victim else GOOD, listener, cases=20
    ).run()
    assert len(notes(listener)) == 1
    assert summary.verdicts == {"pass": 20}
    assert (summary.exit_code, summary.reason) == (4, "moe-fuzz itself failed on 1 case")


def test_nor_is_a_finding_of_before(tmp_path):
    found = campaign(tmp_path, when(nan_on_odd), cases=200).run()
    assert found.new
    again = campaign(tmp_path, lambda case, history, options: BROKE, cases=20).run()
    assert not again.fixed
    assert len(again.known) == len(found.new)


def again_breaks_us():
    """Bad where it is seen first; whoever runs a case again breaks us."""
    seen = set()

    def judge(case, history, options):
        again = case.digest in seen
        seen.add(case.digest)
        return BROKE if again else when(nan_on_odd)(case, history, options)

    return judge


def test_it_is_told_where_a_bad_case_is_run_again(tmp_path):
    listener = Listener()
    summary = campaign(tmp_path, again_breaks_us(), listener, cases=100).run()
    assert summary.verdicts["violation"] > 2
    assert not summary.new
    assert len(notes(listener)) == 1
    assert summary.exit_code == 4
    assert summary.reason != reason(summary.verdicts.get("broken", 0))  # which a plan that draws a case twice has, too


def test_a_gate_tells_it_too(tmp_path):
    listener = Listener()
    summary = gate(tmp_path, again_breaks_us(), listener).run()
    assert len(notes(listener)) == 1
    assert summary.exit_code == 4
