"""Bars with their spread, as SVG that reads well on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.measure import Spread

_WIDTH, _LABELS, _VALUES = 800, 300, 90  # pixels: all, names on the left, figures on the right
_ROW, _BAR, _HEADING, _MARGIN = 24, 16, 34, 12
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.page { fill: #ffffff } .heading { font-weight: 600 }
.bar { fill: #afb8c1 } .ours { fill: #218bff } .spread { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117 }
  .bar { fill: #57606a } .ours { fill: #388bfd } .spread { stroke: #e6edf3 }
}
"""


class Bar(NamedTuple):
    name: str
    spread: Spread
    ours: bool


class Group(NamedTuple):
    """Bars of one unit, on one scale. `form` is a format of the figures."""

    heading: str
    form: str
    bars: Sequence[Bar]


def svg(title: str, groups: Sequence[Group]) -> str:
    """A picture: the groups below each other."""
    height = _MARGIN * 2 + sum(_HEADING + _ROW * len(group.bars) for group in groups)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}" rx="6"/>',
    ]
    top = _MARGIN
    for group in groups:
        lines.append(_text(_MARGIN, top + 20, group.heading, "heading"))
        top += _HEADING
        most = max((bar.spread.most for bar in group.bars), default=0) or 1
        for bar in group.bars:
            lines += _bar(top, bar, group.form, (_WIDTH - _LABELS - _VALUES) / most)
            top += _ROW
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(top: float, bar: Bar, form: str, scale: float) -> list[str]:
    middle = top + _ROW / 2
    median, least, most = (
        value * scale for value in (bar.spread.median, bar.spread.least, bar.spread.most)
    )
    lines = [
        _text(_LABELS - 8, middle + 4.5, bar.name, end=True),
        f'<rect class="{"ours" if bar.ours else "bar"}" x="{_LABELS}" y="{middle - _BAR / 2:g}" '
        f'width="{max(median, 1):.1f}" height="{_BAR}" rx="2"/>',
        _text(_LABELS + max(median, most) + 8, middle + 4.5, format(bar.spread.median, form)),
    ]
    if most - least >= 1:
        lines.append(
            f'<path class="spread" d="M{_LABELS + least:.1f} {middle:g}H{_LABELS + most:.1f}"/>'
        )
    return lines


def _text(x: float, y: float, text: str, kind: str = "", end: bool = False) -> str:
    more = f' class="{kind}"' if kind else ""
    more += ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>'
