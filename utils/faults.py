"""What the machine may lack: told before anything is written, where it can be known, and otherwise
in one sentence instead of a traceback."""
import errno
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from utils.distributed import LOST_PEER, is_lost_peer
from utils.log import print_once
from utils.registry import UserError, one_line

GIB = 2 ** 30

# What PyTorch and the system say, as a regular expression, and what that means; the first that is
# found counts. Errors of loader processes hold their whole traceback, hence long phrases.
SENTENCES = (
    (r"out of resource: .*Hardware limit: \d+",
     "a kernel asks for more than this GPU has ({}). Use --large-kernel torch."),
    (r"shared memory|[Bb]us error|<?/torch_\d+_\d+.*(No space left|Cannot allocate)|shm_open",
     "the shared memory through which the loader processes hand over batches is full. Enlarge "
     "/dev/shm (docker run --shm-size=8g), or lower --num-workers or --batch-size."),
    (r"Too many open files|ancdata",
     "too many files are open in one process. Raise the limit (ulimit -n 65536) or lower "
     "--num-workers."),
    (r"DataLoader worker.*(killed by signal: \w+|exited unexpectedly)",
     "a loader process ended ({}), as the kernel does when memory is short. Lower --num-workers, "
     "or give the job or container more memory; the same command continues a run."),
    (r"Resource temporarily unavailable|can't start new thread",
     "the system starts no more processes or threads. Raise the limit (ulimit -u) or lower "
     "--num-workers."),
    (r"no kernel image is available|driver version is insufficient|invalid device function",
     "this PyTorch and this GPU or its driver do not go together ({}). Install the PyTorch for it, "
     "or use --device cpu."),
    (r"devices? (is|are) busy or unavailable|Duplicate GPU detected",
     "the GPU is taken by another process ({}). Choose another with CUDA_VISIBLE_DEVICES, one for "
     "each process."),
    (r"Failed to find C compiler|No working C\+\+ compiler|InvalidCxxCompiler|CppCompileError|"
     r"[Tt]riton.*(installation|not installed)|TritonMissing",
     "code is generated on this machine, which lacks a compiler for it ({}). Install g++ (and "
     "Triton for a GPU), or use --no-compile and --large-kernel torch."),
)
COMPILE_FROM = 300  # updates of a run, from which on the teacher is compiled on a GPU
GPU_IS_FULL = re.compile(r"(CUDA|HIP|MPS|XPU).*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")
MEMORY_IS_FULL = re.compile(r"can't allocate memory|[Cc]annot allocate memory|not enough memory|"
                            r"bad_?[ ]?alloc")


def describe(error: Exception, flags: Mapping[str, Any]) -> str | None:
    """What is wrong and what to change, for a mistake of the user's and a fault of the machine's;
    None for an error that is neither. `flags`: the program's."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if is_lost_peer(error):
        return LOST_PEER
    if not isinstance(error, (OSError, RuntimeError, MemoryError)):
        return None
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError) or GPU_IS_FULL.search(text):
        return f"error: {_full_gpu(text, flags)}"
    for pattern, sentence in SENTENCES:
        if found := re.search(pattern, text):
            return f"error: {sentence.format(found[0])}"
    if isinstance(error, MemoryError) or MEMORY_IS_FULL.search(text):
        asked = re.search(r"allocate:? ([\d.]+ ?\w+)", text)
        return (f"error: the memory of the machine is full{_asked(asked)}{_batch_size(flags)}. "
                "Lower --batch-size (the effective batch can stay) or --num-workers.")
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: cannot use {error.filename}: {error.strerror}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ("error: no space is left on a disk, or in /dev/shm for the loader processes "
                "(docker run --shm-size=8g). Make room; the same command continues a run.")
    return None


def _full_gpu(text: str, flags: Mapping[str, Any]) -> str:
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", text)
    figures = ""
    with suppress(RuntimeError, AssertionError):  # of a device that does not answer any more
        if torch.cuda.is_available():
            free, total = (size / GIB for size in torch.cuda.mem_get_info())
            held, most = torch.cuda.memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB
            others = max(total - free - held, 0)
            figures = (f"; PyTorch holds {held:.2f} of {total:.2f} GiB (in use at most {most:.2f}),"
                       f" other programs {others:.2f}")
    graphs = "" if flags.get("cuda_graphs", False) is False else (
        " or --no-cuda-graphs (a graph holds its memory all the time)")
    return (f"the GPU's memory is full{_asked(asked)}{figures}{_batch_size(flags)}. Lower "
            "--batch-size (the effective batch can stay) or --input-size, or use --amp bf16"
            f"{graphs}.")


def _asked(found: re.Match | None) -> str:
    return f": {found[1]} more were asked for" if found else ""


def _batch_size(flags: Mapping[str, Any]) -> str:
    return f"; --batch-size is {flags['batch_size']}" if "batch_size" in flags else ""


def resolve_precision(amp: str, device: torch.device) -> str:
    """What --amp auto is: bf16 on a GPU that has it, else none. Raises UserError for bf16 on one
    that has not."""
    is_gpu = device.type == "cuda"
    has_bf16 = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and is_gpu and not has_bf16:
        raise UserError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bfloat16. Use "
                        "--amp fp16 or none.")
    if amp == "auto":
        return "bf16" if has_bf16 else "none"
    return amp


def has_cuda_graphs(asked: bool | None, device: torch.device) -> bool:
    """Whether a run uses CUDA graphs: by default on an NVIDIA GPU. Raises UserError where they are
    asked for and there is none."""
    has_any = device.type == "cuda" and torch.version.cuda is not None
    if asked and not has_any:
        raise UserError(f"--cuda-graphs needs an NVIDIA GPU; this run is on {device}. Leave the "
                        "flag out.")
    return has_any and asked is not False


def what_to_compile(asked: bool | None, device: torch.device, num_updates: int
                    ) -> tuple[bool, bool]:
    """Whether to compile the student and the teacher. Where nobody said (`asked` is None) it is the
    teacher of a long run on a GPU alone: it takes a minute, which a frozen network soon pays back.

    Whether torch.compile can generate code for `device` is tried on one line. Where it was asked
    for and cannot, raises UserError; else that is said."""
    is_default = asked is None and num_updates >= COMPILE_FROM and device.type == "cuda"
    if not (asked or is_default):
        return False, False
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # each part of the compiler has exceptions of its own
        reason = one_line(error).partition(" Set TORCH")[0][:300]
        needed = "a C++ compiler" + (" and Triton" if device.type == "cuda" else "")
        if asked:
            raise UserError(f"--compile needs {needed}, which PyTorch cannot use here ({reason}). "
                            "Install what is missing, or leave the flag out.") from None
        print_once(f"compiled: nothing, for PyTorch cannot use {needed} here ({reason})")
        return False, False
    return bool(asked), True
