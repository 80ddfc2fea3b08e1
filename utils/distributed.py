"""One process or many, started by torchrun or another launcher; every function also works with
one."""
import math
import os
import re
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.process import SIGNALS
from utils.registry import UserError, one_line

DEVICES = ("auto", "cpu", "cuda", "mps")
TORCHRUN = "torchrun --nproc_per_node=NUMBER PROGRAM ..."
JOIN = timedelta(minutes=5)  # that processes of a launcher other than torchrun wait for each other

# What launchers call the rank, the number of processes, and both within the machine. The first one
# that is there counts: mpirun may have been started by srun, and torchrun by either.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
                "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
JOB_NAMES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PBS_JOBID", "LSB_JOBID")


class Place(NamedTuple):
    """Where a process stands among those that its launcher started."""

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0  # on its machine; None: the launcher does not say
    address: str = "localhost"  # of the first process
    port: int = 29500  # torch's own


def find_place(environ: Mapping[str, str]) -> Place:
    """What the environment says of this process. Raises UserError where it says that there are
    others but not enough to join them."""
    launcher = next((name for name, words in LAUNCHERS.items()
                     if words[0] in environ or words[1] in environ), None)
    names = list(LAUNCHERS[launcher or "torchrun"])
    if launcher == "srun" and names[1] not in environ:
        # Slurm says this much to the script of a batch job, too, which is one process whatever the
        # number of tasks. What was told where to meet, or has another rank than 0, is one of many.
        if "MASTER_ADDR" not in environ:
            if environ["SLURM_PROCID"] != "0":
                _first_machine({}, is_alone=False)
            return Place(local_rank=_number(environ, "LOCAL_RANK", 0))
        names[1] = "SLURM_NTASKS"
    world_size = _number(environ, names[1], 1)
    rank = _number(environ, names[0], None if world_size > 1 else 0)
    if rank >= world_size:
        raise UserError(f"{names[0]}={rank} and {names[1]}={environ.get(names[1], 'not set')} in "
                        f"the environment do not go together. Start the processes with {TORCHRUN}")
    local_rank = _number(environ, names[2] if names[2] in environ else "LOCAL_RANK",
                         -1 if world_size > 1 else 0)
    place = Place(launcher or "none", rank, world_size, None if local_rank < 0 else local_rank)
    if world_size == 1:
        return place
    address = _first_machine(environ, is_alone=environ.get(names[3]) == str(world_size))
    job = "".join(environ.get(name, "") for name in JOB_NAMES)
    port = 29500 + zlib.crc32(job.encode()) % 10000 if job else 29500
    port = _number(environ, "MASTER_PORT", port)
    if not 0 < port < 2 ** 16:
        raise UserError(f"MASTER_PORT={port} in the environment is no port, which are 1 to 65535. "
                        f"Set a free one, or start the processes with {TORCHRUN}")
    return place._replace(address=address, port=port)


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name, default)
    try:
        if int(text) < 0 and name in environ:
            raise ValueError
        return int(text)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a whole number in the environment of one of many "
                        f"processes, got {text!r}. Start them with {TORCHRUN}") from None


def _first_machine(environ: Mapping[str, str], is_alone: bool) -> str:
    """Where the process of rank 0 listens; `is_alone`: all are on this machine."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if is_alone:
        return "localhost"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes or "")
    if first:  # gpu[01-03,07],big1 -> gpu01
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
    raise UserError("the environment says that this is one of many processes, but not where the "
                    "first of them is. Set MASTER_ADDR to its machine and MASTER_PORT to a free "
                    f"port of it, the same for all, or start them with {TORCHRUN}")


def setup(device: str) -> torch.device:
    """Join the processes that a launcher started with this one, if there are any, and return this
    process's device.

    `device` is one of DEVICES; auto takes CUDA where it is, else the CPU.
    CPU tensors travel through gloo, CUDA tensors through NCCL.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: PyTorch sees no such device here. Use --device cpu.")
    place = find_place(os.environ)
    if place.world_size > 1 and not dist.is_initialized():
        _join(place, "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    elif place.launcher == "none" and _number(os.environ, "SLURM_NTASKS", 1) > 1:
        print(f"one process, although Slurm gave the job {os.environ['SLURM_NTASKS']} tasks; srun "
              "and torchrun start many.", file=sys.stderr)
    local_rank = place.local_rank if place.local_rank is not None else _rank_here()
    if place.world_size > 1:  # torchrun's words, which PyTorch and what follows read
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size),
                          LOCAL_RANK=str(local_rank), MASTER_ADDR=place.address,
                          MASTER_PORT=str(place.port))
    if device != "cuda":
        return torch.device(device)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} or more processes on this machine, but "
                        f"{torch.cuda.device_count()} CUDA device(s). Lower --nproc_per_node.")
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.benchmark = True
    return torch.device(f"cuda:{local_rank}")


def _join(place: Place, backend: str) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun knows its processes and ends them together
        dist.init_process_group(backend)
        return
    minutes = JOIN.total_seconds() / 60
    if place.rank == 0:
        print(f"waiting at {place.address}:{place.port} for the other processes of "
              f"{place.world_size}, {minutes:g} minutes at most", file=sys.stderr, flush=True)
    try:
        store = dist.TCPStore(place.address, place.port, place.world_size, place.rank == 0, JOIN)
        store.set_timeout(timedelta(minutes=30))  # of what follows, as PyTorch has it
        dist.init_process_group(backend, store=store, rank=place.rank,
                                world_size=place.world_size)
    except (ValueError, RuntimeError) as error:
        size = LAUNCHERS[place.launcher][1]
        raise UserError(
            f"this is process {place.rank} of {place.world_size}, says the environment, but they "
            f"did not meet at {place.address}:{place.port} within {minutes:g} minutes "
            f"({one_line(error).partition(' Exception raised from')[0]}). Set MASTER_ADDR and "
            f"MASTER_PORT to a free port of the first one's machine, or start them with "
            f"{TORCHRUN.partition(' PROGRAM')[0]}; for one alone set {size}=1.") from None


def _rank_here() -> int:
    """The number of processes of lower rank on this machine."""
    names = gather_objects(socket.gethostname())
    return names[:rank()].count(names[rank()])


def parallelize(module: nn.Module, device: torch.device, *, in_ddp: bool = True) -> nn.Module:
    """`module` in DistributedDataParallel when there are many processes, on GPUs after its own
    `synchronise_batch_norms()`; itself when there is one or, not `in_ddp`, when the step calls
    `average_gradients`. All start with the first process's values."""
    if world_size() == 1:
        return module
    if not in_ddp:
        for value in module.state_dict().values():
            broadcast(value)
        return module
    device_ids = None
    if device.type == "cuda":
        # On the CPU, for which there is none, each process keeps the statistics of its own batch.
        module.synchronise_batch_norms()
        device_ids = [device.index]
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


LOST_PEER = ("error: another process of this run ended; it said why or, if not, was killed from "
             "outside (memory?). What was saved before is kept.")
# How gloo, torch's store and NCCL say that the other end is gone.
_GONE = re.compile(r"[Cc]onnection (was )?(closed|reset|refused|aborted)|[Bb]roken pipe|"
                   r"[Ss]ocket (closed|error|timeout)|got 0 bytes|caused pair closure|"
                   r"gloo/transport.*(Timed out|[Rr]ead|[Ww]rite|error)|ncclRemoteError|"
                   r"remote process exit|communicator was aborted|operation timeout")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended, whose own message says why."""
    return world_size() > 1 and isinstance(error, RuntimeError) and (
        isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
        or _GONE.search(str(error)) is not None)


def should_print(message: str, is_consequence: bool = False) -> bool:
    """Whether this process is to print how it ends: none of torchrun's printed the same before,
    and, where that is the consequence of another's end, none printed any. One mistake is one
    sentence. torchrun's store answers, which outlives its processes; without it every process
    prints."""
    if not may_be_many() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=timedelta(seconds=10))
        if is_consequence and store.add("printed", 0):
            return False
        store.add("printed", 1)
        return store.add(f"printed/{message}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> None:
    """End a process that is one of many; one alone returns. On success all wait for each other.

    Without Python's own end: there the threads of gloo and the interpreter wait for each other now
    and then (PyTorch 2.6 in destroy_process_group), and NCCL for processes that are gone.
    """
    if not dist.is_initialized():
        return
    with suppress(RuntimeError):  # the others may have failed at their very end
        if code in (0, 143):
            barrier()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def may_be_many() -> bool:
    """Whether the environment speaks of many processes, joined or not yet; it may hold anything."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def num_processes_here() -> int:
    """Processes of this machine, as far as torchrun says it."""
    return _number(os.environ, "LOCAL_WORLD_SIZE", 1)


def num_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_bytes() -> float:
    """Memory that this process may use at most, of the machine or its container; infinite where the
    system does not say."""
    limits = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container; "max" for none
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU; NCCL's own barrier would need a device


def on_main(act: Callable[[], None]) -> None:
    """Let the first process call `act`, and all wait for it. Its UserError is raised on all."""
    error = None
    if is_main():
        try:
            act()
        except UserError as raised:
            error = raised
    error = broadcast_object(error)
    if error is not None:
        raise error


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
    """On the first process the rows (n, ...) of each, `counts` of them; None on the others."""
    assert len(rows) == counts[rank()], f"{len(rows)} rows, expected {counts[rank()]}"
    if not dist.is_initialized():
        return [rows]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # all send as many
    padded[:len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts] if is_main() else None
    dist.gather(padded, shares)
    return shares and [share[:count] for share, count in zip(shares, counts)]


def broadcast(tensor: Tensor) -> None:
    """Give every process the first one's values, in place."""
    if dist.is_initialized():
        # gloo takes no bool, and neither takes a layout of memory other than the plain one.
        values = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        values = values.contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def broadcast_object(value: object) -> object:
    """The first process's `value`, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients, after the backward pass, where
    DistributedDataParallel does it within. Which of them are None must be the same everywhere."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients]).mul_(1 / world_size())
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(gradient.shape)
                                     for part, gradient in zip(parts, gradients)])


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm's statistics, where it is not
    synchronised."""
    if dist.is_initialized():
        for buffer in module.buffers():
            broadcast(buffer)


def gather_objects(value: object) -> list:
    """`value` of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class StopRequest:
    """SIGTERM or SIGINT, inside `with`, as a wish to stop after the current update, the same on all
    processes. A second Ctrl-C acts as usual, for whoever cannot wait; torchrun follows the first
    with a SIGTERM, which must not cut the saving short.
    """

    def __enter__(self) -> "StopRequest":
        self._asked_by: list[int] = []  # signals
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._asked_by.append(number)
        if number == signal.SIGINT and len(self._asked_by) > 1 and callable(self._previous[number]):
            self._previous[number](number, frame)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, for what may take long after everything was saved, a signal ends the process; so
        does one that came before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        try:
            for number in self._asked_by[:1]:
                signal.raise_signal(number)
            yield
        finally:
            for number in SIGNALS:
                signal.signal(number, self._note)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. To be called by all, once per update; four bytes
        through gloo, so the GPU is not waited for."""
        asked = torch.tensor([float(bool(self._asked_by))])
        return sum_over_ranks(asked).item() > 0
