"""What a run says while it runs: progress, one JSON object per epoch, TensorBoard."""
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.checkpoint import write_text_atomically
from utils.distributed import is_main, rank, world_size
from utils.errors import UserError


def say(message: str) -> None:
    """Print on the first process only, above a progress bar if there is one."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def say_from_anywhere(message: str) -> None:
    """Print whichever process it is, with its number when there are many."""
    tqdm.write(f"process {rank()}: {message}" if world_size() > 1 else message, file=sys.stderr)


def progress(description: str, total: int, *, initial: int = 0, unit: str = "batch") -> tqdm:
    """A bar on the first process; a line now and then where standard error is no terminal."""
    interactive = sys.stderr.isatty()
    return tqdm(desc=description, total=total, initial=initial, unit=unit,
                disable=not is_main(), dynamic_ncols=interactive, leave=not interactive,
                mininterval=0.5 if interactive else 20, maxinterval=1 if interactive else 60)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by PyTorch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


class RunLog:
    """log.txt, one JSON object per epoch, and TensorBoard events beside it if asked for."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = folder / "log.txt"
        self.writer = None
        if tensorboard and is_main():
            self.writer = summary_writer_class()(str(folder / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; an epoch that is repeated after a resume replaces its old line. What is
        NaN or infinite becomes null: JSON has no such numbers."""
        if not is_main():
            return
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        write_text_atomically("\n".join([*kept, json.dumps(record)]) + "\n", self.path)
        if self.writer is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(key, value, record["epoch"])
            self.writer.flush()


def summary_writer_class() -> type:
    """TensorBoard's writer. Raises UserError where the optional package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, "
                        "or leave the flag out.") from None
    return SummaryWriter
