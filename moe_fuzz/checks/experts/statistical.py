"""The distribution of the errors inside the bound: on random data they are as large as roundings are, and no larger.

A bound must allow every rounding to be as bad as it can. On random data roundings are independent and of both signs, so
a sum over many values tells a weight that is 1.004 times too large from a rounding. Derived in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.checks import check
from moe_fuzz.checks.experts.declaration import declaration
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.checks.experts.rounding import gamma, unit
from moe_fuzz.mirror import answers, on_host, rows_of, uploaded
from moe_fuzz.verdict import Violation

ERROR = 1e-9  # the chance that a correct target is accused, a case
_KINDS = 11  # of tests, which share it
_MOSTLY = 0.9  # of the elements: far fewer are the same by chance, or where errors are larger than they should be
_MODEL = 1.02  # the variances themselves are taken to be right to 2 %, however many values there are
_Place = Callable[[int], tuple[tuple[int, ...], str]]  # by its number: coordinates, and a name for a person


@dataclass(frozen=True)
class _Test:
    symptom: str
    place: _Place
    got: Tensor  # at each place
    most: Tensor
    words: str  # what `got` is
    usual: float  # of a correct target

    def used(self) -> tuple[Tensor, Tensor, Tensor]:
        """The share of what is allowed, `got` and `most`, at each place, flat."""
        got, most = self.got.flatten(), self.most.expand_as(self.got).flatten()
        return (got - self.usual) / (most - self.usual), got, most


@check("experts", "statistical", parity=True)
def statistical(seen: ExpertsObservation) -> list[Violation]:
    """Mean z² and the share of y that the errors have in common, over all, by token, by column, by expert, and the
    largest |z|, against thresholds at a family-wise error of 1e-9. z is the error over its standard deviation."""
    if not on_host(seen.random).any():
        return []
    usable = on_host(seen.judged.all(dim=1) & ~seen.numbers.open) & on_host(seen.random)
    tokens = uploaded(usable.nonzero().flatten(), seen.x.device)
    if not len(tokens):
        return []
    value = seen.numbers.value
    alone = torch.ones_like(value[:1, :1]).expand_as(value)
    for shared in (lambda: alone, lambda: seen.shared):  # errors that others have as well may be larger: if need be
        tests = [(test, *test.used()) for test in _Tests(seen, tokens, value, shared()).all()]
        largest = answers([used.max() for _, used, _, _ in tests])
        if all(one <= 1 for one in largest):  # not where one is NaN
            seen.budget["statistical"] = max(0.0, *largest)
            return []
    share, from_rounded = 0.0, None
    for number, (test, used, got, most) in enumerate(tests):
        if bool((used > 1).any()) and (right := _mostly_rounded(seen, tokens)) is not None:
            from_rounded = from_rounded or [test.used()[0] for test in _Tests(seen, tokens, right, seen.shared).all()]
            used = torch.minimum(used, from_rounded[number])
        at = int(used.argmax())
        if float(used[at]) > 1:
            where, text = test.place(at)
            message = f"{text}: {test.words} is {float(got[at]):.4g}, more than roundings make it"
            message += declaration(seen)
            return [Violation("statistical", test.symptom, message, "y", where, f"at most {float(most[at]):.4g}",
                              f"{float(got[at]):.4g}", float(used[at]))]  # fmt: skip
        share = max(share, float(used[at]))
    seen.budget["statistical"] = share
    return []


def _mostly_rounded(seen: ExpertsObservation, tokens: Tensor) -> Tensor | None:
    """The answer of `ExpertsObservation.rounded` that this one has the bits of, but for a few: where its errors are not
    those of random numbers, then neither are those of a right answer, and they are to be measured from there."""
    alike = ((seen.y[tokens] == right[tokens]).double().mean() for right in seen.rounded)
    return next((right for right, share in zip(seen.rounded, alike, strict=True) if float(share) > _MOSTLY), None)


class _Tests:
    def __init__(self, seen: ExpertsObservation, tokens: Tensor, right: Tensor, shared: Tensor) -> None:
        """tokens: int64 [R], those that are judged. right: float64 [T, H], what errors are the distance from. shared:
        [T, H], for how many tokens each counts."""
        self.seen, self.tokens = seen, tokens
        numbers = seen.numbers
        sigma = numbers.variance[tokens].sqrt()
        self.z = (seen.y[tokens] - right[tokens]) / sigma  # [R, H]
        self.value = numbers.value[tokens] / sigma
        self.count, self.hidden = self.z.shape
        self.shared = shared[tokens]  # [R, H]
        self.free, self.peak = _freedom(seen, tokens, self.hidden)
        self.rows = on_host(tokens).tolist()
        local = rows_of(seen.expert, tokens)
        used = on_host(local).unique()
        self.used = uploaded(used[used >= 0], tokens.device)
        self.member = (local[None] == self.used[:, None, None]).any(dim=2).double()  # [E, R]

    def all(self) -> Iterator[_Test]:
        yield from self._squares()
        yield from self._shares()

    # ---- places -----------------------------------------------------------------------------------------------------

    def _everywhere(self, at: int) -> tuple[tuple[int, ...], str]:
        return (), "all tokens"

    def _token(self, at: int) -> tuple[tuple[int, ...], str]:
        return (self.rows[at],), f"token {self.rows[at]}"

    def _column(self, at: int) -> tuple[tuple[int, ...], str]:
        return (0, at), f"column {at}"

    def _expert(self, at: int) -> tuple[tuple[int, ...], str]:
        return (), f"tokens of expert {int(self.used[at])}"

    def _cell(self, at: int) -> tuple[tuple[int, ...], str]:
        return (0, at % self.hidden), f"column {at % self.hidden}, tokens of expert {int(self.used[at // self.hidden])}"

    def _element(self, at: int) -> tuple[tuple[int, ...], str]:
        where = self.rows[at // self.hidden], at % self.hidden
        return where, f"token {where[0]}, column {where[1]}"

    # ---- mean z² ----------------------------------------------------------------------------------------------------

    def _squares(self) -> Iterator[_Test]:
        square, words = self.z.square(), "the mean of z²"
        by_row = square.mean(dim=1)
        one, wide = torch.ones_like(self.free[:1]), self.peak.amax() * self.shared.amax()
        each, most = self.shared.mean(dim=1) / self.free, self.shared.amax(dim=0)  # [R], [H]

        def test(symptom: str, place: _Place, got: Tensor, free: Tensor, peak: Tensor) -> _Test:
            x = _log_chance(got.numel())
            limit = _MODEL * (1 + 2 * (x / free).sqrt() + 2 * x * peak)
            return _Test(symptom, place, got, limit, words, 1.0)

        whole = self.count**2 / each.sum()[None]
        yield test("all", self._everywhere, by_row.mean()[None], whole, wide / self.count)
        yield test("token", self._token, by_row, self.free, self.peak)
        free = self.count**2 / self.shared.sum(dim=0)
        yield test("column", self._column, square.mean(dim=0), free, most / self.count)
        size = self.member.sum(dim=1)
        free = size.square() / (self.member @ each)
        yield test("expert", self._expert, self.member @ by_row / size, free, wide / size)
        cells = self.member @ square / size[:, None]  # [E, H]
        free = size.square()[:, None] / (self.member @ self.shared)
        yield test("expert-column", self._cell, cells, free, most / size[:, None])
        yield test("element", self._element, square, one, one)

    # ---- what the errors have in common with y ----------------------------------------------------------------------

    def _shares(self) -> Iterator[_Test]:
        """r = Σ z v / Σ v², v being y over its deviation: how much too large y is, by least squares.

        The variance of Σ z v over a row is the largest eigenvalue of z's correlations times Σ v² at most. Beside it a
        share is allowed that roundings have themselves: what rounds to a number lies on both sides of it, and not
        equally often.
        """
        product, square = self.z * self.value, self.value.square()  # [R, H]
        inter = self.seen.inputs.plain["w2"].shape[2]
        bias = (2 * unit(self.seen.x.dtype)) ** 2
        bias += 4 * gamma(self.hidden / 16 + 16) + 2 * gamma(inter / 16 + 16)  # where tensor cores cut off
        by_row, weight = product.sum(dim=1), square.sum(dim=1)
        variance = weight * self.peak * self.hidden
        together = (square * self.shared).sum(dim=1) * self.peak * self.hidden
        words = "the share of y in its errors"

        def test(symptom: str, place: _Place, got: Tensor, variance: Tensor, weight: Tensor) -> _Test:
            weight = weight.clamp(min=1e-300)
            x = _log_chance(2 * got.numel())  # of either sign
            most = (2 * x * _MODEL * variance).sqrt() / weight + bias
            return _Test(symptom, place, got.abs() / weight, most, words, 0.0)

        yield test("scale", self._everywhere, by_row.sum()[None], together.sum()[None], weight.sum()[None])
        yield test("token-scale", self._token, by_row, variance, weight)
        columns = square.sum(dim=0)
        yield test("column-scale", self._column, product.sum(dim=0), (square * self.shared).sum(dim=0), columns)
        of_expert = self.member @ torch.stack([by_row, together, weight], dim=1)
        yield test("expert-scale", self._expert, *of_expert.unbind(dim=1))
        excess = (by_row.abs() - bias * weight).clamp(min=0.0).square() / variance.clamp(min=1e-300)
        x = _log_chance(1)
        alike = self.shared.mean(dim=1)
        free, peak = self.count**2 / alike.sum(), alike.amax() / self.count
        most = _MODEL * (1 + 2 * (x / free).sqrt() + 2 * x * peak)
        yield _Test("token-scales", self._everywhere, excess.mean()[None], most[None],
                    "the mean square of tokens' shares of y in their errors", 0.0)  # fmt: skip


def _freedom(seen: ExpertsObservation, tokens: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Of each token's mean z² over columns: the degrees of freedom, and the largest share of one of them.

    The roundings of h are fewer than the columns, and reach all of them: n = (Σs)² / Σs² counts them, s their
    variances. With iid weights the eigenvalues of the columns' correlations have the mean 1, the mean square
    1 + H / n, and the largest is (1 + √(H / n))², or that of a single rounding that outweighs the others.
    """
    total, squares = seen.numbers.spread[tokens].unbind(dim=1)
    total, squares = total.clamp(min=1e-300), squares.clamp(min=1e-300)
    n = (total.square() / squares).clamp(min=1.0)
    free = hidden / (1 + hidden / n)
    largest = (1 + (hidden / n).sqrt()).square() + hidden * seen.numbers.largest[tokens] / total
    return free, (largest / hidden).clamp(max=1.0)


def _log_chance(count: int) -> float:
    """-ln of the chance that one of `count` tests of a kind may have.

    Of Σ λ g², Σ λ = 1, it is exceeded at 1 + 2 √(x Σλ²) + 2 x max λ at most (Laurent and Massart, Annals of Statistics
    28, 2000, lemma 1). Sums of uniform errors have a lighter tail than those of the normal g.
    """
    return math.log(_KINDS * count / ERROR)
