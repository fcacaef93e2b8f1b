"""What a target promises: its numerical contract and its capabilities. Free of torch: both sides of the pipe use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any, TypeVar

from moe_fuzz.errors import UsageError

#: What a router writes on a row that is flagged as padding.
#: distinct: k distinct ids, finite weights · minus_one: id -1, weight 0 · num_experts: id E, weight 0 ·
#: zero_weight: id 0, weight 0 · garbage: anything at all, even nothing
PADDING_DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")

#: What a finding breaks: what the target's own project documents or its callers rely on, or our stricter rule.
FINDING_CLASSES = ("contract", "robustness")
#: The clause where no other is declared.
UNDECLARED = "its project's promises are not declared, so it is held to the contract of the op, and a gate is red"


@dataclass(frozen=True)
class Contract:
    """The numerical contract of a target: the checks take their bounds from it and from nothing else."""

    #: "exp": relative accuracy | "tanh": 0.5 * tanh(x / 2) + 0.5, which has an absolute one only | "tanh.approx": the
    #: same by that instruction, of routers alone
    sigmoid: str = "exp"
    deterministic: bool = False  # same input, same bits
    batch_invariant: bool = False  # a row's bits depend on that row alone: not on its position, on T, on other rows
    isolated: bool = False  # of experts and layers: at the same T, a row's bits depend on that row alone
    ties: str = "any"  # "any" | "lowest_index_first"
    ordered: bool = False  # the slots of a row stand in descending order of biased score
    padding: tuple[str, ...] = ("distinct",)  # the dialects it can speak; only asked for where `is_padding` is taken
    graph: bool = True  # can be captured into a CUDA graph and replayed; False where nobody says so
    padding_weight: str = "dialect"  # weights of flagged rows: "dialect" (0 where there is no expert) | "any"
    # of experts alone; "dtype" is that of x
    accumulate: str = "float32"  # dtype in which the two products are summed up
    gate_up: str = "float32"  # in which the product with w13 is stored, before its bias or behind it
    activation: str = "float32"  # to which each operation of the activation is rounded
    down: str = "float32"  # in which the product with w2 is stored, before its bias or behind it, and its weight
    intermediate: str = "dtype"  # in which the activation's result is stored: "dtype" | "float32"
    slot: str = "dtype"  # in which each weighted slot is stored: "dtype" | "float32" | "none": summed up in float32
    weight_dtype: str = "float32"  # "dtype": the router's weights are rounded to that of x first
    weighted_x: str = "float32"  # "dtype": where the weight is on the input, their product is stored; not of NVFP4
    reduce: str = "float32"  # dtype in which the slots of a token are added up; of allreduce_rmsnorm too: the ranks' x
    truncates: bool = False  # stores cut off instead of rounding
    logits: str = "float32"  # of a layer: "dtype": its logits are rounded to that of hidden
    combine: str = "float32"  # of a layer: in which the shards' results are added up: "float32" | "dtype"
    # the padding dialects whose slots it takes; of align too, and of nvfp4_quantize, of whose expert_ids they say which
    # there are besides experts. ("distinct",): it is given ids of experts, and no others
    accepts: tuple[str, ...] = ("distinct",)
    # of align alone, where `ordered` says that blocks stand in ascending order of expert
    stable: bool = False  # the slots of an expert ascend
    tail: str = "minus_one"  # expert_ids past the blocks in use: "minus_one" | "any": nobody reads them
    dropped: str = "absent"  # slots of no expert: "absent" from sorted_token_ids | "first", in blocks of the expert -1
    factor: str = "float32"  # of experts_nvfp4 alone: "dtype": global scales are rounded to that of x first
    # of nvfp4_quantize, and of experts_nvfp4 where it quantizes activations
    rounding: str = "near"  # "exact": the contract's bytes | "near": a step off where float32 in another order may be
    nonfinite: str = "any"  # bytes of a block with NaN or Inf: "reference": as the contract says | "any"
    scale_padding: str = "any"  # of swizzled scales: "zero" | "any"
    # of allreduce_rmsnorm alone
    rounds: tuple[str, ...] = ("residual",)  # what is rounded to x's dtype on the way: "sum" | "residual" | "normed"
    sum_order: str = "any"  # "rank": float32, from rank 0 on, the residual last: then residual_out is known to the bit


@dataclass(frozen=True)
class Capabilities:
    """Inside these limits a refusal is a violation; outside them a clear error is `rejected`."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    min_experts: int = 1
    max_experts: int = 1024
    experts_power_of_two: bool = False  # takes no other number of experts
    experts_multiple: int = 1  # the number of experts must be a multiple of it
    max_top_k: int = 32
    renormalize: tuple[bool, ...] = (False, True)
    bias: bool = True
    bias_required: bool = False  # without a bias it is another kernel's business
    scale: bool = True
    zero_scale: bool = True  # takes a scale of 0, which makes all weights 0
    is_padding: bool = True
    strided: bool = True  # takes inputs whose rows are not packed
    any_strides: bool = False  # takes vectors whose elements stand apart, and columns as far apart as rows
    out: bool = False  # writes into `out=(...)` buffers when given
    alignment: int = 16  # bytes to which every input and output must be aligned; 1: element alignment is enough
    devices: tuple[str, ...] = ("cpu", "cuda")
    jit: bool = False  # compiles inside the process where nobody can see it: what is first of a config may take long
    one_host_path: bool = False  # its Python code is the same on every device: what it may not read while it is
    # captured on a GPU, it does not read on a CPU
    compiles: bool = True  # compiles for each config anew, as Triton does: a campaign stays with a config for longer
    # of grouped_topk alone
    min_n_group: int = 1
    max_n_group: int = 1024
    min_group_size: int = 1  # experts in a group; some take the two best of each without asking (vllm#29439)
    max_group_size: int = 1024
    max_kept: int = 1 << 20  # experts of all the groups that are kept
    top_k_by_groups: bool = False  # top_k <= n_group * topk_group, whatever a group has (flashinfer#4867)
    scorings: tuple[str, ...] = ("softmax", "sigmoid")
    group_scores: tuple[str, ...] = ("max", "top2_sum")
    group_score_by_bias: bool = False  # `top2_sum` with a bias, `max` without: one function in many libraries
    n_shared: int = 8  # fused shared experts, at most
    expert_map: bool = True
    absent: tuple[str, ...] = ()  # results of the op that it does not give
    # of align and of experts
    block_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)  # of align; none named: any
    fewer_than_map: bool = True  # align's num_experts may be another than that of the ids in expert_map
    int64_ids: bool = True
    duplicate_ids: bool = True  # a row may name an expert twice
    zero_tokens: bool = True
    max_hidden: int = 1 << 20
    max_intermediate: int = 1 << 20
    min_multiple_h: int = 1  # hidden must be a multiple of it
    min_multiple_i: int = 1
    activations: tuple[str, ...] = ("silu", "gelu", "relu2", "swiglu_oai")  # of nvfp4_quantize: that it fuses
    gate_layouts: tuple[str, ...] = ("first", "up_first", "interleaved")
    biases: bool = True  # b13 and b2
    nan_biases: bool = False  # a NaN or an infinity in an expert's bias reaches the tokens that name it, and no other
    nan_weights: bool = False  # the same of its projections; of experts_bf16 alone
    separate_biases: bool = True  # takes either without the other, and each in a dtype of its own
    recipes: tuple[str, ...] = ("dense", "integer", "one_hot", "ladder", "fine", "curve", "cancel")  # of numbers
    # of layers
    max_ranks: int = 64  # data-parallel ranks whose batch it takes
    max_shards: int = 64
    weight_on_input: bool = True
    # of NVFP4
    max_blocks: int = 1 << 12  # of 16 columns, of nvfp4_quantize
    layouts: tuple[str, ...] = ("linear", "swizzled")  # of scales
    global_scales: tuple[str, ...] = ("power", "six", "fitted", "small", "large")  # see ops/nvfp4/space.py
    scale_dtypes: tuple[str, ...] = ("float32",)  # of global scales
    nan_scales: bool = False  # of experts_nvfp4: a block whose scale is NaN is NaN, as it reads such bytes
    signed_scales: bool = False  # of experts_nvfp4: scales of blocks, and factors of experts, may be below 0
    expert_scales: bool = True  # takes a global scale for each expert
    activation_formats: tuple[str, ...] = ("as_given", "nvfp4")  # of experts_nvfp4
    # ways to the same result, forced by the argument `backend`, for every size that the target takes; of experts_nvfp4
    # those that take activations as given
    backends: tuple[str, ...] = ()
    # of allreduce_rmsnorm alone
    max_world: int = 8  # ranks of a group
    launches: tuple[str, ...] = ("phases",)  # of all ranks in one process: "phases" | "single", see ops/allreduce
    processes: tuple[str, ...] = ()  # devices on which each rank can have a process of its own
    max_processes: int = 8  # ranks with a process each: as many as there are devices
    gamma_dtypes: tuple[str, ...] = ("dtype", "float32", "bfloat16", "float16")
    residual: tuple[bool, ...] = (True, False)
    residual_in_place: bool = False  # `out` may hold the residual itself for residual_out, as serving has it
    max_burst: int = 1000  # calls without a wait in between
    max_groups: int = 2  # at the same time
    cuts: bool = False  # takes messages larger than its group's buffers

    def __post_init__(self) -> None:
        for name in ("experts_multiple", "min_multiple_h", "min_multiple_i", "alignment"):
            if getattr(self, name) < 1:
                raise UsageError(f"Capabilities.{name} must be 1 or more, not {getattr(self, name)}", "1: any will do")

    def takes_experts(self, count: int) -> bool:
        """Whether so many experts are taken."""
        in_range = self.min_experts <= count <= self.max_experts and count % self.experts_multiple == 0
        return in_range and not (self.experts_power_of_two and count & (count - 1))

    def numbers_of_experts(self, known: Sequence[int]) -> list[int]:
        """Those of the numbers that are taken; the least that is, where none of them is."""
        least = max(1, -(-self.min_experts // self.experts_multiple)) * self.experts_multiple
        return [count for count in known if self.takes_experts(count)] or [least]


#: Fields by which an op's contract stores a number on the way, and what they say where nobody does.
_UNSTORED: Mapping[str, Any] = {"intermediate": "float32", "slot": "none", "rounds": ()}


@dataclass(frozen=True)
class TargetInfo:
    """All the parent knows of a target: told by the worker, which alone loads it."""

    name: str  # op@provider
    op: str
    provider: str
    origin: str = ""  # where the code was found: a file, or package and version
    contract: Contract = field(default_factory=Contract)
    capabilities: Capabilities = field(default_factory=Capabilities)
    clauses: Mapping[str, str] = field(default_factory=dict)  # "check", "check:symptom" or "*" -> where it is promised
    unpromised: Mapping[str, str] = field(default_factory=dict)  # the same, or " @ " and a feature behind it -> why not
    declared: bool = True  # somebody says which contract it keeps; else `contract` is the op's own
    triton: bool = True  # has kernels of Triton's, which are interpreted on a CPU: see targets/reach.py
    narrowed: str = ""  # what it can take, and is not given on this device, for a person

    def choices(self, *stores: str) -> tuple[Contract, ...]:
        """The contracts of which the target keeps one, its `contract` first. Where none is declared, each of `stores`,
        fields of it, may be left out: to round less than the op's contract does needs nobody's word."""
        if self.declared:
            return (self.contract,)
        ways = product(*(dict.fromkeys((getattr(self.contract, name), _UNSTORED[name])) for name in stores))
        return tuple(replace(self.contract, **dict(zip(stores, way, strict=True))) for way in ways)

    def classify(self, check: str, symptom: str = "", features: Iterable[str] = ()) -> tuple[str, str]:
        """(class, clause) of a finding: `contract` where the target's own project promises what the check asks.

        features: what the smallest case still needs. A finding that needs what `unpromised` names is of class
        `robustness`, and the clause says why the project cannot be held to it; so is one that nothing promises.
        """
        keys = (f"{check}:{symptom}", check, "*")
        for feature in features:
            for key in keys:
                if why := self.unpromised.get(f"{key} @ {feature}"):
                    return "robustness", why
        clause = next((self.clauses[key] for key in keys if key in self.clauses), None)
        if clause is not None:
            return "contract", clause
        silent = UNDECLARED if self.silent else ""
        return "robustness", next((self.unpromised[key] for key in keys if key in self.unpromised), silent)

    @property
    def silent(self) -> bool:
        """Says nothing at all of what its project promises, as a kernel under development. (Of those in plain torch,
        there is no project that could.)"""
        return not self.clauses and not self.unpromised and self.provider != "torch"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetInfo:
        return cls(
            name=data["name"],
            op=data["op"],
            provider=data["provider"],
            origin=data["origin"],
            contract=_record(Contract, data["contract"]),
            capabilities=_record(Capabilities, data["capabilities"]),
            clauses=dict(data["clauses"]),
            unpromised=dict(data["unpromised"]),
            declared=data["declared"],
            triton=data["triton"],
            narrowed=data["narrowed"],
        )


_F = TypeVar("_F", bound=Callable[..., Any])

#: Where `declares` leaves what an implementation promises.
DECLARATION = "__moe_fuzz__"


#: Fields that name where a number is stored: in float32, or in the dtype of x.
_STORED = ("gate_up", "activation", "down", "intermediate", "weight_dtype", "weighted_x", "logits", "combine", "factor")

#: What a field may say, where that is one of a few words, or some of them. A misspelt one would silence its check.
_WORDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_STORED, ("float32", "dtype")),
    **dict.fromkeys(("accumulate", "reduce"), ("float32", "dtype", "bfloat16", "float16")),
    "slot": ("dtype", "float32", "none"),
    "sigmoid": ("exp", "tanh", "tanh.approx"),
    "ties": ("any", "lowest_index_first"),
    "padding": PADDING_DIALECTS,
    "padding_weight": ("dialect", "any"),
    "accepts": PADDING_DIALECTS,
    "tail": ("minus_one", "any"),
    "dropped": ("absent", "first"),
    "rounding": ("exact", "near"),
    "nonfinite": ("reference", "any"),
    "scale_padding": ("zero", "any"),
    "rounds": ("sum", "residual", "normed"),
    "sum_order": ("any", "rank"),
    "dtypes": ("float32", "bfloat16", "float16"),
}


def _require_words(*parts: Contract | Capabilities | None) -> None:
    for part in parts:
        for name, value in vars(part).items() if part is not None else ():
            said = f"{type(part).__name__}({name}={value!r})"
            several = isinstance(getattr(type(part), name), tuple)
            if several and isinstance(value, str):
                raise UsageError(f"{said} is a text, and no tuple", f'write {name}=("{value}",)')
            words = _WORDS.get(name, ())
            for word in value if several else (value,):
                if words and word not in words:
                    raise UsageError(f"{said}: {word!r} means nothing here",
                                     f"{name} is {'of ' if several else 'one of '}{', '.join(words)}")  # fmt: skip


def declares(
    contract: Contract | None = None,
    capabilities: Capabilities | None = None,
    clauses: Mapping[str, str] | None = None,
    unpromised: Mapping[str, str] | None = None,
    origin: str = "",
) -> Callable[[_F], _F]:
    """Says what the decorated implementation promises; without it, moe-fuzz assumes as little as the signature shows.
    A contract is declared as a whole: what it does not name is as the class has it, also where numbers are stored.

    clauses: for each check, the sentence of the project's own documentation that promises what the check asks
    (`"*"` for all checks, `"check:symptom"` for one way to break it). A finding of such a check is of class `contract`,
    any other of class `robustness`.
    unpromised: what the project never promised to take, `"ids @ fault:extreme_bias"`: a check, the feature of a case
    that it needs, and why. Such a finding is of class `robustness` whatever the clauses say. Without a feature
    (`"weights"`), it is the reason given where no clause promises what the check asks.
    origin: where the code behind an adapter is from: package and version, or a library's file.
    """

    if contract is not None and not isinstance(contract, Contract):
        raise UsageError("what is declared must be a Contract", "write @declares(contract=Contract(…)), or @declares()")
    _require_words(contract, capabilities)

    def attach(function: _F) -> _F:
        promise = {"contract": contract, "capabilities": capabilities, "clauses": dict(clauses or {}),
                   "unpromised": dict(unpromised or {}), "origin": origin}  # fmt: skip
        setattr(function, DECLARATION, promise)
        return function

    return attach


def _record(kind: type, data: Mapping[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names})
