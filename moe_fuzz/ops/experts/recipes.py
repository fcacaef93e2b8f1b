"""How the values of an experts case are made. Worker side; free of Triton.

dense: iid, the density of a tent. ladder: a geometric ladder of magnitudes of both signs: what cancels, and what is
lost beside it. integer: every partial sum is an integer times a power of two, far below 2^24 of them, so any order of
summation gives the same bits. one_hot: each row of a projection reads one column, so each result names its source.

fine: integer, but with routing weights of 13 bits, or where a bias is float32 with that of as many: what loses bits
of them on the way is off by less than a step of the result, and shows where that is rounded.
cancel: integer, but with two large numbers of either sign in each row of a projection, far apart, that cancel to the
last bit: a sum has 13 bits on its way, and few at its end. What is kept of it in 16 bits from step to step, or of its
parts, is then off by whole steps of the result. For it columns of x are the same from either end, and so are rows of
w13 and their biases: both numbers are multiplied by the same.
curve: one_hot, but with gates from -15 to 15, where an activation is a curve. A gate is that of all experts, and each
column of y reads the same one of all: so no sum hides what is off by parts of a small result.

All but dense, ladder and curve are exact because column 0 of x is a constant and a gate row reads it alone: the gate is
32 (or 64 with its bias), where silu(g) = gelu(g) = g in float32. No gate makes swiglu_oai exact: there one_hot is
judged within its bound, as curve is everywhere.

Each value hangs on the labels of its expert and its row, of its column, and on nothing else. What a projection of
one_hot, curve or cancel reads also hangs on the number of columns, where the column would be past the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.mirror import uploaded
from moe_fuzz.ops.experts import draw
from moe_fuzz.ops.experts.fields import bias_dtypes

Device = torch.device | str
Tensors = dict[str, torch.Tensor]

WHOLE = ("integer", "fine", "cancel")  # of whole numbers
EXACT = (*WHOLE, "one_hot")
WRITTEN = (*EXACT, "curve")  # whose numbers are few, and in NVFP4, too
_GATE = 32.0
_CANCELLED = {"w13/up": 4096.0, "w2": 128.0}  # h is a multiple of 32
_E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NONZERO = {"relu2": 8}  # about how many of the first columns a row of an integer projection reads; each later column
_NONZERO_DEFAULT = 64  # c is read with the probability of that over c: what is summed up stays small for any width


# ---- tables ---------------------------------------------------------------------------------------------------------


@cache
def _table(kind: str, exponent: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 2^16 values that a draw takes one of, times 2^exponent."""
    at = torch.arange(draw.SIZE, dtype=torch.float64)
    values = _KINDS[kind](at) * 2.0**exponent
    return values.to(dtype).to(device)


def _tent(at: torch.Tensor) -> torch.Tensor:
    """In (-1, 1): the quantiles of the density 1 - |v|. Square roots are rounded correctly everywhere."""
    u = (at + 0.5) / draw.SIZE
    return torch.where(u < 0.5, (2 * u).sqrt() - 1, 1 - (2 - 2 * u).sqrt())


def _rungs(least: int, most: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Both signs, every power of two from 2^least to 2^most, eight mantissas."""

    def values(at: torch.Tensor) -> torch.Tensor:
        index = at.long()
        sign, mantissa, power = 1 - 2 * (index & 1), (index >> 1) & 7, (index >> 4) % (most - least + 1) + least
        return sign * (1 + mantissa / 8) * torch.exp2(power.double())

    return values


def _wide(least: int, most: int, signed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of 13 bits, the last of them 1, from 2^least to 2^(most + 1). One in four is a power of two: what else is wrong
    shows there as well. A sum with one of 13 bits is never half way between two numbers of fewer."""

    def values(at: torch.Tensor) -> torch.Tensor:
        index = at.long()
        mantissa = torch.where(index & 3 == 0, 0, (index >> 3) & 0xFFF | 1)
        power = (index >> 3) % (most - least + 1) + least
        sign = 1 - 2 * ((index >> 2) & 1) if signed else 1
        return sign * (1 + mantissa / (1 << 12)) * torch.exp2(power.double())

    return values


def _short(least: int, most: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of both signs and 4 bits, as E4M3 has them, from 2^least up to 2^(most + 1)."""

    def values(at: torch.Tensor) -> torch.Tensor:
        index = at.long()
        power = (index >> 4) % (most - least + 1) + least
        return (1 - 2 * (index & 1)) * (1 + ((index >> 1) & 7) / 8) * torch.exp2(power.double())

    return values


def _among(*values: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda at: torch.tensor(values, dtype=torch.float64)[(at * len(values) / draw.SIZE).long()]


_KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tent": _tent,
    "share": lambda at: (at + 1) / draw.SIZE,  # (0, 1]
    "x_ladder": _rungs(-14, 14),
    "w_ladder": _rungs(-14, 6),
    "narrow_ladder": _rungs(-9, 0),  # of float16, whose exponents are few
    "unit": _among(-1, 0, 1),
    "fives": _among(*(v / 32 for v in (-2, -1, 0, 1, 2))),
    "small": _among(-1, 0, 1, 2),
    "eights": _among(*range(-8, 9)),
    "gate": _among(0, _GATE),
    "bent": _short(-4, 1),  # gates of `curve`, over 4: from 1/4 to 15
    "bent_bias": _among(-0.5, 0, 0.25, 0.5),
    "tiny": _among(*(2.0**power for power in range(-14, -8)), -(2.0**-10)),
    "e2m1": _among(*(sign * v for v in _E2M1 for sign in (1, -1))),
    "halves": _among(-0.5, 0, 0.5, 1),
    "powers": _among(*(2.0**power for power in range(-3, 4)), -1.0),
    "fine": _wide(-2, 1, False),
    "narrow_fine": _wide(-3, -2, False),
    "fine_small": _wide(1, 1, True),
    "fine_large": _wide(4, 5, True),
    "narrow_powers": _among(*(2.0**power for power in range(-3, 1)), -0.5),
    "input_powers": _among(1, 2, 4),
    "narrow_input_powers": _among(1, 2),
}


def _look_up(
    kind: str, exponent: int, dtype: torch.dtype, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    return draw.looked_up(_table(kind, exponent, dtype, rows.device), rows, columns)


# ---- what changes from step to step ---------------------------------------------------------------------------------


def drawn(case: Case, rows: Sequence[int], stream: int) -> draw.Drawn:
    """What `tokens`, `routing_weights` and `expert_ids` of these row labels hang on."""
    return draw.Drawn(case.seed, _x(case, rows, stream),
                      ("weights", rows, [0], range(int(case.config["top_k"])), stream),
                      ("ids", rows, [0], tuple(case.experts), stream))  # fmt: skip


def _x(case: Case, rows: Sequence[int], stream: int) -> draw.Wanted:
    return "x", rows, [0], range(int(case.config["hidden"])), stream


def tokens_of(case: Case, rows: Sequence[int], stream: int, device: Device) -> torch.Tensor:
    """`tokens` of these row labels."""
    return tokens(case, draw.Drawn(case.seed, _x(case, rows, stream)), device)


def tokens(case: Case, words: draw.Drawn, device: Device) -> torch.Tensor:
    """x [R, H], before any fault."""
    recipe, dtype, hidden = str(case.config["recipe"]), _dtype(case), int(case.config["hidden"])
    row, column = words.lines("x", device)
    if recipe == "dense":
        return _look_up("tent", int(case.config["magnitude"]), dtype, row, column)
    if recipe == "ladder":
        return _look_up("x_ladder" if dtype == torch.bfloat16 else "narrow_ladder", 0, dtype, row, column)
    x = _look_up("unit" if recipe in WHOLE else "e2m1", 0, dtype, row, column)
    if recipe not in WHOLE or case.config.get("activations") == "nvfp4":
        # A 6 in each 16 columns, under which NVFP4 loses nothing of the others.
        at = torch.arange(hidden, device=x.device)
        room = 8 if recipe == "cancel" else 16  # the block in the middle is mirrored itself
        largest = torch.where(at < 16, 1 + (row[:, None] & 0xFFFF) % (room - 1), (row[:, None] >> 16) & (room - 1))
        x = torch.where(at % 16 == largest, torch.where(x < 0, -6.0, 6.0).to(dtype), x)
    x[:, 0] = 1.0 if recipe in WHOLE else 4.0
    return _mirrored(x) if recipe == "cancel" else x


def routing_weights(case: Case, words: draw.Drawn, device: Device) -> torch.Tensor:
    """weights float32 [R, k], before any fault."""
    recipe, narrow = str(case.config["recipe"]), _dtype(case) == torch.float16
    row, column = words.lines("weights", device)
    kind = "share"
    if recipe in EXACT:
        plain = "fine" if recipe == "fine" and not _fine_biases(case) else "powers"
        kind = ("narrow_" if narrow else "") + ("input_powers" if case.config["weight_on_input"] else plain)
    return _look_up(kind, 0, torch.float32, row, column)


def expert_ids(case: Case, words: draw.Drawn, device: Device) -> torch.Tensor:
    """ids int32 [R, k]: k distinct experts a row, those with the largest keys.

    So a row goes on naming the same experts when others, which it did not name, are taken away.
    """
    row, column = words.lines("ids", device)
    key = draw.mixed(row, column).long() << 16 | torch.arange(len(column), device=row.device)  # no two are equal
    return key.topk(int(case.config["top_k"]), dim=1).indices.int()


# ---- weights --------------------------------------------------------------------------------------------------------


def projections(case: Case, labels: Sequence[int], device: Device) -> Tensors:
    """w13 [E, 2I, H] (relu2: [E, I, H]), w2 [E, H, I] and, where there are, b13 and b2 of the experts of these labels,
    in this order."""
    maker = Maker(case, labels, device)
    gated = case.config["activation"] != "relu2"
    up = maker.up()
    return {"w13": maker.arranged(maker.gate(), up) if gated else up, "w2": maker.down(), **biases(maker)}


def biases(maker: Maker) -> Tensors:
    """b13 and b2, where the case has them."""
    gate, up, down = (maker.bias(name) for name in ("b13/gate", "b13/up", "b2"))
    found: Tensors = {}
    if up is not None:
        assert gate is not None
        found["b13"] = maker.arranged(gate, up) if maker.case.config["activation"] != "relu2" else up
    return found | ({"b2": down} if down is not None else {})


class Maker:
    """The projections of one case, or those of these names."""

    together: ClassVar[int] = 1  # columns that share a scale, beside which a large number leaves no small one

    def __init__(
        self, case: Case, labels: Sequence[int], device: Device, names: Sequence[str] = ("w13/gate", "w13/up", "w2")
    ) -> None:
        self.case, self.labels, self.device = case, list(labels), device
        self.recipe, self.dtype = str(case.config["recipe"]), _dtype(case)
        self.hidden, self.inter = int(case.config["hidden"]), int(case.config["intermediate"])
        self.scale = int(case.config["weight_scale"]) if self.recipe == "dense" else 0
        self.drawn = draw.Drawn(case.seed, *self._wanted(names))

    def sides(self, name: str) -> tuple[int, int]:
        """Rows and columns of an expert's projection."""
        return (self.hidden, self.inter) if name == "w2" else (self.inter, self.hidden)

    def _wanted(self, names: Sequence[str]) -> list[draw.Wanted]:
        """What hangs on words of the generator."""
        # Of few numbers the gate is one column, the same for all experts, and relu2 has none.
        no_gate = self.recipe in WRITTEN or self.case.config["activation"] == "relu2"
        sides = {name: self.sides(name) for name in names}
        found: list[draw.Wanted] = [(name, self.labels, range(rows), range(columns), 0)
                                    for name, (rows, columns) in sides.items()
                                    if not (no_gate and name == "w13/gate")]  # fmt: skip
        if self.recipe == "curve":  # what all experts have in common
            found += [(f"{name}/common", [0], range(rows), [0], 0)
                      for name, (rows, _) in sides.items() if name != "w13/up"]  # fmt: skip
        if "w13/up" in names:
            lengths = {"b13/gate": self.inter, "b13/up": self.inter, "b2": self.hidden}
            found += [(name, self.labels, [0], range(length), 0) for name, length in lengths.items()
                      if self._bias_dtype(name) is not None]  # fmt: skip
        return found

    def _bias_dtype(self, name: str) -> torch.dtype | None:
        """None: the case has no such bias."""
        said = bias_dtypes(self.case.config["bias"])[name == "b2"]
        return None if said == "none" else torch.float32 if said == "float32" else self.dtype

    def gate(self) -> torch.Tensor:  # [E, I, H]
        if self.recipe not in WRITTEN:
            return self._free("w13/gate")
        gate = torch.zeros((len(self.labels), self.inter, self.hidden), dtype=self.dtype, device=self.device)
        if self.recipe == "curve":
            gate[:, :, 0] = _look_up("bent", 0, self.dtype, *self.drawn.lines("w13/gate/common", self.device))[:, 0]
        else:
            gate[:, :, 0] = _GATE if self.recipe in WHOLE else _GATE / 4  # x there: 1, and 4
        return gate

    def up(self) -> torch.Tensor:  # [E, I, H]
        if self.recipe not in WRITTEN:
            return self._free("w13/up")
        if self.recipe not in WHOLE:
            return self._one_hot("w13/up", self._powers())
        word = draw.mixed(*self.drawn.lines("w13/up", self.device))
        reads = _NONZERO.get(str(self.case.config["activation"]), _NONZERO_DEFAULT)
        odds = (reads << 15) // torch.arange(1, self.hidden + 1, device=word.device)
        up = self._shaped(((word >> 1) < odds) * (1 - 2 * (word & 1)), self.inter).to(self.dtype)
        return _mirrored(self._cancelling("w13/up", up), 1) if self.recipe == "cancel" else up

    def down(self) -> torch.Tensor:  # [E, H, I]
        if self.recipe in WHOLE:
            down = self._table("w2", "fives")
            return self._cancelling("w2", down) if self.recipe == "cancel" else down
        if self.recipe == "curve":
            return self._one_hot("w2", self._powers() / 16, "w2/common")
        if self.recipe == "one_hot":
            return self._one_hot("w2", torch.full((len(self.labels),), 1 / 32, device=self.device))
        return self._free("w2")

    def _powers(self) -> torch.Tensor:
        """float32 [E]: one of four powers of two for each expert."""
        return uploaded(torch.tensor([2.0 ** (label * 5 % 4 - 1) for label in self.labels]), self.device)

    def bias(self, name: str) -> torch.Tensor | None:  # gate and up [E, I], down [E, H]
        dtype = self._bias_dtype(name)
        if dtype is None:
            return None
        kinds = {"integer": ("gate", "small", "eights"), "one_hot": ("gate", "halves", "halves"),
                 "curve": ("bent_bias", "halves", "tiny")}  # a larger one would hide a small result
        kinds["fine"] = kinds["cancel"] = kinds["integer"]
        if dtype == torch.float32:  # h in float16 has so many bits that some would be half way; a square has too many
            plain = self.dtype == torch.float16 or self.case.config["activation"] == "relu2"
            kinds["fine"] = ("gate", "small" if plain else "fine_small", "fine_large")
        kind = dict(zip(("b13/gate", "b13/up", "b2"), kinds.get(self.recipe, ("tent",) * 3), strict=True))[name]
        exponent = self._bias_exponent(name) if self.recipe == "dense" else 0
        bias = _look_up(kind, exponent, dtype, *self.drawn.lines(name, self.device))
        return _mirrored(bias) if self.recipe == "cancel" and name != "b2" else bias

    def _bias_exponent(self, name: str) -> int:
        """Of the size of what they are added to, or so. Lost beside it, no check would see a bias; and where it is all
        there is, every token has the same y, and roundings are no random numbers."""
        product = int(self.case.config["magnitude"]) + self.scale
        if name != "b2":
            return product
        oai = self.case.config["activation"] == "swiglu_oai"  # about half of the gate, clamped
        return self.scale + (min(product, 5) if oai else 2 * product)

    def arranged(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both halves as `gate_layout` has them: [E, 2I, …]."""
        layout = self.case.config["gate_layout"]
        if layout == "interleaved":
            return torch.stack([gate, up], dim=2).flatten(1, 2)
        return torch.cat([gate, up] if layout == "first" else [up, gate], dim=1)

    def _free(self, name: str) -> torch.Tensor:
        if self.recipe == "dense":
            return self._table(name, "tent")
        return self._table(name, "w_ladder" if self.dtype == torch.bfloat16 else "narrow_ladder")

    def _table(self, name: str, kind: str) -> torch.Tensor:
        values = _look_up(kind, self.scale, self.dtype, *self.drawn.lines(name, self.device))
        return self._shaped(values, self.sides(name)[0])

    def _one_hot(self, name: str, power: torch.Tensor, reads: str = "") -> torch.Tensor:
        """One column a row: power of the expert, of either sign. A column past the last is cut down to one before.
        reads: the words that say which, where those of `name` do not."""
        rows, columns = self.sides(name)
        word = self.drawn.rows(name, self.device).view(-1, rows).long()  # [E, rows]
        which = self.drawn.rows(reads, self.device).long().expand(word.shape) if reads else word
        room = 1 << max(0, columns - 1).bit_length()
        column = (which >> 1) & (room - 1)
        column = torch.where(column < columns, column, column & (room // 2 - 1))
        value = ((1 - 2 * (word & 1)) * power[:, None]).to(self.dtype)
        out = torch.zeros((len(self.labels), rows, columns), dtype=self.dtype, device=self.device)
        return out.scatter_(2, column[:, :, None], value[:, :, None])

    def _cancelling(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """With two large numbers in each row that are multiplied by the same and cancel, where small ones are left."""
        rows, columns = self.sides(name)
        if columns < 4 * self.together:
            return values
        word = self.drawn.rows(name, self.device).view(-1, rows, 1).long()  # [E, rows, 1]
        at, sign = (word >> 1) % (columns // 2), 1 - 2 * (word & 1)
        column = torch.arange(columns, device=word.device)
        inward = torch.minimum(column, columns - 1 - column)  # from either end
        large = torch.where(column == inward, sign, -sign) * _CANCELLED[name]
        values = values.masked_fill(inward // self.together == at // self.together, 0.0)
        return torch.where(inward == at, large.to(values.dtype), values)

    def _shaped(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        return values.view(len(self.labels), rows, values.shape[-1])


def _mirrored(values: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """What stands left of the middle of this dimension, from the right, too."""
    at = torch.arange(values.shape[dim], device=values.device)
    return values.index_select(dim, torch.minimum(at, at.flip(0)))


def _fine_biases(case: Case) -> bool:
    """Whether it is the biases of a `fine` case that have many bits: those of both, multiplied, float32 has not."""
    return "float32" in bias_dtypes(case.config["bias"])


def _dtype(case: Case) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[str(case.config["dtype"])]


def shard(case: Case) -> tuple[list[int], torch.Tensor | None]:
    """The labels of the experts that are here, in the order of their weights, and the map int32 [G] from ids to these.

    shard: those of one rank of several, in ascending order; the others are at -1. permuted: all of them in any order.
    """
    labels, kind = list(case.experts), str(case.config["expert_map"])
    if kind == "none":
        return labels, None
    order = generator.words(case.seed, "expert_map", [0], labels)[0]  # [G]
    if kind == "permuted":
        placed = order.argsort(stable=True)
        return [labels[at] for at in placed.tolist()], placed.argsort(stable=True).int()
    ranks = (2, 4, 8, 16)[int(generator.choice(case.seed, "expert_map/ranks", [0], [0], 4))]
    here = generator.choice(case.seed, "expert_map/rank", [0], labels, ranks)[0] == 0
    here[0] |= not here.any()  # a rank has one at least
    return [label for label, kept in zip(labels, here.tolist(), strict=True) if kept], torch.where(
        here, here.cumsum(0) - 1, -1
    ).int()
