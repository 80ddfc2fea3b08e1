"""How similarities are shown: tables of predictions and stages, and the heat maps."""
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.output import figure_class, markdown_table
from analysis.subjects import Subject
from models.base import FeatureInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFINITIONS = """\
- agreement@k: mean share of the k most probable classes that both networks have in common.
- KL: mean over the images, in nats, of sum p log(p / q); p of the first network named, q of the
  second.
- CKA: linear, of the maps flattened per image, unbiased, over whole batches of {} images; 1 for
  features equal up to rotation and scale, near 0 for independent ones."""


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
    quantity: str
    first_stage: int | None
    other_stage: int | None
    value: float
    images: int


def table_rows(pairs: Sequence[Pair]) -> list[Row]:
    rows = []
    for pair in pairs:
        names = (pair.first.label, pair.other.label)
        for quantity, value in (pair.predictions or {}).items():
            rows.append(Row(*names, quantity, None, None, value, pair.num_images))
        for (i, j), value in np.ndenumerate(pair.cka):
            rows.append(Row(*names, "CKA", i + 1, j + 1, float(value), pair.num_for_cka))
    return rows


def report(pairs: Sequence[Pair], batch_size: int) -> str:
    """Markdown: a table of predictions, then one of stages for each pair."""
    heads = ["first", "other", "images", "agreement@1 %", "agreement@5 %", "KL(first, other)",
             "KL(other, first)"]
    lines = []
    for pair in pairs:
        figures = pair.predictions and [f"{value:.2f}" if "@" in name else f"{value:.4f}"
                                        for name, value in pair.predictions.items()]
        lines.append([pair.first.label, pair.other.label, f"{pair.num_images:,}",
                      *(figures or ["-"] * 4)])
    parts = [markdown_table(heads, lines, 2), DEFINITIONS.format(batch_size)]
    if any(pair.predictions is None for pair in pairs):
        parts.append("'-': the two networks have other classes.")
    for pair in pairs:
        columns = [describe_stage(info) for info in pair.other.model.feature_info]
        cells = [[describe_stage(info), *(f"{value:.3f}" for value in row)]
                 for info, row in zip(pair.first.model.feature_info, pair.cka)]
        parts.append(f"CKA of {pair.first.label} (rows) and {pair.other.label} (columns), "
                     f"{pair.num_for_cka:,} images; channels/stride:")
        parts.append(markdown_table(["", *columns], cells))
    return "\n\n".join(parts)


def describe_stage(info: FeatureInfo) -> str:
    return f"{info.channels}/{info.stride}"


def draw(pairs: Sequence[Pair]) -> "Figure":
    """A panel for each pair on one scale from 0 to 1, the values in the cells."""
    height, width = np.max([pair.cka.shape for pair in pairs], axis=0)
    size = (max(5, (1.6 + 0.75 * width) * len(pairs) + 1), 2 + 0.6 * height)
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)
    for axis, pair in zip(axes.flat, pairs):
        image = axis.imshow(pair.cka, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(pair.cka):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 else "white")
        for subject, set_ticks, set_label in (
                (pair.other, axis.set_xticks, axis.set_xlabel),
                (pair.first, axis.set_yticks, axis.set_ylabel)):
            names = [describe_stage(info) for info in subject.model.feature_info]
            set_ticks(range(len(names)), names, fontsize=8)
            set_label(textwrap.fill(subject.label, 34), fontsize=9)
    figure.colorbar(image, ax=axes, label="linear CKA")
    return figure
