"""Replays on a host do again what a call asked torch and Triton for, and nothing that its Python code did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute import buckets
from moe_fuzz.execute.runner import Runner
from moe_fuzz.execute.tape import NotWhole, Tape
from moe_fuzz.labels import Labels
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, VIOLATION, Verdict

ROUTERS = """
import numpy
import torch
import triton
import triton.language as tl
from moe_fuzz import Capabilities, Contract, declares

KEPT = {}

def right(logits, top_k):
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=1e300) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    e = (x - x.amax(dim=1, keepdim=True).clamp_min(-1e300)).exp()
    return (e.gather(1, ids) / e.sum(1, keepdim=True).clamp_min(1e-300)).float(), ids.int()

promise = declares(contract=Contract(deterministic=True))
same_code = declares(contract=Contract(deterministic=True), capabilities=Capabilities(out=False, one_host_path=True))

@promise
def plain(logits, top_k):
    return right(logits, top_k)

def counted(logits, top_k):
    return right(logits if int((logits > 0).sum()) >= 0 else logits.clone(), top_k)

reads = promise(counted)
may_not_read = same_code(lambda logits, top_k: counted(logits, top_k))

@same_code
def reads_its_own_numbers(logits, top_k):
    assert torch.tensor([3, top_k]).tolist()[1] == int(torch.arange(top_k + 1)[top_k])
    return right(logits, top_k)

@promise
def by_numpy(logits, top_k):
    weights, ids = right(torch.from_numpy(logits.float().numpy().copy()), top_k)
    return weights, ids

@promise
def by_memory_that_nobody_sees(logits, top_k):
    import ctypes
    weights, ids = right(logits, top_k)
    result = torch.empty_like(weights)
    ctypes.memmove(result.data_ptr(), weights.data_ptr(), weights.nbytes)
    return result, ids

@promise
def of_rows_by_mask(logits, top_k):
    some = logits[~logits.isnan().all(1)]  # as many as there are in the capture: all
    weights, ids = right(logits, top_k)
    weights[: len(some)] += 0
    return weights, ids

@promise
def first_shift_is_kept(logits, top_k):
    if "calls" not in KEPT:
        KEPT["calls"] = 0
    KEPT["calls"] += 1
    weights, ids = right(logits, top_k)
    return weights * (1.0 if KEPT["calls"] != 2 else 1.5), ids  # the second call of the process is the capture

@promise
def asks(logits, top_k):
    weights, ids = right(logits, top_k)
    return (weights * 1.5 if torch.cuda.is_current_stream_capturing() else weights), ids

@triton.jit
def _add(x_ptr, out_ptr, rows, SIZE: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    x = tl.load(x_ptr + row * SIZE + columns)
    tl.store(out_ptr + row * SIZE + columns, x)

@promise
def by_triton(logits, top_k):
    whole = torch.empty(logits.shape, dtype=logits.dtype)
    _add[lambda meta: (len(logits),)](logits.contiguous(), whole, len(logits), SIZE=16)
    return right(whole, top_k)

@promise
def writes_before_its_own(logits, top_k):
    whole = torch.empty(logits.shape, dtype=logits.dtype)
    bad = logits.contiguous().isinf().any().int()  # never in the warm-up, nor in the capture
    _add[(len(logits),)](logits.contiguous(), whole, len(logits), SIZE=16)
    _before[(1,)](whole, bad)
    return right(whole, top_k)

@triton.jit
def _before(out_ptr, bad_ptr):
    bad = tl.load(bad_ptr)
    tl.store(out_ptr - 1, 1.0, mask=bad > 0)
"""


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


@pytest.fixture
def run(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(the verdict of a case on a router above, whether its buckets were taped)."""
    file = tmp_path / "routers.py"
    file.write_text(ROUTERS)

    def run(name: str, *faults: Fault, mode: str = "graph") -> tuple[Verdict, list[bool]]:
        taped: list[bool] = []
        close = buckets.Taped.close

        def closed(self: buckets.Taped) -> None:
            taped.append(self._tape is not None)
            close(self)

        monkeypatch.setattr(buckets.Taped, "close", closed)
        rows = Labels.range(6)
        steps = (Step(rows), Step(rows, Labels(), faults), Step(rows))
        case = Case("topk_softmax", {**SIMPLEST, "experts": "0-15", "top_k": 3}, steps, 3, mode)  # type: ignore[arg-type]
        return runner.run(case, f"topk_softmax@{file}:{name}", RunOptions()), taped

    return run


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["graph", "piecewise"])
@pytest.mark.parametrize("name", ["plain", "by_triton", "reads_its_own_numbers"])
def test_a_right_call_is_taped_and_passes(run, name: str, mode: str) -> None:
    verdict, taped = run(name, Fault("nan_rows", "logits", Labels.parse("2")), mode=mode)
    assert (verdict.kind, taped) == (PASS, [True]), verdict


@pytest.mark.parametrize("name", ["reads", "by_numpy", "by_memory_that_nobody_sees", "of_rows_by_mask"])
def test_what_no_tape_can_hold_is_called_again(run, name: str) -> None:
    verdict, taped = run(name, Fault("nan_rows", "logits", Labels.parse("2")))
    assert (verdict.kind, taped) == (PASS, [False]), verdict


def test_who_has_one_host_path_may_not_read_what_is_on_the_device(run) -> None:
    verdict, _ = run("may_not_read")
    assert verdict.kind == VIOLATION
    [found] = verdict.violations
    assert (found.check, found.symptom) == ("capture", "RuntimeError")
    assert "operation not permitted when stream is capturing: the host reads a tensor by" in found.message
    assert found.site.startswith("routers.py:")
    assert found.site.endswith(" in counted")


@pytest.mark.parametrize("name", ["first_shift_is_kept", "asks"])
def test_what_the_host_decided_in_the_capture_is_kept(run, name: str) -> None:
    verdict, taped = run(name)
    assert verdict.kind == VIOLATION, taped
    assert verdict.violations[0].check in ("weights", "replay")


@pytest.mark.interpreter
def test_memory_of_its_own_is_fenced_in_replays_too(run) -> None:
    assert run("writes_before_its_own")[0].kind == PASS
    verdict, _ = run("writes_before_its_own", Fault("inf_rows", "logits", Labels.parse("1")))
    assert {(v.check, v.step) for v in verdict.violations} == {("canary", 1)}
    assert len(verdict.violations) == 2  # of the replay, and of the eager call beside it


def test_a_replay_writes_where_the_call_did() -> None:
    x = torch.arange(4.0)
    tape = Tape([x], refuses=False)
    y = tape.record(lambda: (x * 2).clone() + torch.ones(4)[1])
    assert tape.whole
    x.fill_(3)
    tape.poison()
    assert y.isnan().all()
    tape.replay()
    assert y.tolist() == [7.0] * 4


def test_a_shape_that_hangs_on_numbers_is_seen() -> None:
    x = torch.tensor([0, 1, 1])
    tape = Tape([], refuses=False)
    tape.record(lambda: torch.bincount(x))
    x.fill_(5)
    with pytest.raises(NotWhole):
        tape.replay()


def test_a_call_that_makes_too_much_is_not_kept() -> None:
    x = torch.ones(1 << 20)
    tape = Tape([x], refuses=True)
    y = tape.record(lambda: sum((x + at for at in range(80)), start=x)[0])
    assert not tape.whole
    assert (tape._entries, tape._made) == ([], [])
    assert tape.record(y.item) == 81 + sum(range(80))  # nobody knows any more what is of the device
