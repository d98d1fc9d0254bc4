"""A small SVG writer for the reports: line charts and stacked bars as text, no dependency, no script.

Colours and fonts come from the page's style sheet through class names (s0, s1, ... for series), so one picture fits a light
and a dark page. Text does not scale with the picture: the page shows a narrow drawing on a phone and a wide one elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one line, with an optional band (low, high) around each, and the class that colours it. A limit is drawn
    dashed and without marks."""

    label: str
    points: Sequence[tuple[float, float]]
    bands: Sequence[tuple[float, float]] = ()
    style: str = "s0"
    limit: bool = False


@dataclass(frozen=True)
class Bar:
    """One stacked bar: segments (label, value, class), drawn left to right, the text at its end, and where its limit is drawn
    as a line across it."""

    label: str
    segments: Sequence[tuple[str, float, str]]
    end: str
    limit: float | None = None


def text_width(text: str, size: float = 13) -> float:
    """A cautious estimate: the page's fonts are not known here."""
    return 0.56 * size * len(text)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values at or inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that frame [low, high]: at least two."""
    first = math.floor(math.log10(low) + 1e-9)
    return [10.0**k for k in range(first, max(math.ceil(math.log10(high) - 1e-9), first + 1) + 1)]


def _tag(name: str, content: str = "", **attributes) -> str:
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{v:.1f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v))}"'
        for key, v in attributes.items()
    )
    return f"<{name}{inside}>{content}</{name}>" if content else f"<{name}{inside}/>"


def _text(x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> str:
    return _tag("text", escape(text), x=float(x), y=float(y), class_=cls, text_anchor=anchor)


def _frame(width: float, height: float, title: str, body: Sequence[str], cls: str) -> str:
    # A viewBox alone would let the page stretch the text; a maximum width keeps one unit at most one pixel.
    head = f'<svg class="{cls}" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
    return f'{head}xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>\n' + "\n".join(body) + "\n</svg>"


def _polygon(style: str, *corners: tuple[float, float]) -> Callable[[float, float], str]:
    return lambda x, y: _tag("polygon", points=" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners), class_=f"mark {style}")


# One shape per series, so that a page printed in grey still tells them apart.
MARKS: dict[str, Callable[[float, float], str]] = {
    "s0": lambda x, y: _tag("circle", cx=x, cy=y, r=4.5, class_="mark s0"),
    "s1": lambda x, y: _tag("rect", x=x - 4, y=y - 4, width=8.0, height=8.0, class_="mark s1"),
    "s2": _polygon("s2", (0, -5.5), (5, 4), (-5, 4)),
    "s3": _polygon("s3", (0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    "s4": _polygon("s4", (0, 5.5), (5, -4), (-5, -4)),
    "s5": _polygon("s5", (-5, -2), (0, -5.5), (5, -2), (3, 4.5), (-3, 4.5)),
}


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float,
    height: float = 320,
    x_ticks: Sequence[tuple[float, str]],
    y_text: Callable[[float], str],
    log_y: bool = False,
    names: bool = True,
    cls: str = "",
) -> str:
    """Lines over a logarithmic x axis; y linear from zero, or logarithmic. Each line carries its name, unless a legend does."""
    values = [v for s in series for v in [y for _, y in s.points] + [b for band in s.bands for b in band]]
    ticks = log_ticks(min(values), max(values)) if log_y else nice_ticks(0, max(values) * 1.12)
    low, high = (ticks[0], ticks[-1]) if log_y else (0.0, max(ticks[-1], max(values) * 1.12))
    left = 14 + max(text_width(y_text(t), 12) for t in ticks)
    right, top, bottom = 18.0, 34.0 if names else 26.0, 46.0
    plot_width, plot_height = width - left - right, height - top - bottom
    xs = [math.log(x) for s in series for x, _ in s.points]
    x_low, x_high = min(xs), max(xs)
    inset = 14.0  # marks stay off the axis

    def px(x: float) -> float:
        share = (math.log(x) - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + inset + share * (plot_width - 2 * inset)

    def py(y: float) -> float:
        share = (math.log(y / low) / math.log(high / low)) if log_y else (y - low) / (high - low)
        return top + plot_height * (1 - share)

    body = [_text(0, 14, y_label, "axis")]
    for t in ticks:
        body.append(_tag("line", x1=left, x2=width - right, y1=py(t), y2=py(t), class_="grid"))
        body.append(_text(left - 8, py(t) + 4, y_text(t), "tick", "end"))
    room = plot_width / max(1, len(x_ticks))
    shown = [tick for i, tick in enumerate(x_ticks) if room > 34 or i % 2 == 0]
    for x, label in shown:
        body.append(_text(px(x), height - bottom + 20, label, "tick", "middle"))
    body.append(_text(left + plot_width / 2, height - 6, x_label, "axis", "middle"))
    for s in series:
        if s.bands:
            upper = [f"{px(x):.1f},{py(b[1]):.1f}" for (x, _), b in zip(s.points, s.bands)]
            lower = [f"{px(x):.1f},{py(b[0]):.1f}" for (x, _), b in zip(s.points, s.bands)]
            body.append(_tag("polygon", points=" ".join(upper + lower[::-1]), class_=f"band {s.style}"))
        corners = [(px(x), py(y)) for x, y in s.points]
        if s.limit and len(corners) == 1:  # a limit is a line, over one point too
            corners = [(corners[0][0] + dx, corners[0][1]) for dx in (-inset, inset)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        body.append(_tag("polyline", points=points, class_=f"{'limit' if s.limit else 'line'} {s.style}"))
        first, _, rest = s.style.partition(" ")  # "s1 soft": further classes go to the marks too
        mark = MARKS.get(first, MARKS["s0"])
        body += [] if s.limit else [mark(px(x), py(y)).replace('"mark', f'"mark {rest}' if rest else '"mark') for x, y in s.points]
    body += _labels(series, px, py, left, width - right, top, height - bottom) if names else []
    return _frame(width, height, title, body, cls)


def _labels(series: Sequence[Series], px, py, left: float, right: float, top: float, bottom: float) -> list[str]:
    """Each line's name beside the line, at the point where every other line is farthest away."""
    out = []
    for s in series:
        others = [o for o in series if o is not s]

        def clearance(k: int, s=s, others=others) -> float:
            y = py(s.points[k][1])
            gaps = [abs(y - py(o.points[min(k, len(o.points) - 1)][1])) for o in others]
            return min(gaps, default=0.0)

        best = max(range(len(s.points)), key=clearance)
        x, y = px(s.points[best][0]), py(s.points[best][1])
        nearest = [py(o.points[min(best, len(o.points) - 1)][1]) for o in others]
        above = not nearest or all(y <= n for n in nearest)
        half = text_width(s.label) / 2
        x = min(max(x, left + half + 2), right - half)
        y = y - 14 if above else y + 24
        out.append(_text(x, min(max(y, top - 6), bottom - 6), s.label, f"name {s.style}", "middle"))
    return out


def stacked_bars(bars: Sequence[Bar], *, title: str, width: float, cls: str = "", bar_height: float = 26) -> str:
    """Horizontal stacked bars on one scale. Names stand above their bar, so that long ones fit a phone."""
    total = max(max(sum(value for _, value, _ in bar.segments), bar.limit or 0) for bar in bars)
    end_room = 12 + max(text_width(bar.end, 14) for bar in bars)
    scale = (width - end_room) / total
    pitch = bar_height + 38
    body = []
    for i, bar in enumerate(bars):
        y, x = i * pitch + 20, 0.0
        body.append(_text(0, y - 5, bar.label, "name"))
        for label, value, style in bar.segments:
            w = max(value * scale, 1.0)
            tip = f"<title>{escape(label)}</title>"
            body.append(_tag("rect", tip, x=x, y=float(y), width=w, height=bar_height, class_=f"bar {style}"))
            if text_width(label, 12) + 10 < w:
                body.append(_text(x + 7, y + bar_height / 2 + 4.5, label, "inbar"))
            x += w
        if bar.limit is not None:
            at = bar.limit * scale
            body.append(_tag("line", x1=at, x2=at, y1=y - 1.0, y2=y + bar_height + 3.0, class_="limit"))
            x = max(x, at)
        body.append(_text(x + 8, y + bar_height / 2 + 5, bar.end, "value"))
    return _frame(width, len(bars) * pitch - 6, title, body, cls)
