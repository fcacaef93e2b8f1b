"""What a campaign tells of the cases that it was made of, and of its workers."""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.coverage import Coverage
from moe_fuzz.campaign.engine import Campaign
from moe_fuzz.campaign.events import Cell
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case
from moe_fuzz.verdict import CRASH, REJECTED, Verdict, Violation
from tests.cpu.campaign_fakes import (
    GOOD,
    SOURCES,
    SPACE,
    TARGET,
    FakePool,
    Listener,
    always_good,
    bad,
    campaign,
    nan_on_odd,
    settings,
    toy,
    when,
)  # fmt: skip


def counted(*pairs: tuple[Case, Verdict]) -> dict[tuple[str, str], Cell]:
    coverage = Coverage()
    for case, verdict in pairs:
        coverage.count(TARGET, SPACE, case, verdict)
    return {(cell.config_class, cell.fault): cell for cell in coverage.cells()}


def test_a_case_counts_in_each_of_its_classes_with_each_of_its_faults():
    cells = counted((toy(experts=3, faults=("nan_rows", "ties"), dtype="bfloat16"), GOOD), (toy(experts=8), bad()))
    assert {key: (cell.cases, cell.bad, cell.budget) for key, cell in cells.items()} == {
        **{(name, fault): (1, 0, GOOD.budget) for fault in ("nan_rows", "ties")
           for name in ("all", "E odd", "dtype=bfloat16")},
        **{(name, "none"): (1, 1, 0.0) for name in ("all", "E even", "dtype=float32")},
    }  # fmt: skip


def test_a_refused_case_covers_nothing():
    assert counted((toy(), Verdict(REJECTED))) == {}


def test_the_largest_budget_is_that_of_accepted_cases():
    pairs = [(toy(), replace(GOOD, budget=budget)) for budget in (0.2, 0.7, 0.1)]
    assert counted(*pairs, (toy(), replace(bad(), budget=9.0)))["all", "none"].budget == 0.7


def test_a_campaign_tells_its_coverage_and_its_workers(tmp_path):
    listener = Listener()
    pool = FakePool(when(nan_on_odd))
    with_health = Campaign(
        settings(), pool, StateDir(tmp_path), listener, sources=SOURCES, health=lambda: {"forks": 3}
    )
    summary = with_health.run()
    (coverage,) = listener.of(events.CoverageCounted)
    plain = sum(cell.cases for cell in coverage.cells if (cell.config_class, cell.fault) == ("all", "none"))
    assert plain == sum(not case.fault_names for case in pool.leased)
    assert any(cell.bad for cell in coverage.cells if cell[1:3] == ("E odd", "nan_rows"))
    assert not any(cell.bad for cell in coverage.cells if cell[1:3] == ("E even", "nan_rows"))
    assert [event.counts for event in listener.of(events.WorkersCounted)] == [{"forks": 3}]
    assert listener.events[-1] == events.CampaignFinished(summary)
    assert coverage.to_json()["cells"][0] == list(coverage.cells[0])


def test_without_a_pool_that_counts_nothing_is_told_of_workers(tmp_path):
    listener = Listener()
    campaign(tmp_path, always_good, listener, cases=20).run()
    assert listener.of(events.WorkersCounted) == []


def test_a_killed_worker_yields_its_case(tmp_path):
    first: list[Case] = []

    def judge(case: Case, history: object, options: object) -> Verdict:
        if first:
            return GOOD
        first.append(case)
        return Verdict(CRASH, (Violation("crash", "killed:SIGKILL", "killed"),))

    listener = Listener()
    campaign(tmp_path, judge, listener, cases=20).run()
    (lost,) = listener.of(events.WorkerLost)
    assert lost.case == first[0]
    assert lost.label == SPACE.label(first[0])
