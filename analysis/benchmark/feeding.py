"""Training steps fed by each loader: images from disk, and kept in memory (--data-on).

    python -m analysis.benchmark data --data-path FOLDER
    python -m analysis.benchmark data --data-path FOLDER --student convnext_bn_pico \\
        --input-size 128 --batch-size 1024 --amp bf16 --compile --steps 9      # on a GPU

A round is an epoch of the program's own steps (engine.py), from asking for the first batch to the
last update, mixup included. "no loader" is the same with one batch over and over: the most that any
loader can reach. Decoding into memory, once in a run, comes before the rounds.
"""
import argparse
import time
from collections.abc import Callable, Iterator
from itertools import count
from statistics import median

import torch

import data
import engine
from analysis.benchmark import common
from analysis.benchmark.loader import photographs
from analysis.benchmark.step import Step
from models.base import model_from_spec
from utils.config import Parser, at_least, program
from utils.distributed import num_cores
from utils.faults import has_cuda_graphs
from utils.registry import UserError

BASELINE, CEILING = "disk", "no loader"
COLUMNS = [
    ("loader", "loader", ""), ("images/s", "images_per_second", ".0f"), ("ratio", "ratio", ".2f"),
    ("ms per step", "ms", ".2f"), ("batches alone, images/s", "alone", ".0f"),
    ("decoded in (s)", "preparing_seconds", ".1f")]


def build_loaders(source: data.ImageSource, device: torch.device, *, input_size: int,
                  batch_size: int, num_batches: int, num_workers: int, policy: str
                  ) -> dict[str, data.Loader]:
    """By --data-on: from disk, in ram, and on the device where that is another place."""
    transform = data.train_transform(input_size, auto_augment=policy)
    places = data.PLACES if device.type == "cuda" else data.PLACES[:2]
    loaders = {}
    for place in places:
        loader = data.train_loader(
            source, transform, batch_size=batch_size, num_batches=num_batches, seed=0,
            num_workers=num_workers, skip_bad_images=False, pin_memory=device.type == "cuda")
        loaders[place] = loader if place == "disk" else data.in_memory(loader, place, device)
    return loaders


def epochs_of(loader: data.Loader) -> Iterator[Iterator[data.Batch]]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        yield iter(loader.start_at(epoch, 0))
        epoch += 1


def fed(step: Step, epochs: Iterator[Iterator[data.Batch]], num_steps: int) -> Callable[[], None]:
    def run() -> None:
        running = step._replace(batches=next(epochs))
        for _ in range(num_steps):
            running()
        for _ in running.batches:  # its end, so that no process works on during other rounds
            pass
    return run


def drained(epochs: Iterator[Iterator[data.Batch]], options: engine.StepOptions
            ) -> Callable[[], None]:
    def run() -> None:
        for batch in next(epochs):
            options.to_device(batch.images, batch.labels)
    return run


def measure(step: Step, loaders: dict[str, data.Loader], *, num_steps: int, batch_size: int,
            repeats: int) -> list[common.Row]:
    """One row per loader, `no loader` last: `images_per_second` of whole steps and `alone`, of
    making batches and nothing else; `ratio` to `disk`, the median of those within a round."""
    device = step.options.device
    preparing: dict[str, float | None] = {CEILING: None}
    actions = {}
    for name, loader in loaders.items():
        start = time.perf_counter()
        loader.prepare()
        preparing[name] = None if name == BASELINE else time.perf_counter() - start
        epochs = epochs_of(loader)
        actions[name] = fed(step, epochs, num_steps)
        actions[f"{name} alone"] = drained(epochs, step.options)
    batch = next(iter(loaders["ram"]))
    actions[CEILING] = fed(step, (iter([batch] * num_steps) for _ in count()), num_steps)
    seconds = common.time_interleaved(actions, repeats, device)
    rows = []
    for name in (*loaders, CEILING):
        images, whole = batch_size * num_steps, median(seconds[name])
        alone = seconds.get(f"{name} alone")
        rows.append({"loader": name, "images_per_second": images / whole,
                     "ratio": median(a / b for a, b in zip(seconds[BASELINE], seconds[name])),
                     "ms": 1000 * whole / num_steps, "alone": alone and images / median(alone),
                     "preparing_seconds": preparing[name]})
    return rows


def build_step(spec: list[str], device: torch.device, precision: str, is_compiled: bool,
               num_classes: int) -> Step:
    """As a run on this device does it: on a GPU from a CUDA graph."""
    torch.manual_seed(0)
    student = model_from_spec(spec, "--student", num_classes=num_classes)
    options = common.step_options(device, precision)
    state = common.random_state(student, None, [["ce"]], options,
                                cuda_graphs=has_cuda_graphs(None, device))
    if is_compiled:
        state.distiller.compile()
    return Step(state, iter(()), None, data.Mixup(num_classes).at, options)


def build_parser() -> Parser:
    parser = common.new_parser("data", __doc__, batch_size=64, smallest_batch=2, repeats=5)
    flag = parser.add_argument
    flag("--data-path", required=True, metavar="FOLDER",
         help="a folder per class of images, or train/ with these")
    flag("--student", nargs="+", default=["convnext_bn_nano"], metavar="NAME",
         help="NAME [key=value ...]")
    flag("--aa", choices=["none", "3a"], default="3a", help="as in train_kd.py")
    flag("--amp", choices=list(engine.AMP_DTYPES), default="none", help="mixed precision")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help="the student")
    flag("--num-workers", type=at_least(0), default=num_cores(), help="that read from disk")
    flag("--steps", type=at_least(1), default=50, help="of a round; an epoch's at most")
    parser.set_defaults(input_size=64)
    return parser


@program("analysis.benchmark data", build_parser)
def main(args: argparse.Namespace) -> int:
    if args.batch_size % 2:
        raise UserError(f"mixup pairs the images of a batch: --batch-size must be even, got "
                        f"{args.batch_size}.")
    device = common.start(args.device, args.threads)
    root = photographs(args.data_path).resolve()
    source = data.create_dataset("imagefolder", root.name, str(root.parent))
    num_steps = min(args.steps, len(source) // args.batch_size)
    if num_steps == 0:
        raise UserError(f"{root} has {len(source)} images, fewer than a batch of "
                        f"{args.batch_size}. Set a smaller --batch-size.")
    loaders = build_loaders(source, device, input_size=args.input_size, batch_size=args.batch_size,
                            num_batches=num_steps, num_workers=args.num_workers, policy=args.aa)
    step = build_step(args.student, device, args.amp, args.compile, len(source.classes))
    macs = step.state.distiller.student.count_macs(args.input_size)
    rows = measure(step, loaders, num_steps=num_steps, batch_size=args.batch_size,
                   repeats=args.repeats)
    loaders["disk"].close()
    title = (f"Training fed by each loader, {args.data_path}, {' '.join(args.student)} "
             f"({macs / 1e9:.3f} G MACs), {num_steps} steps of {args.batch_size} images at "
             f"{args.input_size} px, --aa {args.aa}, precision {args.amp}, compiled: "
             f"{'all' if args.compile else 'nothing'}, {args.num_workers} worker(s) for disk")
    notes = ["Ratio: of images per second of whole steps to those from disk, medians of those "
             "within a round. Batches alone: made and normalised, and nothing trained."]
    common.show(title, rows, COLUMNS, notes, {}, repeats=args.repeats, device=device,
                json_path=args.json)
    return 0
