"""The corpus and its lattice: what is kept, what goes, what is another version's, what a campaign does with it."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz.campaign import corpus, lattice
from moe_fuzz.campaign.corpus import Corpus, Entry
from moe_fuzz.campaign.lattice import Cell
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.verdict import PASS, Verdict
from tests.cpu.campaign_fakes import SOURCES, SPACE, TARGET, Listener, bad, campaign, nan_on_odd, ran, toy, when


def get_space(op):
    return SPACE


def put(folder: Path, *entries: Entry) -> Corpus:
    into = corpus.load(folder, get_space)
    for entry in entries:
        into.put(entry)
    return into


# ---- the lattice ----------------------------------------------------------------------------------------------------


def test_a_nearer_case_covers_what_a_farther_one_does():
    far, near = (lattice.cells(SPACE, toy(), budget) for budget in (0.1, 0.8))
    assert far < near
    assert {cell.nearness for cell in near} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("budget", "level"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.5, 3), (0.89, 4), (0.9, 5), (1.0, 5)])
def test_levels_of_nearness(budget, level):
    assert lattice.nearness(budget) == level


def test_every_class_is_paired_with_every_fault_in_the_mode():
    found = lattice.cells(SPACE, replace(toy(experts=3, faults=("nan_rows", "ties")), mode="graph"), 0.0)
    assert {(c.config_class, c.fault, c.mode) for c in found} == {
        (name, fault, "graph") for name in ("any", "E odd", "dtype=float32") for fault in ("nan_rows", "ties")
    }
    assert {(c.op, c.provider) for c in found} == {("toy", "fake")}


def sets(*texts: str) -> dict[str, frozenset[Cell]]:
    return {
        f"{number}": frozenset(Cell("op", "p", letter, "none", "eager", 0) for letter in text)
        for number, text in enumerate(texts)
    }


def test_what_others_cover_goes():
    assert lattice.cover(sets("abc", "ab", "c", "d")) == ["0", "3"]


def test_a_greedy_choice_that_turns_out_to_be_covered_goes():
    # Greed takes "bcde" first; the other two, needed for a and f, then cover all of it.
    assert lattice.cover(sets("bcde", "abc", "def")) == ["1", "2"]


def test_what_must_be_kept_is_and_counts():
    items = sets("ab", "abc", "c")
    assert lattice.cover(items, keep=["0"], weight={"0": (1,), "1": (9,), "2": (1,)}.__getitem__) == ["0", "2"]


def test_of_equals_the_cheaper_one_stays():
    assert lattice.cover(sets("ab", "ab"), weight={"0": (5.0,), "1": (2.0,)}.__getitem__) == ["1"]


@pytest.mark.parametrize("seed", range(20))
def test_a_cover_covers_everything_and_nothing_in_it_can_go(seed):
    chosen = random.Random(seed)
    items = sets(*("".join(chosen.sample("abcdefghij", chosen.randint(0, 5))) for _ in range(12)))
    kept = lattice.cover(items)
    everything = set().union(*items.values())
    assert set().union(*(items[name] for name in kept)) == everything
    for one in kept:
        assert set().union(*(items[name] for name in kept if name != one)) < everything
    fewest = next(
        n for n in range(len(items) + 1)
        if any(set().union(*(items[i] for i in some)) == everything for some in itertools.combinations(items, n))
    )  # fmt: skip
    assert len(kept) <= fewest * sum(1 / n for n in range(1, 6))  # the bound of the greedy choice, of sets of 5


# ---- the files ------------------------------------------------------------------------------------------------------


def test_a_file_is_named_by_what_is_in_it_and_read_back(tmp_path):
    entry = Entry(toy(faults=("ties",)), 0.5, "a bias that ties")
    assert put(tmp_path, entry).entries[entry.digest].file == tmp_path / f"{entry.digest}.json"
    again = corpus.load(tmp_path, get_space)
    assert [replace(found, file=None) for found in again.entries.values()] == [entry]
    assert not again.lines()


def test_the_same_case_is_one_entry_of_the_nearest_it_ever_came(tmp_path):
    into = put(tmp_path, Entry(toy(), 0.2), Entry(toy(), 0.7), Entry(toy(), 0.4, "why"))
    [found] = corpus.load(tmp_path, get_space).entries.values()
    assert (found.budget, found.reason) == (0.7, "why")
    assert not into.put(Entry(toy(), 0.1))


FOREIGN = {
    "a later format": lambda data: data | {"moe_fuzz_corpus": 2},
    "a later case": lambda data: data | {"case": data["case"] | {"moe_fuzz": 9}},
    "another op's field": lambda data: data | {"case": toy(top_k=2, experts=1).to_json()},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_version_is_kept_and_told(tmp_path, kind):
    entry = Entry(toy())
    text = json.dumps(FOREIGN[kind](entry.to_json()))
    (tmp_path / "other.json").write_text(text)
    into = put(tmp_path, Entry(toy(experts=3)))
    assert list(into.foreign) == [tmp_path / "other.json"]
    assert "another version's" in into.lines()[0]
    stays, goes = corpus.prune(into, get_space)
    assert (len(stays), goes) == (1, [])
    assert (tmp_path / "other.json").read_text() == text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"moe_fuzz_corpus": 1}', '{"case": {"op": 3}}', "\x00" * 40])
def test_a_damaged_file_is_told_and_left(tmp_path, text):
    (tmp_path / "0.json").write_text(text)
    into = corpus.load(tmp_path, get_space)
    assert list(into.damaged) == [tmp_path / "0.json"]
    assert (tmp_path / "0.json").read_text() == text


def test_contents_that_were_changed_are_damage(tmp_path):
    into = put(tmp_path, Entry(toy()))
    [file] = tmp_path.glob("*.json")
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 2'))
    assert not corpus.load(tmp_path, get_space).entries
    file.write_text(json.dumps(Entry(toy(seed=5)).to_json()))
    assert "not its name" in corpus.load(tmp_path, get_space).damaged[file]
    assert into.entries  # what was read before is not touched


def test_plain_cases_and_records_are_read_and_never_rewritten_or_pruned(tmp_path):
    (tmp_path / "plain.json").write_text(toy().dumps())
    (tmp_path / "record.json").write_text(json.dumps({"cause": "NaN", "case": toy(seed=2).to_json()}))
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    into = put(tmp_path, Entry(toy(), 0.9), Entry(toy(seed=3)))
    stays, goes = corpus.prune(into, get_space)
    assert len(stays) == 2
    assert [entry.case.seed for entry in goes] == [3]
    assert {file: file.read_text() for file in before} == before


def test_merge_takes_over_and_doubles_nothing(tmp_path):
    one = put(tmp_path / "one", Entry(toy(), 0.2), Entry(toy(seed=2)))
    two = put(tmp_path / "two", Entry(toy(), 0.6), Entry(toy(seed=3)))
    assert corpus.merge(one, [two]) == 1
    assert {e.case.seed: e.budget for e in corpus.load(tmp_path / "one", get_space).entries.values()} == {
        1: 0.6, 2: 0.0, 3: 0.0,
    }  # fmt: skip
    assert len(list((tmp_path / "two").iterdir())) == 2
    assert corpus.merge(one, [two]) == 0


def test_what_is_pruned_covered_nothing_of_its_own(tmp_path):
    chosen = random.Random(4)
    entries = [
        Entry(toy(chosen.choice([1, 2, 3, 8]), 1, faults=chosen.sample(["nan_rows", "ties", "inf_rows"], 1), seed=seed),
              chosen.random()) for seed in range(60)
    ]  # fmt: skip
    into = put(tmp_path, *entries)
    stays, goes = corpus.prune(into, get_space)
    assert len(stays) + len(goes) == 60
    assert len(stays) < 12

    def covered(some):
        return set().union(*(lattice.cells(SPACE, e.case, e.budget) for e in some))

    assert covered(stays) == covered(into.entries.values())
    for entry in goes:
        into.remove(entry)
    assert set(corpus.load(tmp_path, get_space).entries) == {entry.digest for entry in stays}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        Corpus(tmp_path / "file").put(Entry(toy()))


# ---- a campaign -----------------------------------------------------------------------------------------------------


def held(path: Path) -> dict[str, Entry]:
    return corpus.load(path / "corpus", get_space).entries


def test_a_campaign_adds_what_covers_something_new(tmp_path):
    made = campaign(tmp_path, when(lambda case: False))
    made.run()
    entries = held(tmp_path)
    assert 5 < len(entries) < 100
    assert {entry.budget for entry in entries.values()} == {0.5}
    every = set().union(*(lattice.cells(SPACE, case, 0.5) for case in made.pool.leased))
    assert set().union(*(lattice.cells(SPACE, e.case, e.budget) for e in entries.values())) == every


def test_what_failed_is_a_finding_and_not_in_the_corpus(tmp_path):
    campaign(tmp_path, when(nan_on_odd)).run()
    assert held(tmp_path)
    assert not [entry for entry in held(tmp_path).values() if nan_on_odd(entry.case)]


def test_the_next_campaign_begins_with_the_corpus_within_its_budget(tmp_path):
    campaign(tmp_path, when(lambda case: False)).run()
    near = Entry(toy(61, 1, 1, seed=77), 0.97)
    put(tmp_path / "corpus", near)
    anybodys = Entry(replace(toy(8, 3, seed=78), target=""), reason="by a person")
    put(tmp_path / "corpus", anybodys)
    listener = Listener()
    made = campaign(tmp_path, when(lambda case: False), listener, seed=8)
    summary = made.run()
    assert summary.cases == sum(ran(made).values()) == 200
    phases = [event.name for event in listener.events if hasattr(event, "name")]
    assert phases[:3] == ["corpus", "grid", "generate"]
    first = made.pool.leased[:2]
    assert [case.seed for case in first] == [78, 77]  # a person's first, then the nearest
    assert {case.target for case in first} == {TARGET}


def test_a_case_of_the_corpus_that_fails_today_is_a_finding(tmp_path):
    campaign(tmp_path, when(lambda case: False), cases=40).run()
    put(tmp_path / "corpus", Entry(toy(7, 1, 3, ["nan_rows"], seed=5), 0.99))
    listener = Listener()
    [finding] = campaign(tmp_path, when(nan_on_odd), listener, cases=40, seed=9).run().new
    assert (finding.check, finding.symptom) == bad().key


def test_a_campaign_that_was_cut_goes_on_with_the_same_cases_of_the_corpus(tmp_path):
    campaign(tmp_path, when(lambda case: False)).run()

    class Cut(Exception):
        pass

    calls = 0

    def cutting(case, history, options):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Cut
        return Verdict(PASS, budget=0.95)  # nearer than any before: the corpus grows meanwhile

    first = campaign(tmp_path, cutting, seed=8)
    with pytest.raises(Cut):
        first.run()
    again = campaign(tmp_path, when(lambda case: False), seed=8)
    assert again.run().cases == 200
    whole = campaign(tmp_path / "whole", when(lambda case: False), seed=8)
    assert whole.run().cases == 200
    replayed = json.loads((tmp_path / "replay.json").read_text())["cases"]
    assert {case["digest"] for case in replayed} <= set(ran(first)) | set(ran(again))


def test_damaged_files_of_the_corpus_stop_no_campaign(tmp_path):
    campaign(tmp_path, when(lambda case: False)).run()
    files = sorted((tmp_path / "corpus").glob("*.json"))
    files[0].write_bytes(b"\xff\x00")
    files[1].write_text(json.dumps(Entry(toy()).to_json() | {"moe_fuzz_corpus": 7}))
    with StateDir(tmp_path):
        pass
    listener = Listener()
    assert campaign(tmp_path, when(lambda case: False), listener, seed=3).run().exit_code == 0
    assert files[0].with_name(files[0].name + ".damaged").exists()
    assert files[1].exists()
    said = [event.message for event in listener.events if hasattr(event, "message")]
    assert any("is damaged" in line for line in said)
    assert any("another version's" in line for line in said)
    assert SOURCES.space("toy") is SPACE
