"""What compute-sanitizer writes, read into reports. Its forms differ from release to release; all of these are read:

    ========= Invalid __global__ read of size 16 bytes
    =========     at matmul_kernel+0xec0 in matmul.py:43               (since 2023)
    =========     at 0xda0 in /…/fused_moe.py:175:fused_moe_kernel     (before)
    =========     at 0x3b0 in void kernel<int>(int*)                   (without lines)
    =========     by thread (18,0,0) in block (0,0,0)
    =========     Access to 0x7450 is out of bounds
    =========     and is 161 bytes after the nearest allocation at 0x7450 of size 1,024 bytes
    ========= Error: Race reported between Write access at kernel(int*)+0xf0 in race.cu:23
    =========     and Read access at kernel(int*)+0x150 in race.cu:27 [508 hazards]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

_BAR = "========="
_BANNER = re.compile(rf"^{_BAR} COMPUTE-SANITIZER", re.MULTILINE)
#: The tool ran, and looked at nothing. Any of these means that its silence says nothing.
_REFUSALS = re.compile(
    r"device not supported|terminated before first instrumented api call|internal sanitizer error"
    r"|failed to initialize|unable to find injection library|insufficient driver|not supported on this"
    r"|unable to open (?:debugger|profiling)|no kernels? (?:was|were) instrumented",
    re.IGNORECASE,
)
#: Lines that begin a report of a defect, and its kind.
_HEADS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^Invalid (?P<space>__\w+__) (?P<access>[\w?]+) of size"), "out of bounds"),
    (re.compile(r"^Misaligned|^Invalid .*misaligned", re.IGNORECASE), "misaligned"),
    (re.compile(r"^Uninitialized (?P<space>__\w+__) memory (?P<access>\w+)"), "uninitialized"),
    (re.compile(r"^(?:Error|Warn(?:ing)?): (?:\([^)]*\) )?(?:Race reported|Potential \w+ hazard)", re.I), "race"),
    (re.compile(r"^Barrier error detected", re.IGNORECASE), "barrier"),
    (re.compile(r"^(?:Illegal|Stack overflow|Warp|Device assert|Malloc/Free error)", re.IGNORECASE), "device error"),
)  # fmt: skip
_LATER = re.compile(r"(?P<kernel>\S.*?)\+0x[0-9a-f]+(?: in (?P<file>[^\s:][^:]*):(?P<line>\d+))?(?= |$)")
_EARLIER = re.compile(r"0x[0-9a-f]+ in (?P<file>[^\s:][^:]*):(?P<line>\d+):(?P<kernel>.+?)(?: \[|$)")
_BARE = re.compile(r"0x[0-9a-f]+ in (?P<kernel>\S.*?)(?: \[|$)")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK|INITCHECK|SYNCCHECK) SUMMARY: (\d[\d,]*)")
_API = re.compile(r"^Program hit ")  # the consequence of a defect, or an error that the program asks about


@dataclass(frozen=True)
class Report:
    """One defect that the tool saw."""

    tool: str
    kind: str  # "out of bounds", "misaligned", "uninitialized", "race", "barrier", "device error"
    message: str  # the tool's own first line
    kernel: str = ""
    file: str = ""  # as the tool writes it: a path or a last name; empty where the kernel bears no lines
    line: int = 0
    where: str = ""  # thread and block
    note: str = ""  # what it says of the address
    times: int = 1

    @property
    def site(self) -> str:
        """`routing.py:118 in _kernel`, like every other site; empty without a line."""
        return f"{PurePath(self.file).name}:{self.line} in {self.kernel}" if self.file and self.kernel else ""

    @property
    def sentence(self) -> str:
        place = self.site or self.kernel
        said = f"{self.tool}: {self.message.rstrip('.')}"
        said += (f" at {place}" if place else "") + (f" by {self.where}" if self.where else "")
        return said + (f": {self.note}" if self.note else "") + (f" ({self.times}x)" if self.times > 1 else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"site": self.site}


def has_banner(text: str) -> bool:
    """Whether the tool was there at all."""
    return bool(_BANNER.search(text))


def refusal(text: str) -> str:
    """The line in which the tool says that it does not look; empty if it says nothing of the kind."""
    said = (line.removeprefix(_BAR).strip() for line in text.splitlines() if line.startswith(_BAR))
    return next((line for line in said if _REFUSALS.search(line)), "")


def counted(text: str) -> int | None:
    """How many errors the tool says there were; None where it did not come to its end."""
    found = _SUMMARY.findall(text)
    return int(found[-1].replace(",", "")) if found else None


def parse(text: str, tool: str) -> tuple[Report, ...]:
    """The reports, each place once, those that name a line first."""
    merged: dict[tuple[str, str, str, int], Report] = {}
    for head, body in _blocks(text):
        report = _report(head, body, tool)
        key = (report.kind, report.kernel, report.file, report.line)
        known = merged.get(key)
        merged[key] = replace(known, times=known.times + 1) if known else report
    return tuple(sorted(merged.values(), key=lambda report: not report.site))


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Heads of reports with the lines that belong to them."""
    head, body = "", list[str]()
    for raw in text.splitlines():
        if not raw.startswith(_BAR):
            continue  # the program's own output
        line = raw.removeprefix(_BAR)
        if line.startswith("     ") or not line.strip():
            body.append(line.strip())
            continue
        if head:
            yield head, body
        head, body = "", []
        if not _API.match(line.strip()) and any(pattern.search(line.strip()) for pattern, _ in _HEADS):
            head = line.strip()
    if head:
        yield head, body


def _report(head: str, body: Sequence[str], tool: str) -> Report:
    kind = next(kind for pattern, kind in _HEADS if pattern.search(head))
    message = re.split(r" access at | at 0x|(?<=access) at ", head)[0] if kind == "race" else head
    # A race has two places; the first stands in its head.
    places = [head, *body] if kind == "race" else body
    kernel, file, number = next(filter(None, map(_place, places)), ("", "", 0))
    where = next((line.removeprefix("by ") for line in body if line.startswith("by thread")), "")
    said = [line for line in body if line.startswith(("Access ", "Address ", "and is ", "and Read ", "and Write "))]
    return Report(tool, kind, _short(message), _plain(kernel), file, number, where, _short(" ".join(said)))


def _place(line: str) -> tuple[str, str, int] | None:
    """(kernel, file, line) in `at …`, `access at …`."""
    found = re.search(r"\bat (?=\S)", line)
    if found is None or line.startswith(("by ", "Host Frame", "Access", "Address", "and is ")):
        return None
    rest = line[found.end() :]
    for pattern in (_EARLIER, _LATER, _BARE):
        match = pattern.match(rest)
        if match:
            named = match.groupdict()
            return named["kernel"], named.get("file") or "", int(named.get("line") or 0)
    return None


def _plain(kernel: str) -> str:
    """`void space::kernel<int>(int*)` → `kernel`."""
    bare = re.sub(r"\(.*$", "", kernel.strip())
    while (cut := re.sub(r"<[^<>]*>", "", bare)) != bare:
        bare = cut
    return bare.split()[-1].split("::")[-1] if bare.split() else kernel.strip()


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "…"
