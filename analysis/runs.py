"""Run folders as train_kd.py leaves them: their settings and what they reached."""
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.errors import UserError, one_line

NEEDED = {"teacher": list, "student": list, "loss": list, "epochs": int, "seed": int}


class Run(NamedTuple):
    folder: Path
    args: dict[str, Any]
    acc1: float  # last epoch, percent; of the averaged weights when the run kept them
    num_epochs_done: int
    teacher_acc1: float | None  # percent
    records: list[dict[str, Any]]  # an epoch each, as in log.txt


def read_run(folder: Path) -> Run:
    """A run folder's settings and its log.txt; UserError where there is none."""
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text())
        records = read_records(folder / "log.txt")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} (no run with a finished epoch: {Path(error.filename).name} is "
                        "missing)") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} (args.yaml or log.txt is damaged: {one_line(error)})") from None
    wrong = [name for name, kind in NEEDED.items()
             if not isinstance(args, dict) or not isinstance(args.get(name), kind)]
    if wrong:
        raise UserError(f"{folder} (args.yaml has no valid {', '.join(wrong)})")
    last = records[-1]
    return Run(folder, args, last.get("test_acc1_ema", last["test_acc1"]), last["epoch"] + 1,
               last.get("teacher_acc1"), records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.txt, at least one. Raises UserError for one that is none."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            numbers = [record["epoch"], record["test_acc1"], record.get("test_acc1_ema", 0),
                       record.get("teacher_acc1") or 0]
            is_good = all(map(math.isfinite, numbers))
        except (ValueError, KeyError, TypeError, AttributeError):
            is_good = False
        if not is_good:
            raise UserError(f"{path.parent} (line {number} of {path} is no JSON object with epoch "
                            "and test_acc1)")
        records.append(record)
    if not records:
        raise UserError(f"{path.parent} (no finished epoch)")
    return records


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
