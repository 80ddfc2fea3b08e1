"""Attacks the programs until the time is over, and counts."""
import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.campaign import base, process
from tests.campaign.process import Result

# Kind: its module, and its share of the time of `all`.
KINDS = {"kills": ("kills", 10), "flags": ("words", 6), "recipes": ("words", 2),
         "logs": ("words", 1), "checkpoints": ("checkpoints", 4), "weights": ("weights", 4),
         "images": ("images", 3)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--minutes", type=float, default=10, help="of all, shared out")
    parser.add_argument("--inputs", type=int, help="at most so many indices of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input, its output shown")
    parser.add_argument("--out", type=Path, help="also write the report there")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    process.prepare()
    home = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        base.build(home / "base")
        if options.only is None:
            return campaign(list(KINDS) if options.kind == "all" else [options.kind], options, home)
        result = attack(options.kind, options.only, options.seed, home)
        print((home / "case" / "output.log").read_text(errors="replace"), result, sep="\n")
        return int(bool(result.fault))
    finally:
        process.kill_children()
        shutil.rmtree(home, ignore_errors=True)


def campaign(kinds: list[str], options: argparse.Namespace, home: Path) -> int:
    """The faults as they are found, and a table of the counts at the end."""
    lines, totals = [], [0, 0, 0, 0]
    rows = ["| kind | inputs | right | refused in a sentence | faults | minutes |",
            "|---|---:|---:|---:|---:|---:|"]
    for kind in kinds:
        share = KINDS[kind][1] / sum(KINDS[name][1] for name in kinds)
        begun = time.monotonic()
        found = in_parallel(kind, options, home, begun + 60 * options.minutes * share)
        for index, result in found:
            if result.fault:
                lines.append(f"FAULT {kind} ({result.label}): {result.fault}\n    python -m "
                             f"tests.campaign {kind} --seed {options.seed} --only {index}")
                print(lines[-1], flush=True)
        counts = [sum(result.right for _, result in found), sum(r.refused for _, r in found),
                  sum(bool(result.fault) for _, result in found)]
        counts = [sum(counts), *counts]
        totals = [a + b for a, b in zip(totals, counts)]
        rows.append(f"| {kind} | " + " | ".join(f"{number:,}" for number in counts)
                    + f" | {(time.monotonic() - begun) / 60:.1f} |")
    rows.append("| all | " + " | ".join(f"{number:,}" for number in totals) + " | |")
    print("\n".join(rows), flush=True)
    if options.out:
        options.out.write_text("\n".join([*lines, *rows]) + "\n")
    return int(totals[-1] > 0)


def in_parallel(kind: str, options: argparse.Namespace, home: Path, end: float
                ) -> list[tuple[int, Result]]:
    """Indices 0, 1, 2, ... until the time is over, dealt out among `jobs` forked processes."""
    files, pids = [home / f"{kind}-{job}.jsonl" for job in range(options.jobs)], []
    for job, file in enumerate(files):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                process.become_reaper()  # a fork does not inherit it
                work(kind, range(job, options.inputs or sys.maxsize, options.jobs), options.seed,
                     home / f"job{job}", end, file)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    if any([os.waitpid(pid, 0)[1] for pid in pids]):
        raise SystemExit("the campaign itself failed; its traceback is above.")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted((index, Result(**row)) for index, row in rows)


def work(kind: str, indices: range, seed: int, home: Path, end: float, file: Path) -> None:
    home.mkdir(exist_ok=True)
    if not (home / "base").exists():
        (home / "base").symlink_to(home.parent / "base")
    with file.open("w") as log:
        for index in indices:
            if time.monotonic() > end:
                return
            log.write(json.dumps((index, attack(kind, index, seed, home)._asdict())) + "\n")
            log.flush()


def attack(kind: str, index: int, seed: int, home: Path) -> Result:
    """Input number `index`: the same for the same seed, whatever ran before."""
    module, folder = importlib.import_module(f"tests.campaign.{KINDS[kind][0]}"), home / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{seed}/{kind}/{index}")
    return getattr(module, kind)(rng, folder, home / "base")


if __name__ == "__main__":
    sys.exit(main())
