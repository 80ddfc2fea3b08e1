"""How fields are shown: the table of extents and the heat maps."""
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.output import figure_class, in_lines, markdown_table
from analysis.receptive_field import SCALES, THRESHOLDS, Field, extents
from analysis.subjects import by_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFINITIONS = """\
- side: of the smallest centred square with more than the share t of the mean map, in pixels. area:
  that square's share of the map. +-: sample standard deviation over the single images' own squares.
  Extents at different sizes cannot be compared.
- centred, as published, at the pixel (H // 2, W // 2): with an even number of cells in the last map
  that is a corner of the cell whose field is measured, which adds about a cell to small sides.
- log: of log10(1 + map), as published; depends on how large a network's gradients are.
  linear: of the map itself; does not."""


class Row(NamedTuple):
    """A network, a scale and a threshold: a line of the CSV."""
    network: str
    group: str  # the network without its seed
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


def table_rows(label: str, group: str, field: Field) -> list[Row]:
    height, width = field.contribution.shape
    rows = []
    for scale in SCALES:
        single = field.per_image[scale]  # per image, per threshold, (side, area)
        for i, (threshold, found) in enumerate(
                zip(THRESHOLDS, extents(field.contribution, scale))):
            values = np.array([extents_[i] for extents_ in single]).reshape(-1, 2)
            mean = values.mean(0).tolist() if len(values) else (None, None)
            std = values.std(0, ddof=1).tolist() if len(values) > 1 else (None, None)
            rows.append(Row(label, group, f"{height}x{width}", field.num_images, field.num_skipped,
                            scale, threshold, *found, mean[0], std[0], mean[1], std[1]))
    return rows


def report(rows: Sequence[Row], spread: bool) -> str:
    """Markdown: a line for each network and scale; where several share a name, their mean; what the
    words mean."""
    measures = [f"{what} {t:.0%}" for what in ("side", "area") for t in THRESHOLDS]
    networks = by_group(rows, [(row.network, row.scale) for row in rows])
    parts = [markdown_table(["network", "scale", "px", "images", *measures],
                            [network_line(found) for found in networks.values()], 2)]
    groups = by_group([*networks.values()], [
        (found[0].group, found[0].scale, found[0].size) for found in networks.values()])
    means = [group_line(found) for found in groups.values() if len(found) > 1]
    if means:
        parts += ["Mean and sample standard deviation over the n networks of one name:",
                  markdown_table(["network", "scale", "px", "n", *measures], means, 2)]
    notes = [f"- {row.network}: {row.skipped} image(s) left out, their gradients were not finite."
             for row in rows[::len(SCALES) * len(THRESHOLDS)] if row.skipped]
    if any(row.images for row in rows):
        notes.append("- images: " + ("at equal distances through" if spread else "the first of")
                     + " the validation set, warped to the square.")
    return "\n\n".join([*parts, "\n".join([DEFINITIONS, *notes])])


def network_line(rows: Sequence[Row]) -> list[str]:
    """`rows`: a network's at one scale, a threshold each."""
    images = "-" if rows[0].images is None else str(rows[0].images)
    cells = [with_spread(f"{row.side}", row.image_side_std, "{:.0f}") for row in rows]
    cells += [with_spread(f"{row.area:.2%}", row.image_area_std, "{:.2%}") for row in rows]
    return [rows[0].network, rows[0].scale, rows[0].size, images, *cells]


def with_spread(value: str, std: float | None, form: str) -> str:
    return value if std is None else f"{value} +- {form.format(std)}"


def group_line(networks: Sequence[Sequence[Row]]) -> list[str]:
    """`networks`: more than one, each as for `network_line`."""
    first = networks[0][0]
    sides, areas = (np.array([[getattr(row, what) for row in rows] for rows in networks])
                    for what in ("side", "area"))
    return [first.group, first.scale, first.size, str(len(networks)),
            *(f"{mean:.1f} +- {std:.1f}" for mean, std in zip(sides.mean(0), sides.std(0, ddof=1))),
            *(f"{mean:.2%} +- {std:.2%}" for mean, std in zip(areas.mean(0),
                                                             areas.std(0, ddof=1)))]


PANELS_PER_ROW = 4
SMALLEST_SHOWN = 1e-3  # of a map's largest contribution
LINES = ("-", "--", "-.", ":")  # a threshold each


def draw(maps: Mapping[str, np.ndarray]) -> "Figure":
    """A panel for each map (H, W) under its name, all on one logarithmic scale relative to each
    map's largest value, with the squares of the table's extents of log10(1 + map)."""
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    columns = min(PANELS_PER_ROW, len(maps))
    rows = -(-len(maps) // columns)
    size = (max(3.2 * columns, 5), 3.45 * rows + 0.8)
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    norm = LogNorm(SMALLEST_SHOWN, 1)
    for axis, (label, map_) in zip(axes.flat, maps.items()):
        image = axis.imshow(np.maximum(map_ / map_.max(), SMALLEST_SHOWN), norm=norm, cmap="magma")
        axis.set_title(f"{in_lines(label, 34)}\n{map_.shape[1]} x {map_.shape[0]} px", fontsize=9)
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
