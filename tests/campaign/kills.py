"""Runs that are killed at random moments and started again until they are done, as a cluster would,
against the run that nobody stopped: every file of it is there and holds the same values."""
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.campaign.process import (
    Ended,
    Process,
    Result,
    bad_sentence,
    children,
    cry,
    descendants,
    last_line,
    run,
)
from utils.content import CHECKSUMS

COMMON = ("--device cpu --input-size 32 --batch-size 8 --effective-batch 8 --warmup-epochs 1 --lr "
          "1e-3 --epochs 3 --save-freq 2 --save-num 0 --output-dir run --num-workers 0 ")
OUTLINES = "--data-set outlines train_size=32 val_size=16 image_size=32 "
NANO = OUTLINES + "--student resnet_nano "
FOLDER = "--data-path ../base/images --student resnet_nano --num-workers 2 "
EVERYTHING = OUTLINES + (
    "--model-ema --model-ema-decay 0.5 --sparsity 0.5 --prune-every 2 --growth gradient --teacher "
    "slak_nano --teacher-weights random --loss nkd --loss fd weight=0.001 --student "
    "convnext_bn_nano --batch-size 4 ")
MIDDLE = "from the middle"  # started with --resume of a checkpoint within an epoch
VARIANTS = {  # what runs, and how it is started
    "plain": (NANO, "train_kd"),
    "average": (NANO + "--model-ema --model-ema-decay 0.5", "train_kd"),
    "sparse": (NANO + "--sparsity 0.5 --sparse-init erk --prune-every 1", "train_kd"),
    "accumulation": (NANO + "--batch-size 4 --accum-steps 2", "train_kd"),
    "two workers": (FOLDER, "train_kd"),
    "saved every update": (NANO + "--save-every-steps 1 --model-ema", "train_kd"),
    MIDDLE: (NANO + "--model-ema", "train_kd"),
    "everything": (EVERYTHING + "--num-workers 2 --save-every-steps 2", "train_kd"),
    "two workers, python": (FOLDER, "python"),
    "two processes": (NANO + "--batch-size 4", "torchrun"),
    "two processes, everything": (EVERYTHING + "--num-workers 1 --save-every-steps 1", "torchrun"),
}
MEASURED = ("images_per_second", "peak_memory_gib")  # of log.txt; the rest must be equal
# How a program says that it stopped because it was asked to.
STOPPED = r"stopped on request at update|stopped by SIGTERM;|interrupted;"
# torchrun ends with 1 and a traceback of its own, whatever ended its processes.
OF_TORCHRUN = re.compile(r"Traceback [^\n]*\n( [^\n]*\n)+torch\.distributed\.elastic\.[^\n]*")


class Reference(NamedTuple):
    folder: Path
    seconds: float
    events: int  # files opened for writing, renamed and removed in the folder of the run


def kills(rng: random.Random, folder: Path, base: Path) -> Result:
    """One life of a run with one to six kills in it, of which each counts as an input."""
    name, number, story, fault = rng.choice(list(VARIANTS)), rng.randint(1, 6), [], ""
    reference = find_reference(name, folder.parent)
    if name == MIDDLE:
        shutil.copy(reference.folder.parent / "middle.pth", folder)
    while len(story) < number and not fault:
        ended, happened = one_kill(name, folder, rng, reference, number)
        story.append(happened)
        fault = wrong_end(ended, happened, VARIANTS[name][1])
    if not fault:
        ended = run(VARIANTS[name][1], command(name, folder), folder)
        fault = cry(ended) or ended.code and f"at last exit {ended.code}: {last_line(ended.output)}"
    if not fault:
        fault = "; ".join(compare(folder / "run", reference.folder)[:4])
    return Result(right=len(story) - bool(fault), fault=fault, label=f"{name}: {', '.join(story)}")


@cache
def find_reference(name: str, home: Path) -> Reference:
    """The same run without a kill; for the one from the middle, `middle.pth` beside it."""
    folder, program = home / f"reference-{name}", VARIANTS[name][1]
    folder.mkdir()
    if name == MIDDLE:
        words = [*(COMMON + VARIANTS[name][0]).split(), "--save-every-steps", "1"]
        Process(program, words, folder, lambda: end_at_event(12, None)).wait()
        shutil.move(folder / "run" / "checkpoint-last.pth", folder / "middle.pth")
        shutil.rmtree(folder / "run")
    begun, counted = time.monotonic(), folder / "events"
    ended = Process(program, command(name, folder), folder, lambda: count_events(counted)).wait()
    assert ended.code == 0 and not cry(ended), ended
    return Reference(folder / "run", time.monotonic() - begun, counted.stat().st_size)


def command(name: str, folder: Path) -> list[str]:
    """The same words each time, but --resume only until the run has a checkpoint of its own."""
    words = (COMMON + VARIANTS[name][0]).split()
    if name == MIDDLE and not (folder / "run" / "checkpoint-last.pth").exists():
        words += ["--resume", "middle.pth"]
    return words


def one_kill(name: str, folder: Path, rng: random.Random, reference: Reference, number: int
             ) -> tuple[Ended, str]:
    """Start the run, end it at a random moment; how it ended, and what was done."""
    program, argv = VARIANTS[name][1], command(name, folder)
    if program == "train_kd" and rng.random() < 0.4:  # while it writes files, or just after it
        event = rng.randint(1, max(2, reference.events // number))
        delay = rng.choice([None, None, rng.uniform(0, 0.003)])
        ended = Process(program, argv, folder, lambda: end_at_event(event, delay)).wait()
        return ended, f"file event {event}" + (f" + {1000 * delay:.1f} ms" if delay else "")
    signals = [(signal.SIGKILL, "all"), (signal.SIGKILL, "worker"), (signal.SIGTERM, "main"),
               (signal.SIGTERM, "all"), (signal.SIGINT, "all")]
    if program == "torchrun":
        signals += [(signal.SIGKILL, "rank"), (signal.SIGTERM, "rank")]
    kind, whom = rng.choice(signals)
    moment = rng.uniform(0.05, 1.05) * reference.seconds * rng.choice([1 / number, 1])
    process = Process(program, argv, folder)
    until = time.monotonic() + moment
    # Before a program's first words Ctrl-C is Python's and torchrun's, which answer it themselves.
    waits = kind == signal.SIGINT and program != "train_kd"
    while not process.has_ended() and (time.monotonic() < until or waits and "effective batch"
                                       not in process.output.read_text(errors="replace")):
        time.sleep(0.002)
    targets = {"all": [process.pid, *descendants(process.pid)], "main": [process.pid],
               "rank": ranks(process.pid), "worker": workers(process.pid)}[whom]
    for pid in rng.sample(targets, 1) if whom in ("rank", "worker") and targets else targets:
        with suppress(ProcessLookupError):
            os.kill(pid, kind)
    return process.wait(), f"{signal.Signals(kind).name} to {whom} after {moment:.2f} s"


def ranks(pid: int) -> list[int]:
    """The processes of torchrun that run train_kd.py."""
    return [child for child in children(pid) if "train_kd.py" in words_of(child)]


def workers(pid: int) -> list[int]:
    """The loader processes, which are forks of the run's or of a rank."""
    return [child for head in ranks(pid) or [pid] for child in children(head)
            if words_of(child) == words_of(head)]


def words_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def wrong_end(ended: Ended, happened: str, program: str) -> str:
    """What an end by this signal must not look like; empty when it is as it should be."""
    said = OF_TORCHRUN.sub("", ended.output) if program == "torchrun" else ended.output
    fault = cry(ended._replace(output=said))
    sentences = len(re.findall(f"{STOPPED}|: error: ", said))
    codes = {"SIGKILL": (2, -signal.SIGKILL), "file": (-signal.SIGKILL, -signal.SIGALRM),
             "SIGTERM": (143, -signal.SIGTERM), "SIGINT": (143, 130)}[happened.split()[0]]
    if not fault and ended.code == 2:
        fault = bad_sentence(said)
    if not fault and ended.code and not (
            ended.code in codes and sentences == (ended.code > 0)  # 0: it was done before
            or program == "torchrun" and ended.code == 1 and sentences < 2):
        fault = f"exit {ended.code} with {sentences} sentences: {last_line(said)}"
    return fault and f"{happened}: {fault}"


# In the child: file events, through Python's own audit hook.


def watch(act: Callable[[], None]) -> None:
    """Call `act` at each file event in the folder `run`."""
    main, run_folder = os.getpid(), str(Path("run").resolve())

    def hook(event: str, words: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove") or os.getpid() != main or (
                event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(words[0], (str, os.PathLike)) and str(
                Path(words[0]).absolute()).startswith(run_folder):
            act()

    sys.addaudithook(hook)


def count_events(file: Path) -> None:
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(lambda: os.write(log, b"x") and None)


def end_at_event(number: int, delay: float | None) -> None:
    """End this process there and then, or `delay` seconds later."""
    left = [number]

    def act() -> None:
        left[0] -= 1
        if left[0] == 0 and delay is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif left[0] == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, delay)

    watch(act)


# Comparing two folders.


def compare(folder: Path, reference: Path) -> list[str]:
    """How the files of `folder` differ from what the uninterrupted run left, a sentence each."""
    names, wanted = ({path.name for path in place.iterdir()} for place in (folder, reference))
    found = [f"{name} is missing" for name in sorted(wanted - names)]
    found += [f"{name} should not be there" for name in sorted(names - wanted)]
    for name in sorted(names & wanted):
        texts = [place / name for place in (folder, reference)]
        if name.endswith(".pth"):
            contents = [torch.load(path, map_location="cpu", weights_only=True) for path in texts]
            for content in contents:
                content["args"].pop("resume")  # its own way here, and with it the sum of args
                content.get(CHECKSUMS, {}).pop("args", None)
            found += differences(*contents, name)[:2]
        elif name == "log.txt":
            logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in texts]
            for record in logs[0] + logs[1]:
                for key in MEASURED:
                    record.pop(key, None)
            found += differences(*logs, name)[:2]
        elif name == "args.yaml":
            lines = [[line for line in path.read_text().splitlines()
                      if not line.startswith("resume:")] for path in texts]
            found += differences(*lines, name)[:2]
    return found


def differences(got: Any, wanted: Any, where: str) -> list[str]:
    """Paths of the values that are not equal bit for bit."""
    if isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor):
        same = got.dtype == wanted.dtype and torch.equal(got.nan_to_num(), wanted.nan_to_num())
        return [] if same else [f"{where} differs"]
    if type(got) is type(wanted) and isinstance(wanted, dict) and list(got) == list(wanted):
        return [found for key in wanted
                for found in differences(got[key], wanted[key], f"{where} {key}")]
    if type(got) is type(wanted) and isinstance(wanted, (list, tuple)) and len(got) == len(wanted):
        return [found for i, (a, b) in enumerate(zip(got, wanted))
                for found in differences(a, b, f"{where} {i}")]
    same = type(got) is type(wanted) and (got == wanted or got != got and wanted != wanted)
    return [] if same else [f"{where}: {str(got)[:60]}, not {str(wanted)[:60]}"]
