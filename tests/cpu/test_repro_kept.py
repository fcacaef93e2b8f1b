"""repro.py of the cases that are kept in tests/regressions: all ranks of an all-reduce, and graphs of any op."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.campaign.selftest import options_of
from moe_fuzz.case import Case
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.planted.catalog import get_planted
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import ROOT, exhibit_of, finding_of, write
from tests.cpu.test_repro_cuda import GPU, pretended

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

RECORDS = {record["twin"].partition("@planted.")[2]: record for record in map(
    json.loads, (file.read_text() for file in sorted((ROOT / "tests" / "regressions" / "upstream").glob("*.json")))
) if record["twin"]}  # fmt: skip
RANKS = ("no_end_barrier", "rotated_partitions", "mean_times_ranks", "second_pass_is_packed",
         "flags_by_size", "pairs_of_vectors", "residual_read_after_its_store", "tile_with_nan_in_float64",
         "few_rows_by_other_arithmetic", "two_stages_by_other_arithmetic")  # fmt: skip
GRAPHS = ("other_order_in_a_graph", "counts_rows_on_the_host", "filled_once", "counts_cleared_once",
          "ranked_backwards_in_a_graph", "reciprocals_in_a_graph", "frozen_hidden_states")  # fmt: skip
ROUTERS = ("topk_softmax", "topk_sigmoid", "grouped_topk")
#: Why a case has none.
WITHOUT = {
    "gigabytes apart": {"hidden_offset_of_32_bits", "offset_in_32_bits", "row_offset_of_32_bits", "int32_column_offset",
                        "int32_row_offset"},
    "allocates in C++": {"overruns_hidden_scratch"},
    "not a process each": {"last_rank_aborts", "last_rank_waits_elsewhere"},
    "cannot judge statistical": {"bf16_weights", "alpha_as_bfloat16"},
    "compares backends by their bits": {"one_stage_adds_before_rounding"},
}  # fmt: skip


def case_of(name: str) -> Case:
    record = RECORDS[name]
    return replace(Case.from_json(record["case"]), target=record["twin"])


def failing(runner: Runner, name: str) -> tuple[Case, Verdict]:
    case, bug, check = case_of(name), get_planted(name), RECORDS[name]["check"]
    assert bug is not None
    if check == "fence":  # it would take this process down
        return case, Verdict(VIOLATION, (Violation(check, RECORDS[name]["symptom"], bug.story),), seconds=1.0)
    verdict = runner.run(case, case.target, options_of(bug))
    return case, replace(verdict, violations=tuple(one for one in verdict.violations if one.check == check))


def sound(case: Case) -> str:
    if case.target.endswith(".two_stages_by_other_arithmetic"):  # whose other backend is the wrong one
        return "moe_fuzz.planted.allreduce_state:one_stage_adds_before_rounding"
    if case.op == "allreduce_rmsnorm":
        return f"moe_fuzz.targets.{'builtin_allreduce' if case.config['out'] else 'torch_allreduce'}:{case.op}"
    return f"moe_fuzz.kernels.{'nvfp4' if case.op == 'nvfp4_quantize' else case.op}:{case.op}"


@pytest.mark.parametrize("names", [RANKS, GRAPHS], ids=["ranks", "graphs"])
def test_a_kept_case_shows_without_moe_fuzz_and_a_sound_kernel_passes(
    runner: Runner, tmp_path: Path, batch_with_us: Batch, names: tuple[str, ...]
) -> None:
    runs: list[list[Any]] = []
    for name in names:
        case, verdict = failing(runner, name)
        assert verdict.violations, name
        text = render(finding_of(case, verdict), exhibit_of(runner, case))
        assert "import moe_fuzz" not in text
        script = write(tmp_path, name, text)
        runs += [[script], [script, sound(case)]]
    answers = batch_with_us(*runs)
    for name, (code, said), (code_of_sound, said_of_sound) in zip(names, answers[::2], answers[1::2], strict=True):
        assert (code, said[:5]) == (1, "BUG: "), f"{name}: {said}"
        assert code_of_sound == 0, f"{name}: {said_of_sound}"


def test_a_graph_of_any_op_is_captured_where_there_is_a_gpu(
    runner: Runner, tmp_path: Path, batch_with_us: Batch
) -> None:
    """On a stand-in, where a replay is a call: what shows is what the target keeps by its buffers."""
    runs: list[list[Any]] = []
    for name in ("filled_once", "shifted_tail_block"):
        case, verdict = failing(runner, name)
        for mode in ("graph", "piecewise"):
            case = replace(case, mode=mode)
            text = render(finding_of(case, verdict), exhibit_of(runner, case) | GPU)
            assert "with torch.cuda.graph(graph" in text
            script = write(tmp_path, f"{name}_{mode}", pretended(text))
            runs += [[script], [script, sound(case)]]
    answers = batch_with_us(*runs)
    assert [code for code, _ in answers[1::2]] == [0] * 4, answers
    assert [code for code, _ in answers[::2]] == [1] * 4, answers


@pytest.mark.slow
def test_which_kept_cases_have_no_script(runner: Runner) -> None:
    """And why. Of what was found wrong, it is enough here that it is known what is right."""
    found: dict[str, set[str]] = {why: set() for why in WITHOUT}
    without = set().union(*WITHOUT.values())
    for name, record in RECORDS.items():
        if name not in without and get_planted(name).op in ROUTERS:  # tests/cpu/test_repro.py runs the scripts of these
            continue
        case, bug = case_of(name), get_planted(name)
        assert bug is not None
        try:
            exhibit = exhibit_of(runner, case) | (GPU if record["device"] == "cuda" else {})
            known = Violation(record["check"], record["symptom"] or "", "", next(iter(exhibit["steps"][0]["results"])),
                              (0, 0), allowed=None if record["check"] == "statistical" else (0, 1),
                              chosen=(1, 1) if record["check"] == "codes" else ())  # fmt: skip
            verdict = Verdict(VIOLATION, (known,), seconds=1.0)
            render(finding_of(case, verdict, own="all" if bug.fence == "all" else ""), exhibit)
        except CaseError as error:
            why = next(why for why in WITHOUT if why in str(error))
            found[why].add(name)
    assert found == WITHOUT
