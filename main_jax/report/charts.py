"""Small charts as inline SVG, coloured by the CSS variables of the page that they stand in.

    lines({"forward": (steps, values)}, "step", "nats per token")
    histogram({"kept": x, "cut": y}, "nats per token", cut=1.3)

Drawn 360 units wide, so that a phone shows them at their own size. Every text goes through `Markup.format`,
which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 52, 10, 12, 38
NATS = "nats per token"
COLOURS = 8
"""So many series colours, `.s0` to `.s7`, the page's style knows."""

Values = Sequence[float] | np.ndarray


class Axis:
    """Values to places: `at` along one axis, and its round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, ticks: int = 5):
        step = _round_step((high - low) / ticks) if high > low else abs(low) or 1.0
        self.low, self.high = (low, high) if high > low else (low - step, low + step)
        self.start, self.end = start, end
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        self.ticks = [i * step for i in range(first, last + 1)]

    def whole(self) -> None:
        """Keeps whole ticks alone: of steps and tokens there are no halves."""
        self.ticks = [tick for tick in self.ticks if abs(tick - round(tick)) < 1e-9]

    def at(self, value: float) -> float:
        """The place of a value; beyond the axis, its end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


class Interval(NamedTuple):
    """A value with the ends of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; – for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def lines(
    series: Mapping[str, tuple[Values, Values]],
    x_title: str,
    y_title: str,
    marks: Mapping[float, str] | None = None,
    strong: str = "",
) -> Markup:
    """One line for each series of (steps, y), `strong` among them; `marks` are labelled places in x."""
    shown = {name: (x, y) for name, (x, y) in series.items() if len(x)}
    xs = np.concatenate([np.asarray(x, float) for x, _ in shown.values()])
    ys = np.concatenate([np.asarray(y, float) for _, y in shown.values()])
    space = 0.05 * float(ys.max() - ys.min())
    x_axis, y_axis = _axes(
        (float(xs.min()), float(xs.max())), (float(ys.min()) - space, float(ys.max()) + space)
    )
    x_axis.whole()
    parts = _frame(x_axis, y_axis, x_title, y_title)
    for j, (place, text) in enumerate((marks or {}).items()):
        x, right = x_axis.at(place), place > x_axis.low + 0.85 * (x_axis.high - x_axis.low)
        parts.append(_line("mark", x, y_axis.start, x, y_axis.end))
        y = TOP + 8 + 12 * (j % 2)
        parts.append(_text("tick", x + (-3 if right else 3), y, text, "end" if right else "start"))
    colours = {name: i % COLOURS for i, name in enumerate(shown)}
    for name in sorted(shown, key=lambda name: name == strong):  # that one on top
        x, y = shown[name]
        points = [(x_axis.at(a), y_axis.at(b)) for a, b in zip(x, y, strict=True)]
        css = f"line s{colours[name]}" + (" strong" if name == strong else "")
        if len(points) == 1:
            parts.append(_dot(css.replace("line", "dot"), *points[0]))
            continue
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        markup = Markup('<path class="{}" d="{}"><title>{}</title></path>')
        parts.append(markup.format(css, path, name))
    return _figure(parts, f"{y_title} over {x_title}", list(shown), "stroke")


def histogram(
    groups: Mapping[str, np.ndarray],
    x_title: str,
    y_title: str = "pairs",
    cut: float | None = None,
    cut_text: str = "cut",
) -> Markup:
    """Stacked bars, one colour for each group; the outermost half percent is counted in the end bars.

    Values that are not finite are left out.
    """
    groups = {name: x[np.isfinite(x)] for name, x in groups.items()}
    values = np.concatenate(list(groups.values()))
    if not len(values):
        return Markup("<p>no values</p>")
    low, high = (float(q) for q in np.quantile(values, [0.005, 0.995], method="nearest"))
    bins = min(40, 8 + int(len(values) ** 0.5))
    whole = bool(np.all(values == np.round(values)))
    if whole:  # every bar holds equally many numbers
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low - 0.5, high + width + 0.5, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts = {
        name: np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] for name, x in groups.items()
    }
    top = float(np.sum(list(counts.values()), axis=0).max())
    x_axis, y_axis = _axes((float(edges[0]), float(edges[-1])), (0.0, top * 1.08))
    if whole:
        x_axis.whole()
    parts = _frame(x_axis, y_axis, x_title, y_title)
    base = np.zeros(len(edges) - 1)
    for i, (name, count) in enumerate(counts.items()):
        for left, right, bottom, n in zip(edges[:-1], edges[1:], base, count, strict=True):
            if n:
                x, y = x_axis.at(left), y_axis.at(bottom + n)
                parts.append(Markup(
                    '<rect class="bar s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{}: {:,} from {} to {}</title></rect>"
                ).format(i % COLOURS, x, y, max(0.5, x_axis.at(right) - x - 0.6),
                         y_axis.at(bottom) - y, name, n, number(left), number(right)))  # fmt: skip
        base = base + count
    if cut is not None:
        x = x_axis.at(cut)
        parts.append(_line("cut", x, y_axis.start, x, y_axis.end))
        to_left = x > (LEFT + WIDTH) / 2
        place = x - 4 if to_left else x + 4
        parts.append(_text("cut-text", place, TOP + 8, cut_text, "end" if to_left else "start"))
    return _figure(parts, f"{y_title} by {x_title}", list(groups))


def scatter(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    x_title: str,
    y_title: str,
) -> Markup:
    """Points of (x, y, filled) in each group; hollow where not filled. The outermost lie on the edge."""
    groups = {
        name: (x[i], y[i], filled[i])
        for name, (x, y, filled) in groups.items()
        for i in [np.isfinite(x) & np.isfinite(y)]
    }
    axes = []
    for i in range(2):
        values = np.concatenate([group[i] for group in groups.values()])
        low, high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
        margin = 0.05 * (high - low)
        axes.append((max(low - margin, min(0.0, low)), high + margin))
    x_axis, y_axis = _axes(axes[0], axes[1], height=340)
    parts = _frame(x_axis, y_axis, x_title, y_title)
    for i, (xs, ys, filled) in enumerate(groups.values()):
        for css, chosen in (("hollow", ~filled), ("full", filled)):
            dots = Markup("").join(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(
                    x_axis.at(x), y_axis.at(y)
                )
                for x, y in zip(xs[chosen], ys[chosen], strict=True)
            )
            parts.append(Markup('<g class="{} s{}">{}</g>').format(css, i % COLOURS, dots))
    return _figure(parts, f"{y_title} against {x_title}", list(groups), height=340)


def intervals(
    rows: Mapping[str, Mapping[str, Interval]], x_title: str, mark: float | None = None
) -> Markup:
    """One row a name, in it one dot with its interval for each series; all rows share the axis.

    `mark` is a place in x that stands out, and is on the axis.
    """
    names = list(dict.fromkeys(series for row in rows.values() for series in row))
    found = [v for row in rows.values() for i in row.values() for v in i if v is not None]
    found += [] if mark is None else [mark]
    left, step = 92, 12 * len(names) + 8
    height = TOP + step * len(rows) + BOTTOM
    margin = 0.04 * (max(found) - min(found)) or 0.1
    x_axis = Axis(min(found) - margin, max(found) + margin, left, WIDTH - RIGHT)
    y_axis = Axis(0, 1, height - BOTTOM, TOP)
    y_axis.ticks = []
    parts = _frame(x_axis, y_axis, x_title, "", left, height)
    if mark is not None:
        parts.append(_line("cut", x_axis.at(mark), height - BOTTOM, x_axis.at(mark), TOP))
    for i, (label, row) in enumerate(rows.items()):
        top = TOP + step * i
        parts.append(_text("name", left - 6, top + step / 2 + 4, label, "end"))
        parts.append(_line("grid", left, top + step, WIDTH - RIGHT, top + step))
        for name, (value, low, high) in row.items():
            j = names.index(name)
            y, css = top + 10 + 12 * j, f"s{j % COLOURS}"
            if low is not None and high is not None:
                parts.append(_line(f"line {css}", x_axis.at(low), y, x_axis.at(high), y))
            parts.append(_dot(f"dot {css}", x_axis.at(value), y, f"{label}, {name}: {value:.4g}"))
    return _figure(parts, x_title, names, height=height)


# ------------------------------------------------------------------------------------------- pieces


def _axes(x: tuple[float, float], y: tuple[float, float], height: int = 230) -> tuple[Axis, Axis]:
    return Axis(*x, LEFT, WIDTH - RIGHT), Axis(*y, height - BOTTOM, TOP)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)


def _frame(
    x_axis: Axis, y_axis: Axis, x_title: str, y_title: str, left: float = LEFT, height: int = 0
) -> list[Markup]:
    """Grid, ticks and titles."""
    bottom = y_axis.start
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(_line("grid", left, y, WIDTH - RIGHT, y))
        parts.append(_text("tick", left - 5, y + 3.5, _tick(tick), "end"))
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        if height:
            parts.append(_line("grid", x, bottom, x, y_axis.end))
        parts.append(_line("axis", x, bottom, x, bottom + 3))
        parts.append(_text("tick", x, bottom + 14, _tick(tick), "middle"))
    parts.append(_line("axis", left, bottom, WIDTH - RIGHT, bottom))
    parts.append(_text("title", (left + WIDTH - RIGHT) / 2, bottom + 31, x_title, "middle"))
    if y_title:
        middle = (bottom + y_axis.end) / 2
        markup = Markup(
            '<text class="title" text-anchor="middle" transform="translate(10 {:.1f}) rotate(-90)">{}</text>'
        )
        parts.append(markup.format(middle, y_title))
    return parts


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k" if abs(value) < 1e6 else f"{value / 1e6:,.4g}M"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    markup = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return markup.format(css, x1, y1, x2, y2)


def _text(css: str, x: float, y: float, text: str, anchor: str) -> Markup:
    markup = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return markup.format(css, x, y, anchor, text)


def _dot(css: str, x: float, y: float, title: str = "") -> Markup:
    markup = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
    return markup.format(css, x, y, title)


def _figure(
    parts: Sequence[Markup],
    label: str,
    names: Sequence[str],
    legend: str = "fill",
    height: int = 230,
) -> Markup:
    """The drawing in a box that scrolls by itself, under its legend where there is more than one series."""
    keys = Markup("").join(
        Markup('<span><i class="key s{}"></i>{}</span>').format(i % COLOURS, name)
        for i, name in enumerate(names)
    )
    return Markup(
        '{}<div class="scroll"><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></div>'
    ).format(
        Markup('<p class="legend {}">{}</p>').format(legend, keys) if len(names) > 1 else "",
        WIDTH, height, label, Markup("").join(parts),
    )  # fmt: skip
