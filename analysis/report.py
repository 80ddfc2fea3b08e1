"""Tables of any number of runs: accuracy over seeds, what the students gain from teachers, and
which of two equally accurate teachers they gain more from.

    python -m analysis.report runs/*
    python -m analysis.report runs/* --versus slak_t swin_t     # or: --versus all
    python -m analysis.report runs/* --out gains      # also writes gains.md and gains.csv
"""
import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from analysis.common import Run, by_group, csv_text, read_runs
from analysis.intervals import Difference, difference, paired
from utils.checkpoint import FREE_ON_RESUME
from utils.config import Parser, at_least, program
from utils.files import write_text_atomically
from utils.log import markdown_table
from utils.registry import UserError

# What may differ between runs of one row: the seed, and where and how they ran.
NOT_COMPARED = FREE_ON_RESUME - {"student_weights", "student_weights_key"} | {"seed"}
# What may also differ between a distilled run and the supervised one its gain is measured against.
TEACHING = NOT_COMPARED | {"teacher", "teacher_weights", "teacher_weights_key", "loss",
                           "teacher_cache_top"}

# What may differ between runs whose teachers are compared; the loss may not.
COMPARED = TEACHING - {"loss"}
NO_DIFFERENCE = Difference(None, None, None, None, 0, "")

MARK = "<!-- written by python -m analysis.report -->"  # by which it knows its own files
DEFINITIONS = """\
- top-1: last epoch (of averaged weights if kept), mean +- sample standard deviation over n seeds.
- teacher top-1: on the same images at the student's input size, mean over the seeds.
- direct gain: points over the supervised run with the same student, recipe and epochs, trained with
  plain cross-entropy if there are several. Paths of the data are not compared, their sizes are.
- 95 % interval: of the gain, by Student's t: over the differences seed by seed where both rows
  have the same seeds, else after Welch, which ignores what seeds share. '-' for one seed. Each
  interval stands by itself; none is corrected for their number.
- relative gain: direct gain / (teacher top-1 - supervised top-1); 1 is the teacher's accuracy. '-'
  where that lead is unknown or, to two decimals, not positive: the ratio is undefined or misleading
  when the student already equals the teacher."""
LONGER = """\
- over longer: points over the longest supervised run that differs in nothing but having more epochs
  (in brackets), with its 95 % interval."""
VERSUS = """\
- A - B: points of the students' top-1, mean +- sample standard deviation of the differences seed by
  seed over the n seeds that both have, with the 95 % interval of the mean by Student's t.
- Teachers whose own top-1 differ by more than --tolerance points are not compared."""
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
    gain_low: float | None  # its 95 % interval; None for one seed
    gain_high: float | None
    gain_method: str  # paired or welch
    relative_gain: float | None
    longer_epochs: int | None  # of the longest supervised run, where it has more
    longer_gain: float | None
    longer_low: float | None
    longer_high: float | None
    not_compared: str  # why a distilled student has no gain
    runs: str


class Versus(NamedTuple):
    """Two teachers of the same student, loss and recipe: a line of the second table."""
    first: str
    first_acc1: float | None
    second: str
    second_acc1: float | None
    student: str
    loss: str
    epochs: int
    n: int  # seeds that both have; 0 where they are not compared
    difference: float | None  # points of the student's accuracy
    std: float | None
    low: float | None
    high: float | None
    reason: str  # why there is no difference


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


def find_baseline(run: Run, groups: list[list[Run]]) -> tuple[list[Run], str]:
    """The same student without the teacher; or none, and in what the nearest run of it differs."""
    wanted, student = settings(run, TEACHING), run.args["student"][0]
    candidates = [(differing(wanted, settings(group[0], TEACHING)), group) for group in groups
                  if is_supervised(group[0]) and group[0].args["student"][0] == student]
    if not candidates:
        return [], f"no finished supervised run of {student}"
    plain = plain_ones([group for names, group in candidates if not names])
    if len(plain) > 1:
        return [], (f"{len(plain)} supervised runs differ in their loss only "
                    f"({', '.join(str(group[0].folder) for group in plain)})")
    if plain:
        return plain[0], ""
    names, nearest = min(candidates, key=lambda candidate: len(candidate[0]))
    return [], (f"no finished supervised run with {described(wanted, names)} (nearest: "
                f"{nearest[0].folder}, {described(settings(nearest[0]), names)})")


def find_longer(run: Run, groups: list[list[Run]]) -> list[Run]:
    """The longest supervised runs of the same student and recipe with more epochs, if any."""
    wanted = settings(run, TEACHING | {"epochs"})
    longer = plain_ones([group for group in groups if is_supervised(group[0])
                         and group[0].args["epochs"] > run.args["epochs"]
                         and settings(group[0], TEACHING | {"epochs"}) == wanted])
    return max(longer, key=lambda group: group[0].args["epochs"], default=[])


def plain_ones(groups: list[list[Run]]) -> list[list[Run]]:
    """Those trained with plain cross-entropy; all, if none is."""
    return [group for group in groups if group[0].args["loss"] == [["ce"]]] or groups


def by_seed(group: list[Run]) -> dict[int, float]:
    return {run.args["seed"]: run.acc1 for run in group}


def teacher_accuracy(group: list[Run]) -> float | None:
    """Mean over the seeds; None where a run did not measure it."""
    if any(run.teacher_acc1 is None for run in group):
        return None
    return statistics.mean(run.teacher_acc1 for run in group)


def student_name(run: Run) -> str:
    name = " ".join(run.args["student"])
    return f"{name}, sparsity {run.args['sparsity']:g}" if run.args.get("sparsity") else name


def loss_name(run: Run) -> str:
    return " + ".join(" ".join(spec) for spec in run.args["loss"])


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
    baseline, longer, not_compared = [], [], ""
    if not is_supervised(run):
        baseline, not_compared = find_baseline(run, groups)
        longer = find_longer(run, groups)
    gain = difference(by_seed(group), by_seed(baseline)) if baseline else NO_DIFFERENCE
    over = difference(by_seed(group), by_seed(longer)) if longer else NO_DIFFERENCE
    teacher, relative = teacher_accuracy(group), None
    if baseline and teacher is not None:
        lead = teacher - statistics.mean(by_seed(baseline).values())
        if round(lead, 2) > 0:
            relative = gain.mean / lead
    std = statistics.stdev(run.acc1 for run in group) if len(group) > 1 else None
    return Row(" ".join(run.args["teacher"]), teacher, student_name(run), loss_name(run),
               what_differs(run, groups), run.args["epochs"], len(group), acc1, std, gain.mean,
               gain.low, gain.high, gain.method, relative,
               longer[0].args["epochs"] if longer else None, over.mean, over.low, over.high,
               not_compared, ", ".join(str(run.folder) for run in group))


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]], int]:
    """Header and lines of a table, and how many columns are text; without the columns in which
    no row has a value."""
    is_told = any(row.differs for row in rows)
    is_wide = any(row.gain_low is not None for row in rows)
    is_longer = any(row.longer_gain is not None for row in rows)
    header = ["teacher", "teacher top-1", "student", "loss", *["differs in"] * is_told, "epochs",
              "n", "top-1 %", "direct gain", *["95 % interval"] * is_wide, "relative gain",
              *["over longer"] * is_longer]
    lines = []
    for row in rows:
        acc1 = f"{row.acc1:.2f}"
        if row.acc1_std is not None:
            acc1 += f" +- {row.acc1_std:.2f}"
        over = "-"
        if row.longer_gain is not None:
            over = f"{row.longer_gain:+.2f} {interval(row.longer_low, row.longer_high)}"
            over = f"{over.removesuffix(' -')} ({row.longer_epochs})"
        lines.append([row.teacher, number(row.teacher_acc1, ".2f"), row.student, row.loss,
                      *[row.differs or "-"] * is_told, str(row.epochs), str(row.n), acc1,
                      number(row.direct_gain, "+.2f"),
                      *[interval(row.gain_low, row.gain_high)] * is_wide,
                      number(row.relative_gain, "+.2f"), *[over] * is_longer])
    return header, lines, header.index("epochs")


def interval(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"[{low:+.2f}, {high:+.2f}]"


def table(rows: list[Row]) -> str:
    return markdown_table(*cells(rows))


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(rows: list[Row], left_out: list[str]) -> str:
    """The table and its definitions; apart from it, what could not be compared and why."""
    compared = [row for row in rows if not row.not_compared]
    others = [row for row in rows if row.not_compared]
    definitions = DEFINITIONS
    if any(row.longer_gain is not None for row in rows):
        definitions += f"\n{LONGER}"
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


# Two teachers


def check_versus(words: list[str]) -> tuple[str, str] | None:
    """`all` is None: every pair."""
    if words == ["all"]:
        return None
    if len(words) != 2:
        raise UserError(f"--versus takes two teachers, or the word all; got {' '.join(words)}. Put "
                        "a name with options in quotes.")
    return words[0], words[1]


def compare_teachers(groups: list[list[Run]], pairs: list[tuple[str, str] | None],
                     tolerance: float) -> list[Versus]:
    """A row for each two rows with another teacher and all else alike that `pairs` name. Raises
    UserError for a teacher that no run has."""
    taught = [group for group in groups if not is_supervised(group[0])]
    known = sorted({name for group in taught for name in teacher_names(group)})
    for name in {name for pair in pairs if pair is not None for name in pair} - {*known}:
        raise UserError(f"--versus: no finished run has the teacher {name!r}. Known here: "
                        f"{', '.join(known) or 'none'}.")
    alike = by_group(taught, [repr(sorted({**settings(group[0], COMPARED), "loss": group[0].args[
        "loss"]}.items())) for group in taught])
    return [versus_row(first, second, tolerance) for cell in alike.values()
            for first, second in chosen_pairs(cell, pairs)]


def teacher_names(group: list[Run]) -> list[str]:
    """What --versus may call its teacher: the network, or that with its options."""
    words = group[0].args["teacher"]
    return [words[0], " ".join(words)]


def chosen_pairs(cell: list[list[Run]], pairs: list[tuple[str, str] | None]
                 ) -> list[tuple[list[Run], list[Run]]]:
    found = []
    for pair in pairs:
        for i, first in enumerate(cell):
            for j, second in enumerate(cell):
                if pair is None:
                    is_meant = i < j
                else:
                    is_meant = (i != j and pair[0] in teacher_names(first)
                                and pair[1] in teacher_names(second))
                if is_meant and (first, second) not in found:
                    found.append((first, second))
    return found


def versus_row(first: list[Run], second: list[Run], tolerance: float) -> Versus:
    accuracies = teacher_accuracy(first), teacher_accuracy(second)
    gap, found, reason = None, NO_DIFFERENCE, ""
    if None in accuracies:
        reason = "not compared: the accuracy of a teacher is not known"
    else:
        gap = accuracies[0] - accuracies[1]
        if abs(gap) > tolerance + 1e-9:  # for the decimal fractions that a float cannot hold
            reason = (f"not compared: the teachers differ by {abs(gap):.2f} points, more than "
                      f"--tolerance {tolerance:g}")
    if not reason:
        found = paired(by_seed(first), by_seed(second)) or NO_DIFFERENCE
        if found is NO_DIFFERENCE:
            reason = "not compared: no seed in common"
    run, other = first[0], second[0]
    return Versus(" ".join(run.args["teacher"]), accuracies[0], " ".join(other.args["teacher"]),
                  accuracies[1], student_name(run), loss_name(run), run.args["epochs"], found.n,
                  found.mean, found.std, found.low, found.high, reason)


def versus_markdown(rows: list[Versus]) -> str:
    header = ["teacher A", "top-1 A", "teacher B", "top-1 B", "student", "loss", "epochs", "n",
              "A - B", "95 % interval"]
    lines = []
    for row in rows:
        mean = row.reason or f"{row.difference:+.2f}"
        if row.std is not None:
            mean += f" +- {row.std:.2f}"
        lines.append([row.first, number(row.first_acc1, ".2f"), row.second,
                      number(row.second_acc1, ".2f"), row.student, row.loss, str(row.epochs),
                      str(row.n), mean, interval(row.low, row.high)])
    if not lines:
        return "No two rows differ in these teachers only."
    return f"{markdown_table(header, lines, header.index('epochs'))}\n\n{VERSUS}"


# Files


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
    parser.add_argument("--versus", nargs="+", action="append", default=[], metavar="TEACHER",
                        help="two teachers whose students are compared, A - B, or all: each with "
                        "each; may be repeated")
    parser.add_argument("--tolerance", type=at_least(0.0), default=0.5, metavar="POINTS",
                        help="teachers whose top-1 differ by more are not compared")
    parser.add_argument("--out", type=Path, metavar="NAME", help="also write NAME.md and NAME.csv; "
                        "and NAME-versus.csv with --versus")
    return parser


@program("analysis.report", build_parser)
def main(args: argparse.Namespace) -> int:
    if "tolerance" in args.given and not args.versus:
        raise UserError("--tolerance does nothing without --versus.")
    pairs = [check_versus(words) for words in args.versus]
    if args.out is not None:
        check_out(args.out)
    runs, unreadable = read_runs(args.runs)
    groups, left_out = group_runs(runs)
    rows = [make_row(group, groups) for group in groups]
    texts = {".csv": csv_text(rows, digits=4)} if rows else {}
    text = markdown(rows, unreadable + left_out)
    if pairs:
        compared = compare_teachers(groups, pairs, args.tolerance)
        text += f"\n\n{versus_markdown(compared)}"
        if compared:
            texts["-versus.csv"] = csv_text(compared, digits=4)
    print(text)
    if args.out is not None:
        write_files(args.out, {".md": f"{MARK}\n{text}\n", **texts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
