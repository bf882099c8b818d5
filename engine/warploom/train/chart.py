"""Line charts as inline SVG for the report: text stays text, colours come from the page's style sheet (light and dark),
and the same numbers always give the same bytes. A chart is a title, a unit and a few series over the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 30  # margins inside the picture, for the labels
_MAX_POINTS = 800  # a curve wider than the pixels it is drawn on only makes the file larger


@dataclass(frozen=True)
class Series:
    """One curve. `style` is a CSS class of the report: "train", "heldout" (with a dot per point), "plain"."""

    name: str
    points: Sequence[Point]  # (step, value), steps ascending
    style: str
    smooth: bool = False  # draw a running mean over the raw values, which are then drawn faint


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    width: int,
    height: int,
    value: Callable[[float], str] = "{:g}".format,
    from_zero: bool = False,
    skip: float = 0.0,
) -> Markup:
    """Draw the series in one picture, the step from 0 to the last across it.

    label: its name for screen readers. value: writes a y tick. from_zero: the y axis begins at 0. skip: this part of
    the steps, at their beginning, does not widen the y axis; a loss that starts at 9 would flatten all that follows.
    """
    drawn = [(one, thin(one.points, _MAX_POINTS)) for one in series if one.points]
    if not drawn:
        return Markup('<p class="empty">Nothing was recorded.</p>')
    curves = [(one, raw, running_mean(raw) if one.smooth else raw) for one, raw in drawn]
    x_low, x_high = 0.0, max(x for _, raw, _ in curves for x, _ in raw)
    # The faint raw values may leave the picture (it is clipped): one spike must not flatten the curve.
    ys = [y for _, _, curve in curves for x, y in curve if x >= skip * x_high]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> str:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (width - _LEFT - _RIGHT)
        y = height - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for tick in y_ticks:
        y = at((x_low, tick)).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y}" text-anchor="end" dy="0.35em">{value(tick)}</text>')
    for tick in (tick for tick in ticks(x_low, x_high, width // 90) if tick <= x_high and tick == round(tick)):
        x = at((tick, y_low)).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{height - 10}" text-anchor="middle">{tick:,.0f}</text>')
    # A nested svg clips what leaves it, and needs no id that two charts of one page could share.
    inside = f'x="{_LEFT}" y="{_TOP - 6}" width="{width - _LEFT - _RIGHT + 8}" height="{height - _TOP - _BOTTOM + 12}"'
    view = f"{_LEFT} {_TOP - 6} {width - _LEFT - _RIGHT + 8} {height - _TOP - _BOTTOM + 12}"
    parts.append(f'<svg {inside} viewBox="{view}">')
    for one, raw, curve in curves:
        if one.smooth:
            parts.append(f'<polyline class="curve raw {one.style}" points="{" ".join(map(at, raw))}"/>')
        parts.append(f'<polyline class="curve {one.style}" points="{" ".join(map(at, curve))}"/>')
        if one.style == "heldout" or len(curve) == 1:
            for point in curve:
                x, y = at(point).split(",")
                title = f"<title>step {point[0]:,.0f}: {escape(one.name)} {point[1]:.4g}</title>"
                parts.append(f'<circle class="dot {one.style}" cx="{x}" cy="{y}" r="3">{title}</circle>')
    parts.append("</svg></svg>")
    return Markup("".join(parts))


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Some `about` + 1 round numbers (1, 2 or 5 times a power of ten apart) that cover low to high."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: the mean of equal runs of consecutive ones."""
    run = -(-len(points) // limit)
    if run <= 1:
        return list(points)
    groups = (points[start : start + run] for start in range(0, len(points), run))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over a window of about a thirtieth of the curve around each point, narrower towards both ends: no lag."""
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    smoothed = []
    for index, (x, _) in enumerate(points):
        half = min(index, len(points) - 1 - index, len(points) // 60)
        smoothed.append((x, (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)))
    return smoothed
