"""How fields are shown: the table of extents and the heat maps."""
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.output import figure_class, markdown_table
from analysis.receptive_field import SCALES, THRESHOLDS, Field, extents

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFINITIONS = """\
- side: of the smallest centred square with more than the share t of the mean map, in pixels; +- the
  sample standard deviation of the sides of the single images' maps. area: that square's share of
  the map. Extents at different sizes cannot be compared.
- log: of log10(1 + map), as published; depends on how large a network's gradients are.
  linear: of the map itself; does not."""


class Row(NamedTuple):
    """A network, a scale and a threshold: a line of the CSV."""
    network: str
    size: str  # of the map, pixels
    images: int | None  # None: not known, of a map from a file
    skipped: int
    scale: str
    threshold: float
    side: int
    area: float
    image_side_mean: float | None
    image_side_std: float | None
    image_area_mean: float | None
    image_area_std: float | None


def table_rows(label: str, field: Field) -> list[Row]:
    height, width = field.contribution.shape
    rows = []
    for scale in SCALES:
        single = field.per_image[scale]  # per image, per threshold, (side, area)
        for i, (threshold, found) in enumerate(
                zip(THRESHOLDS, extents(field.contribution, scale))):
            values = np.array([extents_[i] for extents_ in single]).reshape(-1, 2)
            mean = values.mean(0).tolist() if len(values) else (None, None)
            std = values.std(0, ddof=1).tolist() if len(values) > 1 else (None, None)
            rows.append(Row(label, f"{height}x{width}", field.num_images, field.num_skipped, scale,
                            threshold, *found, mean[0], std[0], mean[1], std[1]))
    return rows


def report(rows: Sequence[Row], spread: bool) -> str:
    """A Markdown table, one line for each network and scale, and what its words mean."""
    heads = ["network", "scale", "px", "images", *(f"side {t:.0%}" for t in THRESHOLDS),
             *(f"area {t:.0%}" for t in THRESHOLDS)]
    lines = []
    for start in range(0, len(rows), len(THRESHOLDS)):
        group = rows[start:start + len(THRESHOLDS)]
        first = group[0]
        sides = [f"{row.side}" + (f" +- {row.image_side_std:.0f}"
                                  if row.image_side_std is not None else "") for row in group]
        lines.append([first.network, first.scale, first.size,
                      "-" if first.images is None else str(first.images), *sides,
                      *(f"{row.area:.2%}" for row in group)])
    skipped = {row.network: row.skipped for row in rows if row.skipped}
    notes = [f"- {label}: {number} image(s) left out, their gradients were not finite."
             for label, number in skipped.items()]
    if any(row.images for row in rows):
        notes.append("- images: " + ("at equal distances through" if spread else "the first of")
                     + " the validation set, warped to the square.")
    return "\n".join([markdown_table(heads, lines, 2), "", DEFINITIONS, *notes])


PANELS_PER_ROW = 4
SMALLEST_SHOWN = 1e-3  # of a map's largest contribution
LINES = ("-", "--", "-.", ":")  # a threshold each


def draw(maps: Mapping[str, np.ndarray]) -> "Figure":
    """A panel for each map (H, W) under its name, on one logarithmic scale relative to the map's
    own largest value, with the squares of the table's extents of log10(1 + map)."""
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    columns = min(PANELS_PER_ROW, len(maps))
    rows = -(-len(maps) // columns)
    figure = figure_class()(figsize=(max(3.2 * columns, 5), 3.7 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    norm = LogNorm(SMALLEST_SHOWN, 1)
    for axis, (label, map_) in zip(axes.flat, maps.items()):
        image = axis.imshow(np.maximum(map_ / map_.max(), SMALLEST_SHOWN), norm=norm, cmap="magma")
        axis.set_title(textwrap.fill(f"{label}, {map_.shape[0]} px", 30), fontsize=9)
        axis.set_axis_off()
        draw_squares(axis, map_)
    for axis in axes.flat[len(maps):]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="contribution / the map's largest")
    handles = [Line2D([], [], color="deepskyblue", linestyle=line, label=f"{threshold:.0%}")
               for threshold, line in zip(THRESHOLDS, LINES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(LINES), fontsize=9,
                  title="square with this share of log10(1 + map)", title_fontsize=9)
    return figure


def draw_squares(axis: "Axes", map_: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    height, width = map_.shape
    for (side, _), line in zip(extents(map_), LINES):
        corner = (width // 2 - side / 2, height // 2 - side / 2)
        axis.add_patch(Rectangle(corner, side, side, fill=False, color="deepskyblue",
                                 linestyle=line, linewidth=1))
