"""The ledger's file: what is refused and why, what is written, and what an entry stands for."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.finding import Face, Finding
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.gate.ledger_file import load, parse, render
from moe_fuzz.case import Case, inline_sequence
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import CRASH, HANG, VIOLATION, Verdict, Violation

FILE = Path("known.toml")
TARGET = "topk_softmax@torch"
INFO = TargetInfo(TARGET, "topk_softmax", "torch")


@pytest.fixture(scope="module")
def case() -> Case:
    return next(strategies.grid(get_space("topk_softmax"), INFO, "cpu", 0))


def entry(text: str) -> Entry:
    [found] = parse("[[known]]\n" + text, FILE)
    return found


def line(case: Case) -> str:
    return f'tracker = "vllm#1"\nowner = "@me"\ncase = "{case.inline()}"\n'


def test_an_entry_with_everything(case: Case) -> None:
    found = entry(
        line(case) + 'fingerprint = "709fbec7a7"\ntarget = "topk_softmax@*"\ncheck = "finite"\nsymptom = "nan*"\n'
        'features = ["fault:nan_rows"]\nreproduces = "sometimes"\nexpires = 2027-06-30\narch = ["sm90"]\nnote = "why"\n'
        'also = ["weights off by one", "ids"]\n'
        'versions = { vllm = ">=0.30,<0.34" }\nraw = ["crash", "SIGSEGV"]\nquarantine = true\nfence = "all"\n'
    )
    assert found.cases == (case,)
    assert found.raw == ("crash", "SIGSEGV")
    assert found.also == (("weights", "off by one"), ("ids", "*"))
    assert (found.name, found.deadly, found.always) == ("709fbec7a7", True, False)
    assert not found.expired(datetime.date(2027, 6, 29))
    assert found.expired(datetime.date(2027, 6, 30))
    assert found.to_json()["expires"] == "2027-06-30"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('fingerprint = "a"\nowner = "@me"\nCASE', "has no tracker"),
        ('fingerprint = "a"\ntracker = "vllm#1"\nCASE', "has no owner"),
        ('fingerprint = "a"\nowner = "@me"\ntracker = "todo"\nCASE', "'todo' is no reference to an issue"),
        ('fingerprint = "a"\nowner = ""\ntracker = "vllm#1"\nCASE', "owner must be a text"),
        ('LINE', "neither a fingerprint nor a predicate"),
        ('LINE\ncheck = "finite"', "neither a fingerprint nor a predicate"),
        ('fingerprint = "a"\nowner = "@me"\ntracker = "vllm#1"', "has no case"),
        ('LINE\nfingerprint = "a"\ntargt = "x"', "unknown key 'targt' (did you mean target?)"),
        ('LINE\nfingerprint = "a"\nreproduces = "often"', "must be one of always, sometimes"),
        ('LINE\nfingerprint = "a"\nexpires = "2027-01-01"', "without quotation marks"),
        ('LINE\nfingerprint = "a"\nexpires = 2027-01-01T00:00:00', "expires must be a date"),
        ('LINE\nfingerprint = "a"\nversions = { vllm = "new" }', "says no versions"),
        ('LINE\nfingerprint = "a"\nversions = "0.33"', "versions must be a table"),
        ('LINE\nfingerprint = "a"\narch = "sm90"', "arch must be a list"),
        ('LINE\nfingerprint = "a"\nraw = ["crash"]', "a check and a symptom"),
        ('LINE\nfingerprint = "a"\nfence = "some"', "fence must be one of"),
        ('LINE\nfingerprint = "a"\nquarantine = 1', "true or false"),
        ('fingerprint = "a"\nowner = "@me"\ntracker = "A-1"\ncase = "mfz1:eNp"', "its case"),
        ('fingerprint = "a"\nowner = "@me"\ntracker = "A-1"\ncase = 7', "case must be a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_the_entry(case: Case, text: str, said: str) -> None:
    text = text.replace("LINE", line(case)).replace("CASE", f'case = "{case.inline()}"')
    with pytest.raises(UsageError) as error:
        entry(text)
    assert said in f"{error.value.message} {error.value.hint}"
    assert "known.toml: entry 1" in error.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[knwon]]\n", "unknown key 'knwon'"),
        ("[known]\n", "with two brackets"),
        ("known = 7\n", "with two brackets"),
        ("[[known]\n", "not valid TOML"),
        ("known = " + 5000 * "[" + 5000 * "]", "nested deeper than can be read"),
        ("known = " + 5000 * "{a = " + "1" + 5000 * "}", "nested deeper than can be read"),
        ("[[known]]\nfingerprint." + 5000 * "a." + "b = 1", "entry 1: fingerprint must be a text, not {'a': {'a': {"),
    ],
)
def test_what_is_no_ledger(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text, FILE)
    assert said in f"{error.value.message} {error.value.hint}"


def test_files(tmp_path: Path, case: Case) -> None:
    assert load(tmp_path / "none.toml", missing_ok=True) == ()
    with pytest.raises(UsageError, match="there is no ledger"):
        load(tmp_path / "none.toml")
    twice = tmp_path / "twice.toml"
    twice.write_text(2 * ('[[known]]\nfingerprint = "a"\n' + line(case)))
    with pytest.raises(UsageError, match="stands in it twice"):
        load(twice)
    twice.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not text"):
        load(twice)
    marked = tmp_path / "marked.toml"  # by an editor of Windows'
    marked.write_bytes("\ufeff".encode() + f'[[known]]\nfingerprint = "a"\n{line(case)}'.encode())
    assert [found.tracker for found in load(marked)] == ["vllm#1"]


@pytest.mark.parametrize("tracker", ["vllm#39391", "vllm-project/vllm#1", "KERNEL-12", "https://a.b/issues/3"])
def test_trackers(case: Case, tracker: str) -> None:
    assert entry(f'fingerprint = "a"\n{line(case)}'.replace("vllm#1", tracker)).tracker == tracker


def finding(case: Case, check: str = "ids", symptom: str = 'a "quoted" [odd] *', **changes: object) -> Finding:
    violation = Violation(check, symptom, "message")
    made = Finding(
        id="3fa9c1d2e0", target=TARGET, check=check, symptom=symptom, message="m", finding_class="contract", clause="",
        case=replace(case, target=TARGET), verdict=Verdict(VIOLATION, (violation,)), raw=(check, symptom),
        features=("E odd", "fault:nan_rows"), scope=("fault:nan_rows",),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_what_is_written_is_read_and_stands_for_the_finding(case: Case) -> None:
    found = finding(case)
    [written] = parse(render(found, Path("/r"), "vllm#1", "@me", datetime.date(2027, 1, 1), 'a "note"\n'), FILE)
    assert (written.tracker, written.owner, written.note) == ("vllm#1", "@me", 'a "note"\n')
    assert written.expires == datetime.date(2027, 1, 1)
    assert written.cases == (found.case,)
    assert written.is_finding(found)
    assert written.is_finding(replace(found, id="another", features=("fault:nan_rows",)))  # by the predicate
    assert not written.is_finding(replace(found, id="another", features=()))
    assert not written.is_finding(replace(found, id="another", symptom="else"))
    assert not written.is_finding(replace(found, id="another", target="topk_softmax@vllm"))
    bad = BadCase(TARGET, found.case, found.verdict)
    assert written.explains(bad, frozenset({"fault:nan_rows", "fault:ties"}))
    assert not written.explains(bad, frozenset({"fault:ties"}))
    assert not written.explains(replace(bad, verdict=Verdict(HANG)), frozenset({"fault:nan_rows"}))


def test_one_defect_shows_in_many_symptoms(case: Case) -> None:
    """A wrong expert has a wrong weight too; which of the two comes first, no one can say."""
    both = (Violation("weights", "off", "m"), Violation("selection", "inver*sion", "m"))
    found = finding(case, "weights", "off", verdict=Verdict(VIOLATION, both))
    [written] = parse(render(found, Path("/r"), "A-1", "@me"), FILE)
    assert written.also == (("selection", "inver[*]sion"),)
    for violation in both:
        bad = BadCase(TARGET, case, Verdict(VIOLATION, (violation,)))
        assert written.explains(bad, frozenset({"fault:nan_rows"}))
        assert not written.explains(bad, frozenset())
        assert written.shows(bad.verdict)
    other = BadCase(TARGET, case, Verdict(VIOLATION, (Violation("selection", "group", "m"),)))
    assert not written.explains(other, frozenset({"fault:nan_rows"}))
    assert written.is_finding(replace(found, id="another", check="selection", symptom="inver*sion"))


def test_each_face_has_an_entry(case: Case) -> None:
    other = case.with_config(renormalize=not case.config["renormalize"])
    face = Face("00aa00aa00", other, ("fault:ties",), ("fault:ties",), "label", "reason")
    entries = parse(render(finding(case, faces=(face,)), Path("/r"), "vllm#1", "@me"), FILE)
    assert [(e.fingerprint, e.features) for e in entries] == [
        ("3fa9c1d2e0", ("fault:nan_rows",)), ("00aa00aa00", ("fault:ties",)),
    ]  # fmt: skip


def test_a_located_crash_keeps_what_workers_say(case: Case) -> None:
    found = finding(case, "fence", "logits:right:read", raw=("crash", "SIGSEGV"), own="all")
    [written] = parse(render(found, Path("/r"), "vllm#1", "@me"), FILE)
    assert (written.deadly, written.alone, written.covers_cases, written.fence) == (True, True, True, "all")
    died = Verdict(CRASH, (Violation("crash", "SIGSEGV", "m"),))
    assert written.shows(died)
    assert not written.shows(found.verdict.only(Violation("fence", "ids:left:write", "m")))
    assert not written.explains(BadCase(TARGET, case, died), frozenset(found.features))  # that, quarantine alone may
    assert written.is_finding(found)


def test_a_file_of_this_folder_is_named_without_it(case: Case) -> None:
    found = finding(case, target="topk_softmax@/home/me/repo/kernels/my.py:topk")
    [written] = parse(render(found, Path("/home/me/repo"), "A-1", "@me"), FILE)
    assert written.target == "topk_softmax@*/kernels/my.py:topk"
    assert written.is_of("topk_softmax@/ci/checkout/kernels/my.py:topk")
    assert [one.target for one in written.cases_for("topk_softmax@/ci/my.py:topk")] == ["topk_softmax@/ci/my.py:topk"]


def test_a_sequence_is_kept_together(case: Case) -> None:
    found = finding(case, sequence=(case,))
    [written] = parse(render(found, Path("/r"), "A-1", "@me"), FILE)
    assert len(written.cases) == 2
    assert inline_sequence(written.cases) == inline_sequence((case, found.case))
    assert written.alone
    assert not written.explains(BadCase(TARGET, found.case, found.verdict), frozenset(found.features))
