"""What the page says, a section a function: settings, curves, table, predictions, fields."""
import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis import report
from analysis.common import Run, is_number
from analysis.curves import chosen_keys
from analysis.erf import read_field
from analysis.page import predictions
from analysis.page.html import (
    Section,
    data_uri,
    escape,
    folded,
    legend,
    line_chart,
    matrix,
    note,
    table,
    thumbnail,
)
from analysis.page.predictions import Predictions
from utils.checkpoint import FREE_ON_RESUME
from utils.registry import UserError

ALSO = ("train_lr", "agreement", "agreement_ema", "train_agreement", "train_teacher_acc1",
        "train_teacher_entropy", "test_loss", "train_grad_norm")  # drawn where a run has them
TITLES = {"test_acc1": "top-1 %", "test_acc1_ema": "top-1 % of the average",
          "train_lr": "learning rate", "agreement": "agreement with the teacher %",
          "agreement_ema": "agreement of the average with the teacher %",
          "train_agreement": "agreement in training %", "train_loss": "loss: weighted sum",
          "train_teacher_acc1": "teacher's top-1 % in training",
          "train_teacher_entropy": "teacher's entropy in training, nats",
          "test_loss": "cross-entropy on the validation set", "train_grad_norm": "gradient norm"}
MOST_MATRIX_CLASSES, NUM_PAIRS = 50, 20
MOST_NETWORKS = 8  # with images and confusions, so that the file stays small
THUMBNAIL, MAP = 120, 220  # pixels
SMALLEST_SHOWN = 1e-3  # of a map's largest contribution
# Colours of a field from none to most, dark to light.
COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])

FindImage = Callable[[str], Image.Image | None]  # by the name of an image


# Runs


def settings_section(runs: Mapping[str, Run]) -> Section:
    """What differs first; apart from it, what says only where and how the runs ran."""
    names = dict.fromkeys(name for run in runs.values() for name in run.args)
    values = {name: [shown(run.args.get(name, "not set")) for run in runs.values()]
              for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    header = ["setting", *runs]
    rows = {is_free: [[name, *values[name]] for name in differ
                      if (name in FREE_ON_RESUME) == is_free] for is_free in (False, True)}
    parts = []
    if rows[False]:
        parts.append(table(header, rows[False], len(header), "settings that differ",
                           is_shown=False))
    else:
        parts.append(note("The runs have the same settings." if len(runs) > 1 else
                          "One run: there is nothing that it could differ from."))
    if rows[True]:
        parts.append(folded("where and how they ran",
                            table(header, rows[True], len(header), "where and how they ran",
                                  is_shown=False), is_open=False))
    same = [[name, values[name][0]] for name in names if name not in differ]
    parts.append(folded(f"the {len(same)} settings that are the same",
                        table(["setting", "all runs"], same, 2), is_open=False))
    return Section("settings", "Settings that differ", "".join(parts))


def shown(value: Any) -> str:
    """A setting as the command line has it, a dash for none."""
    if isinstance(value, list):
        return (", " if value and isinstance(value[0], list) else " ").join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def curves_section(runs: Mapping[str, Run]) -> Section:
    """A chart for each figure that any run has, and its last values as a table."""
    labels = list(runs)
    known = {key for run in runs.values() for record in run.records for key in record
             if is_number(record[key])}
    keys = chosen_keys(list(runs.values()), [key for key in ALSO if key in known])
    charts, rows = [], []
    for key in keys:
        lines = {number: [(record["epoch"] + 1, float(record[key])) for record in run.records
                          if is_number(record.get(key))]
                 for number, run in enumerate(runs.values())}
        title = TITLES.get(key, f"loss term {key.removeprefix('train_')}")
        charts.append(line_chart(title, {number: points for number, points in lines.items()
                                         if points}, labels))
        rows.append([title, *(f"{points[-1][1]:.5g}" if points else "-"
                              for points in lines.values())])
    last = table(["after the last epoch", *labels], rows, 1, "last values", is_shown=False)
    return Section("curves", "Curves", legend(labels) + f'<div class="charts">{"".join(charts)}'
                   "</div>" + folded("last values as a table", last, is_open=False))


def report_section(runs: Sequence[Run], unreadable: Sequence[str]) -> Section:
    """The table of analysis.report."""
    groups, left_out = report.group_runs(list(runs))
    rows = [report.make_row(group, groups) for group in groups]
    parts = []
    if rows:
        header, lines, num_text = report.cells(rows)
        parts.append(table(["runs", *header], [[row.runs, *line] for row, line in zip(rows, lines)],
                           num_text + 1, "finished runs, those that differ in their seed together"))
    reasons = [f"{row.runs}: {row.not_compared}" for row in rows if row.not_compared]
    reasons += [f"left out: {reason}" for reason in (*unreadable, *left_out)]
    if reasons:
        parts.append(f'<ul class="note">{"".join(f"<li>{escape(line)}</li>" for line in reasons)}'
                     "</ul>")
    words = "\n".join([report.DEFINITIONS, report.LONGER, report.DIFFERS])
    words = words.replace("\n  ", " ").split("\n")
    items = "".join(f"<li>{escape(line.removeprefix('- '))}</li>" for line in words)
    parts.append(folded("what the columns mean", f'<ul class="note">{items}</ul>', is_open=False))
    return Section("report", "Table", "".join(parts))


# Predictions


def accuracy_section(found: Sequence[Predictions], words: Mapping[str, str], num_resamples: int,
                     seed: int) -> Section:
    """Top-1 of each network on the same images, and the paired bootstrap of each two."""
    number = len(found[0].names)
    rows = [[network.label, f"{100 * network.is_right.mean():.2f}",
             f"{100 * network.prob.mean():.1f}"] for network in found]
    parts = [table(["network", "top-1 %", "mean probability of its best class %"], rows, 1,
                   f"on the same {number:,} images of {len(words)} classes")]
    differences = predictions.all_differences(found, num_resamples, seed)
    if differences:
        lines = [[f"{row.first} - {row.other}", f"{row.points:+.2f}",
                  f"{row.low:+.2f} ... {row.high:+.2f}",
                  "yes" if row.low > 0 or row.high < 0 else "no", str(row.only_first),
                  str(row.only_other)] for row in differences]
        parts.append(table(["difference", "points", "95 % interval", "without 0",
                            "only the first right", "only the second right"], lines, 1,
                           "paired bootstrap of top-1"))
        parts.append(note(
            f"{num_resamples:,} resamples of the {number:,} images, the same for both networks, "
            f"seed {seed}; percentile interval. It says how much depends on which images were "
            "evaluated, not how much on the seed of training: for that, train several seeds."))
    return Section("predictions", "Predictions", "".join(parts))


def confusion_section(found: Sequence[Predictions], words: Mapping[str, str]) -> Section:
    parts = []
    for place, network in enumerate(found[:MOST_NETWORKS]):
        names = [words[name] for name in network.classes]
        title = f"{network.label}: {100 * network.is_right.mean():.2f} % right"
        if len(names) <= MOST_MATRIX_CLASSES:
            body = matrix(predictions.confusions(network), names)
        else:
            pairs = predictions.most_confused(network, NUM_PAIRS)
            body = table(["it is", "taken for", "images", "of"],
                         [[words[true], words[taken], str(count), str(total)]
                          for true, taken, count, total in pairs], 2,
                         f"the {len(pairs)} most confused pairs of {len(names)} classes")
        parts.append(folded(title, body, is_open=place < 3))
    return Section("confusions", "What is taken for what",
                   f'<div class="beside">{"".join(parts)}</div>{only_first(found)}')


def mistakes_section(found: Sequence[Predictions], words: Mapping[str, str], num_images: int,
                     find_image: FindImage) -> Section:
    parts = []
    for place, network in enumerate(found[:MOST_NETWORKS]):
        wrong = predictions.confident_mistakes(network, num_images)
        items = [thumbnail(find_image(network.names[i]), f"{network.names[i]}",
                           [f"taken for {taken_for(network, i, words)}",
                            f"label: {words_of(network, i, words)}"])
                 for i in wrong]
        title = f"{network.label}: {int((~network.is_right).sum()):,} mistakes"
        body = f'<ul class="images">{"".join(items)}</ul>' if items else note("None.")
        parts.append(folded(title, body, is_open=place < 3))
    return Section("mistakes", "Most confident mistakes", "".join(parts) + only_first(found))


def disagreement_section(pairs: Sequence[tuple[Predictions, Predictions]],
                         words: Mapping[str, str], num_images: int, find_image: FindImage
                         ) -> Section:
    """`pairs`: a teacher and its student each, or what else is to be compared."""
    parts = []
    for place, (first, other) in enumerate(pairs[:MOST_NETWORKS]):
        differ = first.best != other.best
        counts = [("both right", first.is_right & other.is_right),
                  (f"only {first.label} right", first.is_right & ~other.is_right),
                  (f"only {other.label} right", ~first.is_right & other.is_right),
                  ("both wrong, in the same way", ~first.is_right & ~differ),
                  ("both wrong, in different ways", ~first.is_right & ~other.is_right & differ)]
        rows = [[name, f"{int(mask.sum()):,}", f"{100 * mask.mean():.1f}"]
                for name, mask in counts]
        items = [thumbnail(find_image(first.names[i]), first.names[i],
                           [f"{network.label}: {taken_for(network, i, words)}"
                            for network in (first, other)]
                           + [f"label: {words_of(first, i, words)}"])
                 for i in predictions.disagreements(first, other, num_images)]
        body = table(["", "images", "%"], rows, 1, "who is right") + (
            f'<ul class="images">{"".join(items)}</ul>')
        parts.append(folded(f"{first.label} and {other.label}: {100 * (1 - differ.mean()):.2f} % "
                            "agreement", body, is_open=place < 3))
    return Section("disagreement", "Where student and teacher disagree", "".join(parts))


def taken_for(network: Predictions, place: int, words: Mapping[str, str]) -> str:
    return f"{words[network.classes[network.best[place]]]}, {network.prob[place]:.0%}"


def words_of(network: Predictions, place: int, words: Mapping[str, str]) -> str:
    return words[network.classes[network.truth[place]]]


def only_first(found: Sequence[Predictions]) -> str:
    if len(found) <= MOST_NETWORKS:
        return ""
    return note(f"The first {MOST_NETWORKS} of {len(found)} networks.")


# Receptive fields


def fields_section(folder: Path) -> Section:
    """The maps and the extents that analysis.erf left in a folder. Raises UserError for a folder
    without them."""
    paths = sorted(folder.glob("*.npy"))
    if not paths:
        raise UserError(f"--erf {folder} holds no maps (*.npy) of analysis.erf.")
    figures = []
    for path in paths[:4 * MOST_NETWORKS]:
        uri = data_uri(field_image(read_field(path).contribution), quality=85)
        figures.append(f'<figure><img src="{uri}" alt="contribution map of {escape(path.stem)}">'
                       f"<figcaption>{escape(path.stem)}</figcaption></figure>")
    parts = [f'<div class="maps">{"".join(figures)}</div>',
             note("How much each pixel moves the centre of the last feature map, from "
                  f"{SMALLEST_SHOWN:g} of the map's largest value (dark) to that value (light), on "
                  "a logarithmic scale.")]
    text = folder / "erf.csv"
    if text.is_file():
        parts.append(extents_table(text))
    return Section("fields", "Receptive fields", "".join(parts))


def field_image(contribution: np.ndarray) -> Image.Image:
    """(H, W) -> its colours, at most MAP pixels wide and high."""
    values = np.maximum(contribution / contribution.max(), SMALLEST_SHOWN)
    values = 1 - np.log10(values) / np.log10(SMALLEST_SHOWN)  # 0 ... 1
    places = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(values, places, channel) for channel in COLOURS.T], axis=2)
    image = Image.fromarray(colours.round().astype(np.uint8))
    image.thumbnail((MAP, MAP))
    return image


def extents_table(path: Path) -> str:
    """Of analysis.erf's CSV: side and threshold of each network. Raises UserError for another."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            lines.setdefault((row["network"], row["scale"], row["size"]), []).append(row["side"])
        thresholds = list(dict.fromkeys(f"side {float(row['threshold']):.0%}" for row in rows))
        is_good = rows and all(len(sides) == len(thresholds) for sides in lines.values())
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        is_good = False
    if not is_good:
        raise UserError(f"{path} is no table of analysis.erf. Run analysis.erf again, or leave "
                        "out --erf.")
    return table(["network", "scale", "px", *thresholds],
                 [[*key, *sides] for key, sides in lines.items()], 3,
                 "side of the square that holds this share of the field, in pixels")


def missing_section(lines: Sequence[str]) -> Section:
    """What is not there, and which flag brings it."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Section("missing", "Not on this page", f'<ul class="note">{items}</ul>')
