"""One table of any number of runs: accuracy over seeds, and the gain from the teacher.

    python -m analysis.report runs/*
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.config import Parser
from utils.errors import UserError
from utils.run_folder import FREE_ON_RESUME

# What may differ between runs of one row: the seed, and where and how they ran.
NOT_COMPARED = FREE_ON_RESUME - {"student_weights", "student_weights_key"} | {"seed"}
# What may also differ between a distilled run and the supervised one its gain is measured against.
TEACHING = {"teacher", "teacher_weights", "loss"}


class Run(NamedTuple):
    folder: Path
    args: dict[str, Any]
    acc1: float  # last epoch, percent; of the averaged weights when the run kept them
    num_epochs_done: int


def read_run(folder: Path) -> Run:
    """A run folder's settings and its last line of log.txt; UserError where there is none."""
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text())
        records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{folder} (no run with a finished epoch: {Path(error.filename).name} is "
                        "missing)") from None
    if not records:
        raise UserError(f"{folder} (no finished epoch)")
    last = records[-1]
    return Run(folder, args, last.get("test_acc1_ema", last["test_acc1"]), last["epoch"] + 1)


def group_key(args: dict[str, Any], left_out: frozenset[str]) -> str:
    """The settings as text, but for some. Each seed may have the teacher of its own seed."""
    kept = {name: value for name, value in args.items() if name not in left_out}
    if "teacher_weights" in kept:
        kept["teacher_weights"] = re.sub(r"-seed\d+", "", kept["teacher_weights"])
    return json.dumps(kept)


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and what is none with the reason. Raises UserError when nothing is left."""
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError(f"nothing to report on: {'; '.join(left_out)}.")
    return runs, left_out


def table(runs: list[Run], unreadable: list[str]) -> str:
    """A Markdown table, one row per setting, and the runs that are left out with the reason."""
    groups, left_out = group_runs(runs)
    supervised = {group_key(group[0].args, NOT_COMPARED | TEACHING): mean(group)
                  for group in groups if group[0].args["teacher"] == ["none"]}
    rows = ["| teacher | student | loss | epochs | n | top-1 % | direct gain |",
            "|---|---|---|---:|---:|---:|---:|"]
    for group in groups:
        args = group[0].args
        baseline = supervised.get(group_key(args, NOT_COMPARED | TEACHING))
        gain = "-"
        if args["teacher"] != ["none"] and baseline is not None:
            gain = f"{mean(group) - baseline:+.2f}"
        loss = " + ".join(" ".join(words) for words in args["loss"])
        student = " ".join(args["student"])
        if args.get("sparsity"):
            student += f", sparsity {args['sparsity']:g}"
        rows.append(f"| {' '.join(args['teacher'])} | {student} | {loss} | "
                    f"{args['epochs']} | {len(group)} | {spread(group)} | {gain} |")
    notes = ["", "top-1: last epoch, mean +- sample standard deviation over n seeds. Direct gain: "
             "points over the supervised run with the same student, recipe and epochs."]
    return "\n".join(rows + notes + [f"left out: {reason}" for reason in unreadable + left_out])


def group_runs(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """Finished runs that differ in their seed only, together; and why the others are left out."""
    groups: dict[str, list[Run]] = {}
    left_out = []
    for run in runs:
        group = groups.setdefault(group_key(run.args, NOT_COMPARED), [])
        twin = next((other for other in group if other.args["seed"] == run.args["seed"]), None)
        if run.num_epochs_done != run.args["epochs"]:
            left_out.append(f"{run.folder} (epoch {run.num_epochs_done} of {run.args['epochs']})")
        elif twin is not None:
            left_out.append(f"{run.folder} (same settings and seed as {twin.folder})")
        else:
            group.append(run)
    return [group for group in groups.values() if group], left_out


def mean(group: list[Run]) -> float:
    return statistics.mean(run.acc1 for run in group)


def spread(group: list[Run]) -> str:
    if len(group) == 1:
        return f"{group[0].acc1:.2f}"
    return f"{mean(group):.2f} +- {statistics.stdev(run.acc1 for run in group):.2f}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="analysis.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    try:
        args: argparse.Namespace = parser.parse(sys.argv[1:] if argv is None else argv)
        print(table(*read_runs(args.runs)))
    except UserError as error:
        print(f"analysis.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
