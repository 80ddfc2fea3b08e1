"""Starts a program in a session of its own, and judges how it ended. Linux.

`train_kd`, `eval` and the others run in a forked child of this process, which has imported torch
once: main(argv), output, signals and loader processes are the real ones, only the interpreter's
start and end are left out. `python` and `torchrun` start train_kd.py as users do.
"""
import ctypes
import importlib
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MODULES = ("train_kd", "eval", "predict", "analysis.curves", "analysis.report", "analysis.erf",
           "analysis.similarity", "analysis.complexity", "analysis.export")
STARTED = {"python": [sys.executable, str(ROOT / "train_kd.py")],
           "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc_per_node=2", str(ROOT / "train_kd.py")]}
SPARE_MEMORY = 6 * 2 ** 30  # bytes that a program may ask for beyond what it has after its imports
LIMIT = 180  # seconds, after which a program counts as hanging
PR_SET_CHILD_SUBREAPER = 36
# What a program must never show, whatever its exit code.
CRIES = ("Traceback (most recent call last)", "Exception ignored in", "terminate called",
         "Segmentation fault", "core dumped")


class Ended(NamedTuple):
    code: int  # below 0: the signal that ended it
    output: str
    hung: bool = False
    leftovers: int = 0  # processes of its that were still there after it


class Result(NamedTuple):
    """Of one input, or of several that went through a program together."""

    right: int = 0
    refused: int = 0  # with exit code 2 and one sentence
    fault: str = ""  # what was wrong; empty: nothing
    label: str = ""  # which mutation or variant it was, for a person


def prepare() -> None:
    """To be called once before any start: imports the programs, and makes orphans ours."""
    import torch
    torch.set_num_threads(1)  # a forked child of a process with a pool of threads would wait for it
    for module in MODULES:
        importlib.import_module(module)
    from models.base import create_model
    create_model("resnet_nano", 3).count_macs(32)  # imports what meta tensors need
    become_reaper()


def become_reaper() -> None:
    """From here on processes whose parent ended become children of this one."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Process:
    """`program` (of MODULES or STARTED) with `argv` in the folder `cwd`, where output.log keeps
    what it says. `in_child` is called in the child just before it begins."""

    def __init__(self, program: str, argv: list[str], cwd: Path,
                 in_child: Callable[[], None] = lambda: None) -> None:
        self.output = cwd / "output.log"
        self.pid = os.fork()
        if self.pid == 0:
            with suppress(BaseException):
                _become(program, argv, cwd, self.output, in_child)
            os._exit(99)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, limit: float = LIMIT) -> Ended:
        """Until it ends, `limit` seconds at most; then nothing of it is left."""
        end, pause = time.monotonic() + limit, 0.002
        while not (ended := self.has_ended()) and time.monotonic() < end:
            time.sleep(pause)
            pause = min(0.05, pause * 1.2)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        grace = time.monotonic() + (20 if ended and code >= 0 else 0)
        while children() and time.monotonic() < grace:
            _reap()
            time.sleep(0.005)
        leftovers = kill_children()
        return Ended(code, self.output.read_text(errors="replace"), not ended, leftovers)


def run(program: str, argv: list[str], cwd: Path) -> Ended:
    return Process(program, argv, cwd).wait()


def _become(program: str, argv: list[str], cwd: Path, output: Path,
            in_child: Callable[[], None]) -> None:
    os.setsid()
    os.chdir(cwd)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(HOME=str(cwd), TORCH_HOME=str(cwd / "hub"), HF_HUB_OFFLINE="1", COLUMNS="100")
    if program in STARTED:
        in_child()
        os.execv(sys.executable, [*STARTED[program], *argv])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY,) * 2)
    socket.getaddrinfo = _no_network
    sys.argv = [f"{program}.py", *argv]
    code = 1
    try:
        in_child()
        code = sys.modules[program].main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _no_network(*address: object, **options: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "there is no network in this test")


def children(pid: int | None = None) -> list[int]:
    """Direct children of a process, by default of this one."""
    pid = pid or os.getpid()
    with suppress(OSError):  # it ended
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return [*below, *(deeper for child in below for deeper in descendants(child))]


def kill_children() -> int:
    """Ends all that this process started; how many there were that had not ended by themselves."""
    _reap()
    number = len(children())
    while found := children():
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.002)
    return number


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def judge(ended: Ended, label: str, inputs: int = 1) -> Result:
    """Exit 0, or exit 2 and one sentence on the last line."""
    fault = cry(ended)
    if not fault and ended.code == 0:
        return Result(right=inputs, label=label)
    if not fault and ended.code == 2:
        fault = bad_sentence(ended.output)
        if not fault:
            return Result(refused=inputs, label=label)
    return Result(fault=fault or f"exit {ended.code}: {last_line(ended.output)}", label=label)


def cry(ended: Ended) -> str:
    """What no end of a program excuses; empty when there is nothing of it."""
    if ended.hung:
        return f"no end within {LIMIT} s: {last_line(ended.output)}"
    for words in CRIES:
        if words in ended.output:
            return f"exit {ended.code}, {words}: {last_line(ended.output)}"
    if ended.code >= 0 and ended.leftovers:
        return f"exit {ended.code}, {ended.leftovers} process(es) left behind"
    return ""


def bad_sentence(output: str) -> str:
    """Empty when exactly one error is told, on one line, the last."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w. ]+(\(process \d\))?: error: ", line)]
    if len(errors) != 1:
        return f"exit 2 with {len(errors)} sentences: {last_line(output)}"
    if errors[0] != lines[-1]:
        return f"exit 2, and the error is not the last line: {errors[0][:150]} ... {lines[-1][:80]}"
    return ""


def last_line(output: str) -> str:
    return next((line.strip()[-250:] for line in reversed(output.split("\n")) if line.strip()),
                "no output")
