"""One process or many, started by torchrun; every function also works with one."""
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.registry import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")


def setup(device: str) -> torch.device:
    """Join torchrun's processes, if there are any, and return this process's device.

    `device` is one of DEVICES; auto takes CUDA where it is, else the CPU.
    CPU tensors travel through gloo, CUDA tensors through NCCL.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: PyTorch sees no such device here. Use --device cpu.")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} or more processes on this machine, but "
                            f"{torch.cuda.device_count()} CUDA device(s). Lower --nproc_per_node.")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend)
    return torch.device(f"cuda:{local_rank}" if device == "cuda" else device)


def parallelize(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` in DistributedDataParallel when there are many processes, on GPUs with synchronised
    BatchNorms; itself when there is one."""
    if world_size() == 1:
        return module
    device_ids = None
    if device.type == "cuda":
        # On the CPU, for which there is none, each process keeps the statistics of its own batch.
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place; parameters and names stay
        device_ids = [device.index]
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


LOST_PEER = "error: another process ended; its own message says why."


def should_print(message: str) -> bool:
    """Whether this process is to print an error: none of torchrun's printed the same before, and,
    for LOST_PEER, none printed any. One mistake is one sentence. torchrun's store answers, which
    outlives its processes; without it every process prints."""
    if (int(os.environ.get("WORLD_SIZE", 1)) == 1
            or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"):
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=timedelta(seconds=10))
        if message == LOST_PEER and store.add("printed", 0):
            return False
        store.add("printed", 1)
        return store.add(f"printed/{message}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended, whose own message says why."""
    return world_size() > 1 and any(text in str(error) for text in (
        "Connection closed by peer", "Connection reset by peer", "remote process exited"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def num_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU; NCCL's own barrier would need a device


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


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
        self._is_asked = False
        self._previous = {number: signal.signal(number, self._note)
                          for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._is_asked = True
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def agreed(self) -> bool:
        """Whether any process was asked to stop. To be called by all, once per update; four bytes
        through gloo, so the GPU is not waited for."""
        asked = torch.tensor([float(self._is_asked)])
        return sum_over_ranks(asked).item() > 0
