"""Accuracy and each loss term over the epochs of several runs, in one picture and one table.

    python -m analysis.curves runs/*                              # curves.png, curves.csv
    python -m analysis.curves runs/A runs/B --also agreement train_lr --out a_and_b
"""
import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.common import (
    NO_PICTURES,
    Run,
    csv_text,
    figure_class,
    in_lines,
    new_files,
    read_runs,
    save_figure,
    unique_labels,
)
from utils.checkpoint import write_text_atomically
from utils.config import Parser
from utils.distributed import run_program
from utils.log import print_once
from utils.registry import UserError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = ("test_acc1", "test_acc1_ema")
PANELS_PER_ROW = 3


class Row(NamedTuple):
    """A value: a line of the CSV."""
    run: str
    key: str  # as log.txt has it
    epoch: int
    value: float


def loss_terms(run: Run) -> list[str]:
    """Keys of the raw terms; of their weighted sum, too, where there are several."""
    terms = [f"train_{words[0]}" for words in run.args["loss"]]
    return ["train_loss"] * (len(terms) > 1) + terms


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


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def table_rows(runs: Mapping[str, Run], keys: Sequence[str]) -> list[Row]:
    return [Row(label, key, record["epoch"], record[key]) for label, run in runs.items()
            for key in keys for record in run.records if is_number(record.get(key))]


def draw(rows: Sequence[Row], labels: Sequence[str], keys: Sequence[str]) -> "Figure":
    """A panel for each key, a line for each run that has it."""
    columns = min(PANELS_PER_ROW, len(keys))
    lines = -(-len(keys) // columns)
    legend = [in_lines(label, 70) for label in labels]
    height = 2.9 * lines + 0.25 * sum(1 + text.count("\n") for text in legend) + 0.3
    figure = figure_class()(figsize=(max(6, 4.2 * columns), height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, key in zip(axes.flat, keys):
        for number, label in enumerate(labels):
            points = [(row.epoch + 1, row.value) for row in rows if (row.run, row.key) == (label,
                                                                                           key)]
            if points:
                axis.plot(*zip(*points), color=f"C{number % 10}", label=legend[number],
                          linestyle=("-", "--", ":", "-.")[number // 10 % 4],
                          marker="o", markersize=3, linewidth=1.2)
        axis.set_title("top-1 %" if key == "test_acc1" else key, fontsize=10)
        axis.set_xlabel("epochs done", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(keys):]:
        axis.set_visible(False)
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(
        *axis.get_legend_handles_labels()))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=9)
    return figure


def build_parser() -> Parser:
    parser = Parser(prog="analysis.curves", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, help="run folders")
    flag("--also", nargs="+", default=[], metavar="KEY", help="more keys of log.txt")
    flag("--labels", nargs="+", default=None, metavar="NAME", help="names for the runs, in order")
    flag("--out", type=Path, default=Path("curves"), metavar="NAME", help="for NAME.png, NAME.csv")
    flag("--overwrite", action=argparse.BooleanOptionalAction, default=False,
         help="replace these files")
    return parser


def main(argv: list[str] | None = None) -> int:
    def program() -> int:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        found, left_out = read_runs(args.runs)
        for reason in left_out:
            print_once(f"left out: {reason}")
        names = args.labels or unique_labels([run.folder.resolve().name for run in found])
        if len(set(names)) != len(found):
            raise UserError(f"--labels needs {len(found)} different names, one for each run that "
                            f"could be read; got {', '.join(names)}.")
        base = args.out.with_suffix("") if args.out.suffix in (".png", ".csv") else args.out
        picture, table = (base.with_name(base.name + end) for end in (".png", ".csv"))
        new_files([picture, table], args.overwrite)
        runs = dict(zip(names, found))
        keys = chosen_keys(found, args.also)
        rows = table_rows(runs, keys)
        write_text_atomically(csv_text(rows), table)
        if figure_class() is None:
            print_once(f"{table}; {NO_PICTURES}")
            return 0
        save_figure(draw(rows, names, keys), picture)
        print_once(f"{picture} and {table}: {', '.join(keys)} of {len(runs)} run(s)")
        return 0

    return run_program("analysis.curves", program)


if __name__ == "__main__":
    sys.exit(main())
