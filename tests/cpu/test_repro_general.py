"""repro.py of ops without scripts of their own: what shows without a reference, or by the answer of one place."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.campaign.repro import render
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts.inputs import materialize
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, Planted
from moe_fuzz.reference.align import align as reference_align
from moe_fuzz.targets.bind import bind
from moe_fuzz.verdict import VIOLATION, Verdict, Violation
from tests.cpu.conftest import Batch
from tests.cpu.experts_seen import case_of as experts_case
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


@pytest.mark.parametrize("op", ["align", "experts_bf16", "moe_layer", "nvfp4_quantize"])
def test_a_sound_target_passes_what_two_calls_or_a_plan_are_judged_by(runner: Runner, op: str) -> None:
    """On any case, of whatever layout: a script that misplaces a tensor accuses who is right."""
    name, family = f"{op}@torch", get_space(op).family
    function, shown = bind(name).function, set()
    checks = {"align": ("slots", "experts", "fill", "inverse"), "nvfp4": ("isolation", "batch_invariance")}
    drawn = islice((one for one in draw(op, runner.describe(name), "cpu", 1) if len(one.steps) == 1), 60)
    for number, case in enumerate(drawn):
        if number >= 15 and ("huge" in shown or op != "experts_bf16"):  # one case in four has such neighbours
            break
        if case.mode != "eager" or not case.steps[0].tokens or _costs_too_much(case):
            continue
        exhibit = exhibit_of(runner, case, name)
        others = exhibit["steps"][0]["others"]
        for check in checks.get(family, ("isolation",)):
            if (check == "batch_invariance" and not others["fewer"]) or (check == "isolation" and not others["healed"]):
                continue
            found = Violation(check, "bits", "another answer", "y", (0, 0))
            script: dict[str, Any] = {"__name__": "script"}
            text = render(finding_of(replace(case, target=name), Verdict(VIOLATION, (found,))), exhibit, bare=True)
            exec(compile(text, "script", "exec"), script)
            assert script["judge"](function) is None, get_space(op).label(case)
            shown |= {check} | ({"huge"} if others["huge"] else set())
    assert shown >= set(checks.get(family, ("isolation",))) - {"batch_invariance"}
    assert "huge" in shown or op != "experts_bf16"


def _costs_too_much(case: Case) -> bool:
    return case.steps[0].tokens > 300 or bool({"int32_boundary", "far_columns"}.intersection(case.fault_names))


def test_other_orders_of_experts_are_no_bug(runner: Runner) -> None:
    """The padding of a block stands elsewhere then: `fill` is a rule of the whole plan, and not of one entry."""
    case, verdict = _failing(runner, _bug("padding_of_minus_one"))
    case = replace(case, steps=(Step(Labels.range(4), Labels()),), config={**case.config, "experts": "0-2"})
    verdict = runner.run(case, case.target, RunOptions(checks=("fill",)))
    script: dict[str, Any] = {"__name__": "script"}
    exec(compile(render(finding_of(case, verdict), exhibit_of(runner, case), bare=True), "script", "exec"), script)

    def backwards(ids: torch.Tensor, block_size: int, num_experts: int) -> tuple[torch.Tensor, ...]:
        entries, owners, _, inverse = reference_align(ids, block_size, num_experts)
        used = int((owners >= 0).sum())
        order = [*reversed(range(used)), *range(used, len(owners))]
        return entries.view(-1, block_size)[order].flatten(), owners[order], torch.tensor([used * block_size]), inverse

    assert script["judge"](backwards) is None
    assert "holds no slot" in script["judge"](bind(case.target).function)


@pytest.mark.parametrize("fault", ["transposed", "noncontiguous"])
def test_weights_that_are_not_packed_are_laid_as_they_were(runner: Runner, fault: str) -> None:
    base = next(one for one in draw("experts_bf16", runner.describe("experts_bf16@torch"), "cpu", 1)
                if one.mode == "eager" and len(one.steps) == 1 and 0 < one.steps[0].tokens < 300)  # fmt: skip
    case = replace(base, target="experts_bf16@torch", steps=(replace(base.steps[0], faults=(Fault(fault, "w13"),)),))
    found = Verdict(VIOLATION, (Violation("determinism", "bits", "other bits", "y", (0, 0)),))
    script: dict[str, Any] = {"__name__": "script"}
    exec(compile(render(finding_of(case, found), exhibit_of(runner, case), bare=True), "script", "exec"), script)
    seen: list[tuple[int, ...]] = []
    script["call"](lambda x, w13, *rest, **more: seen.append(w13.stride()) or x)
    _, rows, columns = materialize(case, 0).plain["w13"].shape
    assert (seen[0][1] == 1) if fault == "transposed" else (seen[0][2] == 1 and seen[0][0] > rows * columns)


@pytest.mark.parametrize("expert_map", ["none", "permuted"])
def test_what_is_kept_of_a_call_shows_by_one_in_between(runner: Runner, expert_map: str) -> None:
    """The worker calls the target with other experts, too, before it calls it again."""
    case = replace(experts_case(expert_map=expert_map, top_k=2), target="experts_bf16@torch")
    found = Verdict(VIOLATION, (Violation("determinism", "bits", "other bits", "y", (0, 0)),))
    script: dict[str, Any] = {"__name__": "script"}
    exec(compile(render(finding_of(case, found), exhibit_of(runner, case), bare=True), "script", "exec"), script)
    sound = bind("experts_bf16@torch").function
    kept: dict[str, torch.Tensor] = {}

    def with_the_weights_of_the_call_before(x: torch.Tensor, w13: torch.Tensor, *rest: Any, **more: Any) -> Any:
        now, kept["w13"] = kept.get("w13", w13), w13.clone()
        return sound(x, now, *rest, **more)

    assert script["judge"](sound) is None
    assert "other bits when it is called again" in script["judge"](with_the_weights_of_the_call_before)


def test_what_a_script_cannot_judge_is_refused(runner: Runner) -> None:
    """A script that makes the calls and finds nothing wrong would call a bug fixed."""
    bug = _bug("idle_tokens_unwritten")
    case, _ = _failing(runner, bug)
    verdict = Verdict(VIOLATION, (Violation("statistical", "all", "y is off"),))
    with pytest.raises(CaseError, match="cannot judge statistical"):
        render(finding_of(case, verdict), exhibit_of(runner, case))
