"""The check that the checks can fail: wrong answers, made from the right one, must each be rejected on this very case.

A case on which an all-zero answer passes proves nothing about parity (so did 26 of 27 upstream cases, measured); it
counts for its memory and structural checks alone. Each family makes its own wrong answers: checks/<family>/binding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_fuzz.checks import CHECKS, PARITY

SAMPLE = 32  # rows


def rejected(wrong: Any, family: str, judges: Sequence[str] = ()) -> bool:
    """Whether a parity check of the family, or one of `judges`, finds this observation wrong. Most are for the parity
    checks to reject, so they are asked first."""
    return any(CHECKS[family][name](wrong) for name in (*PARITY[family], *judges))
