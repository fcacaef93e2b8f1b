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

says_nothing = declares(contract=Contract(deterministic=True))
promise = declares(contract=Contract(deterministic=True), capabilities=Capabilities(out=False, one_host_path=True))

@promise
def plain(logits, top_k):
    return right(logits, top_k)

def counted(logits, top_k):
    return right(logits if int((logits > 0).sum()) >= 0 else logits.clone(), top_k)

reads = says_nothing(lambda logits, top_k: counted(logits, top_k))
may_not_read = promise(counted)

@promise
def reads_its_own_numbers(logits, top_k):
    assert torch.tensor([3, top_k]).tolist()[1] == int(torch.arange(top_k + 1)[top_k])
    return right(logits, top_k)

@promise
def with_checks_of_the_hosts(logits, top_k):
    weights, ids = right(logits, top_k)
    torch.nn.functional.one_hot(ids.long(), logits.shape[1])  # on a CPU torch looks whether they are in range
    return weights, ids

TABLE = torch.arange(64)

@promise
def one_table_for_both(logits, top_k):
    on_device = TABLE.to(logits.device)
    assert TABLE.tolist()[3] == 3
    return right(logits + 0 * on_device[0], top_k)

@promise
def kept_of_the_capture(logits, top_k):
    KEPT["calls of it"] = KEPT.get("calls of it", 0) + 1
    if KEPT["calls of it"] == 2:
        KEPT["table"] = torch.arange(64)
    weights, ids = by_memory_that_nobody_sees(logits, top_k)
    return weights, KEPT.get("table", torch.arange(64))[ids.long()].int()

@promise
def by_memory_that_nobody_sees(logits, top_k):
    import ctypes
    weights, ids = right(logits, top_k)
    result = torch.empty_like(weights)
    ctypes.memmove(result.data_ptr(), weights.data_ptr(), weights.nbytes)
    return result, ids

@promise
def of_rows_by_mask(logits, top_k):
    weights, ids = right(logits, top_k)
    weights[: len(logits[~logits.isnan().all(1)])] += 0
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
@pytest.mark.parametrize("name", ["plain", "by_triton", "reads_its_own_numbers", "one_table_for_both"])
def test_a_right_call_is_taped_and_passes(run, name: str, mode: str) -> None:
    verdict, taped = run(name, Fault("nan_rows", "logits", Labels.parse("2")), mode=mode)
    assert (verdict.kind, taped) == (PASS, [True]), verdict


@pytest.mark.parametrize("name", ["by_memory_that_nobody_sees", "with_checks_of_the_hosts", "kept_of_the_capture"])
def test_what_no_tape_can_hold_is_called_again(run, name: str) -> None:
    verdict, taped = run(name, Fault("nan_rows", "logits", Labels.parse("2")))
    assert (verdict.kind, taped) == (PASS, [False]), verdict


def test_who_does_not_say_so_is_not_taped(run) -> None:
    verdict, taped = run("reads", Fault("nan_rows", "logits", Labels.parse("2")))
    assert (verdict.kind, taped) == (PASS, []), verdict


@pytest.mark.parametrize("name", ["counted", "of_rows_by_mask"])
def test_who_has_one_host_path_may_not_read_what_is_on_the_device(run, name: str) -> None:
    verdict, _ = run("may_not_read" if name == "counted" else name)
    assert verdict.kind == VIOLATION
    [found] = verdict.violations
    assert (found.check, found.symptom) == ("capture", "RuntimeError")
    assert "operation not permitted when stream is capturing: the host reads a tensor by" in found.message
    assert found.site.startswith("routers.py:")
    assert found.site.endswith(f" in {name}")


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
    tape = Tape([x])
    y = tape.record(lambda: (x * 2).clone() + torch.ones(4)[1])
    assert tape.whole
    x.fill_(3)
    tape.poison()
    assert y.isnan().all()
    tape.replay()
    assert y.tolist() == [7.0] * 4


def test_a_shape_that_hangs_on_numbers_is_seen() -> None:
    x = torch.tensor([0, 1, 1])
    tape = Tape([])
    tape.record(lambda: torch.bincount(x))
    x.fill_(5)
    with pytest.raises(NotWhole):
        tape.replay()


def test_a_call_that_makes_too_much_is_not_kept() -> None:
    x = torch.ones(1 << 20)
    tape = Tape([x])
    y = tape.record(lambda: sum((x + at for at in range(80)), start=x)[0])
    assert not tape.whole
    assert (tape._entries, tape._made) == ([], [])
    assert tape.record(y.item) == 81 + sum(range(80))  # nobody knows any more what is of the device


def test_what_is_compiled_is_not_taped() -> None:
    twice = torch.compile(lambda x: x * 2, backend="eager")
    x = torch.ones(3)
    assert twice(x).tolist() == [2.0] * 3
    tape = Tape([x])
    tape.record(lambda: twice(x))
    assert not tape.whole


def test_where_a_tensor_goes_is_no_read() -> None:
    x = torch.ones(3)
    tape = Tape([x])
    tape.record(lambda: (x.to(x.device), x.to("cpu", torch.float64), x.to(device=x.device, dtype=torch.float16)))
    assert tape.whole
    for read in (x.cpu, x.tolist, x.numpy, lambda: bool(x[0]), lambda: torch.allclose(x, x), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            Tape([x]).record(read)
