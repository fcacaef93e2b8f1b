"""What `allreduce_rmsnorm` says to a person: one line for each check and fault, and the label of a case."""

from __future__ import annotations

from moe_fuzz.case import RANKS, Case
from moe_fuzz.ops.routing import text

CHECKS = {
    "error": "a valid input is taken: no exception inside the declared capabilities, no wait of a rank given up",
    "capture": "it can be captured into a CUDA graph, where declared",
    "structure": "outputs have the contract's shape, dtype and device",
    "written": "every element of an output is written, on every rank",
    "ranks": "all ranks get the same bits",
    "exact": "where every sum is exact, residual_out is known bit for bit in any order",
    "residual": "where the order of the sum is declared, residual_out is known bit for bit",
    "bound": "both outputs agree with float64 within the running error of sums, norm and stores",
    "fence": "no read or write outside a tensor, no write into an input",
    "canary": "the slack bytes beside a tensor keep their pattern",
    "pads": "signal pads are zero when all ranks have finished their calls",
    "tail": "what lies behind a message in the ranks' buffers keeps its pattern",
    "isolation": "NaN, Inf and overflow in a row of any rank change no other row, where declared",
    "batch_invariance": "a row has the same bits alone and with fewer rows, where declared",
    "backends": "a backend that is forced gives the same bits, where batch_invariant; else it is judged as results are",
    "replay": "a graph's replay gives what an eager call gives, bit for bit where deterministic",
    "determinism": "the same input gives the same bits, where declared; a graph is replayed",
}

_COMMON = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "huge_rows", "ladder", "zero_rows",
           "stale_rows", "noncontiguous", "transposed", "misaligned")  # fmt: skip
FAULTS = {
    **{name: text.FAULTS[name] for name in _COMMON},
    "negative_zeros": "rows of -0, which some protocols take for \"not there yet\"",
    "negative_subnormals": "negative numbers below the normal ones among others: flushed, they are -0",
    "overflowing_squares": "finite numbers whose squares do not fit float32 any more",
}
IN_PLACE = "in_place"  # the residual is the buffer of residual_out: a value of `out`
_PLAIN = {"launches": "phases", "pace": "together", "burst": 0, "groups": 1, "capacity": "exact"}


def label(case: Case) -> str:
    """`allreduce_rmsnorm T=7 R=4 H=2048 bfloat16 gamma=float32 single burst=3; nan_rows on x1 rows 5-6`."""
    config = case.config
    parts = [case.op] + ([case.way] if case.way else [])
    parts += [f"T={step.tokens}" for step in case.steps]
    parts += [f"R={config['ranks']}", f"H={config['hidden']}", str(config["dtype"])]
    parts += [f"gamma={config['gamma_dtype']}"] if config["gamma_dtype"] != "dtype" else []
    parts += ["no residual"] if not config["residual"] else []
    parts += [str(config["recipe"])] if config["recipe"] != "dense" else []
    parts += [f"eps={config['eps']:g}"] if config["eps"] != 1e-6 else []
    parts += [f"{name}={config[name]}" for name, plain in _PLAIN.items()
              if config[name] != plain and not (name == "launches" and case.mode == RANKS)]  # fmt: skip
    parts += ["captured"] if config["captured"] else []
    parts += ["out in place" if config["out"] == IN_PLACE else "out"] if config["out"] else []
    parts += [f"|x|<2^{config['magnitude']}"] if config["magnitude"] else []
    parts += [f"fenced {config['edge']}"] if config["edge"] != "right" else []
    faults = text.fault_lines(case)
    return " ".join(parts) + ("; " + ", ".join(faults) if faults else "")
