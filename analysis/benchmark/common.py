"""What the benchmarks share: interleaved timing, what the machine can do at best, the table, and a
random training step made of the program's own parts."""
import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import data
import engine
import models
from data.batch import Batch, ImageBatch
from losses import create_losses
from models.distiller import Distiller
from utils import optim
from utils.config import Parser, at_least
from utils.distributed import setup
from utils.files import write_text_atomically
from utils.log import markdown_table, peak_memory_gib, progress
from utils.registry import UserError

COPY_BYTES = {"cpu": 2 ** 28, "cuda": 2 ** 30}  # far beyond a cache
MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
HOST_CALLS = 20
SHORTEST = 0.02  # seconds: below that the clock and a kernel's launch are seen
Seconds = dict[str, list[float]]
Row = dict[str, Any]
Column = tuple[str, str, str]  # header, key of a row, format; a column of text has no format

# What `rates` gives.
RATE_COLUMNS = [("G MACs/s", "gmacs_per_second", ".1f"),
                ("of matrix rate", "matrix_share", ".1%")]
SHARE_COLUMNS = [("host", "host_ms", ".3f"), ("in a graph", "graph_ms", ".3f")]  # of gpu_shares


def new_parser(what: str, doc: str, *, batch_size: int, smallest_batch: int = 1, repeats: int = 7,
               has_device: bool = True) -> Parser:
    """A parser of `benchmark WHAT` with the flags that all of them have."""
    parser = Parser(prog=f"analysis.benchmark {what}", description=doc.split("\n\n")[0])
    flag = parser.add_argument
    flag("--batch-size", type=at_least(smallest_batch), default=batch_size, help="images")
    flag("--input-size", type=at_least(1), default=224, help="pixels")
    flag("--repeats", type=at_least(1), default=repeats, help="rounds; the table shows medians")
    if has_device:
        flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
        flag("--threads", type=at_least(1), metavar="N",
             help="threads of PyTorch; default: as it is")
    flag("--json", type=_new_file, metavar="FILE", help="write the values there, too")
    return parser


def _new_file(text: str) -> Path:
    """A path that can be written to, as far as one can tell before the long work."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file in an existing folder.")
    return path


def start(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return setup(device)


def place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def dtype_of(precision: str) -> torch.dtype:
    """Of a name of engine.AMP_DTYPES; "none" is float32."""
    return engine.AMP_DTYPES[precision] or torch.float32


def size_of(teacher: models.VisionModel, input_size: int) -> int:
    """Pixels at which a FrozenTeacher of this network sees images of `input_size`."""
    has_own = teacher.fixed_size or teacher.input_size != models.VisionModel.input_size
    return teacher.input_size if has_own else input_size


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


def gpu_shares(action: Callable[[], Any], device: torch.device, *, is_recorded: bool = True
               ) -> dict[str, float | None]:
    """Milliseconds of one call of what the host does to hand it over, "host_ms", and of what the
    device does for it, replayed from a CUDA graph without the host, "graph_ms": None unless
    `is_recorded`. A call takes at least the longer of both. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    seconds = []
    for _ in range(HOST_CALLS):
        wait_for(device)
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    shares = {"host_ms": 1000 * median(seconds), "graph_ms": None}
    if not is_recorded:
        return shares
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    times = math.ceil(SHORTEST / time_of(graph.replay, 2, device))
    return {**shares, "graph_ms": 1000 * time_of(graph.replay, times, device)}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds by name; a lap lasts from the one before it. Waits for the device, if there is one,
    at every lap."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        if self.device is not None:
            wait_for(self.device)
        self.at = time.perf_counter()

    def lap(self, name: str) -> None:
        before = self.at
        self.start()
        self.seconds[name] += self.at - before


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


def ceiling_actions(device: torch.device, dtype: torch.dtype,
                    prefix: str = "") -> dict[str, Callable[[], Any]]:
    """A large copy, and a large product of square matrices in `dtype`. `prefix`: of their names."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    edge = _matrix_edge(device, dtype)
    a, b = torch.rand(2, edge, edge, device=device).to(dtype)
    return {f"{prefix}copy": lambda: target.copy_(source),
            f"{prefix}matrix product": lambda: a @ b}


def ceilings(seconds: Seconds, device: torch.device, dtype: torch.dtype,
             prefix: str = "") -> dict[str, float]:
    """GB/s of the copy, bytes read and bytes written counted, and G MACs/s of the product,
    medians."""
    num_bytes, macs = 2 * COPY_BYTES[device.type], _matrix_edge(device, dtype) ** 3
    return {"copy_gb_per_second": num_bytes / median(seconds[f"{prefix}copy"]) / 1e9,
            "matrix_gmacs_per_second": macs / median(seconds[f"{prefix}matrix product"]) / 1e9}


def _matrix_edge(device: torch.device, dtype: torch.dtype) -> int:
    edge = MATRIX_EDGE[device.type]
    # A CPU without float16 units takes 100 times as long as in float32.
    return min(edge, 512) if device.type == "cpu" and dtype == torch.float16 else edge


def ceilings_text(best: Mapping[str, float], dtype: torch.dtype) -> str:
    text = (f"In the same rounds: a copy of {best['copy_gb_per_second']:.1f} GB/s (read + "
            f"written), {str(dtype).removeprefix('torch.')} matrix products of "
            f"{best['matrix_gmacs_per_second']:.1f} G MACs/s")
    if dtype == torch.float32 and torch.cuda.is_available():
        # cuDNN's float32 convolutions round to TF32 where matrix products do not.
        return f"{text}, without TF32, which cuDNN's convolutions may use."
    return f"{text}."


def rates(macs: float, seconds: float, best: Mapping[str, float]) -> Row:
    rate = macs / seconds / 1e9
    return {"gmacs_per_second": rate, "matrix_share": rate / best["matrix_gmacs_per_second"]}


# The result


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """The columns of text come first."""
    header = [name for name, _, _ in columns]
    cells = [[_cell(row[key], form) for _, key, form in columns] for row in rows]
    return markdown_table(header, cells, [form for _, _, form in columns].count(""))


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    text = format(value, form)
    return text.replace("%", " %") if form.endswith("%") else text


def show(title: str, rows: list[Row], columns: Sequence[Column], notes: Sequence[str],
         values: Mapping[str, Any], *, repeats: int, device: torch.device | None,
         json_path: Path | None) -> None:
    """Print what was compared and where, the table and the notes, and write the values if asked to.
    No `device`: on one thread, and the title says so."""
    values = {**values, "rows": rows}
    if device is not None:
        peak = peak_memory_gib(device)
        title = f"{title}, {place(device)}"
        notes = [*notes, f"Peak memory: {peak:.2f} GiB, all rows together."]
        values |= {"place": place(device), "peak_memory_gib": peak}
    title = f"{title}, medians of {repeats} rounds"
    print("\n\n".join([title, table(rows, columns), "\n".join(notes)]))
    if json_path:
        try:
            write_text_atomically(json.dumps({"title": title, **values}), json_path)
        except OSError as error:
            raise UserError(f"--json {json_path} cannot be written: {error}.") from None


# A random step


def step_options(device: torch.device, precision: str, accum_steps: int = 1) -> engine.StepOptions:
    """Those of train_kd.py for images that are normalised as ImageNet's."""
    transform = data.BatchTransform(models.VisionModel.input_mean, models.VisionModel.input_std,
                                    device)
    return engine.StepOptions(
        device=device, amp_dtype=engine.AMP_DTYPES[precision], accum_steps=accum_steps,
        clip_grad=None, memory_format=torch.channels_last, seed=0, batch_transform=transform)


def random_batches(batch_size: int, input_size: int, num_classes: int,
                   device: torch.device) -> Iterator[Batch]:
    """The same random batch for ever, as a loader for `device` hands it over."""
    pixels = torch.randint(256, (batch_size, input_size, input_size, 3), dtype=torch.uint8)
    side = int(0.42 * input_size)  # random erasing takes 0.18 of an image's area in the mean
    erased = torch.tensor([[place, 0, 0, side, side, place] for place in range(0, batch_size, 4)])
    images = ImageBatch(pixels.permute(0, 3, 1, 2), erased, len(erased) * side ** 2)
    labels = torch.randint(num_classes, (batch_size,))
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    batch = Batch(images, labels, torch.arange(batch_size), torch.ones(batch_size).bool())
    while True:
        yield batch


def random_state(student: models.VisionModel, teacher: nn.Module | None,
                 loss_specs: list[list[str]], options: engine.StepOptions, *,
                 keeps_average: bool = False, cuda_graphs: bool = False) -> engine.TrainState:
    """A run that begins, with AdamW at a small rate. `loss_specs`: NAME key=value ..."""
    teacher_info = None if teacher is None else teacher.feature_info
    distiller = Distiller(student, *create_losses(loss_specs, student.feature_info, teacher_info))
    distiller.to(options.device, memory_format=options.memory_format).train()
    optimizer = optim.build_optimizer("adamw", optim.parameter_groups(distiller, 0.05), lr=1e-4)
    return engine.build_state(distiller, optimizer, options,
                              ema=optim.ModelEma(student) if keeps_average else None,
                              captured=distiller.capture() if cuda_graphs else None)
