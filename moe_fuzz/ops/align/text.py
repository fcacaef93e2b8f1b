"""What `align` says to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels

#: Their order is that of attribution.
CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities",
    "capture": "it can be captured into a CUDA graph, where declared: nothing waits for the device",
    "structure": "results have the contract's dtype, and the room that any ids of this shape can need",
    "written": "every element of a result is written",
    "count": "num_tokens_post_padded is what the kept slots of each expert take in whole blocks",
    "slots": "every kept slot stands in sorted_token_ids exactly once, and no dropped one does",
    "experts": "each block in use holds slots of one expert, the one that expert_ids names",
    "fill": "every other entry of sorted_token_ids is N, the number of slots",
    "tail": "expert_ids is -1 past the blocks in use, where declared",
    "inverse": "inverse says where each slot stands, and -1 for those that were dropped",
    "order": "blocks stand in ascending order of expert, where declared",
    "stable": "the slots of an expert ascend, where declared",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bits, where declared; a graph is replayed",
}

FAULTS = {
    "duplicate_experts": "rows name an expert several times",
    "all_to_one": "all slots of the rows go to one expert",
    "hot_expert": "one slot of each row goes to the same expert",
    "exact_count": "as many rows name one expert as fill its blocks, or one more, or one less",
    "empty_experts": "the rows name an eighth of the experts only",
    "zero_rows": "rows of zeros, as in a buffer that nobody has written yet: expert 0, k times",
    "stale_rows": "rows hold an earlier step's ids",
    "minus_one_ids": "rows of -1, as vLLM writes them for padding since 0.27",
    "num_experts_ids": "rows of E, the first id that is no expert",
    "sentinel_ids": "ids of no expert: -1, -2, E, E + 1, the largest and smallest int32",
    "wide_ids": "int64 ids that are an expert's if all but 32 bits are cut off",
    "noncontiguous": "rows stand apart in a wider buffer, or the entries of a map",
    "int32_boundary": "rows so far apart that offsets pass 2^31 elements",
    "far_columns": "columns so far apart that offsets pass 2^31 elements",
    "transposed": "columns are packed, and rows are not",
    "misaligned": "the first element is not aligned for vector loads",
}


def label(case: Case) -> str:
    """`align T=7 E=60 k=4 block=16 int64; sentinel_ids rows 5-6`. Rows stand by position, as the target sees them."""
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    for step in case.steps:
        parts.append(f"T={step.tokens}" + (f" ({len(step.padding)} padding)" if step.padding else ""))
    parts += [f"E={len(case.experts)}", f"k={config['top_k']}", f"block={config['block_size']}"]
    parts += ["int64"] if config["ids_dtype"] == "int64" else []
    parts += [f"expert_map={config['expert_map']}"] if config["expert_map"] != "none" else []
    parts += ["out"] if config["out"] else []
    parts += [f"fenced {config['edge']}"] if config["edge"] != "right" else []
    faults = [
        (f"step {index}: " if len(case.steps) > 1 else "") + _fault(case, step, fault)
        for index, step in enumerate(case.steps)
        for fault in step.faults
    ]
    return " ".join(parts) + ("; " + ", ".join(faults) if faults else "")


def _fault(case: Case, step: Step, fault: Fault) -> str:
    rows = str(Labels.of(fault.rows.positions(step.rows)))
    streams = [case.stream(index) for index in range(len(case.steps))]
    source = f" of step {streams.index(fault.stream)}" if fault.stream in streams else ""
    shown = f" rows {rows}" if len(rows) <= 24 else f" ({len(fault.rows)} rows)"
    return f"{fault.name} on {fault.tensor}{shown if rows else ''}{source}"
