"""Accuracy and each loss term over the epochs of several runs, in one plot and one table.

    python -m analysis.curves runs/*                              # curves.png, curves.csv
    python -m analysis.curves runs/A runs/B --also agreement train_lr --out a_and_b
"""
import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from analysis.common import (
    NO_PLOTS,
    Run,
    add_output_flags,
    check_new,
    csv_text,
    figure_class,
    in_lines,
    is_number,
    panels,
    read_runs,
    save_figure,
    unique_labels,
)
from utils.config import Parser, program
from utils.files import write_text_atomically
from utils.registry import UserError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = ("test_acc1", "test_acc1_ema")
PANELS_PER_ROW = 3
LINES = ("-", "--", ":", "-.")  # ten runs each, in ten colours


class Row(NamedTuple):
    """A value: a line of the CSV."""
    run: str
    key: str  # as log.txt has it
    epoch: int
    value: float


def loss_terms(run: Run) -> list[str]:
    """Keys of the raw terms; of their weighted sum, too, where there are several."""
    terms = [f"train_{spec[0]}" for spec in run.args["loss"]]
    return ["train_loss", *terms] if len(terms) > 1 else terms


def chosen_keys(runs: Sequence[Run], also: Sequence[str]) -> list[str]:
    """The keys that any of the runs has, accuracy first, losses next, then `also`. Raises UserError
    for a name of `also` that no run knows."""
    known = {key: None for run in runs for record in run.records for key, value in record.items()
             if is_number(value)}
    for key in also:
        if key not in known:
            raise UserError(f"--also {key}: no run has it in its log.txt."
                            f"{did_you_mean(key, known)} There are: {', '.join(known)}.")
    wanted = [*ACCURACY, *(term for run in runs for term in loss_terms(run)), *also]
    return [key for key in dict.fromkeys(wanted) if key in known]


def table_rows(runs: Mapping[str, Run], keys: Sequence[str]) -> list[Row]:
    return [Row(label, key, record["epoch"], record[key]) for label, run in runs.items()
            for key in keys for record in run.records if is_number(record.get(key))]


def draw(rows: Sequence[Row], labels: Sequence[str], keys: Sequence[str]) -> "Figure":
    """A panel for each key, a line for each run that has it."""
    legend = [in_lines(label, 70) for label in labels]
    num_legend_lines = sum(1 + text.count("\n") for text in legend)
    figure, axes = panels(len(keys), PANELS_PER_ROW, width=4.2, height=2.9,
                          margin=0.25 * num_legend_lines + 0.3)
    handles = {}
    for axis, key in zip(axes, keys):
        for number, label in enumerate(labels):
            points = [(row.epoch + 1, row.value) for row in rows
                      if row.run == label and row.key == key]
            if points:
                (handles[legend[number]],) = axis.plot(
                    *zip(*points), color=f"C{number % 10}", marker="o", markersize=3,
                    linestyle=LINES[number // 10 % len(LINES)], linewidth=1.2)
        axis.set_title("top-1 %" if key == "test_acc1" else key, fontsize=10)
        axis.set_xlabel("epochs done", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=9)
    return figure


def build_parser() -> Parser:
    parser = Parser(prog="analysis.curves", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, help="run folders")
    flag("--also", nargs="+", default=[], metavar="KEY", help="more keys of log.txt")
    flag("--labels", nargs="+", default=None, metavar="NAME", help="names for the runs, in order")
    add_output_flags(parser, "curves", "NAME", "for NAME.png, NAME.csv")
    return parser


@program("analysis.curves", build_parser)
def main(args: argparse.Namespace) -> int:
    runs, left_out = read_runs(args.runs)
    for reason in left_out:
        print(f"left out: {reason}")
    labels = args.labels or unique_labels([run.folder.resolve().name for run in runs])
    if len(set(labels)) != len(runs):
        raise UserError(f"--labels needs {len(runs)} different names, one for each run that could "
                        f"be read; got {', '.join(labels)}.")
    base = args.out.with_suffix("") if args.out.suffix in (".png", ".csv") else args.out
    plot, table = (base.with_name(base.name + end) for end in (".png", ".csv"))
    check_new([plot, table], args.overwrite)
    keys = chosen_keys(runs, args.also)
    rows = table_rows(dict(zip(labels, runs)), keys)
    write_text_atomically(csv_text(rows), table)
    if figure_class() is None:
        print(f"{table}; {NO_PLOTS}")
        return 0
    save_figure(draw(rows, labels, keys), plot)
    print(f"{plot} and {table}: {', '.join(keys)} of {len(runs)} run(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
