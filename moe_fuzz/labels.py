"""Labels: a sorted set of row or expert numbers, written the way cpusets are: `0-6,9`.

A case names its rows and experts by label, and every value of a tensor is a function of the labels, not of the
position. So when a row or an expert is taken away, what is left keeps its values.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, starmap

from moe_fuzz.lazy import cached

MAX_LABEL = 2**31 - 1
_SPAN = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")


@dataclass(frozen=True)
class Labels:
    """An immutable sorted set of labels, stored as half-open spans that neither touch nor overlap."""

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def range(cls, count: int) -> Labels:
        """The labels 0 … count-1."""
        return cls(((0, count),)) if count > 0 else cls()

    @classmethod
    def of(cls, values: Iterable[int]) -> Labels:
        """The set of the given labels, in any order, duplicates allowed."""
        spans: list[tuple[int, int]] = []
        for value in sorted(set(values)):
            if spans and spans[-1][1] == value:
                spans[-1] = (spans[-1][0], value + 1)
            else:
                spans.append((value, value + 1))
        return cls(tuple(spans))

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Labels:
        """Reads `0-6,9`; the empty string is the empty set. Raises ValueError unless written in ascending order."""
        spans: list[tuple[int, int]] = []
        for part in text.split(",") if text else ():
            match = _SPAN.fullmatch(part)
            if match is None:
                raise ValueError(f"{part!r} is neither a number nor a range like 0-6")
            start = int(match[1])
            stop = int(match[2] or match[1]) + 1
            if stop <= start or stop - 1 > MAX_LABEL:
                raise ValueError(f"{part!r} is empty or beyond {MAX_LABEL}")
            if spans and start <= spans[-1][1]:
                raise ValueError(f"{part!r} is out of order, or touches the range before it")
            spans.append((start, stop))
        return cls(tuple(spans))

    def __str__(self) -> str:
        return ",".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in self.spans)

    @cached
    def _count(self) -> int:
        return sum(b - a for a, b in self.spans)

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(starmap(range, self.spans))

    def __contains__(self, label: object) -> bool:
        if not isinstance(label, int):
            return False
        index = bisect.bisect_right(self.spans, label, key=lambda span: span[0]) - 1
        return index >= 0 and label < self.spans[index][1]

    def __and__(self, other: Labels) -> Labels:
        spans: list[tuple[int, int]] = []
        i = j = 0
        while i < len(self.spans) and j < len(other.spans):
            (a, b), (c, d) = self.spans[i], other.spans[j]
            if max(a, c) < min(b, d):
                spans.append((max(a, c), min(b, d)))
            i, j = (i + 1, j) if b < d else (i, j + 1)
        return Labels(tuple(spans))

    def __or__(self, other: Labels) -> Labels:
        spans: list[tuple[int, int]] = []
        for a, b in sorted((*self.spans, *other.spans)):
            if spans and a <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
            else:
                spans.append((a, b))
        return Labels(tuple(spans))

    def __sub__(self, other: Labels) -> Labels:
        # Both span lists are sorted, so what follows other's last span that ends before ours begins is all that counts.
        spans: list[tuple[int, int]] = []
        j = 0
        for start, stop in self.spans:
            while j < len(other.spans) and other.spans[j][1] <= start:
                j += 1
            k = j
            while k < len(other.spans) and other.spans[k][0] < stop:
                if start < other.spans[k][0]:
                    spans.append((start, other.spans[k][0]))
                start = max(start, other.spans[k][1])
                k += 1
            if start < stop:
                spans.append((start, stop))
        return Labels(tuple(spans))

    def issubset(self, other: Labels) -> bool:
        if len(other.spans) == 1:  # as the rows of most steps are
            (start, stop), spans = other.spans[0], self.spans
            return not spans or (start <= spans[0][0] and spans[-1][1] <= stop)
        return len(self & other) == len(self)

    def first(self, count: int) -> Labels:
        """The `count` smallest labels."""
        spans: list[tuple[int, int]] = []
        for a, b in self.spans:
            if count <= 0:
                break
            spans.append((a, min(b, a + count)))
            count -= b - a
        return Labels(tuple(spans))

    def last(self, count: int) -> Labels:
        """The `count` largest labels."""
        return self - self.first(max(0, len(self) - count))

    def positions(self, within: Labels) -> list[int]:
        """The positions of these labels in `within`, ascending; labels absent from `within` are left out."""
        return list(chain.from_iterable(self.runs(within)))

    def runs(self, within: Labels) -> list[Sequence[int]]:
        """`positions` as ranges, none of them empty and each past the one before it."""
        found: list[Sequence[int]] = []
        base = 0
        for a, b in within.spans:
            for c, d in self.spans:
                if max(a, c) < min(b, d):
                    found.append(range(base + max(a, c) - a, base + min(b, d) - a))
            base += b - a
        return found
