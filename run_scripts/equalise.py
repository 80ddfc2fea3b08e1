"""Says which trainings make teachers of several families equally accurate, and which to take.

    python run_scripts/equalise.py RUNS --families swin slak --longest 24 --tolerance 0.5 --tries 4

The rule, on seeds that nothing else uses. A training is a whole schedule of some number of epochs.
1. The first family, which is expected to be the weakest, is trained with the longest schedule. Its
   top-1 is the target; where another family stays below with the longest one, the lower of them is.
2. The others begin with half of it. A choice is one run of each family; it is good where no two
   differ by more than the tolerance. If there is a good one, that with the highest lowest top-1 is
   taken, and nothing more is trained.
3. Else each family whose nearest run is more than half the tolerance from the target is trained
   again. Where its runs lie on both sides of the target, with the number of epochs that a straight
   line through the nearest two of them, on a scale of log(epochs), gives; where all are above, with
   half the fewest; where all are below, with twice the most. Where no other whole number is left,
   with the number of epochs of the nearest run, and the next seed.
4. After the given number of trainings of each such family the choice with the smallest spread is
   taken as it is, and said to be unequal.

Prints `train FAMILY EPOCHS SEED FOLDER` for each training to do next; or `take FAMILY EPOCHS SEED
FOLDER TOP-1` for each family, and whether these are equal. What was asked for is kept in
RUNS/asked.txt, and asked for again until it is finished, so that an interrupted study goes on as if
it had never stopped.
"""
import argparse
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple


class Trained(NamedTuple):
    family: str
    epochs: int
    seed: int
    acc1: float = math.nan  # percent, after the last epoch


def folder_of(runs: Path, run: Trained) -> Path:
    return runs / f"{run.family}-{run.epochs}ep-seed{run.seed}"


def accuracy(folder: Path, epochs: int) -> float | None:
    """Top-1 after the last of `epochs`, of averaged weights if kept; None while it is missing."""
    try:
        lines = (folder / "log.txt").read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut off; the training program mends it
            continue
        if record["epoch"] == epochs - 1:
            averaged = record.get("test_acc1_ema")
            return record["test_acc1"] if averaged is None else averaged
        return None
    return None


def next_training(runs: list[Trained], target: float, longest: int, first_seed: int) -> Trained:
    """Of one family, whose nearest run is too far from the target."""
    first = sorted((run for run in runs if run.seed == first_seed), key=lambda run: run.epochs)
    above = next((run for run in first if run.acc1 > target), None)
    below = [run for run in first if run.acc1 <= target
             and (above is None or run.epochs < above.epochs)]
    if above is None:
        fewest, epochs, most = below[-1].epochs + 1, 2 * below[-1].epochs, longest
    elif not below:
        fewest, epochs, most = 1, above.epochs // 2, above.epochs - 1
    else:
        low = below[-1]
        share = (target - low.acc1) / (above.acc1 - low.acc1)
        epochs = round(low.epochs * (above.epochs / low.epochs) ** share)
        fewest, most = low.epochs + 1, above.epochs - 1
    if fewest > most:
        return repeated(min(runs, key=lambda run: abs(run.acc1 - target)), runs)
    return Trained(runs[0].family, min(max(epochs, fewest), most), first_seed)


def repeated(nearest: Trained, runs: list[Trained]) -> Trained:
    """The same number of epochs with the next seed."""
    seeds = [run.seed for run in runs if run.epochs == nearest.epochs]
    return Trained(nearest.family, nearest.epochs, max(seeds) + 1)


def spread(choice: tuple[Trained, ...]) -> float:
    accuracies = [run.acc1 for run in choice]
    return max(accuracies) - min(accuracies)


def choose(by_family: dict[str, list[Trained]], tolerance: float
           ) -> tuple[tuple[Trained, ...], bool]:
    """One run of each family; and whether no two differ by more than the tolerance."""
    choices = list(itertools.product(*by_family.values()))
    good = [choice for choice in choices if spread(choice) <= tolerance + 1e-9]
    if good:
        best = max(good, key=lambda choice: (min(run.acc1 for run in choice), -spread(choice)))
        return best, True
    return min(choices, key=spread), False


def decide(by_family: dict[str, list[Trained]], *, longest: int, tolerance: float, tries: int,
           first_seed: int) -> tuple[list[Trained], tuple[Trained, ...], bool]:
    """What to train next; or nothing, the runs to take, and whether they are equal."""
    weakest = next(iter(by_family))
    start = [Trained(family, longest if family == weakest else max(1, longest // 2), first_seed)
             for family in by_family]
    has = {family: {(run.epochs, run.seed) for run in runs} for family, runs in by_family.items()}
    untrained = [run for run in start if (run.epochs, run.seed) not in has[run.family]]
    if untrained:
        return untrained, (), False
    choice, is_equal = choose(by_family, tolerance)
    if is_equal:
        return [], choice, True
    target = min(run.acc1 for runs in by_family.values() for run in runs
                 if (run.epochs, run.seed) == (longest, first_seed))
    wanted = [next_training(runs, target, longest, first_seed) for runs in by_family.values()
              if len(runs) < tries
              and min(abs(run.acc1 - target) for run in runs) > tolerance / 2]
    return wanted, choice if not wanted else (), False


def read_asked(path: Path) -> list[Trained]:
    if not path.exists():
        return []
    words = [line.split() for line in path.read_text().splitlines()]
    return [Trained(family, int(epochs), int(seed)) for family, epochs, seed in words]


def add_asked(path: Path, runs: list[Trained]) -> None:
    """By renaming: of half a line another training would be made."""
    text = path.read_text() if path.exists() else ""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text + "".join(f"{run.family} {run.epochs} {run.seed}\n" for run in runs))
    os.replace(temporary, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="equalise.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the teachers' run folders")
    parser.add_argument("--families", nargs="+", required=True, help="the weakest first")
    parser.add_argument("--longest", type=int, required=True, help="epochs")
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of top-1")
    parser.add_argument("--tries", type=int, default=4, help="most trainings of a family")
    parser.add_argument("--seed", type=int, default=100, help="the first")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    asked = args.runs / "asked.txt"
    by_family: dict[str, list[Trained]] = {family: [] for family in args.families}
    missing = []
    for run in read_asked(asked):
        if run.family not in by_family:
            continue
        acc1 = accuracy(folder_of(args.runs, run), run.epochs)
        if acc1 is None:
            missing.append(run)
        else:
            by_family[run.family].append(run._replace(acc1=acc1))
    if not missing:
        missing, choice, is_equal = decide(by_family, longest=args.longest,
                                           tolerance=args.tolerance, tries=args.tries,
                                           first_seed=args.seed)
        add_asked(asked, missing)
    for run in missing:
        print("train", run.family, run.epochs, run.seed, folder_of(args.runs, run))
    if not missing:
        for run in choice:
            print("take", run.family, run.epochs, run.seed, folder_of(args.runs, run),
                  f"{run.acc1:.2f}")
        verdict = "equal" if is_equal else "NOT equal"
        print(f"teachers: {verdict} within {args.tolerance:g} points (spread "
              f"{spread(choice):.2f}) after {sum(map(len, by_family.values()))} trainings")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
