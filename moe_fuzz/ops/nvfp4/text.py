"""What `nvfp4_quantize` says to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels

#: Their order is that of attribution.
CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities",
    "capture": "it can be captured into a CUDA graph, where declared: nothing waits for the device",
    "structure": "codes and scales have the contract's shape and dtype",
    "written": "every byte of a result is written, the padding of the scales too",
    "finite": "no scale byte is NaN or negative",
    "scale": "each scale byte is that of its block's maximum: to the bit where declared, else a step off at most, and "
             "only beside a tie",
    "codes": "each code is the nearest one under the target's own scale: to the bit where declared, else a step off at "
             "most, and only beside a tie",
    "padding": "the padding of swizzled scales is zero, where declared",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "isolation": "a block with NaN or Inf in it changes no other block",
    "batch_invariance": "a row's bytes depend on that row alone, where declared",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bytes, where declared; a graph is replayed",
}  # fmt: skip

FAULTS = {
    "nan_rows": "rows of NaN, as attention leaves them in padding",
    "inf_rows": "rows of +Inf",
    "neg_inf_rows": "rows of -Inf",
    "partial_nan": "one place in three of a row is NaN",
    "partial_inf": "one place in four of a row is +Inf, and one in four -Inf",
    "huge_rows": "the dtype's largest and smallest numbers among ordinary ones",
    "ladder": "zeros, subnormals and a ladder of magnitudes",
    "zero_rows": "rows of zeros",
    "stale_rows": "rows hold an earlier step's values",
    "zero_block": "one block in two is zero: its scale is, and so is what divides by it",
    "tiny_block": "one block in two is so small that its scale rounds to zero, or is subnormal",
    "scale_saturation": "one block in two is beyond 448 times its global scale, by a little or by far",
    "scale_ties": "each block's maximum lies where its scale is halfway between two, or a bit beside that",
    "code_ties": "values lie halfway between two codes, or a bit beside that",
    "nonfinite_block": "one block in three has one NaN or Inf in it",
    "code_grid": "values that codes hold exactly",
    "lone_number": "one number in a block of zeros, anywhere in it",
    "minus_one_ids": "rows of no expert: id -1",
    "num_experts_ids": "rows of no expert: id E",
    "sentinel_ids": "rows of no expert: -1, -2, E, E + 1, the largest and smallest int32",
    "wide_ids": "int64 ids beyond 32 bits, whose low 32 bits are an expert's",
    "all_to_one": "all rows are of one expert",
    "noncontiguous": "rows stand apart in a wider buffer",
    "int32_boundary": "rows so far apart that offsets pass 2^31 elements",
    "far_columns": "columns so far apart that offsets pass 2^31 elements",
    "transposed": "columns are packed, and rows are not",
    "misaligned": "the first element is not aligned for vector loads",
}


def label(case: Case) -> str:
    """`nvfp4_quantize T=7 K=96 bfloat16 swizzled global_scale=six; zero_block on x rows 5-6`. Rows by position."""
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    parts += [f"T={step.tokens}" for step in case.steps]
    parts += [f"K={16 * len(Labels.parse(str(config['blocks'])))}", str(config["dtype"]), str(config["layout"])]
    parts += [f"of {config['activation']}"] if config["activation"] != "none" else []
    parts += [f"global_scale={config['global_scale']}"]
    parts += ["bfloat16 global_scale"] if config["scale_dtype"] != "float32" else []
    parts += [f"{config['expert_ids']} expert_ids"] if config["expert_ids"] != "none" else []
    parts += [f"magnitude 2^{config['magnitude']}"] if config["magnitude"] else []
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
