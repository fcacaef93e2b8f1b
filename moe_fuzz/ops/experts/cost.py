"""What an experts case costs, and configs cut down to what can be afforded. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_fuzz.case import Case, Scalar
from moe_fuzz.labels import Labels
from moe_fuzz.ops.space import Means

MAX_ELEMENTS = 1 << 27
#: Elements of the projections of a case. A GPU makes and multiplies far more in a millisecond, but they are also laid
#: into fences, and judged in float64: of four times as many 54 planted bugs took as many cases, and 1.6 times as long.
BUDGET = 1 << 19
SHARES = (1.0, 1 / 8)  # of it, for one case in three each: most flaws show in sizes that cost less than their judgement
LONG = "long"  # and for the third: a side as long as models have it stays, and all else is cut down
CROWD = 3 * 32 * 32  # of an expert, where it is slots that a case has many of
WIDE, OF_WIDE = 2048, 4  # a side that long is a model's own, and may take so many times the budget
NARROW = 16  # what the other side of a long one keeps
FP4_BUDGET = 1 << 18  # in the interpreter, a number that has to be decoded costs ten times as much
#: Seconds that an interpreted case may take; most take a third of it. A block of slots takes 7 ms in the two products
#: however small it is, an expert with a slot has one at least, and a case calls the kernel three times or four.
CPU_BUDGET = 0.4
HOST_BUDGET = 0.12  # of one whose target is no kernel of Triton's
CPU_CALLS = 3
CUDA_BUDGET = 1 << 19  # x, and what the slots hold


def afforded(config: Mapping[str, Scalar], sizes: Mapping[str, Sequence[int]], budget: float) -> dict[str, Scalar]:
    """The config as `shrunk` to the budget, or to a larger one where that leaves a side as long as models have them."""
    wide = shrunk(config, sizes, OF_WIDE * budget)
    return wide if max(int(wide[name]) for name in sizes) >= WIDE else shrunk(config, sizes, budget)


def lengthy(
    config: Mapping[str, Scalar], sizes: Mapping[str, Sequence[int]], counts: Sequence[int], budget: float
) -> dict[str, Scalar]:  # fmt: skip
    """The config with its longer side, where models have one as long: the other side is cut down to the budget, and
    then the number of experts. Else of so many that half of the cases have, a long side would hardly ever be left.
    counts: the numbers of experts that can be had."""
    name = max(sizes, key=lambda name: int(config[name]))
    if int(config[name]) < WIDE:
        return shrunk(config, sizes, SHARES[-1] * budget)
    others = {other: [size for size in sizes[other] if size >= NARROW] for other in sizes if other != name}
    whole = shrunk(config, others, budget)
    each = 3 * int(whole["hidden"]) * int(whole["intermediate"])
    most = max(min(counts), int(budget) // each)
    count = max(n for n in (len(Labels.parse(str(whole["experts"]))), *counts) if n <= most)
    return shrunk({**whole, "experts": str(Labels.range(count))}, sizes, budget)


def shrunk(config: Mapping[str, Scalar], sizes: Mapping[str, Sequence[int]], budget: float) -> dict[str, Scalar]:
    """The config with hidden and intermediate cut down until its projections are within the budget: the larger of the
    two first, to the next smaller size that can be had."""
    whole = dict(config)
    count = len(Labels.parse(str(whole["experts"])))
    while 3 * count * int(whole["hidden"]) * int(whole["intermediate"]) > budget:
        for name in sorted(sizes, key=lambda name: -int(whole[name])):
            smaller = [size for size in sizes[name] if size < int(whole[name])]
            if smaller:
                whole[name] = max(smaller)
                break
        else:
            break
    return whole


def affordable_tokens(tokens: int, config: Mapping[str, Scalar], means: Means) -> bool:
    if means.device == "cpu":
        # What a config costs with a token alone is not changed by refusing it a few more.
        most = max(means.budget(CPU_BUDGET, HOST_BUDGET), 2 * _judged_call(1, config, means))
        return tokens <= 1 or _judged_call(tokens, config, means) <= most
    hidden, inter, top_k = int(config["hidden"]), int(config["intermediate"]), int(config["top_k"])
    return tokens * (hidden + top_k * (hidden + inter)) <= CUDA_BUDGET


def call_seconds(tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
    """A call, fitted to measurements: interpreted of our kernel, else of a loop over the experts that have a slot."""
    slots, count = tokens * int(config["top_k"]), len(Labels.parse(str(config["experts"])))
    if not means.interpreted:
        width = int(config["hidden"]) + int(config["intermediate"])
        return 0.004 + (8e-3 if "activations" in config else 4e-4) * min(slots, count) + 7e-8 * slots * width
    blocks = min(slots, count) + slots // 16
    weights = 3 * blocks * max(16, int(config["hidden"])) * max(16, int(config["intermediate"]))
    if "activations" in config:  # weights are decoded, number by number
        return 0.035 + 0.01 * blocks + 3.5e-7 * weights
    return 0.012 + 0.007 * blocks + 6e-8 * weights


def _judged_call(tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
    """With those of the relations, and the weights made and multiplied in float64."""
    weights = 3 * len(Labels.parse(str(config["experts"]))) * int(config["hidden"]) * int(config["intermediate"])
    return CPU_CALLS * call_seconds(tokens, config, means) + (5e-8 * weights if tokens else 0.0)


def seconds(case: Case, means: Means) -> float:
    """Estimated seconds of a case in a worker."""
    graph = case.mode != "eager"
    config = case.config
    if means.device != "cpu":
        weights = 3 * len(case.experts) * int(config["hidden"]) * int(config["intermediate"])
        each = sum(0.004 + 2e-9 * (weights + step.tokens * int(config["hidden"])) for step in case.steps)
        return each + (0.02 * len(case.buckets) if graph else 0.0)
    calls = [call_seconds(step.tokens, config, means) for step in case.steps]
    judged = [_judged_call(step.tokens, config, means) for step in case.steps]
    if not graph:
        return sum(judged)
    # One to warm up a bucket, two a step, and the relations of the last.
    return sum(call_seconds(tokens, config, means) for tokens in case.buckets) + 2 * sum(calls) + judged[-1]
