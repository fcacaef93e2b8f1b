"""The benchmark's points, statistics, process and tables; all but the clock, which takes a GPU."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from rich.console import Console

from moe_fuzz.bench import candidates as extra
from moe_fuzz.bench import table
from moe_fuzz.bench.drive import Result, Timer, measure_all
from moe_fuzz.bench.points import EXTRA, NAN_ROWS, Candidate, Point, candidates, points
from moe_fuzz.bench.stats import estimate, interval_rank, paired
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.kernels.grouped_topk import grouped_topk
from moe_fuzz.ops import OPS, get_space

FAKE = str(Path(__file__).with_name("bench_child.py"))
SMALL = Point("topk_softmax", "small", 12, {"experts": 16, "top_k": 2, "dtype": "bfloat16"}, 5)


def named(*labels: str, upstream: tuple[str, ...] = ()) -> list[Candidate]:
    return [Candidate(label, f"topk_softmax@{label}", label in upstream) for label in labels]


@pytest.fixture
def timer():
    """timer(flag…): the process that makes its times up."""
    started = []

    def start(*flags: str, patience: float = 30.0) -> Timer:
        started.append(Timer([sys.executable, FAKE, *flags], patience))
        return started[-1]

    yield start
    for one in started:
        one.close()


# ---- statistics -----------------------------------------------------------------------------------------------------


def coverage(n: int, rank: int) -> float:
    """Chance that the rank-th smallest and largest of n samples enclose the median, by counting."""
    return sum(math.comb(n, below) for below in range(rank + 1, n - rank)) / 2**n


@pytest.mark.parametrize("n", [6, 7, 15, 60, 61, 301])
def test_the_interval_is_the_narrowest_that_covers(n: int) -> None:
    rank = interval_rank(n)
    assert coverage(n, rank) >= 0.95
    assert coverage(n, rank + 1) < 0.95


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_samples_give_all_there_is(n: int) -> None:
    assert interval_rank(n) == 0
    found = estimate([float(value) for value in range(n)])
    assert (found.low, found.high) == (0.0, n - 1.0)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    source = random.Random(3)
    hits = 0
    for _ in range(600):
        found = estimate([source.expovariate(1.0) for _ in range(41)])  # skewed, as times are
        hits += found.low <= math.log(2) <= found.high
    assert 0.93 <= hits / 600 <= 0.995


def test_pairing_removes_what_slows_both_down() -> None:
    source = random.Random(1)
    drift = [1 + 0.5 * math.sin(i / 5) for i in range(60)]
    base = [3.0 * d * (1 + 0.001 * source.random()) for d in drift]
    ours = [2.7 * d * (1 + 0.001 * source.random()) for d in drift]
    ratio = paired(ours, base)
    assert ratio.median == pytest.approx(0.9, abs=2e-3)
    assert ratio.high - ratio.low < 2e-3
    assert estimate(ours).high - estimate(ours).low > 0.3


def test_pairing_wants_pairs() -> None:
    with pytest.raises(ValueError, match="longer than argument 1"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no samples"):
        estimate([])


# ---- points and candidates ------------------------------------------------------------------------------------------


def test_points_are_every_preset_at_every_number_of_tokens() -> None:
    found = points("topk_softmax", (), (1, 4096))
    assert found[0] == Point("topk_softmax", NAN_ROWS, 128, found[0].config, 10)
    presets = get_space("topk_softmax").presets
    assert [(p.name, p.tokens) for p in found[1:]] == list(itertools.product(presets, (1, 4096)))
    assert [p.name for p in points("topk_softmax", ("mixtral-8x7b",), (1,))] == ["mixtral-8x7b"]
    assert [p.name for p in points("topk_softmax", (NAN_ROWS,), (1,))] == [NAN_ROWS]
    with pytest.raises(UsageError, match="no preset 'mixtral'") as error:
        points("topk_softmax", ("mixtral",))
    assert "mixtral-8x7b" in error.value.hint


def test_a_point_survives_json() -> None:
    assert Point.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL


def test_candidates() -> None:
    labels = [candidate.label for candidate in candidates("topk_softmax")]
    assert {"builtin", "torch", *EXTRA["topk_softmax"]} <= set(labels)
    assert [c.label for c in candidates("topk_softmax", ("builtin", "torch + nan_to_num"))] == [
        "builtin", "torch + nan_to_num"
    ]  # fmt: skip
    assert not any(c.upstream for c in candidates("topk_softmax", ("builtin", "torch", "builtin, NaN-unsafe")))
    with pytest.raises(UsageError, match="there is no target"):
        candidates("topk_softmax", ("buildin",))


@pytest.mark.parametrize("name", ["topk_softmax_nan_to_num", "topk_softmax_unsafe", "topk_sigmoid_unsafe"])
def test_candidates_of_the_benchmark_route(name: str) -> None:
    logits = torch.randn(6, 33)
    weights, ids = getattr(extra, name)(logits, 4, renormalize=True)
    assert torch.equal(ids, logits.topk(4).indices.int())
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


def test_what_nan_safety_leaves_out() -> None:
    """Without it a row of NaN gives weights that are NaN, though the ids stay distinct: keys are integers."""
    logits = torch.full((1, 33), math.nan)
    weights, ids = extra.topk_softmax_unsafe(logits, 4, renormalize=True)
    assert weights.isnan().all()
    assert len(set(ids[0].tolist())) == 4


@pytest.mark.parametrize("groups", [(64, 4), (64, 1)])  # whole lanes; none, which is another kernel
def test_what_nan_safety_leaves_out_of_groups(groups: tuple[int, int]) -> None:
    experts, n_group = groups
    logits = torch.randn(5, experts)
    logits[2] = math.nan
    call = {"n_group": n_group, "topk_group": 1, "renormalize": True, "scoring": "sigmoid"}
    weights, ids = extra.grouped_topk_unsafe(logits, 4, **call)
    safe = grouped_topk(logits, 4, **call)
    sound = torch.arange(5) != 2
    assert torch.equal(ids[sound], safe[1][sound])
    assert torch.equal(weights[sound], safe[0][sound])
    assert weights[2].isnan().any()
    assert safe[0][2].isfinite().all()


def test_verification(tmp_path: Path) -> None:
    from moe_fuzz.bench.child import verify
    from moe_fuzz.execute.runner import Runner
    from moe_fuzz.targets.bind import bind

    file = tmp_path / "broken.py"
    file.write_text("import torch\ndef router(logits, top_k):\n    k = logits.shape[0], top_k\n"
                    "    return torch.zeros(k), torch.zeros(k, dtype=torch.int32)\n")  # fmt: skip
    runner = Runner("cpu")

    def verified(target: str) -> tuple[tuple[str, str] | None, str]:
        return verify(runner, bind(target), SMALL)

    assert verified("topk_softmax@builtin") == (None, "safe")
    problem, on_nan = verified("topk_softmax@moe_fuzz.bench.candidates:topk_softmax_unsafe")
    assert problem is None
    assert on_nan == "finite"
    wrong, _ = verified(f"topk_softmax@{file}:router")
    assert wrong is not None
    assert wrong[0] == "wrong"
    renormalized = Point("topk_softmax", "small", 3, {"experts": 16, "top_k": 2, "renormalize": True})
    refused, _ = verify(runner, bind(f"topk_softmax@{file}:router"), renormalized)
    assert refused is not None
    assert refused[0] == "rejected"


# ---- the process ----------------------------------------------------------------------------------------------------


def test_a_crash_and_a_hang_are_lines_and_the_rest_is_measured(timer) -> None:
    who = named("builtin", "crashes", "wrong", "hangs", "torch")
    result = timer(patience=3.0).measure(SMALL, who, 8, 1)
    assert set(result.times) == {"builtin", "torch"}
    assert all(len(samples) == 8 for samples in result.times.values())
    assert {label: why[0] for label, why in result.left_out.items()} == {
        "crashes": "crash", "wrong": "wrong", "hangs": "hang"
    }  # fmt: skip
    assert "SIGSEGV" in result.left_out["crashes"][1]


def test_who_ends_the_process_twice_is_not_tried_again(timer) -> None:
    seen: list[Result] = []
    results = measure_all(timer(), [SMALL] * 4, named("crashes", "torch"), 6, 1, seen.append)
    assert results == seen
    assert [r.left_out["crashes"][0] for r in results] == ["crash", "crash", "left out", "left out"]
    assert all(set(r.times) == {"torch"} for r in results)


def test_nobody_left_to_measure(timer) -> None:
    result = timer().measure(SMALL, named("crashes"), 6, 1)
    assert not result.times
    assert set(result.left_out) == {"crashes"}


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [("--no-device", "no CUDA device"), ("--dead", "does not start.*exit code 7"), ("--dies-timing", "is lost")],
)
def test_a_process_that_cannot_time_is_a_problem_of_the_machine(timer, flag: str, complaint: str) -> None:
    with pytest.raises(EnvironmentProblem, match=complaint):
        timer(flag).measure(SMALL, named("torch"), 6, 1)


# ---- what is shown --------------------------------------------------------------------------------------------------

US, THEM = [2.0, 2.1, 2.2, 2.0, 2.1, 2.2], [3.0, 3.1, 3.3, 3.0, 3.1, 3.3]


def a_result(ours: list[float], theirs: list[float], copy: float) -> Result:
    floor = {"empty": [1.0] * 6, "copy": [copy] * 6, "bytes_per_us": 4e6}
    times = {"builtin": ours, "vllm": theirs, "torch": [17.0] * 6}
    facts = {"builtin": {"nan_safe": "safe"}, "torch": {"nan_safe": "finite"}, "vllm": {"nan_safe": ""}}
    return Result(SMALL, times, {}, facts, floor, 4_000_000, {"sglang": ("unavailable", "not installed")})


WHO = named("builtin", "vllm", "sglang", "torch", upstream=("vllm", "sglang"))


@pytest.mark.parametrize(
    ("ours", "copy", "meets"),
    [(US, 1.0, True), (THEM, 1.0, False), (THEM, 2.9, True), ([t * 0.85 for t in THEM], 1.0, False)],
)
def test_goal(ours: list[float], copy: float, meets: bool) -> None:
    """0.8 of the fastest upstream, or 85 % of copy bandwidth; the torch router is nobody's serving kernel."""
    result = a_result(ours, THEM, copy)
    assert table.fastest_upstream(result, WHO) == "vllm"
    assert table.meets_goal(result, WHO) is meets


def test_no_goal_without_a_rival() -> None:
    assert table.meets_goal(a_result(US, THEM, 1.0), named("builtin", "torch")) is None
    assert table.meets_goal(Result(SMALL), WHO) is None


def test_table() -> None:
    stream = io.StringIO()
    results = [a_result(US, THEM, 1.0), Result(SMALL, left_out={c.label: ("hang", "no answer") for c in WHO})]
    Console(file=stream, width=200).print(table.table(results, WHO))
    shown = stream.getvalue()
    for part in ("small", "2.10", "3.10", "17.00 *", "unavailable", "0.67", "48%", "hang"):
        assert part in shown, part
    notes = table.notes(results)
    assert "sglang: unavailable at small T=12: not installed" in notes
    assert "* torch: on NaN rows it fails the check finite" in notes
    assert not any("builtin" in note and "*" in note for note in notes)


@pytest.mark.parametrize("op", [op for op in OPS if op != "allreduce_rmsnorm"])
def test_every_op_has_a_table(op: str) -> None:
    """An op has sizes of its own: the quantizer knows no experts."""
    stream = io.StringIO()
    shown = points(op)[:2]
    Console(file=stream, width=200).print(table.table([Result(point) for point in shown], WHO))
    for point in shown:
        assert point.name in stream.getvalue()
        assert all(str(point.config[name]) in stream.getvalue() for name in {*point.config} & {"experts", "blocks"})


def test_result_file() -> None:
    record = json.loads(json.dumps(table.to_json([a_result(US, THEM, 1.0)], WHO, {"date": "d"}, ("builtin", "vllm"))))
    assert (record["format"], record["date"]) == (1, "d")
    (point,) = record["points"]
    assert point["floor"] == {"empty_us": [1, 1, 1], "copy_us": [1, 1, 1], "empty_and_bytes_us": 2.0}
    assert point["fastest_upstream"] == "vllm"
    assert point["meets_goal"] is True
    ours, vllm, sglang, _ = point["candidates"]
    assert ours["us"] == [2.1, 2.0, 2.2]
    assert ours["of_copy"][0] == pytest.approx(1 / 2.1, abs=1e-4)
    assert vllm["status"] == "ok"
    assert sglang == {"label": "sglang", "target": "topk_softmax@sglang", "status": "unavailable",
                      "reason": "not installed"}  # fmt: skip
    (ratio,) = record["ab"]["a_over_b"]
    assert ratio["ratio"][0] == pytest.approx(2 / 3, abs=1e-4)
