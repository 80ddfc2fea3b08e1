"""One table of any number of runs: accuracy over seeds, and what the students gain from teachers.

    python -m analysis.report runs/*
    python -m analysis.report runs/* --out gains      # also writes gains.md and gains.csv
"""
import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from analysis.common import Run, csv_text, read_runs
from utils.checkpoint import FREE_ON_RESUME
from utils.config import Parser, program
from utils.files import write_text_atomically
from utils.log import markdown_table
from utils.registry import UserError

# What may differ between runs of one row: the seed, and where and how they ran.
NOT_COMPARED = FREE_ON_RESUME - {"student_weights", "student_weights_key"} | {"seed"}
# What may also differ between a distilled run and the supervised one its gain is measured against.
TEACHING = NOT_COMPARED | {"teacher", "teacher_weights", "teacher_weights_key", "loss"}

MARK = "<!-- written by python -m analysis.report -->"  # by which it knows its own files
DEFINITIONS = """\
- top-1: last epoch (of averaged weights if kept), mean +- sample standard deviation over n seeds.
- teacher top-1: on the same images at the student's input size, mean over the seeds.
- direct gain: points over the supervised run with the same student, recipe and epochs, trained with
  plain cross-entropy if there are several. Paths of the data are not compared, their sizes are.
- relative gain: direct gain / (teacher top-1 - supervised top-1); 1 is the teacher's accuracy. '-'
  where that lead is unknown or, to two decimals, not positive: the ratio is undefined or misleading
  when the student already equals the teacher."""
DIFFERS = "- differs in: the settings in which rows of the same names and epochs are not alike."


class Row(NamedTuple):
    """One setting: a line of the tables, a record of the CSV."""
    teacher: str
    teacher_acc1: float | None
    student: str
    loss: str
    differs: str  # settings in which it is not like other rows of these names and epochs
    epochs: int
    n: int  # seeds
    acc1: float
    acc1_std: float | None  # None for one seed
    direct_gain: float | None
    relative_gain: float | None
    not_compared: str  # why a distilled student has no gain
    runs: str


def is_supervised(run: Run) -> bool:
    return run.args["teacher"] == ["none"]


def settings(run: Run, left_out: frozenset[str] = NOT_COMPARED) -> dict[str, Any]:
    """What runs of one row share. Each seed may have the teacher of its own seed."""
    if is_supervised(run):
        left_out |= {"teacher_weights", "teacher_weights_key"}
    shared = {name: value for name, value in run.args.items() if name not in left_out}
    if "teacher_weights" in shared:
        shared["teacher_weights"] = re.sub(r"-seed\d+", "", str(shared["teacher_weights"]))
    return shared


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [name for name in {**first, **second}
            if first.get(name, "not set") != second.get(name, "not set")]


def described(values: dict[str, Any], names: list[str]) -> str:
    """'lr 0.01, opt_betas 0.9 0.95'"""
    found = []
    for name in names:
        value = values.get(name, "not set")
        if isinstance(value, list):
            value = " ".join(map(str, value))
        found.append(f"{name} {value}")
    return ", ".join(found)


def group_runs(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """Finished runs that differ in their seed only, together; and why the others are left out."""
    groups: list[list[Run]] = []
    left_out = []
    for run in runs:
        if run.num_epochs_done != run.args["epochs"]:
            left_out.append(f"{run.folder} (epoch {run.num_epochs_done} of {run.args['epochs']})")
            continue
        group = next((group for group in groups if settings(group[0]) == settings(run)), [])
        twins = [other.folder for other in group if other.args["seed"] == run.args["seed"]]
        if twins:
            left_out.append(f"{run.folder} (same settings and seed as {twins[0]})")
        elif group:
            group.append(run)
        else:
            groups.append([run])
    return groups, left_out


def find_baseline(run: Run, groups: list[list[Run]]) -> tuple[float | None, str]:
    """Top-1 without the teacher; or None, and in what the nearest run of this student differs."""
    wanted, student = settings(run, TEACHING), run.args["student"][0]
    candidates = [(differing(wanted, settings(group[0], TEACHING)), group) for group in groups
                  if is_supervised(group[0]) and group[0].args["student"][0] == student]
    if not candidates:
        return None, f"no finished supervised run of {student}"
    equal = [group for names, group in candidates if not names]
    plain = [group for group in equal if group[0].args["loss"] == [["ce"]]] or equal
    if len(plain) > 1:
        return None, (f"{len(plain)} supervised runs differ in their loss only "
                      f"({', '.join(str(group[0].folder) for group in plain)})")
    if plain:
        return statistics.mean(other.acc1 for other in plain[0]), ""
    names, nearest = min(candidates, key=lambda candidate: len(candidate[0]))
    return None, (f"no finished supervised run with {described(wanted, names)} (nearest: "
                  f"{nearest[0].folder}, {described(settings(nearest[0]), names)})")


def names_of(run: Run) -> tuple:
    """What a row says of a run without its other settings."""
    return tuple(str(run.args.get(name)) for name in ("teacher", "student", "sparsity", "loss",
                                                      "epochs"))


def what_differs(run: Run, groups: list[list[Run]]) -> str:
    """'lr 0.01': in what it is not like the groups of the same names and epochs."""
    own = settings(run)
    names = [name for group in groups if names_of(group[0]) == names_of(run)
             for name in differing(own, settings(group[0]))]
    return described(own, sorted(set(names)))


def make_row(group: list[Run], groups: list[list[Run]]) -> Row:
    run, acc1 = group[0], statistics.mean(run.acc1 for run in group)
    baseline, not_compared = (None, "") if is_supervised(run) else find_baseline(run, groups)
    student = " ".join(run.args["student"])
    if run.args.get("sparsity"):
        student += f", sparsity {run.args['sparsity']:g}"
    teacher = direct = relative = None
    if all(run.teacher_acc1 is not None for run in group):
        teacher = statistics.mean(run.teacher_acc1 for run in group)
    if baseline is not None:
        direct = acc1 - baseline
        if teacher is not None and round(teacher - baseline, 2) > 0:
            relative = direct / (teacher - baseline)
    std = statistics.stdev(run.acc1 for run in group) if len(group) > 1 else None
    return Row(" ".join(run.args["teacher"]), teacher, student,
               " + ".join(" ".join(spec) for spec in run.args["loss"]),
               what_differs(run, groups), run.args["epochs"], len(group), acc1, std, direct,
               relative, not_compared, ", ".join(str(run.folder) for run in group))


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]], int]:
    """Header and lines of a table, and how many columns are text; without `differs in` where
    nothing does."""
    is_told = any(row.differs for row in rows)
    header = ["teacher", "teacher top-1", "student", "loss", *["differs in"] * is_told, "epochs",
              "n", "top-1 %", "direct gain", "relative gain"]
    lines = []
    for row in rows:
        acc1 = f"{row.acc1:.2f}"
        if row.acc1_std is not None:
            acc1 += f" +- {row.acc1_std:.2f}"
        lines.append([row.teacher, number(row.teacher_acc1, ".2f"), row.student, row.loss,
                      *[row.differs or "-"] * is_told, str(row.epochs), str(row.n), acc1,
                      number(row.direct_gain, "+.2f"), number(row.relative_gain, "+.2f")])
    return header, lines, header.index("epochs")


def table(rows: list[Row]) -> str:
    return markdown_table(*cells(rows))


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(rows: list[Row], left_out: list[str]) -> str:
    """The table and its definitions; apart from it, what could not be compared and why."""
    compared = [row for row in rows if not row.not_compared]
    others = [row for row in rows if row.not_compared]
    definitions = DEFINITIONS
    if any(row.differs for row in rows):
        definitions += f"\n{DIFFERS}"
    parts = []
    if compared:
        parts += [table(compared), definitions]
    if others:
        parts += ["Without a supervised run to compare with:", table(others),
                  "\n".join(f"- {row.runs}: {row.not_compared}" for row in others)]
    if not compared:
        parts.append(definitions)
    notes = [f"- left out: {reason}" for reason in left_out]
    return "\n\n".join(parts + ["\n".join(notes)]).rstrip()


def check_out(base: Path) -> None:
    if not base.name or not base.parent.is_dir():
        raise UserError(f"--out {base} is no name in an existing folder; make {base.parent} or "
                        "name another.")


def write_files(base: Path, texts: dict[str, str]) -> None:
    """`texts` by suffix. UserError where there is a file of another kind."""
    files = {Path(f"{base}{suffix}"): text for suffix, text in texts.items()}
    for path, text in files.items():
        if path.exists() and not starts_with(path, text.splitlines()[0]):
            raise UserError(f"--out {base} would overwrite {path}, which this command did not "
                            "write. Give another name.")
    for path, text in files.items():
        write_text_atomically(text, path)


def starts_with(path: Path, line: str) -> bool:
    """False for what is no file that can be read."""
    try:
        return path.read_bytes().startswith(line.encode())
    except OSError:
        return False


def build_parser() -> Parser:
    parser = Parser(prog="analysis.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, metavar="NAME", help="also write NAME.md and NAME.csv")
    return parser


@program("analysis.report", build_parser)
def main(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_out(args.out)
    runs, unreadable = read_runs(args.runs)
    groups, left_out = group_runs(runs)
    rows = [make_row(group, groups) for group in groups]
    text = markdown(rows, unreadable + left_out)
    print(text)
    if args.out is not None:
        write_files(args.out, {".md": f"{MARK}\n{text}\n", ".csv": csv_text(rows, digits=4)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
