"""How similarities are shown: tables of predictions and stages, and the heat maps."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.output import figure_class, in_lines, markdown_table
from analysis.subjects import Subject, by_group
from models.base import FeatureInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFINITIONS = """\
- agreement@k: mean share of the k most probable classes that both networks have in common.
- KL: mean over the images, in nats, of sum p log(p / q); p of the first network named, q of the
  second.
- CKA: linear, of the maps flattened per image, unbiased, over whole batches of {} images in
  random order; 1 for features equal up to rotation and scale, near 0 for independent ones."""


PANELS_PER_ROW = 3


class Pair(NamedTuple):
    """The first network against another."""

    first: Subject
    other: Subject
    cka: np.ndarray  # (first's stages, other's stages)
    predictions: dict[str, float] | None  # None: their classes are not the same
    num_images: int
    num_for_cka: int


class Row(NamedTuple):
    """A figure: a line of the CSV."""
    first: str
    other: str
    group: str  # the other without its seed
    quantity: str
    first_stage: int | None
    other_stage: int | None
    value: float
    images: int


def table_rows(pairs: Sequence[Pair]) -> list[Row]:
    rows = []
    for pair in pairs:
        names = (pair.first.label, pair.other.label, pair.other.group)
        for quantity, value in (pair.predictions or {}).items():
            rows.append(Row(*names, quantity, None, None, value, pair.num_images))
        for (i, j), value in np.ndenumerate(pair.cka):
            rows.append(Row(*names, "CKA", i + 1, j + 1, float(value), pair.num_for_cka))
    return rows


def report(pairs: Sequence[Pair], batch_size: int) -> str:
    """Markdown: a table of predictions, then one of stages for each group of pairs."""
    heads = ["first", "other", "n", "images", "agreement@1 %", "agreement@5 %", "KL(first, other)",
             "KL(other, first)"]
    groups = grouped(pairs)
    lines = [[pairs[0].first.label, group, str(len(found)), f"{found[0].num_images:,}",
              *prediction_cells(found)] for group, found in groups.items()]
    parts = [markdown_table(heads, lines, 2), DEFINITIONS.format(batch_size)]
    if any(pair.predictions is None for pair in pairs):
        parts.append("'-': the two networks have other classes.")
    for group, found in groups.items():
        columns = [describe_stage(info) for info in found[0].other.model.feature_info]
        cells = [[describe_stage(info), *(f"{value:.3f}" for value in row)]
                 for info, row in zip(found[0].first.model.feature_info, mean_cka(found))]
        parts.append(f"CKA of {found[0].first.label} (rows) and {group} (columns), mean over "
                     f"n = {len(found)}, {found[0].num_for_cka:,} images; channels/stride:")
        parts.append(markdown_table(["", *columns], cells))
    return "\n\n".join(parts)


def grouped(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs whose other network has one name: seeds of one."""
    return by_group(pairs, [pair.other.group for pair in pairs])


def prediction_cells(pairs: Sequence[Pair]) -> list[str]:
    """Means over the pairs, their sample standard deviation where there are several."""
    if any(pair.predictions is None for pair in pairs):
        return ["-"] * 4
    cells = []
    for name in pairs[0].predictions:
        values = [pair.predictions[name] for pair in pairs]
        digits = 2 if "@" in name else 4
        spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{spread}")
    return cells


def mean_cka(pairs: Sequence[Pair]) -> np.ndarray:
    return np.mean([pair.cka for pair in pairs], axis=0)


def describe_stage(info: FeatureInfo) -> str:
    return f"{info.channels}/{info.stride}"


def draw(pairs: Sequence[Pair]) -> "Figure":
    """A panel for each group of pairs on one scale from 0 to 1, the mean values in the cells."""
    groups = grouped(pairs)
    columns = min(PANELS_PER_ROW, len(groups))
    rows = -(-len(groups) // columns)
    height, width = np.max([pair.cka.shape for pair in pairs], axis=0)
    size = (max(5, (1.6 + 0.75 * width) * columns + 1), (1.6 + 0.6 * height) * rows + 0.4)
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (group, found) in zip(axes.flat, groups.items()):
        cka = mean_cka(found)
        image = axis.imshow(cka, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(cka):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 else "white")
        other = f"{group}, n = {len(found)}" if len(found) > 1 else group
        for label, subject, set_ticks, set_label in (
                (other, found[0].other, axis.set_xticks, axis.set_xlabel),
                (found[0].first.label, found[0].first, axis.set_yticks, axis.set_ylabel)):
            names = [describe_stage(info) for info in subject.model.feature_info]
            set_ticks(range(len(names)), names, fontsize=8)
            set_label(in_lines(label, 34), fontsize=9)
    for axis in axes.flat[len(groups):]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="linear CKA")
    return figure
