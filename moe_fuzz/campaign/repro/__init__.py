"""repro.py, the script that comes with each finding: `renderer(pool)` makes the function that writes it."""

from __future__ import annotations

from moe_fuzz.campaign.repro.render import render, renderer

__all__ = ["render", "renderer"]
