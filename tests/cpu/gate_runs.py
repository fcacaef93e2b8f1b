"""A gate on fakes, for the tests of the gate: its settings, a ledger's entry, and what it told."""

from __future__ import annotations

import datetime
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.gate.engine import Gate
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.gate.plan import Profile
from moe_fuzz.campaign.gate.settings import GateSettings
from moe_fuzz.campaign.state import StateDir
from tests.cpu.campaign_fakes import SOURCES, TARGET, FakePool, Listener, toy

TODAY = datetime.date(2026, 11, 21)
SMALL = Profile("small", 60.0, 300, {"cpu": 64, "cuda": 64}, {"cpu": 16, "cuda": 16}, "for tests")
NAN_ON_ODD = toy(experts=1, top_k=1, rows=1, faults=("nan_rows",))
#: The entry of the bug that `nan_on_odd` is.
KNOWN = Entry(
    "known-nan", "toy#1", "@me", target=TARGET, check="routing", symptom="wrong", features=("fault:nan_rows",),
    cases=(NAN_ON_ODD,),
)  # fmt: skip


def gate(tmp_path, judge, listener=None, *, base=None, pool=None, sanitize=None, sources=SOURCES, **changes):
    given = {"targets": (TARGET,), "profile": SMALL, "cases": 200, "seconds": None, "seed": 7, "device": "cuda",
             "workers": 1, "today": TODAY}  # fmt: skip
    made = Gate(
        GateSettings(**(given | changes)), pool or FakePool(judge, int(changes.get("workers", 1))), StateDir(tmp_path),
        listener or Listener(), base=base, sources=sources, sanitize=sanitize,
    )  # fmt: skip
    made.listener = made._emit
    return made


def judged(listener) -> list[tuple]:
    """The list of cases and verdicts that a gate told, without the seconds."""
    return [tuple(replace(event, seconds=0.0).to_json().values()) for event in listener.of(events.CaseJudged)]


def statuses(summary) -> dict[str, str]:
    return {result.entry["name"]: result.status for result in summary.gate.entries}
