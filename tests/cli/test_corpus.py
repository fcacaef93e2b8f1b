"""`moe-fuzz corpus`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign import corpus
from moe_fuzz.campaign.corpus import Entry
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case, dumps_sequence
from moe_fuzz.ops import get_space

HERE = Path(".moe-fuzz/corpus")


def entries(folder: Path = HERE) -> dict[str, Entry]:
    return corpus.load(folder, get_space).entries


def test_a_case_is_added_once_for_a_reason(call: Callable, case: Case) -> None:
    ran = call("corpus", "add", case.inline(), "--reason", "seen in production")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.split()[:2] == [case.digest, "added"]
    [entry] = entries().values()
    assert (entry.case, entry.reason) == (case, "seen in production")
    assert "was there" in call("corpus", "add", case.inline(), "--reason", "again").out
    assert len(entries()) == 1


def test_a_case_can_be_added_for_every_target_of_its_op(call: Callable, case: Case) -> None:
    call("corpus", "add", case.inline(), "--reason", "x", "--any-target", "--corpus", "seeds")
    assert [entry.case.target for entry in entries(Path("seeds")).values()] == [""]


@pytest.mark.parametrize("words", [["--reason", " "], []])
def test_no_reason_is_refused(call: Callable, case: Case, words: list[str]) -> None:
    ran = call("corpus", "add", case.inline(), *words)
    assert ran.code == 2
    assert "--reason" in ran.err
    assert not HERE.exists()


def test_a_case_that_needs_others_before_it_is_refused(call: Callable, case: Case) -> None:
    Path("both.json").write_text(dumps_sequence([case, replace(case, seed=5)]))
    ran = call("corpus", "add", "both.json", "--reason", "x")
    assert ran.code == 2
    assert "stand alone" in ran.err


def test_an_unknown_case_is_refused(call: Callable) -> None:
    assert call("corpus", "add", "nothing", "--reason", "x").code == 2


def make(folder: Path, *some: Entry) -> None:
    into = corpus.load(folder, get_space)
    for entry in some:
        into.put(entry)


def test_merge_tells_what_is_new_and_what_it_left(call: Callable, case: Case) -> None:
    make(Path("a"), Entry(case, 0.3), Entry(replace(case, seed=2)))
    make(Path("b"), Entry(case, 0.8), Entry(replace(case, seed=3)))
    other = json.dumps(Entry(replace(case, seed=4)).to_json() | {"moe_fuzz_corpus": 9})
    Path("b/later.json").write_text(other)
    ran = call("corpus", "merge", "a", "b")
    assert ran.code == 0
    assert f"4 cases read, 3 new; {HERE} holds 3" in ran.out
    assert "b/later.json is another version's (corpus format 9, here 1)" in ran.err
    assert entries()[case.digest].budget == 0.8
    assert Path("b/later.json").read_text() == other
    assert "0 new" in call("corpus", "merge", "a", "b").out


def test_merge_of_no_folder_is_refused(call: Callable) -> None:
    ran = call("corpus", "merge", "nowhere")
    assert ran.code == 2
    assert "nowhere" in ran.err


def test_prune_keeps_the_nearest_and_those_with_a_reason(call: Callable, case: Case) -> None:
    make(HERE, *(Entry(replace(case, seed=seed), seed / 10) for seed in range(8)))
    make(HERE, Entry(replace(case, seed=50), reason="mine"))
    ran = call("corpus", "prune", "--dry-run")
    assert "2 cases stay, 1 of them for a reason; 7 would go" in ran.out
    assert len(entries()) == 9
    ran = call("corpus", "prune")
    assert "7 went" in ran.out
    assert sorted(entry.case.seed for entry in entries().values()) == [7, 50]
    assert case.target in ran.out


def test_the_corpus_of_a_campaign_that_runs_is_not_touched(call: Callable, case: Case) -> None:
    with StateDir(".moe-fuzz"):
        ran = call("corpus", "add", case.inline(), "--reason", "x")
    assert ran.code == 3
    assert "another campaign" in ran.err


def test_the_configured_state_directory_is_used(call: Callable, case: Case) -> None:
    Path("pyproject.toml").write_text('[tool.moe-fuzz]\nstate-dir = "mine"\n')
    assert call("corpus", "add", case.inline(), "--reason", "x").code == 0
    assert entries(Path("mine/corpus"))


def test_a_folder_that_is_not_there_is_no_empty_corpus(call: Callable) -> None:
    ran = call("corpus", "prune", "--corpus", "mistyped")
    assert (ran.code, "there is no folder mistyped" in ran.err) == (2, True)
