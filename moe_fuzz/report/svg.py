"""Pictures for reports and docs: SVG by hand, its colours in CSS, so that one picture serves light and dark.

Inside a page the page's own style colours the classes; a picture that stands alone carries STYLE with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
svg { --ink: #1f2328; --dim: #59636e; --rule: #d1d9e0; --bar: #2f6fb7; --line: #2f6fb7; --bad: #c5221f; --ground: #fff;
  font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --dim: #9198a1; --rule: #3d444d; --bar: #6cb0f5; --line: #6cb0f5; --bad: #ff7b72; --ground: #0d1117 } }
.ground { fill: var(--ground) } .ink { fill: var(--ink) } .dim { fill: var(--dim) } .bar { fill: var(--bar) }
.rule { stroke: var(--rule) } .limit { stroke: var(--bad); stroke-dasharray: 3 3 } .head { font-weight: 600; font-size: 12px }
.line { stroke: var(--line); fill: none; stroke-width: 1.5 } .area { fill: var(--line); opacity: .18 }
.mark { fill: var(--bad) } .lost { stroke: var(--dim); stroke-width: 1.5 }
"""  # noqa: E501

WIDTH = 380  # of a picture in a page: what a telephone shows, so that no text shrinks there


def budgets(counts: Sequence[int], title: str) -> str:
    """Passed cases by the share of the bound that their largest error used: a bar a bin, the last one ends at 100 %.

    A bar is as high as the root of its count, so that one case among thousands can be seen.
    """
    left, right, top, bottom, height = 8, 8, 16, 24, 130
    wide, high = WIDTH - left - right, height - top - bottom
    most, base = max([*counts, 1]), height - bottom
    step = wide / len(counts)
    parts = []
    last = max((at for at, count in enumerate(counts) if count), default=0)
    for at, count in enumerate(counts):
        if not count:
            continue
        tall = max(2.0, high * math.sqrt(count / most))
        x, low, up = left + at * step, 100 * at / len(counts), 100 * (at + 1) / len(counts)
        tip = f"{low:.0f} to {up:.0f} % of the bound: {count:,} cases"
        parts.append(f'<rect class="bar" x="{x + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" '
                     f'height="{tall:.1f}" rx="1.5"><title>{tip}</title></rect>')  # fmt: skip
        if count == most or at == last:
            anchor = "start" if at == 0 else "end" if at == len(counts) - 1 else "middle"
            where = {"start": x + 1, "end": x + step - 4, "middle": x + step / 2}[anchor]
            parts.append(_text(where, base - tall - 4, f"{count:,}", anchor, "dim"))
    for share in (0, 25, 50, 75, 100):
        x = left + wide * share / 100
        anchor = "start" if share == 0 else "end" if share == 100 else "middle"
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(_text(x, base + 16, f"{share} %", anchor, "dim"))
    parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - right}" y1="{base}" y2="{base}"/>')
    edge = WIDTH - right
    parts.append(f'<line class="limit" x1="{edge}" x2="{edge}" y1="{top - 10}" y2="{base}"/>')
    return picture(WIDTH, height, title, parts)


def timeline(
    samples: Sequence[tuple[float, int]], found: Sequence[tuple[float, str]], lost: Sequence[float], title: str,
    first: float = 0.0,
) -> str:  # fmt: skip
    """Cases a second over time; a triangle for each finding, a cross for each worker lost. Times in seconds."""
    left, right, top, bottom, height = 34, 8, 20, 24, 170
    rates = _rates(samples)
    end = max([*(at for at, _ in samples), *(at for at, _ in found), *lost, first + 0.1])
    most = max([rate for _, rate in rates] + [1.0])
    base, high = height - bottom, height - top - bottom

    def x(seconds: float) -> float:
        return left + (WIDTH - left - right) * (min(seconds, end) - first) / (end - first)

    def y(rate: float) -> float:
        return base - high * rate / most

    parts = []
    for share in (0.0, 0.5, 1.0):
        at = y(most * share)
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 4, at + 4, f"{most * share:.3g}", "end", "dim"))
    if rates:
        points = " ".join(f"{x(at):.1f},{y(rate):.1f}" for at, rate in rates)
        begin, close = x(rates[0][0]), x(rates[-1][0])
        parts.append(f'<polygon class="area" points="{begin:.1f},{base} {points} {close:.1f},{base}"/>')
        parts.append(f'<polyline class="line" points="{points}"/>')
    for seconds in lost:
        at = x(seconds)
        parts.append(f'<path class="lost" d="M{at - 3:.1f} {base - 7}l6 6m0 -6l-6 6"><title>a worker was lost at '
                     f"{seconds:.0f} s</title></path>")  # fmt: skip
    for seconds, name in found:
        at = x(seconds)
        tip = escape(f"{name}, at {seconds:.0f} s")
        parts.append(f'<path class="mark" d="M{at:.1f} {top - 3}l-5 -9h10z"><title>{tip}</title></path>')
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{base}"/>')
    for share in (0.0, 0.5, 1.0):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        seconds = first + (end - first) * share
        parts.append(_text(x(seconds), base + 16, _clock(seconds), anchor, "dim"))
    return picture(WIDTH, height, title, parts)


def bars(values: Mapping[str, float], unit: str, title: str) -> str:
    """A bar for each name, its value behind it. What stands together must have one unit."""
    line, width, label = 22, 560, 210
    most = max([*values.values(), 1e-9])
    parts = []
    for at, (name, value) in enumerate(values.items()):
        y = 8 + at * line
        wide = (width - label - 90) * value / most
        parts.append(_text(label - 8, y + 12, name, "end", "ink"))
        parts.append(f'<rect class="bar" x="{label}" y="{y}" width="{max(wide, 1):.1f}" height="{line - 6}" rx="2"/>')
        parts.append(_text(label + wide + 6, y + 12, f"{value:,.3g} {unit}", "start", "dim"))
    return picture(width, 16 + line * len(values), title, parts)


def picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{body}'
            "</svg>")  # fmt: skip


def alone(pictures: Mapping[str, str], columns: int = 2) -> str:
    """A file of pictures, each below its name."""
    sizes = [_size(one) for one in pictures.values()]
    wide, high = max(w for w, _ in sizes) + 24, max(h for _, h in sizes) + 30
    columns = max(1, min(columns, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    parts = [f"<style>{STYLE}</style>", f'<rect class="ground" width="{wide * columns:g}" height="{high * rows:g}"/>']
    for at, (name, one) in enumerate(pictures.items()):
        x, y = (at % columns) * wide + 12, (at // columns) * high
        parts.append(_text(x, y + 20, name, "start", "ink head"))
        parts.append(one.replace("<svg ", f'<svg x="{x:g}" y="{y + 26:g}" ', 1))
    return picture(wide * columns, high * rows, "; ".join(pictures), parts) + "\n"


def _size(svg: str) -> tuple[float, float]:
    width, height = svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    return float(width), float(height)


def _rates(samples: Sequence[tuple[float, int]], windows: int = 60) -> list[tuple[float, float]]:
    """Cases a second, over windows of at least a sixtieth of the time: single samples are too coarse."""
    if len(samples) < 2:
        return []
    least = max((samples[-1][0] - samples[0][0]) / windows, 0.5)
    rates, (start, before) = [], samples[0]
    for at, cases in samples[1:]:
        if at - start >= least:
            rates.append(((at + start) / 2, max(0.0, (cases - before) / (at - start))))
            start, before = at, cases
    return rates


def _text(x: float, y: float, said: str, anchor: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _clock(seconds: float) -> str:
    """`0:09`, `12:30`, `2:05:00`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
