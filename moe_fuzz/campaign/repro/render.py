"""repro.py of a finding: a script that shows it with torch and the target alone, for whoever maintains the target.

The worker says what the calls are made of (execute/exhibit.py); the templates beside this file hold the script:
`script.py.j2` its frame, `judge.py.j2` what is wrong with the answer of a router in plain torch, `general.py.j2` with
any other (`align.py.j2`, `allreduce.py.j2`, `nvfp4.py.j2` and `relations.py.j2` are parts of it), `buckets.py.j2`
graphs and their replays, `memory.py.j2` the tensors' memory, with what differs between devices in `pages_cpu.py.j2` and
`pages_cuda.py.j2`.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jinja2

from moe_fuzz.campaign import interfaces
from moe_fuzz.campaign.confirm import TRIES, holds, in_order
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.interfaces import Cases
from moe_fuzz.campaign.locate import OWN
from moe_fuzz.campaign.repro import tensors
from moe_fuzz.campaign.repro.judged import judged
from moe_fuzz.campaign.repro.steps import Calls, all_tensors, calls_of
from moe_fuzz.case import Case, targets_of
from moe_fuzz.errors import CaseError, MoeFuzzError
from moe_fuzz.ops import get_space
from moe_fuzz.options import FENCED_DEVICES, FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, HANG

_UNFENCED = FenceOptions(hard=(), readonly=(), own="off")
_ATTEMPTS = 20  # child processes, for a finding that shows sometimes
_DEADLINE = 60  # seconds for what should not hang
_HANG = 10  # the least seconds after which the script says that it hangs, where the finding does not say
_MEMORY = 4 << 30  # bytes, where the worker had no limit
_WIDTH = 117  # three quotes stand before the first line
_BITWISE = ("isolation", "batch_invariance", "determinism", "replay", "ranks", "residual")  # checks
_FAR = {"int32_boundary", "far_columns"}  # layouts of gigabytes of addresses
#: what an exhibit's `load` may leave out
_NOTHING: Mapping[str, Any] = {"libraries": [], "environment": {}, "imports": [], "calls": ""}
#: what a script may need of the standard library
_MODULES = ("ast", "base64", "contextlib", "ctypes", "faulthandler", "functools", "glob", "importlib",
            "importlib.util", "inspect", "json", "math", "mmap", "os", "re", "resource", "runpy", "select", "signal",
            "sys", "time", "traceback", "zlib")  # fmt: skip


class Worker(interfaces.Worker, Protocol):
    def exhibit(self, case: Case, target: str) -> dict[str, Any]: ...


class Pool(Protocol):
    def fresh(self) -> AbstractContextManager[Worker]: ...


def renderer(pool: Pool, options: RunOptions | None = None) -> Callable[[Finding], str]:
    """Renders a finding's script with exhibits from fresh workers of `pool`; `options` are those of the campaign.

    A finding must not be lost over its script: where there can be none, the text says why and ends with exit code 3.
    """
    options = options or RunOptions()

    def render_repro(finding: Finding) -> str:
        try:
            cases = (*finding.sequence, finding.case)
            if len(set(targets_of(cases, finding.target))) > 1:
                raise CaseError("", "a script calls one target, not others before it", "use `moe-fuzz replay`")
            with pool.fresh() as worker:
                exhibits = [worker.exhibit(case, finding.target) for case in cases]
            return render(finding, exhibits[-1], exhibits[:-1], bare=_shows_bare(pool, finding, options))
        except MoeFuzzError as error:
            return _environment().get_template("none.py.j2").render(
                doc=_docstring([finding.message]), reason=str(error), replay=finding.replay
            )

    return render_repro


def _shows_bare(pool: Pool, finding: Finding, options: RunOptions) -> bool:
    """Whether the finding shows without guards, and without poison in memory that the target allocates itself."""
    if finding.check in ("fence", "canary", HANG):  # what needs its fence by definition, and what costs too much to see
        return finding.check == HANG
    cases: Cases = (*finding.sequence, finding.case)
    bare = replace(options, fence=_UNFENCED)
    for _ in range(1 if finding.reproduces == "always" else TRIES):
        with pool.fresh() as worker:
            if holds(in_order(worker, cases, finding.target, bare)[-1], finding.raw):
                return True
    return False


def render(
    finding: Finding, exhibit: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = (), bare: bool = False
) -> str:
    """The script of a finding, from the exhibit of its case and those of the cases that must run before it.

    bare: the finding shows without guards and poison, so the script has none, unless the finding is about them.
    Raises CaseError for what a script cannot do: another device, rows or columns gigabytes apart.
    """
    device = exhibit["device"]
    if device not in FENCED_DEVICES:
        raise CaseError("", f"a script for device {device!r} cannot be written", "use `moe-fuzz replay`")
    if finding.own == "all":
        raise CaseError("", "a script cannot fence what the target allocates in C++", "use `moe-fuzz replay`")
    if any(_FAR & set(case.fault_names) for case in (*finding.sequence, finding.case)):
        raise CaseError("", "a script has no memory for what lies gigabytes apart", "use `moe-fuzz replay`")
    check, load = finding.check, _NOTHING | exhibit["load"]
    earlier: list[Calls] = []
    for other, its in zip(finding.sequence, before, strict=True):
        first = sum(len(calls.steps) for calls in earlier) + 1
        earlier.append(calls_of(other, its, [f"_BEFORE_{first + i}" for i in range(len(its["steps"]))]))
    several = len(exhibit["steps"]) > 1
    case = calls_of(finding.case, exhibit, [f"_{i + 1}" if several else "" for i in range(len(exhibit["steps"]))])
    by, fence = judged(finding, exhibit["contract"]), _fence(finding, bare)
    everywhere = [step for calls in (*earlier, case) for _, step in calls.steps]
    graphs = any(calls.graph for calls in (*earlier, case))
    refills = any(step["holds"] for step in everywhere)
    poisons = graphs or bool(fence["own"]) or check == "written" or any(step["out"] for step in everywhere)
    found = next(iter(finding.verdict.violations), None)
    tape = next((one["tape"] for one in (exhibit, *before) if one["tape"]), "")
    context = {
        "judge_template": by.template,
        "by": by,
        "finding": finding,
        "check": check,
        "found": found,
        "shows": by.shows,
        "doc": _docstring(_about(finding, load, device, case, sum(len(one.steps) for one in earlier), bool(tape))),
        "judge_doc": _sentence(_rule(finding) or "the calls come back"),
        "device": device,
        "load": load,
        "interpreter": exhibit["interpreter"],
        "tape": tape,
        "target": _target(load),
        "contract": exhibit["contract"],
        "edge": exhibit["edge"],
        "before": earlier,
        "earlier": [one for calls in earlier for one in calls.steps],
        "case": case,
        "steps": list(case.steps),
        "graphs": graphs,
        "first": exhibit["steps"][0]["fluid"][0],
        "count": len(exhibit["steps"][0]["results"]),
        "peers": _peers([*earlier, case]),
        "refills": refills,
        "fills": graphs or refills or bool(fence["readonly"]),
        "wants_healed": check in ("isolation", "batch_invariance") or by.shows != "wrong",
        "wants_subset": check == "batch_invariance" or by.shows != "wrong",
        "fence": fence,
        "guards": bool(fence["names"] or fence["own"] == "fence"),
        "poisons": poisons,
        "bits": poisons or by.relation or check in _BITWISE,
        "compressed": any("zlib" in tensor for step in everywhere for tensor in all_tensors(step)),
        "int64": any(tensor["dtype"] == "int64" for step in everywhere for tensor in all_tensors(step)),
        "attempts": 1 if finding.reproduces == "always" else _ATTEMPTS,
        "deadline": _deadline(finding, device),
        "memory": (exhibit["memory_limit"] or _MEMORY) if by.shows == "memory" and device == "cpu" else None,
    }
    template = _environment().get_template("script.py.j2")
    body = template.render(context, imports=())
    imports = [name for name in _MODULES if re.search(rf"\b{re.escape(name)}\.", body)]
    return template.render(context, imports=imports)


def _peers(cases: Sequence[Calls]) -> dict[str, Any] | None:
    """What the cases of an all-reduce need: whether other calls are made around theirs."""
    who = [calls.peers for calls in cases if calls.peers]
    if not who:
        return None
    keyword = f", {who[-1]['group']}=self.groups[0]" if who[-1]["group"] else ""
    return {"around": any(one["burst"] or one["groups"] > 1 for one in who), "keyword": keyword}


def _deadline(finding: Finding, device: str) -> int:
    """Seconds from the moment the target is loaded; on a GPU its kernels are compiled within them."""
    if finding.check != HANG:
        return _DEADLINE if device == "cpu" else 2 * _DEADLINE
    seconds = math.ceil(finding.verdict.seconds) or _HANG
    return seconds if device == "cpu" else max(seconds, _DEADLINE)


def _fence(finding: Finding, bare: bool) -> dict[str, Any]:
    """Which tensors lie between guards, which are read-only, and what becomes of memory the target allocates itself."""
    tensor = finding.symptom.partition(":")[0]
    everything = list(get_space(finding.case.op).tensors)
    if finding.check in ("fence", "canary"):
        own = tensor.startswith(OWN)
        written = [tensor] if finding.symptom.endswith(":inside:write") else []
        return {"names": [] if own else [tensor], "readonly": written, "own": "fence" if own else ""}
    if finding.check == CRASH and not bare:
        return {"names": everything, "readonly": everything, "own": "fence"}
    return {"names": [], "readonly": [], "own": "" if bare else "poison"}


def _about(
    finding: Finding, load: Mapping[str, Any], device: str, case: Calls, earlier: int, taped: bool
) -> list[str]:
    """The paragraphs of the docstring."""
    space = get_space(finding.case.op)
    violation = next(iter(finding.verdict.violations), None)
    facts = [f"Input     {finding.label or space.label(finding.case)}"]
    facts += [f"Check     {finding.check}" + (f": {rule}" if (rule := _rule(finding)) else "")]
    facts += [f"Promised  {finding.clause}"] if finding.clause else []
    if violation is not None:
        told = (("Expected", violation.expected), ("Got", violation.got))
        facts += [f"{name:9} {text}" for name, text in told if text]
    if case.graph:
        sizes = " and ".join(str(name) for name, _ in case.buckets)
        again = "what a call asked for, again, over buffers" if taped else "calls over static buffers"
        what = "the graphs" if device == "cuda" else f"a CPU has no graphs: {again}"
        facts += [f"Replays   {len(case.steps)}; {what} of {sizes} tokens"]
    if any(step["holds"] for _, step in case.steps):
        facts += [f"Calls     {len(case.steps)}; the buffers of one are filled anew for another, as a server does it"]
    if earlier:
        calls = f"{earlier} other call{'s' if earlier > 1 else ''}"
        facts += [f"Before    {calls} in the same process, without which it passes"]
    needs = "torch and the target itself" if load["kind"] != "source" else "torch alone: the target is copied below"
    if load["calls"]:
        libraries = ", ".join(f"{one['path']} (another one: {one['variable']}=PATH)" for one in load["libraries"])
        needs = f"torch and {libraries or load['imports'][0]}: it calls {load['calls']} itself"
    run = [f"Run it with `python repro.py`. It needs {needs}. Another implementation, or a fixed one, is tried with "
           "`python repro.py path/to/file.py:function`, or `package.module:function`."]  # fmt: skip
    if load.get("needs_moe_fuzz"):
        run += ["The file of the target imports moe_fuzz itself."]
    versions = ", ".join(f"{name} {text}" for name, text in finding.env.items() if name not in ("target", "origin"))
    return [
        f"{finding.target}: {finding.message}",
        "\n".join(facts),
        " ".join(run),
        "Exit code: 1 the bug is there, 0 it is fixed, 2 something else is wrong, 3 the target cannot be loaded.",
        *([f"Found with {versions}."] if versions else []),
        f"With moe-fuzz:\n\n    {finding.replay}",
    ]


def _rule(finding: Finding) -> str:
    """What the check asks, in one line; a crash, a hang and running out of memory need none."""
    return get_space(finding.case.op).checks.get(finding.check, "")


def _target(load: Mapping[str, Any]) -> str:
    """`file.py:function` or `package.module:function`, `()` behind a factory; empty where the source is copied."""
    if load["kind"] == "source":
        return ""
    return f"{load.get('path') or load['module']}:{load['attribute']}{'()' if load['factory'] else ''}"


def _docstring(paragraphs: Sequence[str]) -> str:
    """Paragraphs as the inside of a docstring: wrapped, and with nothing that could end it or garble the source."""
    lines: list[str] = []
    for paragraph in paragraphs:
        for line in _printable(paragraph).splitlines():
            if line.startswith("    "):  # a command, to be copied as one line
                lines.append(line)
                continue
            indent = " " * 10 if line[:10].rstrip().isalpha() and line[9:10] == " " else ""
            lines += textwrap.wrap(
                line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        lines.append("")
    return "\n".join(lines).rstrip().replace("\\", "\\\\").replace('"""', "'''")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _rows(rows: Sequence[int]) -> str:
    """Row numbers as a Python expression."""
    if len(rows) > 2 and list(rows) == list(range(rows[0], rows[-1] + 1)):
        return f"range({rows[0]}, {rows[-1] + 1})"
    text = str(list(rows))
    if len(text) < _WIDTH - 20:
        return text
    return "\n".join(["[", textwrap.fill(text[1:-1], 112, initial_indent="    ", subsequent_indent="    ") + ",", "]"])


def _index(rows: Sequence[int]) -> str:
    """The same, where a tensor is indexed with it: a short range would be taken for an index of each dimension."""
    text = _rows(rows)
    return f"list({text})" if text.startswith("range") else text


def _repr(value: Any) -> str:
    """Python source of a plain value, in double quotes where that needs no thought."""
    if isinstance(value, float) and math.isinf(value):
        return "math.inf" if value > 0 else "-math.inf"
    text = ascii(value)
    return text if '"' in text or "\\'" in text else text.replace("'", '"')


@functools.cache  # a template is compiled once: that costs more than all the rest of a script
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the output is Python; what comes from outside goes through repr, or through _docstring
    )
    environment.filters |= {"literal": tensors.literal, "rows": _rows, "index": _index, "repr": _repr}
    return environment
