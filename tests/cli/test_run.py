"""`run`: from words to settings, and from a summary to an exit code. The campaign itself is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.events import Summary, TargetRow
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.plan import Settings
from moe_fuzz.options import LIB_VARIABLES
from moe_fuzz.restriction import Restriction
from moe_fuzz.targets import registry

#: The targets that are serving libraries': they are not installed where these tests run, or may be.
LIBRARIES = tuple(target.name for target in registry.known() if target.provider in LIB_VARIABLES)


def summary(**changes: Any) -> Summary:
    row = TargetRow("topk_softmax@builtin", 100, {"pass": 100}, parity=90)
    plain: dict[str, Any] = dict(
        seed=7, cases=100, planned=None, seconds=3.0, verdicts={"pass": 100}, new=(), known=(), fixed=(), flaky=0,
        unexamined=0, rows=(row,), interrupted=False, exit_code=0,
    )  # fmt: skip
    return Summary(**(plain | changes))


@dataclass
class FakeCampaign:
    """Emits what it is given, and ends in the summary it is given."""

    summary: Summary = field(default_factory=summary)
    events: list[events.Event] = field(default_factory=list)
    error: BaseException | None = None
    settings: Settings | None = None

    def __call__(self, settings: Settings, pool: object, state: Any, emit: Callable, **extra: object) -> FakeCampaign:
        self.settings, self.emit = settings, emit
        return self

    def run(self) -> Summary:
        assert self.settings is not None
        self.emit(events.CampaignStarted("0.1.0", (), self.settings.device, 1, 7, None, 3.0, ".moe-fuzz"))
        for event in self.events:
            self.emit(event)
        if self.error is not None:
            raise self.error
        self.emit(events.CampaignFinished(self.summary))
        return self.summary


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch, pool: Any) -> FakeCampaign:
    fake = FakeCampaign()
    monkeypatch.setattr("moe_fuzz.cli.run.Campaign", fake)
    return fake


def test_flags_win_over_environment_over_file(
    call: Callable, campaign: FakeCampaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.moe-fuzz]\ntime = '1m'\ncases = 11\nseed = 12\ntargets = ['topk_softmax@torch']\nchecks = ['ids']\n"
    )
    monkeypatch.setenv("MOE_FUZZ_CASES", "22")
    monkeypatch.setenv("MOE_FUZZ_SEED", "23")
    assert call("run", "--seed", "33", "--device", "cpu").code == 0
    assert campaign.settings is not None
    got = campaign.settings
    assert (got.seconds, got.cases, got.seed) == (60.0, 22, 33)
    assert (got.targets, got.checks) == (("topk_softmax@torch",), ("ids",))
    monkeypatch.setenv("MOE_FUZZ_TARGETS", "topk_softmax@builtin topk_softmax@torch")
    call("run")
    assert campaign.settings.targets == ("topk_softmax@builtin", "topk_softmax@torch")
    call("run", "topk_softmax@builtin")
    assert campaign.settings.targets == ("topk_softmax@builtin",)


def test_budgets(call: Callable, campaign: FakeCampaign, pool: Any) -> None:
    def settings(*arguments: str) -> Settings:
        call("run", "topk_softmax@builtin", *arguments)
        assert campaign.settings is not None
        return campaign.settings

    assert settings().seconds == 300.0
    assert settings("--profile", "quick").seconds == 60.0
    assert settings("--profile", "quick").minimize_seconds == 15.0
    assert settings("--minimize-time", "7").minimize_seconds == 7.0
    assert (settings("--cases", "5").seconds, settings("--cases", "5").cases) == (None, 5)
    assert (settings("--cases", "5", "--time", "2m").seconds) == 120.0
    assert settings("--deadline", "3", "--workers", "4", "--device", "cpu").deadline == 3.0
    assert pool.made["workers"] == 4
    settings("--memory", "2GiB")
    assert pool.made["memory_limit"] == 2 << 30


def test_targets(call: Callable, campaign: FakeCampaign, pool: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    assert call("run", "mine.py:f", "--op", "topk_softmax").code == 0
    assert campaign.settings is not None
    assert campaign.settings.targets == (f"topk_softmax@{tmp_path}/mine.py:f",)
    pool.unavailable = ("topk_softmax@torch", *LIBRARIES)
    call("run", "topk_softmax", "topk_softmax@torch")  # each once; who is asked for by name is not left out
    assert campaign.settings.targets == ("topk_softmax@builtin", "topk_softmax@torch")
    pool.unavailable = ("topk_softmax@vllm.fused_topk", "topk_softmax@vllm.fused_topk_bias")
    ran = call("run", "vllm", "--op", "topk_softmax")  # a provider stands for whatever there is of it
    assert campaign.settings.targets == ("topk_softmax@vllm",)
    assert "not available: topk_softmax@vllm.fused_topk" in ran.out
    pool.unavailable = LIBRARIES
    assert call("run", "vllm", "--op", "topk_softmax").code == 3


def test_restrictions(
    call: Callable, campaign: FakeCampaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flags over variables over the file; each may be repeated, and hold several names."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.moe-fuzz]\nops = ['topk_softmax']\nmode = ['eager']\npreset = ['mixtral-8x7b']\nfaults = ['ties']\n"
        "fence = 'off'\nonly = ['bias=true']\n"
    )
    assert call("run", "--device", "cpu").code == 0
    assert campaign.settings is not None
    assert campaign.settings.restriction == Restriction(
        ("eager",), ("mixtral-8x7b",), ("ties",), (("bias", ("true",)),)
    )
    assert campaign.settings.own == "off"
    assert "only these presets: mixtral-8x7b" in campaign.settings.notes
    monkeypatch.setenv("MOE_FUZZ_PRESET", "qwen3-30b-a3b,gpt-oss-120b")
    monkeypatch.setenv("MOE_FUZZ_FENCE", "all")
    call("run", "--device", "cpu", "--faults", "nan_rows,ties", "--faults", "misaligned", "--faults", "ties")
    assert campaign.settings.restriction.presets == ("qwen3-30b-a3b", "gpt-oss-120b")
    assert campaign.settings.restriction.faults == ("nan_rows", "ties", "misaligned")
    assert campaign.settings.own == "torch"  # on a CPU there is no more
    assert "on a CPU" in campaign.settings.notes[0]
    call("run", "--faults", "none")
    assert campaign.settings.restriction.faults == ("none",)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("topk_softmax@builtin", "out=true"),
        ("nvfp4_quantize@builtin", "global_scale=greatest,nan"),
        ("allreduce_rmsnorm@builtin", "capacity=half"),
        ("align@builtin", "out=true"),
    ],
)
def test_a_value_that_only_some_targets_take_may_be_asked_for(
    call: Callable, campaign: FakeCampaign, target: str, words: str
) -> None:
    field, _, values = words.partition("=")
    ran = call("run", target, "--only", words)
    assert ran.code == 0, ran.err
    assert campaign.settings.restriction.values == ((field, tuple(values.split(","))),)


def test_values_of_several_fields_may_be_asked_for_at_once(call: Callable, campaign: FakeCampaign) -> None:
    one = call("run", "topk_softmax@builtin", "--only", "bias=false,top_k=2,4,out=true", "--only", "experts=8")
    assert one.code == 0, one.err
    wanted = (("bias", ("false",)), ("top_k", ("2", "4")), ("out", ("true",)), ("experts", ("8",)))
    assert campaign.settings.restriction.values == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--only bias=false,=8", "is not FIELD=VALUE"),
        ("--only bias=,out=true", "names nothing"),
        ("--ops topk_softmx", "no op 'topk_softmx' (did you mean topk_softmax?)"),
        ("--mode egaer", "no mode 'egaer' (did you mean eager?)"),
        ("--preset mixtral", "no preset 'mixtral' (did you mean mixtral-8x7b?)"),
        ("--faults nan_row", "no fault 'nan_row' (did you mean nan_rows?)"),
        ("--faults none,ties", "none stands alone"),
        ("--fence some", "'some' is not one of"),
        ("--preset ,", "names nothing"),
        ("--only bia=false", "no field 'bia' (did you mean bias?)"),
        ("--only bias=no", "no bias value 'no'"),
        ("--only bias", "'bias' is not FIELD=VALUE"),
    ],
)
def test_restrictions_that_make_no_sense(call: Callable, campaign: FakeCampaign, words: str, said: str) -> None:
    ran = call("run", "topk_softmax@builtin", *words.split())
    assert (ran.code, campaign.settings) == (2, None)
    assert said in ran.err


def test_a_restriction_that_leaves_nothing(
    call: Callable, campaign: FakeCampaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Restriction, "refusal", lambda self, space, info: "it takes no such case" if self else "")
    ran = call("run", "--faults", "ties")
    assert ran.code == 3
    assert "there is nothing to run: it takes no such case" in ran.out
    assert "there is nothing to run: --mode" in ran.err
    assert call("run").code == 0
    monkeypatch.setattr("moe_fuzz.cli.restriction.OPS", ("topk_softmax", "align"))
    ran = call("run", "topk_softmax@builtin", "--ops", "align")
    assert ran.code == 3
    assert "no target asked for is one of align" in ran.err


def test_without_a_target_all_that_can_run_do(call: Callable, campaign: FakeCampaign, pool: Any) -> None:
    pool.unavailable = ("topk_softmax@torch", *LIBRARIES)
    ran = call("run", "--op", "topk_softmax")
    assert ran.code == 0
    assert "not available: topk_softmax@torch: topk_softmax@torch is not installed" in ran.out
    assert campaign.settings is not None
    assert campaign.settings.targets == ("topk_softmax@builtin",)
    pool.unavailable = ("topk_softmax@builtin", "topk_softmax@torch", *LIBRARIES)
    assert call("run", "--op", "topk_softmax").code == 3


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_the_exit_code_is_the_campaigns(call: Callable, campaign: FakeCampaign, code: int) -> None:
    campaign.summary = summary(exit_code=code, reason="because" if code else "")
    ran = call("run", "topk_softmax@builtin")
    assert ran.code == code
    assert ("because" in ran.out) == bool(code)


def test_too_little_is_not_clean(call: Callable, campaign: FakeCampaign) -> None:
    campaign.summary = summary(cases=3)
    ran = call("run", "topk_softmax@builtin")
    assert ran.code == 3
    assert "only 3 cases ran" in ran.err
    assert call("run", "topk_softmax@builtin", "--time", "1").code == 0  # as little as was asked for


def test_an_error_in_the_campaign_is_no_finding(call: Callable, campaign: FakeCampaign) -> None:
    campaign.error = RuntimeError("oh")
    assert call("run", "topk_softmax@builtin").code == 4
    campaign.error = KeyboardInterrupt()
    assert call("run", "topk_softmax@builtin").code == 130


def test_ndjson(call: Callable, campaign: FakeCampaign, finding: Finding, tmp_path: Path) -> None:
    campaign.events = [events.FindingReported(finding, "new", "somewhere"), events.Note("hello")]
    campaign.summary = summary(new=(finding,), exit_code=1)
    assert call("run", "topk_softmax@builtin", "--report", "ndjson=out/events.ndjson").code == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "events.ndjson").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "campaign-started", "finding-reported", "note", "campaign-finished",
    ]  # fmt: skip
    assert lines[1]["finding"]["id"] == finding.id
    assert lines[1]["finding"]["replay"] == finding.replay
    assert all(line["time"] > 1.7e9 for line in lines)


def test_a_report_that_cannot_be_written_to_its_end(call: Callable, campaign: FakeCampaign, finding: Finding) -> None:
    ran = call("run", "topk_softmax@builtin", "--report", "ndjson=/dev/full")
    assert ran.code == 3
    assert "is incomplete: No space left" in ran.err
    campaign.summary = summary(new=(finding,), exit_code=1)
    assert call("run", "topk_softmax@builtin", "--report", "ndjson=/dev/full").code == 1  # a finding outranks it


def test_a_stranger_understands_the_end(call: Callable, campaign: FakeCampaign, finding: Finding) -> None:
    rows = (
        TargetRow("topk_softmax@builtin", 98, {"pass": 97, "violation": 1}, parity=90, budget=0.5),
        TargetRow("topk_softmax@vllm", unavailable="vllm is not installed"),
        TargetRow("topk_softmax@acme", 2, {"rejected": 2}),
        TargetRow("topk_softmax@slow", 3, {"pass": 2, "rejected": 1}, unjudged=1, too_slow=1200, cut=1),
    )
    known = replace(finding, id="00aa00aa00", sequence=(finding.case,))
    campaign.summary = summary(
        verdicts={"pass": 97, "violation": 1, "rejected": 2}, new=(finding,), known=(known,), rows=rows, exit_code=1
    )
    out = call("run", "topk_softmax@builtin").out
    assert "finished: 100 cases in 3.0 s, 1 new finding" in out
    assert "topk_softmax@vllm: not run, vllm is not installed" in out
    assert "every one of them was refused: nothing was tested" in out
    assert "topk_softmax@slow: 3 cases (2 pass · 1 rejected); 1 of them took too long to judge" in out
    assert "; 1,200 larger cases left out for smaller ones: too slow on this CPU" in out
    assert "; 1 case given up, under way when the time was over" in out
    assert "rejected: refused with a clear error" in out
    assert "3fa9c1d2e0  topk_softmax@builtin: ids duplicate-id  [contract]" in out
    assert finding.message in out
    assert finding.label in out
    lines = out.splitlines()
    assert f"    moe-fuzz replay {finding.case.inline()}" in lines  # whole, on a line of its own
    assert f"    {known.replay}" in lines


def test_nothing_found_says_what_that_means(call: Callable, campaign: FakeCampaign) -> None:
    out = call("run", "topk_softmax@builtin").out
    assert "no new finding" in out
    assert "evidence for the cases that ran, and no proof" in out
