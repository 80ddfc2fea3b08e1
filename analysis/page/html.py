"""Pieces of a page as HTML text: tables, charts, images. All that is given to them is escaped."""
import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

NUM_COLOURS = 8  # s0 ... s7 of template.html
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # so that lines differ without colours, and where they meet
WIDTH, HEIGHT = 460, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34
MOST_DOTS = 60  # of a line; a dot can be pointed at


class Section(NamedTuple):
    anchor: str
    title: str
    body: str  # HTML


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 1,
          caption: str = "", *, is_shown: bool = True) -> str:
    """Its first column heads the rows; the first `num_text_columns` are aligned left. `is_shown`:
    whether the caption is for the eye, too."""
    kinds = ["text" if i < num_text_columns else "number" for i in range(len(header))]
    head = "".join(f'<th scope="col" class="{kind}">{escape(cell)}</th>'
                   for kind, cell in zip(kinds, header))
    lines = []
    for row in rows:
        cells = [f'<th scope="row" class="{kinds[0]}">{escape(row[0])}</th>']
        cells += [f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds[1:],
                                                                                  row[1:])]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    described = f"<caption>{escape(caption)}</caption>" if is_shown and caption else ""
    return wide(f"<table>{described}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
                "</table>", caption or header[0])


def wide(content: str, label: str) -> str:
    """Scrolls sideways where it does not fit; the keyboard can reach it to do so."""
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{content}'
            "</div>")


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def folded(summary: str, body: str, is_open: bool) -> str:
    return (f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}"
            "</details>")


# Charts


def line_style(number: int) -> tuple[str, str]:
    """Class, and dashes, of the line of run `number`."""
    return (f"s{number % NUM_COLOURS}",
            DASHES[(number + number // NUM_COLOURS) % len(DASHES)])


def legend(labels: Sequence[str]) -> str:
    items = []
    for number, label in enumerate(labels):
        colour, dashes = line_style(number)
        items.append(f'<li><svg viewBox="0 0 36 12" aria-hidden="true"><line class="line {colour}" '
                     f'stroke-dasharray="{dashes}" x1="0" y1="6" x2="36" y2="6"/></svg>'
                     f"{escape(label)}</li>")
    return f'<ul class="legend" aria-label="runs">{"".join(items)}</ul>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Mapping[int, Sequence[tuple[float, float]]],
               labels: Sequence[str]) -> str:
    """A figure of points (epochs done, value) by the number of their run in `labels`. To point at a
    dot shows its value; a reader of screens is told the last values."""
    xs, ys = (np.array([point[i] for points in lines.values() for point in points])
              for i in range(2))
    low, high = float(ys.min()), float(ys.max())
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    first, last = float(xs.min()), max(float(xs.max()), float(xs.min()) + 1)

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    parts = []
    for value in ticks(low, high, 5):
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
                     f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{value:.4g}</text>')
    for value in ticks(first, last, 6):
        if value == int(value):
            x, _ = place(value, low)
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                         f"{value:.0f}</text>")
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">'
                 "epochs done</text>")
    for number, points in lines.items():
        colour, dashes = line_style(number)
        joined = " ".join(",".join(place(*point)) for point in points)
        parts.append(f'<polyline class="line {colour}" stroke-dasharray="{dashes}" '
                     f'points="{joined}"/>')
        every = math.ceil(len(points) / MOST_DOTS)
        for x, y in points[::-every]:  # the last one always
            across, down = place(x, y)
            parts.append(f'<circle class="dot {colour}" cx="{across}" cy="{down}" r="4"><title>'
                         f"{escape(labels[number])}: {y:.4g} after {x:.0f} epochs</title></circle>")
    told = "; ".join(f"{labels[number]} ends at {points[-1][1]:.4g} after {points[-1][0]:.0f} "
                     "epochs" for number, points in lines.items())
    return (f"<figure><figcaption><strong>{escape(title)}</strong></figcaption>"
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(f"{title}: {told}")}">{"".join(parts)}</svg></figure>')


# Matrices and images


def matrix(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Confusions (K, K): a row for each true class, a column for each predicted one; shaded by the
    share of the row."""
    head = "".join(f'<th scope="col" class="turned"><span>{escape(name)}</span></th>'
                   for name in classes)
    lines = []
    for i, name in enumerate(classes):
        total = max(int(counts[i].sum()), 1)
        cells = [f'<th scope="row">{escape(name)}</th>']
        for j, count in enumerate(counts[i].tolist()):
            share = count / total
            kinds = [kind for kind, holds in (("own", i == j), ("deep", share > 0.45),
                                              ("zero", count == 0)) if holds]
            cells.append(f'<td class="{" ".join(kinds)}" style="--share:{share:.2f}">{count}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return wide('<table class="matrix"><caption>rows: what it is; columns: what it was taken for'
                f'</caption><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
                "</table>", "confusion matrix")


def data_uri(image: Image.Image, quality: int = 72) -> str:
    file = io.BytesIO()
    image.save(file, format="jpeg", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(image: Image.Image | None, alt: str, lines: Sequence[str]) -> str:
    """An item of a list: the image (None: not there), and lines of text below."""
    shown = '<p class="note">(image not found)</p>'
    if image is not None:
        shown = f'<img src="{data_uri(image)}" alt="{escape(alt)}" loading="lazy">'
    return f"<li>{shown}{''.join(f'<p>{escape(line)}</p>' for line in lines)}</li>"
