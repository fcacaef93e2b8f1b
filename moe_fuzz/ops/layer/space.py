"""The space of moe_layer: gate, router, experts, and the ranks over which they are spread. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from moe_fuzz.case import ALL_MODES, MODES, RANKS, Case, Scalar, Step, in_mode
from moe_fuzz.contract import PADDING_DIALECTS, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import moves
from moe_fuzz.ops.experts.fields import BIASES, OFTEN, bias_dtypes, biases_of
from moe_fuzz.ops.layer import text
from moe_fuzz.ops.layer.presets import MODELS
from moe_fuzz.ops.routing import space as routing
from moe_fuzz.ops.space import Axis, FaultPlace, Means
from moe_fuzz.sizes import any_number

EXPERTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 17, 32, 33, 60, 64, 67, 72, 96, 128, 129, 160, 256, 257, 384, 512)
TOP_K = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 17, 22, 32)
HIDDEN = (16, 1, 7, 8, 24, 32, 33, 40, 64, 72, 96, 100, 128, 129, 192, 256, 320, 448, 512)
INTERMEDIATE = (16, 1, 8, 12, 24, 32, 33, 40, 48, 64, 65, 96, 128, 130, 176, 256)
DP = (1, 2, 3, 4, 8)
EP = (1, 2, 3, 4, 8)
#: Elements of w13 and w2: the host draws them anew for each case, and multiplies them in float64.
MAX_WEIGHTS = 1 << 18
CPU_BUDGET = 0.3  # seconds an interpreted case may take: a layer is a router, and a few launches a shard
HOST_BUDGET = 0.2  # and one whose target is no kernel of Triton's
CUDA_SLOTS = 1 << 20  # numbers that the slots hold, on a device, for the same reason

FIELDS: dict[str, tuple[Scalar, ...]] = {
    "hidden": HIDDEN,
    "intermediate": INTERMEDIATE,
    "dp": DP,
    "ep": EP,
    "dtype": ("bfloat16", "float16"),
    "gate_dtype": ("dtype", "float32"),
    "scoring": ("softmax", "sigmoid"),
    "renormalize": (False, True),
    "bias": (False, True),
    "scale": (1.0, 2.5, 0.5, 2.827),  # Kimi K2's last: no bfloat16, and no float32 either
    "is_padding": (False, True),
    "dialect": PADDING_DIALECTS,
    "activation": ("silu", "gelu", "relu2", "swiglu_oai"),
    "gate_layout": ("first", "up_first", "interleaved"),
    "expert_bias": BIASES,  # of b13 and of b2
    # numbers of order 1; whole ones; those with biases of 13 bits; those with large ones that cancel
    "recipe": ("dense", "integer", "fine", "cancel"),
    "edge": ("right", "left"),
    "out": (False, True),
    "magnitude": (0, 2, -4, 5),  # hidden states lie within ±2^magnitude
}
ROW_FAULTS = ("nan_rows", "inf_rows", "neg_inf_rows", "partial_nan", "partial_inf", "huge_rows", "ladder", "ties",
              "zero_rows", "stale_rows")  # fmt: skip
#: Attention leaves NaN in nearly every padded batch (829 of 832 steps: vllm#37758).
TAILS = ("", "", "nan_rows", "nan_rows", "nan_rows", "inf_rows", "huge_rows", "zero_rows")
PLACES = (
    *(FaultPlace(name, "hidden", on_rows=True) for name in ROW_FAULTS),
    FaultPlace("extreme_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("negative_bias", "bias", on_rows=False, needs="bias"),
    FaultPlace("noncontiguous", "hidden", on_rows=False),
    FaultPlace("transposed", "hidden", on_rows=False),
    FaultPlace("misaligned", "hidden", on_rows=False),
    FaultPlace("noncontiguous", "gate", on_rows=False),
    FaultPlace("transposed", "gate", on_rows=False),
    *(FaultPlace("noncontiguous", name, on_rows=False, needs=name) for name in ("bias", "is_padding")),
)


@dataclass(frozen=True)
class LayerSpace(routing.RoutingSpace):
    """moe_layer. Its rows are the gathered batch: in the mode `ranks` those of `dp` ranks, one after the other."""

    family: ClassVar[str] = "layer"
    checks: ClassVar[Mapping[str, str]] = text.CHECKS
    faults: ClassVar[Mapping[str, str]] = text.FAULTS
    places: ClassVar[tuple[FaultPlace, ...]] = PLACES
    sizes: ClassVar[tuple[str, ...]] = ("experts", "top_k")
    fields: ClassVar[Mapping[str, tuple[Scalar, ...]]] = FIELDS
    tails: ClassVar[tuple[str, ...]] = TAILS
    row_faults: ClassVar[tuple[str, ...]] = ROW_FAULTS

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        inputs = ("hidden", "gate", "w13", "w2", "bias", "b13", "b2", "is_padding")
        return dict.fromkeys(inputs, "input") | dict.fromkeys(("y", "weights", "ids"), "output")

    # ---- what to draw -----------------------------------------------------------------------------------------------

    def axes(self, info: TargetInfo) -> tuple[Axis, ...]:
        can, contract = info.capabilities, info.contract
        limited: dict[str, tuple[Scalar, ...]] = {
            "hidden": tuple(h for h in HIDDEN if h <= can.max_hidden and h % can.min_multiple_h == 0),
            "intermediate": tuple(i for i in INTERMEDIATE if i <= can.max_intermediate and i % can.min_multiple_i == 0),
            "dp": tuple(n for n in DP if n <= can.max_ranks),
            "ep": tuple(n for n in EP if n <= can.max_shards),
            "dtype": tuple(d for d in FIELDS["dtype"] if d in can.dtypes),
            "scoring": can.scorings,
            "renormalize": can.renormalize,
            "bias": (True,) if can.bias_required else (False, True) if can.bias else (False,),
            "scale": FIELDS["scale"] if can.scale else (1.0,),
            "is_padding": (False, True) if can.is_padding else (False,),
            "dialect": contract.padding,
            "activation": can.activations,
            "gate_layout": can.gate_layouts,
            "expert_bias": biases_of(info),
            "recipe": tuple(r for r in FIELDS["recipe"] if r in can.recipes),
            "out": (False, True) if can.out else (False,),
        }
        return (
            Axis("experts", can.numbers_of_experts(EXPERTS), between=can.takes_experts),
            Axis("top_k", [k for k in TOP_K if k <= can.max_top_k], between=any_number),
            *(Axis(name, limited.get(name, values), OFTEN["bias"] if name == "expert_bias" and can.biases else ())
              for name, values in FIELDS.items()),
        )

    def modes(self, info: TargetInfo) -> tuple[str, ...]:
        # Ranks pad to static buffers where nothing is captured, too.
        known = ALL_MODES if info.contract.graph else (MODES[0], RANKS)
        return known if info.capabilities.max_ranks > 1 else tuple(mode for mode in known if mode != RANKS)

    def complete(self, config: Mapping[str, Scalar], info: TargetInfo) -> dict[str, Scalar]:
        axes = {axis.name: axis.values for axis in self.axes(info)}
        whole = self.mended({**config, "experts": str(Labels.range(int(config["experts"])))})
        for size in ("hidden", "intermediate", "hidden", "intermediate"):
            count = len(Labels.parse(str(whole["experts"])))
            fits = [v for v in axes[size] if v == whole[size] or _weights(count, {**whole, size: v}) <= MAX_WEIGHTS]
            if _weights(count, whole) > MAX_WEIGHTS:
                smaller = [int(v) for v in fits if int(v) < int(whole[size])]
                whole[size] = max(smaller) if smaller else min(map(int, axes[size]))
        if not whole["is_padding"]:
            whole["dialect"] = info.contract.padding[0]  # nobody asks: one value, so that equal cases look equal
        return whole

    def tokens(self, config: Mapping[str, Scalar], means: Means) -> tuple[int, ...]:
        if means.device == "cpu":
            most = means.budget(CPU_BUDGET, HOST_BUDGET)
            found = tuple(t for t in routing.TOKENS if self.cpu_seconds(t, config, means) <= most)
            # Where nothing but a token or none can be afforded, none would be every second case.
            return found if len(found) > 2 else (1,)
        width = (int(config["hidden"]) + int(config["intermediate"])) * int(config["top_k"])
        return tuple(t for t in routing.TOKENS if t * width <= CUDA_SLOTS)

    def affordable(self, case: Case, means: Means) -> bool:
        # A step costs more calls in a graph mode; with no more time, no case of several shards would have one.
        most = means.budget(CPU_BUDGET, HOST_BUDGET) * (1 if case.mode == "eager" else 2)
        return means.device != "cpu" or self.cost(case, means) <= most

    # ---- what is valid ----------------------------------------------------------------------------------------------

    def validate(self, case: Case) -> None:
        super().validate(case)
        config, count = case.config, len(case.experts)
        if int(config["ep"]) > count:
            raise CaseError("config.ep", f"{config['ep']} shards of {count} experts: some would have none")
        if config["recipe"] != "dense" and config["activation"] == "swiglu_oai":
            raise CaseError("config.recipe", "no gate makes swiglu_oai exact", "use dense")
        if _weights(count, config) > 1 << 27:
            raise CaseError("config.hidden", f"{count} experts of {config['hidden']} x {config['intermediate']} are "
                            "too many elements")  # fmt: skip
        if (int(config["dp"]) > 1) != (case.mode == RANKS):
            raise CaseError("config.dp", f"must be 1 in mode {case.mode}" if case.mode != RANKS
                            else "must be more than 1 in mode ranks")  # fmt: skip
        for index, step in enumerate(case.steps):
            if step.tokens % int(config["dp"]):
                raise CaseError(f"steps[{index}].rows", f"{step.tokens} rows are not as many for each of "
                                f"{config['dp']} ranks")  # fmt: skip

    def refusals(self, case: Case, info: TargetInfo) -> Iterator[tuple[object, str]]:
        can, config = info.capabilities, case.config
        yield from super().refusals(self._as_router(case), info)
        yield config["scoring"] not in can.scorings, f"scoring={config['scoring']}"
        yield config["activation"] not in can.activations, f"activation={config['activation']}"
        yield config["gate_layout"] not in can.gate_layouts, f"gate_layout={config['gate_layout']}"
        yield config["expert_bias"] not in biases_of(info), f"expert_bias={config['expert_bias']}"
        yield config["recipe"] not in can.recipes, f"recipe={config['recipe']}"
        yield int(config["dp"]) > can.max_ranks, f"{config['dp']} ranks"
        yield int(config["ep"]) > can.max_shards, f"{config['ep']} shards"
        hidden, inter = int(config["hidden"]), int(config["intermediate"])
        yield hidden > can.max_hidden or hidden % can.min_multiple_h, f"hidden {hidden}"
        yield inter > can.max_intermediate or inter % can.min_multiple_i, f"intermediate {inter}"

    @staticmethod
    def _as_router(case: Case) -> Case:
        return case.with_config(padding=case.config["dialect"])

    # ---- what it is like --------------------------------------------------------------------------------------------

    def features(self, case: Case) -> frozenset[str]:
        config = case.config
        found = set(super().features(self._as_router(case))) - {"large logits"}
        found |= {f"{name}={config[name]}" for name in ("scoring", "activation", "gate_layout", "expert_bias", "recipe")
                  if config[name] != self.simplest[name]}  # fmt: skip
        found |= {"several ranks"} if config["dp"] != 1 else set()
        found |= {"several shards"} if config["ep"] != 1 else set()
        found |= {"uneven shards"} if len(case.experts) % int(config["ep"]) else set()
        found |= {f"{name} not a multiple of 16" for name in ("hidden", "intermediate") if int(config[name]) % 16}
        counts = [rank_tokens(step, int(config["dp"])) for step in case.steps]
        found |= {"fault:dp_skew"} if any(len(set(each)) > 1 for each in counts) else set()
        found |= {"fault:zero_tokens"} if any(0 in each and max(each) for each in counts) else set()
        found |= {"large hidden states"} if int(config["magnitude"]) > 2 else set()
        return frozenset(found)

    def simplify(self, case: Case) -> Iterator[Case]:
        for mode in ALL_MODES[: ALL_MODES.index(case.mode)]:
            for simpler in moves.in_simpler_mode(case, mode):
                yield replace(simpler, config=in_mode(case.config, mode))
        if case.mode == RANKS:
            yield from self._fewer_ranks(case)
        # dp has been dealt with: it is no field that stands alone
        yield from (one for one in super().simplify(case) if one.mode == case.mode and
                    one.config["dp"] == case.config["dp"])  # fmt: skip

    def _fewer_ranks(self, case: Case) -> Iterator[Case]:
        ranks = int(case.config["dp"])
        blocks = [step.tokens // ranks for step in case.steps]
        for fewer in (r for r in DP if 1 < r < ranks):
            steps = tuple(step.keep_rows(step.rows.first(fewer * block))
                          for step, block in zip(case.steps, blocks, strict=True))  # fmt: skip
            yield replace(case, steps=steps, config={**case.config, "dp": fewer})
        for rows in (1, 2, 4, 8, 16):
            for pick in (Labels.first, Labels.last):
                if rows < max(blocks):
                    steps = tuple(_each_rank(step, ranks, lambda of, pick=pick, rows=rows: pick(of, rows))
                                  for step in case.steps)  # fmt: skip
                    yield replace(case, steps=steps)

    def mended(self, config: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """top_k and ep are at most the number of experts. No gate makes swiglu_oai exact."""
        count = len(Labels.parse(str(config["experts"])))
        fitting = [shards for shards in EP if shards <= min(int(config["ep"]), count)]
        whole = {**super().mended(config), "ep": max(fitting)}
        if whole["activation"] == "swiglu_oai":
            whole["recipe"] = "dense"
        elif whole["recipe"] == "fine" and "float32" not in bias_dtypes(whole["expert_bias"]):
            whole["recipe"] = "integer"  # nothing else of it is fine
        return whole | ({"magnitude": 0} if whole["recipe"] != "dense" else {})

    def cpu_seconds(self, tokens: int, config: Mapping[str, Scalar], means: Means) -> float:
        """A case with its reruns. Interpreted, fitted to 370 measurements: right on average, and within a factor of two
        for nine in ten. Launches count, and in each shard's the blocks of slots with the tiles that they multiply.
        Else a layer is a loop over the experts, with all tokens at worst."""
        count, top_k = len(Labels.parse(str(config["experts"]))), int(config["top_k"])
        hidden, inter, shards = int(config["hidden"]), int(config["intermediate"]), int(config["ep"])
        if not tokens:
            return 0.02
        slots = tokens * min(top_k, count)
        if not means.interpreted:
            return 0.03 + 1e-3 * count + 3e-6 * tokens * count + 5e-5 * slots + 8e-8 * _weights(count, config)
        blocks = min(slots, min(slots, -(-count // shards)) + slots // 16)
        tile = max(16, hidden) * max(16, inter) / 16384
        return 0.095 + shards * (0.034 + blocks * (0.0036 + 0.0087 * tile)) + 9e-8 * _weights(count, config)

    def label(self, case: Case) -> str:
        return text.label(case)


def rank_tokens(step: Step, ranks: int) -> list[int]:
    """The real tokens of each rank."""
    block = step.tokens // ranks
    rows = list(step.rows)
    return [sum(row not in step.padding for row in rows[r * block : (r + 1) * block]) for r in range(ranks)]


def _each_rank(step: Step, ranks: int, pick: object) -> Step:
    block, rows, kept = step.tokens // ranks, step.rows, Labels()
    for rank in range(ranks):
        own = rows.first((rank + 1) * block).last(block)
        kept = kept | pick(own)  # type: ignore[operator]
    return step.keep_rows(kept)


def _weights(experts: int, config: Mapping[str, Scalar]) -> int:
    return 3 * experts * int(config["hidden"]) * int(config["intermediate"])


SPACES = (
    LayerSpace("moe_layer", "gate, router and experts of a layer, tokens and experts spread over ranks",
               MODELS),
)  # fmt: skip
