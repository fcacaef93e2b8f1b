"""Text on standard output: tables for a person, words that must stay whole for their clipboard."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
    """Columns aligned by spaces. On a terminal the last column is cut at the edge; in a pipe nothing is."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for index, line in enumerate((head, *rows)):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        if limit is not None and len(text) > limit:
            text = text[: limit - 1] + "…"
        click.echo(click.style(text, bold=True) if index == 0 else text)
