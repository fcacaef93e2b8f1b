"""`gate` end to end, with workers: each kind of finding by exit code and report. The targets are in gate_targets.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import moe_fuzz
from moe_fuzz.campaign.gate import ledger_file
from moe_fuzz.cli.gate import limited
from moe_fuzz.cli.machine import architecture
from moe_fuzz.errors import UsageError
from moe_fuzz.worker.gpus import MAX_SLOTS, Gpu

HERE = Path(__file__).parent
ROOT = Path(moe_fuzz.__file__).parents[1]
CPU = ("--device", "cpu", "--workers", "2", "--op", "topk_softmax")


@pytest.fixture
def gate(call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a gate over functions of a copy of gate_targets.py, in which bugs can be mended."""
    shutil.copy(HERE / "gate_targets.py", tmp_path / "kernels.py")
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("GATE_MARKS", str(tmp_path / "marks"))

    def run(*functions: str, cases: int = 24, words: tuple[str, ...] = ()) -> Any:
        targets = [f"kernels.py:{function}" for function in functions]
        given = (*CPU, "--profile", "quick", "--cases", str(cases), "--report", "ndjson=events.ndjson")
        ran = call("gate", *targets, *given, *words)
        report = Path("events.ndjson")
        ran.events = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        return ran

    return run


def of(ran: Any, kind: str) -> list[dict[str, Any]]:
    return [event for event in ran.events if event["kind"] == kind]


def verdicts(ran: Any) -> list[tuple[Any, ...]]:
    return [
        tuple(value for key, value in event.items() if key not in ("time", "seconds", "target"))
        for event in of(ran, "case-judged")
    ]


def end(ran: Any) -> dict[str, Any]:
    return of(ran, "campaign-finished")[0]["summary"]


def mend(file: Path) -> None:
    """Takes the bug out of `odd`."""
    text = file.read_text()
    assert "if experts % 2 and experts > top_k else logits" in text
    file.write_text(text.replace("if experts % 2 and experts > top_k else logits", "if 0 else logits"))


@pytest.mark.slow
def test_new_then_known_then_mended(gate: Callable, call: Callable, tmp_path: Path) -> None:
    new = gate("odd", "sound")
    assert new.code == 1, new.out
    found = end(new)["new"]
    assert "gate red" in new.out

    def add(finding: dict[str, Any]) -> int:
        words = ("--tracker", "kernels#7", "--owner", "@me", "--ledger", "known.toml")
        return int(call("ledger", "add", finding["id"], *words).code)

    assert [add(finding) for finding in found] == [0] * len(found)
    assert add(found[0]) == 2  # it is there
    entries = ledger_file.load(tmp_path / "known.toml")
    assert {entry.fingerprint for entry in entries} >= {finding["id"] for finding in found}
    assert {entry.target for entry in entries} == {"topk_softmax@*/kernels.py:odd"}

    known = gate("odd", "sound", words=("--ledger", "known.toml"))
    assert known.code == 0, known.out
    assert verdicts(known) == verdicts(new)
    assert {e["status"] for e in of(known, "finding-reported")} == {"known"}
    assert "gate green" in known.out
    assert f"known: {found[0]['id']}" in known.out
    assert "kernels#7 (@me)" in known.out

    text = (tmp_path / "known.toml").read_text()
    (tmp_path / "late.toml").write_text(text.replace("case =", "expires = 2020-01-01\ncase ="))
    expired = gate("odd", words=("--ledger", "late.toml"))
    assert expired.code == 1
    assert "expired on 2020-01-01" in expired.out

    mend(tmp_path / "kernels.py")
    mended = gate("odd", words=("--ledger", "known.toml"))
    assert mended.code == 1, mended.out
    assert {e["entry"]["name"] for e in of(mended, "finding-fixed")} == {entry.name for entry in entries}
    assert "remove the entry" in mended.out
    assert gate("odd", "sound").code == 0


def test_crashes_run_in_quarantine(gate: Callable, call: Callable, tmp_path: Path) -> None:
    new = gate("overrun")
    assert new.code == 1, new.out
    found = end(new)["new"]
    assert {(f["check"], f["symptom"]) for f in found} == {("fence", "logits:right:read")}
    for finding in found:
        call("ledger", "add", finding["id"], "--tracker", "kernels#8", "--owner", "@me", "--ledger", "known.toml")
    assert all(entry.deadly for entry in ledger_file.load(tmp_path / "known.toml"))
    known = gate("overrun", words=("--ledger", "known.toml"))
    assert known.code == 0, known.out
    crashed = [event for event in of(known, "case-judged") if event["verdict"] == "crash"]
    assert crashed
    assert all(event["alone"] for event in crashed)


def test_flaky_ones_are_annotated(gate: Callable) -> None:
    ran = gate("once", "seldom", "sound", cases=48)
    assert ran.code == 0, ran.out
    assert len(of(ran, "flaky-seen")) >= 1
    assert end(ran)["flaky"] >= 1
    assert not end(ran)["new"]
    assert "(flaky)" in ran.out


def test_two_hundred_cases_twice(gate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identical lists and verdicts in two clean directories, whatever the number of workers."""
    first = gate("odd", "sound", cases=200)
    (tmp_path / "another").mkdir()
    shutil.copy(tmp_path / "kernels.py", tmp_path / "another")
    monkeypatch.chdir(tmp_path / "another")
    again = gate("odd", "sound", cases=200, words=("--workers", "1"))
    assert len(verdicts(first)) == 200
    assert verdicts(first) == verdicts(again)
    assert [f["label"] for f in end(first)["new"]] == [f["label"] for f in end(again)["new"]]
    assert (first.code, again.code) == (1, 1)
    assert of(first, "campaign-started")[0]["plan"] == of(again, "campaign-started")[0]["plan"]


def test_the_base_build_has_it_too(gate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and base are two builds of one package, each with a path of its own."""
    for build in ("head", "base"):
        (tmp_path / build / "toykernels").mkdir(parents=True)
        shutil.copy(HERE / "gate_targets.py", tmp_path / build / "toykernels" / "__init__.py")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/head:{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    base = ("toykernels:odd", "--base-path", str(tmp_path / "base"))
    ran = gate(words=base)
    assert ran.code == 0, ran.out
    both = {finding["check"] for finding in end(ran)["gate"]["on_base"]}  # an expert left out is seen in two ways
    assert both
    assert both <= {"selection", "weights"}
    assert "these fail on the base build too" in ran.out
    mend(tmp_path / "base" / "toykernels" / "__init__.py")
    assert gate(words=base).code == 1
    # The path of the change is not handed on: a base interpreter that does not know the package has no such target.
    ran = gate(words=("toykernels:odd", "--base-python", sys.executable))
    assert (ran.code, "toykernels:odd is not on the base build" in ran.out) == (1, True)
    # And the very same file on both sides is no comparison.
    ran = gate(words=("toykernels:odd", "--base-path", str(tmp_path / "head")))
    assert (ran.code, "on the base build too, so what fails is told as new" in ran.out) == (1, True)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cases 1 sound odd", "1 cases are too few for 2 targets"),
        ("--ledger none.toml sound", "there is no ledger none.toml"),
        ("--corpus none sound", "there is no corpus none"),
        ("--profile slow sound", "'slow' is not one of"),
        ("--changed-from HEAD sound", "--changed-from needs a git repository"),
    ],
)
def test_words_that_make_no_sense(gate: Callable, call: Callable, tmp_path: Path, words: str, said: str) -> None:
    targets = [word if word not in ("sound", "odd") else f"kernels.py:{word}" for word in words.split()]
    ran = call("gate", *targets, *CPU)
    assert ran.code in (2, 3)
    assert said in ran.err


def test_a_base_build_on_which_nothing_runs_is_no_base(gate: Callable) -> None:
    """What was there before must not be called new because nobody could look."""
    ran = gate("odd", words=("--base-python", "/bin/ls"))
    assert ran.code == 3
    assert "--base-python /bin/ls cannot be compared with" in ran.err
    assert not of(ran, "case-judged")


def test_the_table_of_the_configuration(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz.gate]\nprofil = 'quick'\n")
    ran = call("gate", "topk_softmax@torch")
    assert ran.code == 2
    assert "unknown key 'profil' (did you mean profile?)" in ran.err
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz.paths]\n'csrc/**' = ['topk_softmx']\n")
    ran = call("gate", "topk_softmax@torch")
    assert "there is no target, op or provider 'topk_softmx' (did you mean topk_softmax?)" in ran.err
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz.gate]\nledger = 'ci/known.toml'\n")
    ran = call("gate", "topk_softmax@torch")
    assert f"there is no ledger {tmp_path}/ci/known.toml" in ran.err


def test_the_ledger_looks_where_the_configuration_says(call: Callable, tmp_path: Path) -> None:
    """click hands defaults on to one level of commands only."""
    (tmp_path / "pyproject.toml").write_text("[tool.moe-fuzz]\nstate-dir = 'mine'\n")
    ran = call("ledger", "add", "abcdef0123", "--tracker", "a#1", "--owner", "@me")
    assert ran.code == 2
    assert f"in {tmp_path}/mine" in ran.err


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A repository with a kernel, a ledger and a text."""
    shutil.copy(HERE / "gate_targets.py", tmp_path / "kernels.py")
    (tmp_path / "moe-fuzz-ledger.toml").write_text("")
    (tmp_path / "README.md").write_text("kernels")
    (tmp_path / ".gitignore").write_text("reports\n.moe-fuzz\n__pycache__\n")
    for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    return tmp_path


def test_reports_are_written_where_there_is_nothing_to_gate(call: Callable, committed: Path) -> None:
    (committed / "README.md").write_text("more")
    kinds = {"junit": "j.xml", "sarif": "s.sarif", "html": "p.html", "ndjson": "e.ndjson", "github": "summary.md"}
    asked = [word for kind, file in kinds.items() for word in ("--report", f"{kind}=reports/{file}")]
    ran = call("gate", "kernels.py:sound", *CPU, "--changed-from", "HEAD", *asked)
    assert (ran.code, "nothing to gate: README.md" in ran.out) == (0, True), ran.err
    assert {file.name for file in (committed / "reports").iterdir()} == set(kinds.values())
    [run] = json.loads((committed / "reports/s.sarif").read_text())["runs"]
    assert run["results"] == []
    suites = ElementTree.parse(committed / "reports/j.xml").getroot()
    assert not suites.findall(".//error")
    assert not suites.findall(".//failure")


def test_a_change_of_the_ledger_is_gated(call: Callable, committed: Path) -> None:
    (committed / "README.md").write_text("more")
    (committed / "moe-fuzz-ledger.toml").write_text("# nothing is known\n")
    words = ("gate", "kernels.py:sound", *CPU, "--changed-from", "HEAD", "--cases", "4")
    ran = call(*words)
    assert ran.code == 0, ran.out
    assert "moe-fuzz-ledger.toml changed" in ran.out
    assert "4 of 4 cases" in ran.out
    (committed / "moe-fuzz-ledger.toml").write_text("[[known]\n")
    assert call(*words).code == 2


def test_an_entry_of_a_configured_target_is_left_alone_where_another_is_named(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.moe-fuzz.gate]\ntargets = ["topk_softmax@topk_softmax.mine:router", "kernels.py:sound"]\n'
    )
    entry = '[[known]]\ntarget = "topk_softmax@*{}"\ncheck = "ids"\ntracker = "a#1"\nowner = "@me"\n'
    entry += 'reproduces = "sometimes"\nexpires = 2020-01-01\n'
    entries = map(entry.format, ("mine:router", "/kernels.py:sound"))
    (tmp_path / "moe-fuzz-ledger.toml").write_text("".join(entries))
    ran = call("gate", "topk_softmax@builtin", *CPU, "--cases", "4")
    assert (ran.code, "expired" in ran.out) == (0, False), ran.out + ran.err


@pytest.mark.parametrize(("day", "said"), [
    ("2020-01-01", "2020-01-01 has come already"), ("tomorrow", "write it like 2027-06-30"),
])
def test_the_day_of_an_entry_is_one_to_come(call: Callable, day: str, said: str) -> None:
    ran = call("ledger", "add", "5ff2384ea3", "--tracker", "a#1", "--owner", "@me", "--expires", day)
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_an_entry_of_a_mistyped_target_is_told(call: Callable, committed: Path) -> None:
    """Of a target that is known and not gated here, nothing is said."""
    entry = '[[known]]\ntarget = "{}"\ncheck = "ids"\ntracker = "a#1"\nowner = "@me"\nreproduces = "sometimes"\n'
    ledger = committed / "moe-fuzz-ledger.toml"
    ledger.write_text("".join(map(entry.format, ("topk_softmax@vlm", "topk_softmax@vllm", "*/kernels.py:sound"))))
    words = ("gate", "kernels.py:sound", *CPU, "--cases", "4")
    ran = call(*words)
    assert (ran.code, "no-target: entry 1  topk_softmax@vlm  a#1" in ran.out) == (0, True), ran.out
    assert "entry 2" not in ran.out
    ledger.write_text(entry.format("topk_softmax@vllm") + "expires = 2020-01-01\n")
    assert call(*words).code == 0
    ledger.write_text(entry.format("topk_softmax@vlm") + "expires = 2020-01-01\n")
    ran = call(*words)
    assert (ran.code, "expired on 2020-01-01, and no target" in ran.out) == (1, True), ran.out
    for git in ("add -A", "-c user.name=a -c user.email=a@b commit -qm ledger"):
        subprocess.run(["git", *git.split()], cwd=committed, check=True)
    (committed / "README.md").write_text("more")
    ran = call(*words, "--changed-from", "HEAD")
    assert (ran.code, "ledger: entry 1: no target" in ran.out) == (0, True), ran.out


@pytest.mark.parametrize("text", ["[tool.moe-fuzz]\nmemory = '4GiB'\n", "[tool.ruff]\n"])
def test_a_change_of_the_configuration_is_gated(call: Callable, committed: Path, text: str) -> None:
    """Also one that took its table away."""
    (committed / "pyproject.toml").write_text(text)
    ran = call("gate", "kernels.py:sound", *CPU, "--changed-from", "HEAD", "--cases", "4")
    assert (ran.code, "pyproject.toml changed" in ran.out) == (0, True), ran.out
    (committed / "deep").mkdir()
    (committed / "pyproject.toml").rename(committed / "deep/pyproject.toml")
    ran = call("gate", "kernels.py:sound", *CPU, "--changed-from", "HEAD", "--cases", "4")
    assert "nothing to gate: deep/pyproject.toml" in ran.out


def test_a_budget_of_gpu_memory_is_fewer_workers() -> None:
    card = Gpu("H200", 140 << 30, 139 << 30, "GPU-a")
    [less] = limited((card,), 12 << 30)
    assert (card.slots, less.slots, less.room) == (MAX_SLOTS, 2, 2)
    assert less.budget is not None
    assert 2 * less.budget <= 12 << 30
    assert limited((card,), None) == (card,)
    with pytest.raises(UsageError, match="a worker needs"):
        limited((card,), 1 << 30)
    assert architecture("cpu") == "cpu"
