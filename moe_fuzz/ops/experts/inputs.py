"""The tensors of an experts case: made by a recipe, faults laid, then placed inside memory fences. Worker side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, TypeVar

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case, Scalar
from moe_fuzz.contract import Capabilities
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.faults.align import IdsCanvas
from moe_fuzz.faults.experts import WeightsCanvas, write_padding
from moe_fuzz.fence import Arena
from moe_fuzz.mirror import answers, on_host, uploaded
from moe_fuzz.ops.experts import recipes
from moe_fuzz.ops.experts.space import BROKEN, WEIGHT_FAULT
from moe_fuzz.ops.inputs import Inputs, Lie, Result
from moe_fuzz.reference.align import expert_of_slot

_FINITE = "_moe_fuzz_finite_rows"  # an attribute of x, into which nobody writes once it is made
_BROKEN = "_moe_fuzz_broken"  # an attribute of a weight: the same with a fault in it
_DRAWN_ON_HOST = 1 << 17  # keys of the selection of experts: of more a device takes the largest sooner
_STALE = 62  # the stream of rows that no step of the case has had
_BENIGN = 61  # of what rows could have held instead
_WHOLE = ("noncontiguous", "int32_boundary", "far_columns", "transposed", "misaligned", "int64_ids")  # of no rows


def _no_rows() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.bool)


@dataclass
class ExpertsInputs(Inputs):
    """activation, gate_layout, apply_weight_on_input; x [T, H], w13 [E, 2I, H], w2 [E, H, I], weights and ids [T, k]
    and, where the config has them, expert_map [G], b13, b2."""

    recipe: str = "dense"
    padding: torch.Tensor = field(default_factory=_no_rows)  # bool [T]: rows that are flagged as padding
    ordinary: torch.Tensor = field(default_factory=_no_rows)  # bool [T]: x and weights are as the recipe makes them
    broken: bool = False  # some projections hold NaN or infinities
    turned: tuple[str, ...] = ()  # weights whose columns are packed, and rows are not
    folds: dict[str, int] = field(default_factory=dict)  # of the weights that are not packed: rows between the gaps

    fluid: ClassVar[tuple[str, ...]] = ("x", "weights", "ids")

    @classmethod
    def canvas(cls, x: torch.Tensor, rows: Sequence[int], seed: int, fixed: Mapping[str, torch.Tensor]) -> Canvas:
        """x while its faults are laid; `fixed`: what does not change from step to step."""
        return Canvas("x", x, rows, range(x.shape[1]), seed)

    @property
    def results(self) -> dict[str, Result]:
        return {"y": (tuple(self.plain["x"].shape), self.plain["x"].dtype)}

    @property
    def inter(self) -> int:
        return self.plain["w2"].shape[2]

    @property
    def quantizes(self) -> bool:
        """Whether x, and what lies between the products, are quantized to NVFP4 before they are multiplied."""
        return False

    @property
    def has_factors(self) -> bool:
        """Whether products are multiplied by global scales."""
        return False

    @property
    def finite_weights(self) -> bool:
        """Whether all numbers of the projections are finite, their biases and their global scales."""
        biases = [name for name in ("b13", "b2") if name in self.plain]
        return not self.broken and all(answers([self.plain[name].isfinite().all() for name in biases]))

    @property
    def finite(self) -> bool:
        """Whether all that is multiplied is finite, but for the routing weights."""
        return self.finite_weights and (self.quantizes or bool(self.finite_rows.all()))

    @property
    def finite_rows(self) -> torch.Tensor:
        """bool [T], on the host: where x is finite. It is looked at once, and not where no fault was laid on x."""
        x = self.plain["x"]
        kept = getattr(x, _FINITE, None)
        if kept is None:
            kept = on_host(x.isfinite().all(dim=1))
            setattr(x, _FINITE, kept)
        assert isinstance(kept, torch.Tensor)
        return kept

    def matrix(self, name: str, experts: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """float64 [e, R, C]: the numbers of w13 or w2 of these experts, as they are multiplied."""
        return self.plain[name][experts].double()

    def factor(self, name: str, experts: torch.Tensor) -> torch.Tensor | None:
        """float64 [e, 1, 1]: what these experts' products with w13 or w2 are multiplied by; None: nothing."""
        return None

    @property
    def exact(self) -> bool:
        """Whether the bits of an ordinary row are known."""
        oai = self.options["activation"] == "swiglu_oai"
        return self.recipe in recipes.WHOLE or (self.recipe == "one_hot" and not oai)

    def blank(self) -> ExpertsInputs:
        """Zeros, and distinct experts, which any target takes."""
        ids = self.plain["ids"]
        distinct = torch.arange(ids.shape[1], dtype=ids.dtype, device=ids.device).expand(ids.shape).contiguous()
        zeros = {name: torch.zeros_like(self.plain[name]) for name in ("x", "weights")}
        return self.replace(ids=distinct, **zeros)

    def _place(self, name: str, plain: torch.Tensor, arena: Arena, capabilities: Capabilities) -> torch.Tensor:
        """Fences know gaps between the rows of a matrix. Weights are one of E rows, or of as many as the experts have
        rows together."""
        rows = self.folds.get(name)
        if name in self.turned:
            return super()._place(name, plain.transpose(1, 2).contiguous(), arena, capabilities).transpose(1, 2)
        if rows is None:
            return super()._place(name, plain, arena, capabilities)
        placed = super()._place(name, plain.reshape(rows, -1), arena, capabilities)
        if rows == plain.shape[0]:
            return placed.unflatten(1, plain.shape[1:])
        return placed.unflatten(0, plain.shape[:2])


_Inputs = TypeVar("_Inputs", bound=ExpertsInputs)


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> ExpertsInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    plain = _fixed(case.op, case.seed, tuple(case.config.items()), str(device))
    return filled(ExpertsInputs, case, step_index, device, plain)


def filled(
    kind: type[_Inputs], case: Case, step_index: int, device: torch.device | str, fixed: Mapping[str, torch.Tensor]
) -> _Inputs:
    """The inputs of one step, with projections that are there already and what else does not change."""
    config, step = case.config, case.steps[step_index]
    rows, top_k = list(step.rows), int(config["top_k"])
    options = {"activation": config["activation"], "gate_layout": config["gate_layout"],
               "apply_weight_on_input": config["weight_on_input"]}  # fmt: skip
    options |= {name: config[name] for name in ("scale_layout", "activations") if name in config}
    plain = dict(fixed)
    for fault in step.faults:
        if fault.name in BROKEN:
            plain[fault.tensor] = with_broken(case, fault.name, fault.tensor, plain[fault.tensor])
    stream = case.stream(step_index)
    words = recipes.drawn(case, rows, stream)
    x = kind.canvas(recipes.tokens(case, words, device), rows, case.seed, plain)
    # The routing decision is laid out on the host: it is small, and who judges asks for it again and again.
    weights = WeightsCanvas("weights", recipes.routing_weights(case, words, "cpu"), rows, range(top_k), case.seed)
    there = "cpu" if len(rows) * len(case.experts) <= _DRAWN_ON_HOST else device
    ids = IdsCanvas("ids", on_host(recipes.expert_ids(case, words, there)), rows, range(top_k), case.seed,
                    experts=case.experts)  # fmt: skip
    canvases: dict[str, Canvas] = {"x": x, "weights": weights, "ids": ids}
    for name in ("w13", "w2"):  # only their layout can be a fault
        canvases[name] = Canvas(name, plain[name], range(len(plain[name])), [0], case.seed)
    for name in (name for name in ("b13", "b2", "expert_map") if name in plain):  # and so of these
        table = plain[name] if plain[name].dim() == 2 else plain[name][None]
        canvases[name] = Canvas(name, table, range(len(table)), range(table.shape[1]), case.seed)

    padding = torch.zeros(len(rows), dtype=torch.bool)
    flagged = step.padding.positions(step.rows)
    padding[flagged] = True
    write_padding(str(config["dialect"]), ids, weights, flagged)
    ordinary = torch.ones_like(padding)
    touched = False  # x: by more than another layout
    last: list[int] = []  # rows of a fault that hangs on what the others leave
    for fault in step.faults:
        if fault.tensor not in canvases or fault.name in BROKEN:  # laid already
            continue
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(rows)))
        if fault.name == "stale_rows":
            source = _STALE if fault.stream is None else fault.stream
            x.values[x.at(positions)] = recipes.tokens_of(case, [rows[p] for p in positions], source, device)
        elif fault.name == "nan_dropped":
            last += positions
        elif fault.name in _WHOLE or rows:
            FAULTS[fault.name].lay(canvases[fault.tensor], positions)
            if fault.tensor in ("x", "weights") and fault.name not in _WHOLE:
                ordinary[positions] = False
                touched |= fault.tensor == "x"
    if last:
        expert_map = plain.get("expert_map")
        there_is = None if expert_map is None else on_host(expert_map)
        weights.dropped = expert_of_slot(ids.values, len(plain["w13"]), there_is) < 0
        FAULTS["nan_dropped"].lay(weights, last)

    plain |= {"x": x.values, "weights": uploaded(weights.values, device), "ids": uploaded(ids.values, device)}
    if not touched:  # every recipe gives finite numbers
        setattr(x.values, _FINITE, torch.ones(len(rows), dtype=torch.bool))
    inputs = kind(options, plain, recipe=str(config["recipe"]), padding=uploaded(padding, device),
                  ordinary=uploaded(ordinary, device),
                  broken=any(fault.name == WEIGHT_FAULT for fault in step.faults))  # fmt: skip
    for name, canvas in canvases.items():
        _lay_out(inputs, name, canvas)
    return inputs


def with_broken(case: Case, fault: str, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Biases or projections with a fault in those of some experts, of one at least; the same tensor for all steps of a
    case, since it is a weight."""
    kept = getattr(whole, _BROKEN, None)
    if kept is not None:
        assert isinstance(kept, torch.Tensor)
        return kept
    labels = recipes.shard(case)[0]
    values = whole.flatten(1).clone()
    canvas = Canvas(name, values, labels, range(values.shape[1]), case.seed)
    hit = some_experts(case, name, fault, whole.device, each=1).nonzero().flatten().tolist()
    FAULTS[fault].lay(canvas, hit or [0])
    found = canvas.values.view(whole.shape)
    setattr(whole, _BROKEN, found)
    return found


def some_experts(case: Case, name: str, fault: str, device: torch.device, each: int = 2) -> torch.Tensor:
    """bool [E]: a few of the experts that are here, so that tokens are left that have none of them: of `each` tokens
    about one has one."""
    odds = max(3, each * int(case.config["top_k"]))
    return generator.choice(case.seed, f"{name}/{fault}", recipes.shard(case)[0], [0], odds, device=device)[:, 0] == 0


def joined(steps: Sequence[_Inputs]) -> _Inputs:
    """One call with the tokens of several, one step's after the other's. All else they have in common."""
    one = steps[0]
    whole = one.replace(**{name: torch.cat([step.plain[name] for step in steps]) for name in one.fluid})
    setattr(whole.plain["x"], _FINITE, torch.cat([step.finite_rows for step in steps]))
    padding, ordinary = (torch.cat([getattr(step, name) for step in steps]) for name in ("padding", "ordinary"))
    return replace(whole, padding=padding, ordinary=ordinary)


@lru_cache(maxsize=1)  # steps share their weights, and where these are the same tensors nobody copies them again
def _fixed(op: str, seed: int, config: tuple[tuple[str, Scalar], ...], device: str) -> dict[str, torch.Tensor]:
    case = Case(op, dict(config), (), seed)
    labels, expert_map = recipes.shard(case)
    found = recipes.projections(case, labels, device)
    if expert_map is not None:
        found["expert_map"] = uploaded(expert_map, device)
    return found


_NEAR = 12  # elements between two rows
_MOST_APART = 1 << 24  # between the first and the last: what a guard looks through at each call


def _lay_out(inputs: ExpertsInputs, name: str, canvas: Canvas) -> None:
    if not (canvas.stride_gap or canvas.transposed or canvas.offset):
        return
    tensor, gap = inputs.plain[name], canvas.stride_gap
    if tensor.dim() == 3 and canvas.transposed:
        inputs.turned = (*inputs.turned, name)
        inputs.lies[name] = Lie(0, canvas.offset)
        return
    far = tensor.dim() == 3 and gap > 1 << 16
    if tensor.dim() == 3 and not far:  # an expert's rows stand apart, and they may be many
        gap = min(gap, max(_NEAR, _MOST_APART // max(1, tensor.shape[0] * tensor.shape[1])))
    if tensor.dim() == 1:
        inputs.lies[name] = Lie(0, canvas.offset, 1 + gap)
        return
    # The stride is that of the whole step, also where a check takes fewer rows: they are rows of the same view.
    column_stride = max(1, len(canvas.rows) + canvas.stride_gap) if canvas.transposed else 0
    inputs.lies[name] = Lie(0 if canvas.transposed else gap, canvas.offset, column_stride)
    if tensor.dim() == 3:
        inputs.folds[name] = tensor.shape[0] if far else tensor.shape[0] * tensor.shape[1]


def elements(case: Case, step_index: int) -> int:
    """Microseconds that a host takes to make and judge a step, fitted to measurements: a number of what a slot holds
    goes through a hundred operations, a weight through a few; one that is decoded, through more."""
    config = case.config
    hidden, inter = int(config["hidden"]), int(config["intermediate"])
    weights = 3 * len(case.experts) * hidden * inter
    slots = case.steps[step_index].tokens * int(config["top_k"]) * (hidden + inter)
    return weights // 24 + slots // 6 if "activations" in config else weights // 128 + slots // 8


def benign_rows(
    case: Case, step_index: int, positions: list[int], device: torch.device | str = "cpu"
) -> torch.Tensor:  # fmt: skip
    """Ordinary x [len(positions), H] for the rows at these positions: what padding could have held instead."""
    rows = list(case.steps[step_index].rows)
    return recipes.tokens_of(case, [rows[p] for p in positions], _BENIGN, device)
