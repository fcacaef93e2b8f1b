"""The ledger's file: read with an error for whatever is wrong with it, and written from a finding."""

from __future__ import annotations

import datetime
import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.case import Case, inline_sequence, loads_sequence
from moe_fuzz.case_json import unpacked
from moe_fuzz.errors import CaseError, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.options import OWN

REPRODUCES = ("always", "sometimes")
_TRACKER = re.compile(r"https?://\S+|[A-Za-z][\w./-]*#\d+|[A-Z][A-Z0-9]*-\d+")


def load(path: Path, missing_ok: bool = False) -> tuple[Entry, ...]:
    """The entries of a file. Raises UsageError for whatever is wrong with it, naming the entry and the way out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if missing_ok:
            return ()
        raise UsageError(f"there is no ledger {path}", "`moe-fuzz ledger add ID` begins one") from None
    except OSError as error:
        raise UsageError(f"the ledger {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the ledger {path} is not text: {error}", "correct the file") from error
    return parse(text, path)


def check(text: str) -> None:
    """Raises UsageError for text that would not be read again."""
    parse(text, Path("what is to be written"))


def parse(text: str, path: Path) -> tuple[Entry, ...]:
    """`load`, of a file's text."""
    try:
        return _parse(text, path)
    except RecursionError as error:  # of the parser
        raise UsageError(f"the ledger {path} is nested deeper than can be read", "correct the file") from error


def _parse(text: str, path: Path) -> tuple[Entry, ...]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the ledger {path} is not valid TOML: {error}", "correct the file") from error
    unknown = sorted(set(data) - {"known"})
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}", "a ledger holds [[known]] tables and nothing else")
    tables = data.get("known", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: `known` must be a list of tables", "write [[known]], with two brackets")
    entries = tuple(_entry(table, number, path) for number, table in enumerate(tables, 1))
    twice = next((e.name for at, e in enumerate(entries) if e.name in {o.name for o in entries[:at]}), None)
    if twice is not None:
        raise UsageError(f"{path}: {twice} stands in it twice", "remove one of the two")
    return entries


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_KEYS = {f.name for f in fields(Entry)} - {"name", "cases"} | {"case"}


def _entry(table: Mapping[str, Any], number: int, path: Path) -> Entry:
    fingerprint = table.get("fingerprint")
    name = fingerprint if fingerprint and isinstance(fingerprint, str) else f"entry {number}"
    where = f"{path}: {name}" if name.startswith("entry") else f"{path}: entry {number}, {name}"

    def wrong(problem: str, hint: str = "") -> UsageError:
        return UsageError(f"{where}: {problem}", hint)

    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise wrong(f"unknown key {key!r}{meant}", f"the keys are {', '.join(sorted(_KEYS))}")
    for key in ("fingerprint", "target", "check", "symptom", "tracker", "owner", "case", "reproduces", "fence", "note"):
        if key in table and (not isinstance(table[key], str) or (not table[key].strip() and key != "note")):
            raise wrong(f"{key} must be a text, not {_said(table[key])}")
    for key in ("tracker", "owner"):
        if key not in table:
            raise wrong(f"has no {key}", f"every entry has a {key}: who looks at it, and where it is tracked")
    if not _TRACKER.fullmatch(table["tracker"]):
        raise wrong(f"tracker {table['tracker']!r} is no reference to an issue",
                    "write its address, or like vllm#39391 or KERNEL-12")  # fmt: skip
    if not ("fingerprint" in table or ("target" in table and "check" in table)):
        raise wrong("has neither a fingerprint nor a predicate", "write fingerprint = …, or target = … and check = …")
    reproduces = table.get("reproduces", "always")
    if reproduces not in REPRODUCES:
        raise wrong(f"reproduces must be one of {', '.join(REPRODUCES)}, not {_said(reproduces)}")
    if reproduces == "always" and "case" not in table:
        raise wrong("has no case, so that nobody would notice when it is mended",
                    'write the case (`moe-fuzz ledger add` does), or reproduces = "sometimes"')  # fmt: skip
    if table.get("fence", "torch") not in OWN:
        raise wrong(f"fence must be one of {', '.join(OWN)}, not {_said(table['fence'])}")
    expires = table.get("expires")
    if expires is not None and (not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime)):
        raise wrong(f"expires must be a date, not {_said(expires)}",
                    "write expires = 2027-06-30, without quotation marks")  # fmt: skip
    if not isinstance(table.get("quarantine", False), bool):
        raise wrong(f"quarantine must be true or false, not {_said(table['quarantine'])}")
    raw = _texts(table, "raw", wrong)
    if raw and len(raw) != 2:
        raise wrong(f'raw must be a check and a symptom, as ["crash", "SIGSEGV"], not {list(raw)}')
    plain: dict[str, Any] = {key: table[key] for key in _KEYS & set(table) - {"case", "raw", "versions"}}
    plain |= {key: _texts(table, key, wrong) for key in ("features", "arch")}
    plain["also"] = tuple((check, symptom or "*") for check, _, symptom in
                          (text.partition(" ") for text in _texts(table, "also", wrong)))  # fmt: skip
    return Entry(name=name, cases=_cases(table, wrong), versions=_versions(table, wrong),
                 raw=(raw[0], raw[1]) if raw else None, **plain)  # fmt: skip


def _said(value: object) -> str:
    """A wrong value in a message: of deep tables and long texts the beginning, whatever repr() makes of their depth."""
    return _SHORT.repr(value)


def _texts(table: Mapping[str, Any], key: str, wrong: Any) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(f"{key} must be a list of texts, not {_said(value)}")
    return tuple(value)


def _cases(table: Mapping[str, Any], wrong: Any) -> Cases:
    if "case" not in table:
        return ()
    try:
        text = unpacked(table["case"].strip())
        cases = loads_sequence(text) if '"moe_fuzz_sequence"' in text else (Case.loads(text),)
        for case in cases:
            get_space(case.op).validate(case)
    except CaseError as error:
        raise wrong(f"its case: {error.message}", error.hint or "copy the whole word from the finding") from error
    if not cases:
        raise wrong("its case is an empty sequence")
    return cases


def _versions(table: Mapping[str, Any], wrong: Any) -> dict[str, str]:
    value = table.get("versions", {})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise wrong(f"versions must be a table of texts, not {_said(value)}", 'write versions = { vllm = "<0.34" }')
    for name, specifier in value.items():
        try:
            SpecifierSet(specifier)
        except InvalidSpecifier:
            raise wrong(f"versions: {name} = {specifier!r} says no versions", 'write like ">=0.30,<0.34"') from None
    return dict(value)


# ---- writing ---------------------------------------------------------------------------------------------------------


def render(
    finding: Finding, root: Path, tracker: str, owner: str, expires: datetime.date | None = None, note: str = ""
) -> str:
    """The [[known]] tables of a finding, one for each of its faces too. root: the ledger's folder, whose absolute path
    does not go into it: other people's is another."""
    shown = [(finding.id, finding.scope, (*finding.sequence, finding.case))]
    shown += [(face.id, face.scope, (face.case,)) for face in finding.faces]
    return "".join(_render(finding, *one, root, tracker, owner, expires, note) for one in shown)


def _render(
    finding: Finding, id_: str, scope: Iterable[str], cases: Cases, root: Path, tracker: str, owner: str,
    expires: datetime.date | None, note: str,
) -> str:  # fmt: skip
    values: dict[str, Any] = {
        "fingerprint": id_, "target": _literal(finding.target).replace(f"@{root}/", "@*/"), "check": finding.check,
        "symptom": _literal(finding.symptom),
    }  # fmt: skip
    if finding.raw != (finding.check, finding.symptom):
        values["raw"] = list(finding.raw)
    others = sorted(finding.symptoms - {finding.raw, (finding.check, finding.symptom)})
    if others:
        values["also"] = [f"{check} {_literal(symptom)}" for check, symptom in others]
    values |= {"features": list(scope), "tracker": tracker, "owner": owner}
    values["reproduces"] = "always" if finding.reproduces == "always" else "sometimes"
    if expires is not None:
        values["expires"] = expires
    if finding.own != "torch":
        values["fence"] = finding.own
    if note:
        values["note"] = note
    values["case"] = inline_sequence(cases) if len(cases) > 1 else cases[0].inline()
    return "\n[[known]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _literal(text: str) -> str:
    """A pattern that stands for this text alone."""
    return re.sub(r"([*?\[])", r"[\1]", text)


def _toml(value: Any) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
