"""repro.py of ops without scripts of their own: what shows without a reference, or by the answer of one place."""

from __future__ import annotations

import os
from itertools import chain, islice
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest

from moe_fuzz.campaign.repro import render
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import Case
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, Planted
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.repro_cases import ROOT, exhibit_of, finding_of, smallest, write

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

HOMES = {"align": "align", "experts_bf16": "experts_bf16", "experts_nvfp4": "experts_nvfp4", "nvfp4_quantize": "nvfp4",
         "moe_layer": "moe_layer"}  # fmt: skip
SHOWN = ("fills_whole_vectors", "stops_at_first_match", "room_by_count", "no_slots_raises",
         "result_cleared_in_vectors", "idle_tokens_unwritten", "float32_result", "no_tokens_raises",
         "clears_whole_vectors", "padding_left_as_it_was", "scales_as_integers", "no_rows_raise",
         # by the answer that is right, and by how far rounding may go from it
         "k_tail_dropped", "int64_ids_cut_to_32_bits", "amax_of_the_layer", "gate_in_tf32", "shard_offset_ignored",
         "map_of_minus_one", "tail_of_expert_zero", "slot_sums_cleared_once", "nan_scales_are_the_largest",
         # by the rules of a plan, whatever the order of its slots
         "token_for_slot", "last_warp_not_placed", "dropped_go_to_place_zero", "global_expert_ids",
         "inverse_without_padding", "padding_of_minus_one", "full_experts_first", "later_slots_first",
         # by bytes: of one block under its global scale, of one number under its block's scale
         "sixth_by_reciprocal", "tiles_of_eight_rows", "fused_halves_exchanged", "scale_not_clamped",
         "high_nibble_first", "codes_by_two_reciprocals", "padding_of_the_last_column",
         # by two calls that must agree
         "tile_with_nan_by_reciprocals", "few_rows_by_reciprocals", "nan_block_slow_path", "few_slots_stay_wide",
         "prepared_by_checksum", "plan_of_another_rank", "tactic_by_weight", "other_backend_without_alpha",
         "rounds_at_random")  # fmt: skip


def _bug(name: str) -> Planted:
    return next(bug for bug in PLANTED if bug.name == name)


def _failing(runner: Runner, bug: Planted) -> tuple[Case, Verdict]:
    drawn = islice(draw(bug.op, runner.describe(bug.target), "cpu", 0), 600)
    for case in chain(smallest(bug), drawn):
        if case.mode == "eager" and "int32_boundary" not in case.fault_names:
            verdict = runner.run(case, bug.target, RunOptions(checks=(bug.check,)))
            if verdict.kind == VIOLATION and verdict.violations[0].check == bug.check:
                return case, verdict
    raise AssertionError(f"no case shows {bug.name}")


@pytest.mark.parametrize("name", SHOWN)
def test_a_planted_bug_shows_without_moe_fuzz_and_a_sound_kernel_passes(
    runner: Runner, tmp_path: Path, batch: Batch, batch_with_us: Batch, name: str
) -> None:
    bug = _bug(name)
    case, verdict = _failing(runner, bug)
    text = render(finding_of(case, verdict), exhibit_of(runner, case))
    assert "import moe_fuzz" not in text
    script = write(tmp_path, name, text)
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    sound = tmp_path / "sound.py"
    sound.write_text(f"from kernels.{HOMES[bug.op]} import {bug.op}\n")
    if bug.op not in ("align", "nvfp4_quantize"):  # the files of the others import moe_fuzz; the script does not
        home = f"moe_fuzz.kernels.{HOMES[bug.op]}:{bug.op}"
        (code, said), (code_of_sound, said_of_sound) = batch_with_us([script], [script, home])
    else:
        (code, said), (code_of_sound, said_of_sound) = batch([script], [script, f"{sound}:{bug.op}"])
    assert (code, said[:5]) == (1, "BUG: "), said
    assert code_of_sound == 0, said_of_sound


def test_what_a_script_cannot_judge_is_refused(runner: Runner) -> None:
    """A script that makes the calls and finds nothing wrong would call a bug fixed."""
    bug = _bug("idle_tokens_unwritten")
    case, _ = _failing(runner, bug)
    verdict = Verdict(VIOLATION, (Violation("bound", "y", "y is off"),))
    with pytest.raises(CaseError, match="cannot judge bound"):
        render(finding_of(case, verdict), exhibit_of(runner, case))
