"""What the benchmarks share: interleaved timing, what the machine can do at best, the table."""
import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine
import models
from data.batch import ImageBatch, collate, draw_erasure
from losses import create_losses
from models.distiller import Distiller, FrozenTeacher
from utils import optim
from utils.checkpoint import write_text_atomically
from utils.config import Parser
from utils.distributed import setup
from utils.log import peak_memory_gib, progress
from utils.optim import ModelEma
from utils.registry import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPY_BYTES = {"cpu": 2 ** 28, "cuda": 2 ** 30}  # far beyond a cache
MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
SHORTEST = 0.02  # seconds: below that the clock and a kernel's launch are seen
COPY, MATRIX = "copy", "matrix product"
Seconds = dict[str, list[float]]


def new_parser(what: str, doc: str, *, batch_size: int | None, input_size: int | None = 224,
               repeats: int = 7, has_device: bool = True) -> Parser:
    """A parser of `benchmark WHAT` with the flags that all of them have."""
    parser = Parser(prog=f"analysis.benchmark {what}", description=doc.split("\n\n")[0])
    flag = parser.add_argument
    if batch_size:
        flag("--batch-size", type=int, default=batch_size, help="images")
    if input_size:
        flag("--input-size", type=int, default=input_size, help="pixels")
    flag("--repeats", type=int, default=repeats, help="rounds; the table shows medians")
    if has_device:
        flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
        flag("--threads", type=int, metavar="N", help="threads of PyTorch; default: as it is")
    flag("--json", type=_new_file, metavar="FILE", help="write the figures there, too")
    return parser


def _new_file(text: str) -> Path:
    """A path that can be written to, as far as one can tell before the long work."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file in an existing folder.")
    return path


def check_at_least(values: Mapping[str, int | None], smallest_batch: int = 1) -> None:
    """Flags that must be 1 or more, where given. Training takes a batch of 2, for BatchNorm."""
    for name, value in values.items():
        limit = smallest_batch if name == "batch_size" else 1
        if value is not None and value < limit:
            raise UserError(f"--{name.replace('_', '-')} must be at least {limit}.")


def start(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return setup(device)


def place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


# Timing


def time_interleaved(actions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device,
                     shortest: float = 0) -> Seconds:
    """Seconds of each action, one after the other `repeats` times after one round to warm up, so
    that whatever else the machine does meets all alike. An action that takes less than `shortest`
    seconds is done as often as fills them, and the mean is taken."""
    seconds: Seconds = {name: [] for name in actions}
    times = dict.fromkeys(actions, 1)
    with progress("rounds", (repeats + 1) * len(actions), unit="timing") as bar:
        for done in range(repeats + 1):
            for name, action in actions.items():
                seconds[name].append(time_of(action, times[name], device))
                if done == 0 and shortest:  # once more, now compiled, chosen and allocated
                    times[name] = math.ceil(shortest / time_of(action, 1, device))
                bar.update()
    return {name: values[1:] for name, values in seconds.items()}


def time_of(action: Callable[[], Any], times: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    wait_for(device)
    return (time.perf_counter() - start) / times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds by name; a lap lasts from the one before it. Waits for the device, if there is one,
    at every lap."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        if self.device is not None:
            wait_for(self.device)
        self.at = time.perf_counter()

    def lap(self, name: str) -> None:
        before = self.at
        self.start()
        self.seconds[name] = self.seconds.get(name, 0) + self.at - before


def memory_of(action: Callable[[], Any], device: torch.device) -> float | None:
    """GiB that the action holds at its peak beyond what was held before; None on a CPU."""
    if device.type != "cuda":
        return None
    wait_for(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    wait_for(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30


# What the machine does at best, in the same rounds


def ceiling_actions(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A large copy, and a large product of square matrices in `dtype`."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    a, b = torch.rand(2, *[_matrix_edge(device, dtype)] * 2, device=device).to(dtype)
    return {COPY: lambda: target.copy_(source), MATRIX: lambda: a @ b}


def ceilings(seconds: Seconds, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of the copy, bytes read and bytes written counted, and G multiply-adds/s of the product,
    medians."""
    return {"copy_gb_per_second":
                2 * COPY_BYTES[device.type] / statistics.median(seconds[COPY]) / 1e9,
            "matrix_gmacs_per_second":
                _matrix_edge(device, dtype) ** 3 / statistics.median(seconds[MATRIX]) / 1e9}


def _matrix_edge(device: torch.device, dtype: torch.dtype) -> int:
    edge = MATRIX_EDGE[device.type]
    # A CPU without float16 units takes 100 times as long as in float32.
    return min(edge, 512) if device.type == "cpu" and dtype == torch.float16 else edge


def ceilings_text(best: Mapping[str, float], dtype: torch.dtype) -> str:
    # cuDNN's float32 convolutions round to TF32 where matrix products do not.
    is_exact = dtype != torch.float32 or not torch.cuda.is_available()
    return (f"In the same rounds: a copy of {best['copy_gb_per_second']:.1f} GB/s (read + "
            f"written), {str(dtype).removeprefix('torch.')} matrix products of "
            f"{best['matrix_gmacs_per_second']:.1f} G multiply-adds/s"
            + ("." if is_exact else ", without TF32, which cuDNN's convolutions may use."))


# The result


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]],
                   num_words: int = 1) -> str:
    """The first `num_words` columns are words, the others numbers."""
    rule = ["---"] * num_words + ["---:"] * (len(header) - num_words)
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("| ---: ", "|---:")
                     for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def show(title: str, table: str, notes: Iterable[str], figures: Mapping[str, Any], *,
         device: torch.device | None, json_path: Path | None) -> None:
    """Print what was compared, the table and the notes, and write the figures if asked to."""
    figures = {"title": title, **figures}
    notes = list(notes)
    if device is not None:
        peak = peak_memory_gib(device)
        notes.append(f"Peak memory: {peak:.2f} GiB, all rows together.")
        figures = {**figures, "place": place(device), "peak_memory_gib": peak}
    print(f"{title}\n\n{table}\n\n" + "\n".join(notes))
    if json_path:
        try:
            write_text_atomically(json.dumps(figures), json_path)
        except OSError as error:
            raise UserError(f"--json {json_path} cannot be written: {error}.") from None


def add_model_flag(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", nargs="+", default=[default], metavar="NAME",
                        help="NAME [key=value ...]")


def random_batches(options: engine.StepOptions, batch_size: int, input_size: int,
                   num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same random images (N, 3, H, W), labels and indices for ever, on the device."""
    images = torch.randn(batch_size, 3, input_size, input_size)
    batch = options.to_device(images, torch.randint(num_classes, (batch_size,)))
    while True:
        yield *batch, torch.arange(batch_size)


def random_images(batch_size: int, input_size: int, num_classes: int, *, pin_memory: bool,
                    erasing_prob: float = 0.25) -> Iterator[tuple[ImageBatch, Tensor, Tensor]]:
    """The same random pictures as the loader hands them over for ever: bytes on the host and what
    is to be erased, labels, indices. For options with `prepare`."""
    samples = []
    for index in range(batch_size):
        pixels = torch.randint(256, (input_size, input_size, 3), dtype=torch.uint8)
        image = pixels.permute(2, 0, 1)
        samples.append((image, draw_erasure(image, erasing_prob),
                        int(torch.randint(num_classes, ())), index))
    pictures, labels, indices = collate(samples)
    if pin_memory:
        pictures, labels = pictures.pin_memory(), labels.pin_memory()
    while True:
        yield pictures, labels, indices


def no_mix(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return images, labels


def random_state(student: models.VisionModel, teacher: FrozenTeacher | None,
                 loss_specs: list[list[str]], options: engine.StepOptions, *,
                 keeps_average: bool) -> engine.TrainState:
    """As train_kd.py builds it, with AdamW at a small rate. `loss_specs`: NAME key=value ..."""
    distiller = Distiller(student, *create_losses(loss_specs, student.feature_info,
                                                  teacher and teacher.feature_info))
    distiller.to(options.device, memory_format=options.memory_format).train()
    optimizer = optim.build_adamw(optim.parameter_groups(distiller, 0.05), lr=1e-4,
                                  betas=(0.9, 0.999), eps=1e-8)
    return engine.TrainState(
        distiller=distiller, wrapped=distiller, optimizer=optimizer,
        ema=ModelEma(student) if keeps_average else None,
        scaler=torch.amp.GradScaler(options.device.type,
                                    enabled=options.amp_dtype is torch.float16))
