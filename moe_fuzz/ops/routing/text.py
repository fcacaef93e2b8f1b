"""What the routing ops say to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels

CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities",
    "capture": "it can be captured into a CUDA graph, where declared",
    "structure": "outputs have the contract's shape, dtype and device",
    "written": "every element of an output is written",
    "ids": "the k ids of a row are distinct and name experts",
    "finite": "weights are finite and not negative, on undefined rows too",
    "padding": "rows flagged as padding follow the declared dialect",
    "selection": "no unselected expert has a higher score than a selected one, beyond rounding",
    "ties": "equal scores fall to the lowest index, where declared",
    "order": "slots stand in descending order of score, where declared",
    "weights": "weights agree with float64 for the kernel's own ids, within the rounding bound",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "isolation": "what stands in padding and undefined rows does not change a real row, bit for bit",
    "batch_invariance": "a row's bits do not depend on its position or on the number of rows, where declared",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bits, where declared; a graph is replayed",
}

FAULTS = {
    "nan_rows": "whole rows of NaN, of one bit pattern or of several, both signs",
    "inf_rows": "whole rows of +Inf",
    "neg_inf_rows": "whole rows of -Inf",
    "partial_nan": "a third of a row is NaN",
    "partial_inf": "a quarter of a row is +Inf, a quarter -Inf",
    "masked_experts": "experts masked by -Inf, a third of them or a run; the others far down in every second row",
    "clustered_top": "the best experts are those of one lane: every second, every 32nd, a run of them, or a half",
    "shifted_rows": "all logits of a row shifted by the same number",
    "huge_rows": "the dtype's largest numbers of both signs",
    "ladder": "zeros, subnormals, a ladder of magnitudes",
    "ties": "rows of few distinct values",
    "tied_lane": "the best experts are those of one lane, and few distinct values",
    "tied_best": "the best experts are few, and tie, wherever they lie",
    "signed_zeros": "rows of zeros of both signs, which are equal",
    "zero_rows": "rows of zeros, as in a buffer that nobody has written yet",
    "stale_rows": "rows hold an earlier step's data",
    "extreme_bias": "a bias of every sign and magnitude, -Inf too",
    "tied_bias": "a bias of few values, most often of one: experts whose logits tie still do",
    "negative_bias": "a bias that makes every biased score negative",
    "broken_bias": "NaN, +Inf or -Inf in a bias: in few places, in one of three, or everywhere; -Inf in nearly all",
    "noncontiguous": "rows stand apart in a wider buffer, or the elements of a vector",
    "int32_boundary": "rows so far apart that offsets pass 2^31 elements",
    "far_columns": "columns so far apart that offsets pass 2^31 elements",
    "transposed": "columns are packed, and rows are not",
    "misaligned": "the first element is not aligned for vector loads",
}


GROUPED_CHECKS: dict[str, str] = {}
for _name, _line in CHECKS.items():  # their order is that of attribution
    GROUPED_CHECKS[_name] = _line
    if _name == "padding":
        GROUPED_CHECKS["shared"] = "the slots of fused shared experts hold the ids E, E + 1, … and the weight 1"
        GROUPED_CHECKS["expert_map"] = "the ids of routed slots are those that expert_map gives"
GROUPED_CHECKS["selection"] = (
    "some legal choice of groups holds all selected experts and no better unselected one, beyond rounding"
)
GROUPED_CHECKS["ties"] = "equal scores of experts and of groups fall to the lowest index, where declared"

GROUPED_FAULTS = {
    "tied_groups": "values that repeat along a row: groups tie, inside and with each other",
    "near_tied_groups": "the same with a last bit changed here and there",
    "masked_groups": "runs of experts masked by -Inf, but for one expert in every second row",
    **FAULTS,
    "overlapping_map": "physical ids begin at 0, as where experts are replicated: they are logical ids too",
}


def label(case: Case) -> str:
    """`topk_softmax T=7 (2 padding) E=60 k=4 bfloat16 renormalize; nan_rows on logits rows 5-6`.

    Rows stand by position, as the target sees them.
    """
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    for step in case.steps:
        parts.append(f"T={step.tokens}" + (f" ({len(step.padding)} padding)" if step.padding else ""))
    parts += [f"E={len(case.experts)}", f"k={config['top_k']}", str(config["dtype"])]
    if "n_group" in config:
        parts.append(f"groups={config['topk_group']}/{config['n_group']} {config['scoring']} {config['group_score']}")
    parts += [name for name in ("renormalize", "bias", "expert_map", "out") if config.get(name)]
    if config.get("n_shared"):
        parts.append(f"shared={config['n_shared']}")
    if config["is_padding"]:
        parts.append(f"is_padding={config['padding']}")
    if config["scale"] != 1.0:
        parts.append(f"scale={config['scale']}")
    if config["magnitude"] != 2:
        parts.append(f"|logits|<2^{config['magnitude']}")
    if config["edge"] != "right":
        parts.append(f"fenced {config['edge']}")
    faults = fault_lines(case)
    return " ".join(parts) + ("; " + ", ".join(faults) if faults else "")


def fault_lines(case: Case) -> list[str]:
    """Each fault with its tensor and rows; where there are several steps, with the step."""
    return [
        (f"step {index}: " if len(case.steps) > 1 else "") + _fault(case, step, fault)
        for index, step in enumerate(case.steps)
        for fault in step.faults
    ]


def _fault(case: Case, step: Step, fault: Fault) -> str:
    rows = _rows(Labels.of(fault.rows.positions(step.rows)))
    streams = [case.stream(index) for index in range(len(case.steps))]
    source = f" of step {streams.index(fault.stream)}" if fault.stream in streams else ""
    return f"{fault.name} on {fault.tensor}{rows}{source}"


def _rows(rows: Labels) -> str:
    if not rows:
        return ""
    text = str(rows)
    return f" rows {text}" if len(text) <= 24 else f" ({len(rows)} rows)"
