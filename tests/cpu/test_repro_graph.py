"""repro.py of findings in graph modes: static buffers, a replay a step, and an eager call beside each."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import HEALTHY, case_of, exhibit_of, finding_of, write
from tests.cpu.test_repro_cuda import GPU, pretended

#: Right in every call of its own; what shows needs more than one, at an address that was seen before.
ROUTERS = """
import torch

SEEN = {}

def right(logits, k, out=None):
    x = logits.float().nan_to_num(nan=-torch.inf) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :k]
    e = (x.double() - x.double().amax(1, keepdim=True).clamp_min(-1e300)).exp()
    picked, total = e.gather(1, ids).float(), e.sum(1, keepdim=True).clamp_min(1e-30).float()
    weights, ids = picked / total, ids.int()
    if out is None:
        return weights, ids
    out[0].copy_(weights)
    out[1].copy_(ids)
    return out

def times(logits):
    key = logits.data_ptr(), len(logits)
    SEEN[key] = SEEN.get(key, 0) + 1
    return SEEN[key]

def tuned(logits, k):
    weights, ids = right(logits, k)
    return (weights.nextafter(weights + 1), ids) if times(logits) >= 2 else (weights, ids)  # within every bound

def first_answer_only(logits, k, out=None):
    found = right(logits, k)
    if out is None or SEEN.setdefault(out[0].data_ptr(), 0):
        return out or found
    SEEN[out[0].data_ptr()] = 1
    return right(logits, k, out)

def raises_on_eight(logits, k):
    if len(logits) == 8:
        raise RuntimeError("eight")
    return right(logits, k)

def forgets_out(logits, k, out=None):
    return right(logits, k, out if times(logits) < 3 else None)

def cannot_be_captured(logits, k):
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    return right(logits, k)

def worn_out(logits, k):
    weights, ids = right(logits, k)
    SEEN["calls"] = SEEN.get("calls", 0) + 1
    return weights * (1.5 if SEEN["calls"] > 8 else 1.0), ids

def reads_past(logits, k):
    import ctypes
    if times(logits) >= 2:
        (ctypes.c_ubyte * 1).from_address(logits.data_ptr() + 4 * logits.numel())[0]
    return right(logits, k)
"""
#: The same as they would be declared. A script is not to import us, so it is given the bare file.
DECLARED = ROUTERS + """
from moe_fuzz.contract import Contract, declares

for one in list(globals().values()):
    if callable(one) and getattr(one, "__module__", "") == __name__:
        declares(contract=Contract(deterministic=True))(one)
"""


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    path = tmp_path / "routers.py"
    path.write_text(ROUTERS)
    return path


def step(tokens: int, padding: int = 0, *faults: Fault) -> Step:
    rows = Labels.range(tokens)
    return Step(rows, rows.last(padding), faults)


STEPS = (step(2), step(8), step(8, 3), step(2))


def script(folder: Path, name: str, case: Case, check: str, symptom: str, *before: Case, cuda: bool = False) -> Path:
    verdict = Verdict(VIOLATION, (Violation(check, symptom, "is wrong"),), seconds=1.0)
    runner = Runner("cpu")
    exhibits = [exhibit_of(runner, one) | (GPU if cuda else {}) for one in (*before, case)]
    for exhibit in exhibits:
        exhibit["contract"]["deterministic"] = True
    text = render(finding_of(case, verdict, sequence=before), exhibits[-1], exhibits[:-1])
    return write(folder, name, pretended(text) if cuda else text)


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "stand-in"])
@pytest.mark.parametrize("mode", ["graph", "piecewise"])
def test_what_only_shows_in_replays(routers: Path, tmp_path: Path, batch: Batch, mode: str, cuda: bool) -> None:
    def named(name: str) -> str:
        return f"topk_softmax@{routers}:{name}"

    found = {
        "tuned": ("replay", "weights", {}, "from a replay; from an eager call, expert"),
        "first_answer_only": ("written", "weights:unwritten", {"out": True}, "were never written"),
        "raises_on_eight": ("error", "RuntimeError", {}, "raises on a valid input: RuntimeError: eight"),
        "forgets_out": ("structure", "weights:out", {"out": True}, "did not come back in the buffer"),
        "reads_past": ("fence", "logits:right:read", {"experts": 16}, "(SIGSEGV)"),
        "cannot_be_captured": ("capture", "RuntimeError", {}, "cannot be captured into a CUDA graph: RuntimeError: op"),
    }
    for name in ("forgets_out", "first_answer_only") if cuda else ("cannot_be_captured",):
        del found[name]  # a graph replays what was captured; a CPU captures nothing
    if cuda and mode == "piecewise":
        del found["reads_past"]  # logits that another graph left lie in the graphs' memory, not between guards
    declared = tmp_path / "declared.py"
    declared.write_text(DECLARED)
    runs = []
    for name, (check, symptom, config, _) in found.items():
        case = case_of(named(name), mode=mode, steps=STEPS, **config)
        if check not in ("fence", "capture"):
            verdict = Runner("cpu").run(case, f"topk_softmax@{declared}:{name}", RunOptions())
            assert (check, symptom) in [(one.check, one.symptom) for one in verdict.violations], name
        path = script(tmp_path, name, case, check, symptom, cuda=cuda)
        runs += [[path], [path, HEALTHY]]
    answers = batch(*runs)
    for (name, (_, _, _, says)), (code, said), healthy in zip(found.items(), answers[::2], answers[1::2], strict=True):
        assert (code, says in said) == (1, True), f"{name}: {said}"
        assert healthy[0] == 0, f"{name}: {healthy[1]}"


def test_every_step_is_a_replay_in_order(routers: Path, tmp_path: Path, batch: Batch) -> None:
    """Calls are counted: two warm-ups, then a replay and an eager call each. The ninth is the last step's replay."""
    case = case_of(f"topk_softmax@{routers}:worn_out", mode="graph", steps=STEPS)
    path = script(tmp_path, "all", case, "weights", "off")
    fewer = script(tmp_path, "fewer", case_of(case.target, mode="graph", steps=STEPS[:3]), "weights", "off")
    eager = script(tmp_path, "eager", case_of(case.target, steps=STEPS), "weights", "off")
    assert [code for code, _ in batch([path], [fewer], [eager])] == [1, 0, 0]
    text = " ".join(path.read_text().split())
    assert "Replays 4; a CPU has no graphs: calls over static buffers of 8 and 2 tokens" in text
    assert text.index("BUCKETS[8] = bucket_2(target)") < text.index("BUCKETS[2] = bucket_1(target)")


def test_replays_before_it(routers: Path, tmp_path: Path, batch: Batch) -> None:
    """A graph case leaves its traces for an eager one, and the other way round."""
    target = f"topk_softmax@{routers}:worn_out"
    graph, eager = case_of(target, mode="graph", steps=STEPS[:3]), case_of(target)
    paths = [script(tmp_path, "one", eager, "weights", "off", graph),
             script(tmp_path, "two", graph, "weights", "off", eager, eager),
             script(tmp_path, "alone", eager, "weights", "off")]  # fmt: skip
    assert [code for code, _ in batch(*([path] for path in paths))] == [1, 1, 0]


def test_one_token_count_laid_in_two_ways_is_two_buckets(routers: Path, tmp_path: Path, batch: Batch) -> None:
    steps = (step(4), step(4, 0, Fault("noncontiguous", "logits")), step(4))
    case = case_of(f"topk_softmax@{routers}:tuned", mode="graph", steps=steps)
    path = script(tmp_path, "laid", case, "replay", "weights")
    assert 'BUCKETS["4, laid as in step 2"] = bucket_2(target)' in path.read_text()
    assert "BUCKETS[4]" not in path.read_text()
    assert [code for code, _ in batch([path], [path, HEALTHY])] == [1, 0]
