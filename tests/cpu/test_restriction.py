"""What a campaign is cut down to: the grid and generation draw nothing else, and say when nothing is left."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign import events
from moe_fuzz.campaign.drive import drive
from moe_fuzz.campaign.interfaces import Sources
from moe_fuzz.case import Case, Fault
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.restriction import NO_FAULT, RestrictedSpace, Restriction
from tests.cpu.campaign_fakes import SOURCES, TARGET, Listener, always_good, campaign, toy

SPACE = get_space("topk_softmax")
INFO = TargetInfo("topk_softmax@builtin", "topk_softmax", "builtin")
OWN = Sources(get_space, strategies.rounds, strategies.grid)


def drawn(restriction: Restriction, info: TargetInfo = INFO) -> list[Case]:
    """Of both kinds, some hundred."""
    sources = OWN.restricted(restriction)
    cases = list(itertools.islice(sources.grid(SPACE, info, "cuda", 5), 300))
    drive(sources.rounds(SPACE, info, "cuda"), 5, 60, lambda found: cases.extend(found))
    assert len(cases) > 100
    for case in cases:
        SPACE.validate(case)
    return cases


def test_presets_alone() -> None:
    """Sizes, dtype and flags of a model; what a model leaves open still varies, and so do tokens and faults."""
    names = ("mixtral-8x7b", "qwen1.5-moe-a2.7b")
    cases = drawn(Restriction(presets=names))
    models = {(len(case.experts), case.config["top_k"], case.config["renormalize"]) for case in cases}
    assert models == {(8, 2, True), (60, 4, False)}
    assert {case.config["dtype"] for case in cases} == {"bfloat16"}
    assert {case.config["bias"] for case in cases} == {False, True}
    assert len({case.steps[0].tokens for case in cases}) > 10
    assert len({name for case in cases for name in case.fault_names}) > 8
    assert not any("preset" in case.config for case in cases)


def test_a_size_that_was_asked_for_is_the_only_one() -> None:
    """Not one between it and the next smaller of those asked for, either."""
    cases = drawn(Restriction(values=(("experts", ("64",)),)))
    assert {len(case.experts) for case in cases} == {64}


def test_one_preset_costs_the_grid_nothing() -> None:
    """What it fixes is covered once, not once for each value of the dictionary."""
    every = sum(1 for _ in strategies.grid(SPACE, INFO, "cuda", 1))
    sources = OWN.restricted(Restriction(presets=("mixtral-8x7b",)))
    assert sum(1 for _ in sources.grid(SPACE, INFO, "cuda", 1)) < every / 2


def test_a_preset_outside_the_capabilities_is_left_out() -> None:
    small = TargetInfo("topk_softmax@small", "topk_softmax", "small", capabilities=Capabilities(max_experts=64))
    cases = drawn(Restriction(presets=("qwen3-30b-a3b", "mixtral-8x7b")), small)
    assert {len(case.experts) for case in cases} == {8}
    refusal = Restriction(presets=("qwen3-30b-a3b",)).refusal(SPACE, small)
    assert refusal == "topk_softmax@small takes no config of qwen3-30b-a3b"
    assert not Restriction(presets=("qwen3-30b-a3b", "mixtral-8x7b")).refusal(SPACE, small)


def test_faults_alone() -> None:
    cases = drawn(Restriction(faults=("nan_rows", "misaligned")), TargetInfo(
        "topk_softmax@x", "topk_softmax", "x", capabilities=Capabilities(alignment=1)))  # fmt: skip
    assert {name for case in cases for name in case.fault_names} == {"nan_rows", "misaligned"}
    assert not any(case.fault_names for case in drawn(Restriction(faults=(NO_FAULT,))))
    assert "no fault extreme" in Restriction(faults=("extreme",)).refusal(SPACE, INFO)
    assert not Restriction(faults=(NO_FAULT,)).refusal(SPACE, INFO)
    assert "no fault misaligned" in Restriction(faults=("misaligned",)).refusal(SPACE, INFO)  # it wants 16 bytes
    assert not Restriction(faults=("extreme_bias",)).refusal(SPACE, INFO)


def test_modes_alone() -> None:
    assert {case.mode for case in drawn(Restriction(modes=("eager",)))} == {"eager"}
    gone = Restriction(modes=("no such mode",))
    assert gone.refusal(SPACE, INFO) == "topk_softmax@builtin cannot be run in mode no such mode"
    assert RestrictedSpace(SPACE, gone).modes(INFO) == ()


def test_values_alone() -> None:
    only = Restriction(values=(("bias", ("false",)), ("experts", ("60", "8")), ("top_k", ("2", "4"))))
    cases = drawn(only)
    seen = {(len(case.experts), case.config["top_k"], case.config["bias"]) for case in cases}
    assert seen == {(experts, top_k, False) for experts in (8, 60) for top_k in (2, 4)}
    assert only.lines() == ("only bias=false", "only experts=60,8", "only top_k=2,4")
    assert not only.allows(cases[0].with_config(bias=True))
    assert Restriction(values=(("experts", ("1025",)),)).refusal(SPACE, INFO).endswith("takes no experts=1025")
    assert Restriction(values=(("out", ("true",)),)).refusal(SPACE, INFO).endswith("takes no out=true, but false")
    model = Restriction(presets=("mixtral-8x7b", "qwen1.5-moe-a2.7b"), values=(("experts", ("60",)),))
    assert {len(case.experts) for case in drawn(model)} == {60}


def test_a_fault_is_laid_in_its_modes_alone() -> None:
    """The producer's graph would take real memory for all that lies between the rows: a finding of ours, not theirs."""
    far = Restriction(faults=("int32_boundary",))
    cases = drawn(far)
    assert {case.mode for case in cases if case.fault_names} == {"eager", "graph"}
    assert any(case.mode == "piecewise" for case in cases)
    nowhere = Restriction(modes=("piecewise",), faults=("int32_boundary",))
    assert nowhere.refusal(SPACE, INFO) == "topk_softmax@builtin takes cases with no fault int32_boundary"
    one = next(case for case in cases if case.mode == "graph" and case.fault_names)
    with pytest.raises(CaseError, match="cannot be laid in mode piecewise") as caught:
        SPACE.validate(replace(one, mode="piecewise"))
    assert (caught.value.where, caught.value.hint) == ("steps[0].faults[0]", "use mode eager or graph")
    assert "piecewise" not in {simpler.mode for simpler in SPACE.simplify(one)}


def test_what_a_source_draws_besides_is_dropped() -> None:
    """A source need not look at the space: the toy's does not."""
    sources = SOURCES.restricted(Restriction(faults=("ties",)))
    cases: list[Case] = []
    drive(sources.rounds(SOURCES.space("toy"), INFO, "cpu"), 1, 50, lambda found: cases.extend(found))
    assert {case.fault_names for case in cases} == {(), ("ties",)}
    assert not Restriction(modes=("graph",)).allows(toy())
    laid = toy().with_step(0, toy(faults=["nan_rows"]).steps[0])
    assert laid.steps[0].faults == (Fault("nan_rows", "logits", Labels.of([3])),)
    assert not Restriction(faults=("ties",)).allows(laid)


def test_no_restriction_changes_nothing() -> None:
    assert SOURCES.restricted(Restriction()) is SOURCES
    assert not Restriction()
    assert Restriction(faults=())


def cases_in(inflight) -> int:
    """Of all batches, when no thread of the killed campaign is writing one down any more."""
    until = time.monotonic() + 10.0
    while any(file.name.startswith(".") for file in inflight.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    return sum(len(json.loads(file.read_text())["cases"]) for file in inflight.glob("[!.]*.json"))


def test_a_campaign_goes_on_only_under_the_same_restriction(tmp_path) -> None:
    class Killed(BaseException):
        pass

    def killer(event):
        if isinstance(event, events.Progress):
            raise Killed

    ties = Restriction(faults=("ties",))
    for restriction, resumed in ((ties, True), (Restriction(), False), (Restriction(faults=("inf_rows",)), False)):
        with pytest.raises(Killed):
            campaign(tmp_path, always_good, killer, restriction=ties, seed=None).run()
        # What was running when it was killed runs again in any case: it may be what killed it.
        running = cases_in(tmp_path / "inflight")
        listener = Listener()
        made = campaign(tmp_path, always_good, listener, restriction=restriction, seed=None)
        made.run()
        assert listener.of(events.CampaignStarted)[0].resumed is resumed
        names = {name for case in made.pool.leased[running:] for name in case.fault_names}
        assert names == (set(restriction.faults) if restriction.faults else {"nan_rows", "ties", "inf_rows"})
    assert json.loads((tmp_path / "campaign.json").read_text())["key"]["restriction"]["faults"] == ["inf_rows"]


@pytest.mark.parametrize("both", [False, True])
def test_nothing_left_is_told(tmp_path, monkeypatch, both) -> None:
    """For one of two targets it is a line on the screen; for all of them the campaign has not run."""
    monkeypatch.setattr(Restriction, "refusal", lambda self, space, info: "no" if both or "b" in info.name else "")
    listener = Listener()
    targets = (TARGET, "toy@b")
    only = Restriction(modes=("eager",))
    summary = campaign(tmp_path, always_good, listener, targets=targets, restriction=only).run()
    told = [event.target for event in listener.of(events.TargetUnavailable)]
    assert told == (list(targets) if both else ["toy@b"])
    assert summary.exit_code == (3 if both else 0)
    assert [row.target for row in summary.rows] == (list(targets) if both else [TARGET])
    assert ("nothing to run: no" in summary.reason) is both
