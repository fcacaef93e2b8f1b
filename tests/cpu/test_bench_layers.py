"""The benchmark of experts: points, candidates, what a call costs at least, verification, tables; all but the clock."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from rich.console import Console

from moe_fuzz.bench import layer_table, nvfp4_table
from moe_fuzz.bench.drive import Result, Timer
from moe_fuzz.bench.layer_child import cost, make_sets, refuses, verify
from moe_fuzz.bench.layer_weights import make_weights
from moe_fuzz.bench.layers import MODELS, OP, OP_NVFP4, TOKENS, bound_as, candidates, points
from moe_fuzz.bench.points import Candidate, Point
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference
from moe_fuzz.targets.bind import bind_at

FAKE = str(Path(__file__).with_name("bench_child.py"))
SIZES = {"experts": 8, "local": 8, "top_k": 3, "hidden": 64, "inter": 40}


def small(tokens: int, model: str = "qwen3-30b-a3b", op: str = OP, **more: object) -> Point:
    return Point(op, "small", tokens, {**MODELS[op][model], **SIZES, **more})  # type: ignore[dict-item]


def bound(candidate: Candidate, op: str = OP):
    return bind_at(bound_as(candidate, op), candidate.label, candidate.target)


def test_points_and_candidates() -> None:
    assert [(p.name, p.tokens) for p in points()] == [(name, count) for name in MODELS[OP] for count in TOKENS]
    assert [c.label for c in candidates() if not c.upstream] == ["builtin"]
    (own,) = candidates(("somewhere.py:experts",))
    assert own.target == "somewhere.py:experts"
    with pytest.raises(UsageError, match="no preset 'mixtral'") as error:
        points(("mixtral",))
    assert "mixtral-8x7b" in error.value.hint
    with pytest.raises(UsageError, match="no candidate 'buildin'"):
        candidates(("buildin",))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "point",
    [small(1), small(9), small(70), small(9, local=4), small(5, local=4, top_k=1), small(30, "gpt-oss-120b")],
)
def test_what_is_right_is_found_right(point: Point) -> None:
    (arguments, *_) = make_sets(point, make_weights(point, "cpu"))
    for candidate in candidates(("builtin", "torch, grouped_mm", "torch, loop")):
        assert verify(bound(candidate), arguments) < 2**-6, candidate.label


@pytest.mark.interpreter
@pytest.mark.parametrize("point", [
    small(9, op=OP_NVFP4, inter=48), small(5, "nemotron-3-super", op=OP_NVFP4, inter=48, local=4),
])  # fmt: skip
def test_nvfp4_beside_the_same_weights_decoded(point: Point) -> None:
    (arguments, *_) = make_sets(point, make_weights(point, "cpu"))
    for candidate in candidates(op=OP_NVFP4):
        if candidate.upstream:  # it needs a GPU
            continue
        assert verify(bound(candidate, OP_NVFP4), arguments) < 2**-6, candidate.label
    dense = {**point.config, "experts": 8, "local": 8}
    moved = [cost(Point(op, "", 9, dense), make_sets(point, make_weights(point, "cpu")))[0] for op in (OP, OP_NVFP4)]
    assert 2 < moved[0] / moved[1] < 2 / 0.5625


WRONG = """
from moe_fuzz.reference.experts_bf16 import experts_bf16 as reference

def one_slot_less(x, w13, w2, weights, ids, *, expert_map=None, activation="silu", gate_layout="first", out=None):
    return reference(x, w13, w2, weights[:, 1:], ids[:, 1:], activation=activation, gate_layout=gate_layout)

def last_row_unwritten(x, w13, w2, weights, ids, *, activation="silu", gate_layout="first", out=None):
    out[:-1] = reference(x, w13, w2, weights, ids, activation=activation, gate_layout=gate_layout)[:-1]
    return out

def halves_swapped(x, w13, w2, weights, ids, *, activation="silu", gate_layout="first"):
    return reference(x, w13, w2, weights, ids, activation=activation, gate_layout="up_first")
"""


@pytest.mark.parametrize("name", ["one_slot_less", "last_row_unwritten", "halves_swapped"])
def test_what_is_wrong_is_not_timed(name: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    (arguments, *_) = make_sets(small(70), make_weights(small(70), "cpu"))
    (candidate,) = candidates((f"{file}:{name}",))
    assert verify(bound(candidate), arguments) > 2**-6


# the signatures of vLLM 0.10 and 0.33, and of SGLang 0.5, as far as unquantized experts need them
VLLM_OLD = """(hidden_states, w1, w2, topk_weights, topk_ids, inplace=True, activation="silu",
    apply_router_weight_on_input=False, use_fp8_w8a8=False, global_num_experts=-1, expert_map=None)"""
VLLM_NEW = """(hidden_states, w1, w2, topk_weights, topk_ids, activation=None, apply_router_weight_on_input=False,
    global_num_experts=-1, expert_map=None, quant_config=None)"""
SGLANG = "(hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None)"


@pytest.mark.parametrize(
    ("label", "module", "signature", "body"),
    [
        ("vllm", "vllm.model_executor.layers.fused_moe.fused_moe", VLLM_OLD,
         "assert not inplace; return reference(hidden_states, w1, w2, topk_weights, topk_ids, expert_map=expert_map)"),
        ("vllm", "vllm.model_executor.layers.fused_moe.fused_moe", VLLM_NEW,
         "return reference(hidden_states, w1, w2, topk_weights, topk_ids, expert_map=expert_map)"),
        ("sglang", "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe", SGLANG,
         "assert not moe_runner_config.inplace; "
         "return reference(hidden_states, w1, w2, *topk_output[:2], b13=b1, b2=b2)"),
    ],
)  # fmt: skip
def test_releases_of_libraries(label: str, module: str, signature: str, body: str, monkeypatch) -> None:
    names: dict[str, object] = {"reference": reference}
    exec(f"def fused_experts{signature}:\n    {body}", names)
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        made = ModuleType(".".join(parts[:end]))
        made.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, made.__name__, made)
    made.fused_experts = names["fused_experts"]  # type: ignore[attr-defined]
    if label == "sglang":
        runner = sys.modules["sglang.srt.layers.moe.moe_runner"]
        runner.MoeRunnerConfig = SimpleNamespace  # type: ignore[attr-defined]
    (candidate,) = candidates((label,))
    target = bound(candidate)
    for point in (small(9), small(9, local=4)):
        if label == "sglang" and point.config["local"] == 4:
            assert refuses(target, point) == "it takes no expert_map"
            continue
        assert not refuses(target, point)
        (arguments, *_) = make_sets(point, make_weights(point, "cpu"))
        assert verify(target, arguments) == 0.0
    assert "silu" not in refuses(target, small(1))
    assert "swiglu_oai" in refuses(target, small(1, "gpt-oss-120b"))
    biased = small(3, bias=True)
    if label == "sglang":
        assert not refuses(target, biased)
        (arguments, *_) = make_sets(biased, make_weights(biased, "cpu"))
        assert arguments["b13"] is not None
        assert arguments["b2"] is not None
        assert verify(target, arguments) == 0.0
    else:
        assert refuses(target, biased) == "it takes no biases"


def test_a_library_that_is_not_there() -> None:
    (candidate,) = candidates(("vllm",))
    with pytest.raises(EnvironmentProblem, match="no package here has"):
        bound(candidate)


def test_cost_counts_each_expert_that_has_a_token_once() -> None:
    point = small(2)
    weights = make_weights(point, "cpu")
    sets = make_sets(point, weights)
    for arguments in sets:
        arguments["ids"] = torch.tensor([[0, 1, 2], [1, 2, 3]], dtype=torch.int32)
    moved, worked = cost(point, sets)
    of_expert = 3 * 64 * 40
    assert moved == 4 * of_expert * 2 + 2 * (2 * 64 * 2)  # weights of four experts, x and y of two tokens
    assert worked == 6 * of_expert * 2
    for arguments in sets:
        arguments["expert_map"] = torch.tensor([-1, 0, 1, -1, -1, -1, -1, -1], dtype=torch.int32)
    assert cost(point, sets) == (2 * of_expert * 2 + 2 * (2 * 64 * 2), 4 * of_expert * 2)


def a_result(tokens: int, ours: float, other: float, floor: float, rate: float = 0.5, launches: int = 3) -> Result:
    """`rate`: the share of the floor's time that operations take."""
    times = {"builtin": [ours] * 6, "torch, grouped_mm": [other] * 6, "torch, loop": [1000.0] * 6}
    facts = {"builtin": {"launches": launches}, "torch, loop": {"eager": True}}
    shown = {"us": floor, "bytes_per_us": 4e6, "flops_per_us": 7e8, "flops": rate * floor * 7e8}
    return Result(small(tokens), times, {}, facts, shown, 10, {"vllm": ("unavailable", "no package vllm")})


@pytest.mark.parametrize(
    ("result", "met"),
    [
        (a_result(1, 27.0, 40.0, 20.0), True),  # floor + 2.5 µs for each of three launches
        (a_result(1, 28.0, 40.0, 20.0), False),
        (a_result(64, 120.0, 40.0, 100.0), True),  # 80 % of the floor
        (a_result(64, 130.0, 40.0, 100.0), False),
        (a_result(4096, 150.0, 40.0, 100.0, 1.0), True),  # 65 % of the rate
        (a_result(4096, 160.0, 40.0, 100.0, 1.0), False),
        (Result(small(1)), None),
    ],
)
def test_goal(result: Result, met: bool | None) -> None:
    assert layer_table.meets_goal(result) is met


def test_table_and_file() -> None:
    stream, who = io.StringIO(), candidates()
    results = [a_result(1, 27.0, 20.0, 20.0), Result(small(8), left_out={c.label: ("hang", "") for c in who})]
    Console(file=stream, width=200).print(layer_table.table(results, who))
    for part in ("27.00", "1.35 !", "74%", "met", "hang", "unavailable"):
        assert part in stream.getvalue(), part
    assert any("torch, loop: cannot be captured" in note for note in layer_table.notes(results))
    first, second = json.loads(json.dumps(layer_table.to_json(results, who, {"date": "d"})))["points"]
    assert (first["fastest_other"], first["ours_over_fastest_other"]) == ("torch, grouped_mm", 1.35)
    assert first["candidates"][0]["us"] == [27.0, 27.0, 27.0]
    assert (second["meets_goal"], second["candidates"][0]["status"]) == (None, "hang")


def test_a_hang_costs_its_own_line() -> None:
    with Timer([sys.executable, FAKE], patience=3.0) as timer:
        result = timer.measure(small(1), [Candidate("hangs", "x:y"), Candidate("builtin", "x:y")], 6, 1)
    assert result.left_out["hangs"][0] == "hang"
    assert list(result.times) == ["builtin"]


def test_bars_of_nvfp4() -> None:
    point = Point(OP_NVFP4, "qwen3-30b-a3b", 64, MODELS[OP_NVFP4]["qwen3-30b-a3b"])
    moved = 10**9 + 4 * 64 * 2048
    floor = {"bytes_per_us": 4e6, "flops_per_us": 6e8, "flops": 1e9, "us": moved / 4e6}
    times = {"builtin": 300.0, "builtin, small": 290.0, "builtin, large": 400.0, "builtin, three fills": 310.0,
             "builtin, bf16": 600.0, "vllm, Marlin": 200.0}  # fmt: skip
    result = Result(point, times={label: [us] * 3 for label, us in times.items()}, floor=floor, moved=moved)
    assert nvfp4_table.bf16_floor(result) == pytest.approx(10**9 / 0.5625 * 2 / 4e6, rel=1e-3)
    lines = nvfp4_table.bars([result])
    counts = [line.split(": ")[-1].split(" points")[0] for line in lines]
    assert counts == ["0 of 1", "1 of 1", "0 of 1", "1 of 1", "1 of 1", "0 of 1"]
    assert "worst 1.50 at qwen3-30b-a3b T 64" in lines[0]
    text = io.StringIO()
    Console(file=text, width=200).print(nvfp4_table.facts([result], candidates(op=OP_NVFP4)))
    assert text.getvalue().count("qwen3-30b-a3b") == 6
    assert nvfp4_table.bars([])[0].endswith("nothing to hold to it")
