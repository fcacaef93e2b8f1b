"""What the experts ops say to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels

#: Their order is that of attribution.
CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities",
    "capture": "it can be captured into a CUDA graph, where declared: nothing waits for the device",
    "structure": "the result has the contract's shape, dtype and device",
    "written": "every element of the result is written",
    "finite": "what the contract determines is a number, and a NaN in a token's x is one in its result",
    "dropped": "a token none of whose experts are here gets exactly 0",
    "exact": "where the recipe makes every sum exact, the result has the known bits",
    "bound": "the result is within the rounding error that the declared stores and sums can make",
    "statistical": "errors of random data are as large as roundings make them, and no larger",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "isolation": "what stands in padding rows, dropped slots or other rows does not change a row, bit for bit",
    "batch_invariance": "a row's bits do not depend on its position or on the number of rows, where declared",
    "relabel": "with the experts in another order, and the ids with them, the result is the same within its bounds",
    "shards": "the partial results of ranks that share the experts sum to the whole",
    "scaling": "twice the routing weights give twice the result",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bits, where declared; a graph is replayed",
}

#: Of `experts_nvfp4` alone.
FP4_CHECKS = {
    "backends": "each backend that can be forced gives the result within its bounds; known bits where sums are exact",
}

FAULTS = {
    "nan_rows": "whole rows of NaN, of one bit pattern or of several, both signs",
    "inf_rows": "whole rows of +Inf",
    "neg_inf_rows": "whole rows of -Inf",
    "partial_nan": "a third of a row is NaN",
    "partial_inf": "a quarter of a row is +Inf, a quarter -Inf",
    "huge_rows": "the dtype's largest numbers of both signs",
    "ladder": "zeros, subnormals, a ladder of magnitudes",
    "zero_rows": "rows of zeros, as in a buffer that nobody has written yet",
    "stale_rows": "rows hold an earlier step's data",
    "extreme_weights": "half of the routing weights are zero, negative, tiny or huge",
    "nan_dropped": "the weights of slots without an expert here are NaN",
    "duplicate_experts": "rows name an expert several times",
    "all_to_one": "all slots of the rows go to one expert",
    "hot_expert": "one slot of each row goes to the same expert",
    "exact_count": "as many rows name one expert as fill its blocks, or one more, or one less",
    "empty_experts": "the rows name an eighth of the experts only",
    "last_experts": "the rows name the last experts, an eighth of them at least",
    "sentinel_ids": "ids of no expert: -1, -2, E, E + 1, the largest and smallest int32",
    "wide_ids": "ids are int64, some beyond 32 bits, whose low 32 bits are an expert's",
    "int64_ids": "ids are int64",
    "broken_weights": "NaN, +Inf or -Inf in the projections of some experts: one number, one in four, or all of them",
    "broken_biases": "NaN, +Inf or -Inf in the biases of some experts: in one place, or in a quarter of them",
    "noncontiguous": "rows stand apart in a wider buffer, or the entries of a map",
    "int32_boundary": "rows of x, or experts of a projection, so far apart that offsets pass 2^31 elements",
    "far_columns": "columns so far apart that offsets pass 2^31 elements",
    "transposed": "columns are packed, and rows are not",
    "misaligned": "the first element is not aligned for vector loads",
}


FP4_FAULTS = {
    "scale_ties": "each block's maximum lies where its scale is halfway between two, or a bit beside that",
    "code_ties": "values lie halfway between two codes, or a bit beside that",
    "tiny_block": "one block in two is so small that its scale rounds to zero, or is subnormal",
    "scale_saturation": "one block in two is beyond 448 times its global scale, by a little or by far",
    "poison_scales": "the padding of swizzled scales holds 0x7F, a NaN",
    "nan_blocks": "the scales of some blocks are NaN, in some experts",
    "signed_blocks": "the scales of some blocks are below 0, their codes have the other sign; so have whole experts",
    "zero_scale": "a global scale is 0; of weights, that of some experts",
    "infinite_scale": "a global scale is infinite; of weights, that of some experts",
    "nan_scale": "a global scale is NaN; of weights, that of some experts",
    "subnormal_scale": "a global scale of activations is no normal number",
    "negative_scale": "a global scale of activations is below 0",
    "stale_scales": "the padding of swizzled scales holds any bytes, as memory does that nobody cleared",
}


def label(case: Case) -> str:
    """`experts_bf16 T=7 (2 padding: minus_one) E=8 k=2 H=64 I=32 bfloat16 silu first dense; nan_rows on x rows 5-6`.

    Rows stand by position, as the target sees them.
    """
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    for step in case.steps:
        padding = f" ({len(step.padding)} padding: {config['dialect']})" if step.padding else ""
        parts.append(f"T={step.tokens}{padding}")
    parts += [f"E={len(case.experts)}", f"k={config['top_k']}", f"H={config['hidden']}", f"I={config['intermediate']}"]
    parts += [str(config[name]) for name in ("dtype", "activation", "gate_layout", "recipe")]
    if config["recipe"] == "dense":
        parts += [f"|x|<2^{config['magnitude']}", f"|w|<2^{config['weight_scale']}"]
    parts += [f"bias={config['bias']}"] if config["bias"] != "none" else []
    parts += ["weight_on_input"] if config["weight_on_input"] else []
    parts += [f"expert_map={config['expert_map']}"] if config["expert_map"] != "none" else []
    parts += [str(config["scale_layout"])] if "scale_layout" in config else []
    parts += [f"activations={config['activations']} {config['global_scale']}"] if _quantizes(case) else []
    parts += ["out"] if config["out"] else []
    parts += [f"fenced {config['edge']}"] if config["edge"] != "right" else []
    faults = [
        (f"step {index}: " if len(case.steps) > 1 else "") + _fault(case, step, fault)
        for index, step in enumerate(case.steps)
        for fault in step.faults
    ]
    return " ".join(parts) + ("; " + ", ".join(faults) if faults else "")


def _quantizes(case: Case) -> bool:
    return case.config.get("activations") == "nvfp4"


def _fault(case: Case, step: Step, fault: Fault) -> str:
    rows = str(Labels.of(fault.rows.positions(step.rows)))
    streams = [case.stream(index) for index in range(len(case.steps))]
    source = f" of step {streams.index(fault.stream)}" if fault.stream in streams else ""
    shown = f" rows {rows}" if len(rows) <= 24 else f" ({len(fault.rows)} rows)"
    return f"{fault.name} on {fault.tensor}{shown if rows else ''}{source}"
