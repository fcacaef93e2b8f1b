"""The distribution of the errors inside the bound: on random data they are as large as roundings are, and no larger.

A bound must allow every rounding to be as bad as it can. On random data roundings are independent and of both signs, so
a sum over many values tells a weight that is 1.004 times too large from a rounding. Derived in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_fuzz.checks import check
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.verdict import Violation

ERROR = 1e-9  # the chance that a correct target is accused, a case
_KINDS = 6  # of tests, which share it
_Place = Callable[[int], tuple[tuple[int, ...], str]]  # by its number: coordinates, and a name for a person


@check("experts", "statistical", parity=True)
def statistical(seen: ExpertsObservation) -> list[Violation]:
    """Mean z² over all, by token, by column, by expert and by both of these, and the largest |z|, against χ² thresholds
    at a family-wise error of 1e-9. z is the error over its standard deviation."""
    tokens = (seen.random & seen.judged.all(dim=1)).nonzero().flatten()
    if not len(tokens):
        return []
    numbers = seen.numbers
    z = (seen.y[tokens] - numbers.value[tokens]) / numbers.variance[tokens].sqrt()  # [R, H]
    share = 0.0
    for symptom, name, statistic, threshold in _tests(seen, tokens, z):
        used = (statistic - 1) / (threshold - 1)
        if bool((used > 1).any()):
            at = int(used.argmax())
            got, most = float(statistic.flatten()[at]), float(threshold.expand_as(statistic).flatten()[at])
            where, text = name(at)
            return [Violation("statistical", symptom, f"{text}: the mean of z² is {got:.4g}", "y", where,
                              f"at most {most:.4g}", f"{got:.4g}", float(used.max()))]  # fmt: skip
        share = max(share, float(used.max()))
    seen.budget["statistical"] = share
    return []


def _tests(seen: ExpertsObservation, tokens: Tensor, z: Tensor) -> Iterator[tuple[str, _Place, Tensor, Tensor]]:
    """symptom, a place by its number, mean z² at each place, and the threshold there."""
    (count, hidden), square = z.shape, z.square()
    free, peak = _freedom(seen, tokens, hidden)
    rows = tokens.tolist()
    by_row = square.mean(dim=1)
    yield "all", lambda at: ((), "all tokens"), by_row.mean()[None], _threshold(
        count**2 / (1 / free).sum()[None], peak.amax() / count, 1)  # fmt: skip
    yield "token", lambda at: ((rows[at],), f"token {rows[at]}"), by_row, _threshold(free, peak, count)
    one = torch.ones(1, dtype=torch.float64, device=z.device)
    yield "column", lambda at: ((0, at), f"column {at}"), square.mean(dim=0), _threshold(
        one * count, one / count, hidden)  # fmt: skip

    used, local = seen.expert[tokens].unique(), seen.expert[tokens]
    used = used[used >= 0]
    member = (local[None] == used[:, None, None]).any(dim=2).double()  # [E, R]
    size = member.sum(dim=1)
    names = used.tolist()
    yield "expert", lambda at: ((), f"tokens of expert {names[at]}"), member @ by_row / size, _threshold(
        size.square() / (member @ (1 / free)), peak.amax() / size, len(names))  # fmt: skip
    cells = member @ square / size[:, None]  # [E, H]
    yield "expert-column", lambda at: ((0, at % hidden), f"column {at % hidden} of expert {names[at // hidden]}"), (
        cells), _threshold(size, 1 / size, cells.numel())[:, None]  # fmt: skip

    def element(at: int) -> tuple[tuple[int, ...], str]:
        where = rows[at // hidden], at % hidden
        return where, f"token {where[0]}, column {where[1]}"

    yield "element", element, square, _threshold(one, one, z.numel())


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


def _threshold(free: Tensor, peak: Tensor, count: int) -> Tensor:
    """What the mean of Σ λ g², Σ λ = 1, exceeds with a chance of ERROR / (_KINDS * count) at most: free is 1 / Σ λ²,
    peak the largest λ. (Laurent and Massart, Annals of Statistics 28, 2000, lemma 1. Sums of uniform errors have a
    lighter tail than this one's normal ones.)"""
    x = math.log(_KINDS * count / ERROR)
    return 1 + 2 * (x / free).sqrt() + 2 * x * peak
