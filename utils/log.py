"""What a run tells: printed lines, tables, progress, means of an epoch, log.txt."""
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import gather_objects, is_main, on_main, rank, sum_over_ranks, world_size
from utils.files import write_text_atomically
from utils.records import read_records
from utils.registry import UserError
from utils.sinks import Sink


def print_once(message: str) -> None:
    """Print on the first process only, above a progress bar if there is one."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def print_from_any(message: str) -> None:
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
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]],
                   num_text_columns: int = 1) -> str:
    """A Markdown table; its first `num_text_columns` are aligned left and the others right."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
             for cells in (header, *rows)]
    rule = ["---"] * num_text_columns + ["---:"] * (len(header) - num_text_columns)
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


class Meter:
    """Means of scalars over an epoch, their sums kept on the device until asked for."""

    def __init__(self) -> None:
        # Vectors by the names that were added together: sums, counts, and the first update with a
        # NaN or infinity (else inf). One vector instead of many scalars: a GPU is launched to less.
        self.groups: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self.restored: dict[str, tuple[float, float]] = {}  # sum and count, until added to

    def add(self, values: dict[str, Tensor], step: int) -> None:
        """Count a value each. One that is not finite is left out, and its step is remembered."""
        if not values:
            return
        new = torch.stack([value.detach() for value in values.values()]).to(sum_dtype(values))
        is_finite = new.isfinite()
        failed_at = torch.where(is_finite, math.inf, float(step))
        names = tuple(values)
        if names not in self.groups:
            before = new.new_tensor([self.restored.pop(name, (0.0, 0.0)) for name in names])
            self.groups[names] = (before[:, 0], before[:, 1], torch.full_like(new, math.inf))
        sums, counts, failures = self.groups[names]
        self.groups[names] = (sums + torch.where(is_finite, new, 0), counts + is_finite.to(new),
                              torch.minimum(failures, failed_at))

    def failures(self) -> list[tuple[float, str]]:
        """First step and name of whatever was not finite, on any process, the earliest first."""
        local = [(step, name) for names, (_, _, steps) in self.groups.items()
                 for name, step in zip(names, steps.tolist()) if math.isfinite(step)]
        if not sum_over_ranks(torch.tensor([float(len(local))])).item():
            return []
        everywhere = [failure for share in gather_objects(local) for failure in share]
        return sorted(everywhere, key=lambda failure: failure[0])  # stable: terms before the total

    def means(self) -> dict[str, float]:
        """Averages of the finite values of the epoch so far and all processes; NaN where there
        were none. Waits for the device."""
        state = self.state_dict()
        sums, counts = state["sums"], state["counts"]
        return {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Sums and counts by name, averaged over the processes; called by all of them."""
        names = [*self.restored, *(name for group in self.groups for name in group)]
        if not names:
            return {"sums": {}, "counts": {}}
        result = {}
        for i, key in enumerate(("sums", "counts")):
            parts = [group[i].cpu() for group in self.groups.values()]
            before = torch.tensor([pair[i] for pair in self.restored.values()],
                                  dtype=parts[0].dtype if parts else torch.float64)
            values = sum_over_ranks(torch.cat([before, *parts])) / world_size()
            result[key] = dict(zip(names, values.tolist()))
        return result

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.groups = {}
        self.restored = {name: (total, state["counts"][name])
                         for name, total in state["sums"].items()}


def sum_dtype(values: dict[str, Tensor]) -> torch.dtype:
    """float64, so that a resume does not change an epoch's mean; float32 on Apple's MPS, which has
    no other."""
    device = next(iter(values.values())).device
    return torch.float32 if device.type == "mps" else torch.float64


class RunLog:
    """What a run of `epochs` leaves of each: a printed line, a JSON object in log.txt, which is the
    record, and the same figures in `sinks`. To be made by all processes; raises UserError on all
    where there is a log.txt that cannot be continued."""

    def __init__(self, folder: Path, epochs: int, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.epochs = folder / "log.txt", epochs
        self.lines: dict[int, str] = {}  # of log.txt, by epoch; of the first process
        on_main(self._read)
        self.start, self.num_written = time.perf_counter(), 0
        self.sinks = sinks

    def point(self, values: dict[str, float], step: int) -> None:
        """Figures within an epoch, for the sinks alone."""
        self._add({f"update/{name}": value for name, value in values.items()}, step)

    def write(self, record: dict[str, Any], best: dict[str, float], step: int) -> None:
        """Append a record; an epoch that is repeated after a resume replaces its old line. What is
        NaN or infinite becomes null: JSON has no such numbers. `best`: as TrainState has it.
        `step`: updates done."""
        if not is_main():
            return
        self.num_written += 1
        print_once(self._line(record, best))
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}
        epoch = record["epoch"]
        kept = {number: line for number, line in self.lines.items() if number < epoch}
        if self.num_written == 1 and len(kept) < epoch:
            print_once(f"note: {self.path} lacks {epoch - len(kept)} of the {epoch} epochs before "
                       "this one")
        self.lines = dict(sorted(kept.items())) | {epoch: json.dumps(record)}
        write_text_atomically("\n".join(self.lines.values()) + "\n", self.path)
        self._add(record, step)
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def _add(self, values: dict[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items()
                   if isinstance(value, (int, float)) and math.isfinite(value)}
        for sink in self.sinks:
            sink.add(numbers, step)

    def _read(self) -> None:
        try:
            if self.path.exists():
                records = read_records(self.path)
                self.lines = {record["epoch"]: json.dumps(record) for record in records}
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}).") from None
        except UserError as error:
            raise UserError(f"{error}, and the run would go on writing it. Mend it or move it "
                            "away.") from None

    def _line(self, record: dict[str, Any], best: dict[str, float]) -> str:
        """The epoch for a person; the time left is reckoned at the pace since this start."""
        epoch = record["epoch"] + 1
        parts = [f"epoch {epoch}/{self.epochs}", f"loss {record['train_loss']:.3f}"]
        for suffix, name in (("", "top-1"), ("_ema", "top-1 of the average")):
            if f"test_acc1{suffix}" in record:
                parts.append(f"{name} {record[f'test_acc1{suffix}']:.2f} "
                             f"(best {best[f'best_acc1{suffix}']:.2f})")
        if "agreement" in record:
            parts.append(f"agreement {record['agreement']:.1f}")
        parts.append(f"lr {record['train_lr']:.1e}")
        if record["images_per_second"]:
            parts.append(f"{record['images_per_second']:,.0f} images/s")
        pace = (time.perf_counter() - self.start) / self.num_written
        minutes = int(pace * (self.epochs - epoch) / 60)
        return "  ".join([*parts, f"eta {minutes // 60}:{minutes % 60:02d}"])
