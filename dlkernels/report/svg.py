"""A small SVG plot: two axes, lines, bands, marks and labels. Colours come from CSS classes, so one drawing serves light, dark and print.

ElementTree builds and escapes the markup. A mark carries its numbers in a <title>: the tooltip without scripts, and the page's script
shows the same text sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

Point = tuple[float, float]

# A mark's outline around (0, 0): the shape tells lines apart without colour.
MARKS = {
    "circle": "M-3.4,0a3.4,3.4 0 1 0 6.8,0a3.4,3.4 0 1 0 -6.8,0z",
    "square": "M-3,-3h6v6h-6z",
    "triangle": "M0,-3.8l3.8,6.6h-7.6z",
    "diamond": "M0,-4.2l4.2,4.2l-4.2,4.2l-4.2,-4.2z",
    "wedge": "M0,3.8l3.8,-6.6h-7.6z",
    "bar": "M-1.6,-4h3.2v8h-3.2z",
}
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 40.0  # margins around the plotting area, user units


@dataclass(frozen=True)
class Axis:
    """One axis from `low` to `high`; `show` formats a tick."""

    low: float
    high: float
    label: str
    show: Callable[[float], str]
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], label: str, show: Callable[[float], str], log: bool = False, pad: float = 0.05) -> Axis:
        """The axis that covers the values with a margin of `pad` of its length. Raises ValueError without values."""
        found = [math.log10(v) if log else v for v in values]
        if not found:
            raise ValueError("values: got none, an axis needs at least one")
        low, high = min(found), max(found)
        if high - low < 1e-9 * max(1.0, abs(high)):
            half = 0.5 if log else 0.05 * abs(high) or 0.5
            low, high = low - half, high + half
        margin = pad * (high - low)
        low, high = low - margin, high + margin
        return cls(10.0**low if log else low, 10.0**high if log else high, label, show, log)

    def place(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round values: 1-2-5 steps, or whole decades on a long log axis."""
        if not self.log:
            return list(linear_ticks(self.low, self.high, most))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for multiples, stride in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
            inside = [
                tick
                for power in range(first, last + 1)
                if power % stride == 0
                for multiple in multiples
                if self.low <= (tick := multiple * 10.0**power) <= self.high
            ]
            if len(inside) <= most:
                return inside
        return inside[:: math.ceil(len(inside) / most)]


def linear_ticks(low: float, high: float, most: int) -> Iterable[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield i * step


class Plot:
    """One drawing. Everything is placed in data coordinates and drawn in the order of the calls."""

    def __init__(self, x: Axis, y: Axis, title: str, width: int = 400, height: int = 270) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        box = f"0 0 {width} {height}"
        self.root = ElementTree.Element("svg", {"viewBox": box, "role": "img", "aria-label": title, "class": "plot"})
        self.frame()

    def at(self, x: float, y: float) -> Point:
        """Data coordinates to user units."""
        across, down = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return LEFT + across * self.x.place(x), TOP + down * (1 - self.y.place(y))

    def add(self, tag: str, css: str, text: str | None = None, **attributes: str | float) -> ElementTree.Element:
        shown = {key: f"{value:.1f}" if isinstance(value, int | float) else value for key, value in attributes.items()}
        element = ElementTree.SubElement(self.root, tag, {"class": css, **shown})
        element.text = text
        return element

    def frame(self) -> None:
        """Grid, ticks and the names of the axes."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        columns = [(tick, self.at(tick, self.y.low)[0]) for tick in self.x.ticks(self.width // 65)]
        rows = [(tick, self.at(self.x.low, tick)[1]) for tick in self.y.ticks(self.height // 42)]
        lines = [f"M{x:.1f},{TOP:g}V{bottom:g}" for _, x in columns] + [f"M{LEFT:g},{y:.1f}H{right:g}" for _, y in rows]
        self.add("path", "grid", d="".join(lines))
        for tick, x in columns:
            self.add("text", "middle", self.x.show(tick), x=x, y=bottom + 14)
        for tick, y in rows:
            self.add("text", "end", self.y.show(tick), x=LEFT - 6, y=y + 3.5)
        self.add("path", "axis", d=f"M{LEFT:g},{TOP:g}V{bottom:g}H{right:g}")
        self.add("text", "end", self.x.label, x=right, y=self.height - 7)

    def line(self, points: Sequence[Point], css: str) -> None:
        self.add("path", f"line {css}", d=outline([self.at(*p) for p in points]))

    def band(self, low: Sequence[Point], high: Sequence[Point], css: str) -> None:
        """The area between two lines over the same x."""
        self.add("path", f"band {css}", d=outline([self.at(*p) for p in [*low, *reversed(high)]]) + "z")

    def mark(self, point: Point, css: str, shape: str, tip: str) -> None:
        """One point; the page defines the outline of each of MARKS once, under the shape's name."""
        px, py = self.at(*point)
        mark = self.add("use", f"mark {css}", href=f"#{shape}", x=px, y=py)
        ElementTree.SubElement(mark, "title").text = tip

    def label(self, point: Point, text: str) -> None:
        """Text that ends just above and left of a point."""
        px, py = self.at(*point)
        self.add("text", "label end", text, x=px - 3, y=py - 6)

    def label_along(self, start: Point, end: Point, text: str) -> None:
        """Text above the line from start to end, parallel to it, ending shortly before `end`."""
        (x0, y0), (x1, y1) = self.at(*start), self.at(*end)
        length = math.hypot(x1 - x0, y1 - y0)
        across, down = (x1 - x0) / length, (y1 - y0) / length
        x, y = x1 - 12 * across + 5 * down, y1 - 12 * down - 5 * across
        turn = f"rotate({math.degrees(math.atan2(down, across)):.1f} {x:.1f} {y:.1f})"
        self.add("text", "label end", text, x=x, y=y, transform=turn)

    def svg(self) -> Markup:
        """The finished element; ElementTree has escaped every text in it."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def outline(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
