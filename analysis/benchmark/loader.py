"""Images per second and core of the training loader, against torchvision's ImageFolder, transforms
and default collating with the same operations on the same photographs.

    python -m analysis.benchmark loader --data-path FOLDER
"""
import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import data
from analysis.benchmark.common import (
    Stopwatch,
    check_at_least,
    markdown_table,
    new_parser,
    number,
    show,
)
from data.batch import RATIO, SCALE, BatchTransform, ImageBatch, collate
from data.loader import FREED_BLOCKS, UNREADABLE, Samples, keep_freed_memory
from data.randaugment import parse_policy
from utils.log import progress
from utils.registry import UserError
from utils.rng import seeded

POLICY, REPROB = "rand-m9-mstd0.5-inc1", 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("decode", "crop, resize", "flip, RandAugment", "tensor", "collate")
BASELINE = "torchvision"
Row = dict[str, Any]


class TorchvisionSamples:
    """(epoch, index) -> (image, label) by torchvision alone, drawn from the seeds of ours."""

    def __init__(self, root: Path, input_size: int) -> None:
        crop = T.RandomResizedCrop(input_size, interpolation=T.InterpolationMode.BICUBIC)
        self.augment = T.Compose([crop, T.RandomHorizontalFlip(), parse_policy(POLICY)])
        self.to_tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing(
            REPROB, scale=SCALE, ratio=RATIO, value="random")])
        self.crop = crop
        self.folder = ImageFolder(str(root), T.Compose([self.augment, self.to_tensor]))

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        with seeded(0, "augment", *key):
            return self.folder[key[1]]


def photographs(folder: str | Path) -> Path:
    """The folder with one folder per class: its train/ if there is one, else itself."""
    root = Path(folder)
    return root / "train" if (root / "train").is_dir() else root


def check_readable(source: data.ImageSource) -> None:
    """Ours would skip a broken picture and torchvision's pipeline would not."""
    for index in range(len(source)):
        try:
            source.load(index)[0].load()
        except UNREADABLE as error:
            raise UserError(f"cannot read the picture {source.name_of(index)} ({error}). Repair or "
                            "remove it.") from None


def measure(folder: str | Path, *, input_size: int = 224, batch_size: int = 64, repeats: int = 9
            ) -> list[Row]:
    """One row per pipeline, torchvision's first: `images_per_second`, up to the batch;
    `with_device_share`, up to the normalised and erased float batch, as torchvision's is already;
    `ratio` and `ratio_with_device_share` to torchvision; and per image the milliseconds of STAGES
    and of the `device` share.

    One process and one thread. A round passes over the photographs once with each pipeline, with
    the same crops and operations; figures are medians over `repeats` rounds after one to warm up,
    ratios those of ratios within a round. Ours runs as it does in a worker of the loader.
    """
    root = photographs(folder).resolve()
    source = data.create_dataset("imagefolder", root.name, str(root.parent))
    check_readable(source)
    batch_size = min(batch_size, len(source))
    batches = [range(first, first + batch_size)
               for first in range(0, len(source) - batch_size + 1, batch_size)]
    passes = {BASELINE: _torchvision_pass(TorchvisionSamples(root, input_size))}
    for name, is_fast in (("ours, the same pixels", False), ("ours, --fast-decode", True)):
        transform = data.train_transform(input_size, auto_augment=POLICY, fast_decode=is_fast,
                                         random_erasing_prob=REPROB)
        passes[name] = _our_pass(Samples(source, transform, seed=0))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = _rounds(passes, batches, repeats)
    finally:
        torch.set_num_threads(num_threads)
        keep_freed_memory(0)
    num_images = batch_size * len(batches)
    return [_row(name, seconds, rounds[BASELINE], num_images) for name, seconds in rounds.items()]


def _rounds(passes: dict[str, Callable], batches: list[range], repeats: int
            ) -> dict[str, list[dict[str, float]]]:
    """Of each pipeline and round the seconds of every stage, and `all` of them up to the batch."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in passes}
    with progress("rounds", repeats + 1, unit="round") as bar:
        for epoch in range(repeats + 1):
            for name, run in passes.items():
                keep_freed_memory(0 if name == BASELINE else FREED_BLOCKS)
                rounds[name].append(run(epoch, batches))
            bar.update()
    return {name: seconds[1:] for name, seconds in rounds.items()}


def _torchvision_pass(samples: TorchvisionSamples) -> Callable:
    def run(epoch: int, batches: Iterable[range]) -> dict[str, float]:
        watch = Stopwatch()
        for batch in batches:
            watch.start()
            default_collate([samples[epoch, index] for index in batch])
            watch.lap("all")
            images = []
            for index in batch:  # the same again, stage by stage
                path, label = samples.folder.samples[index]
                with seeded(0, "augment", epoch, index):
                    watch.start()
                    image = samples.folder.loader(path)
                    watch.lap("decode")
                    image = samples.crop(image)
                    watch.lap("crop, resize")
                    for step in samples.augment.transforms[1:]:
                        image = step(image)
                    watch.lap("flip, RandAugment")
                    images.append((samples.to_tensor(image), label))
                    watch.lap("tensor")
            watch.start()
            default_collate(images)
            watch.lap("collate")
        return {**watch.seconds, "device": 0.0}
    return run


def _our_pass(samples: Samples) -> Callable:
    prepare = BatchTransform(MEAN, STD)

    def run(epoch: int, batches: Iterable[range]) -> dict[str, float]:
        watch = Stopwatch()
        for batch in batches:
            watch.start()
            pictures: ImageBatch = collate([samples[epoch, index] for index in batch])[0]
            watch.lap("all")
            prepare(pictures)
            watch.lap("device")
            _our_stages(samples, epoch, batch, watch)
        return watch.seconds
    return run


def _our_stages(samples: Samples, epoch: int, batch: range, watch: Stopwatch) -> None:
    crop, hand_over = samples.transform.read, samples.transform._replace(steps=())
    done = []
    for index in batch:
        with seeded(0, "augment", epoch, index):
            watch.start()
            decoded = crop.decode(samples.source.load(index)[0])
            watch.lap("decode")
            image = crop.resize(*decoded)
            watch.lap("crop, resize")
            for step in samples.transform.steps:
                image = step(image)
            watch.lap("flip, RandAugment")
            done.append((*hand_over.finish(image), 0, index))
            watch.lap("tensor")
    watch.start()
    collate(done)
    watch.lap("collate")


def _row(name: str, rounds: list[dict[str, float]], baseline: list[dict[str, float]],
         num_images: int) -> Row:
    whole = [seconds["all"] + seconds["device"] for seconds in rounds]
    median = statistics.median
    return {
        "pipeline": name,
        "images_per_second": median(num_images / seconds["all"] for seconds in rounds),
        "with_device_share": median(num_images / seconds for seconds in whole),
        "ratio": median(base["all"] / seconds["all"] for base, seconds in zip(baseline, rounds)),
        "ratio_with_device_share": median(
            base["all"] / seconds for base, seconds in zip(baseline, whole)),
        **{stage: median(1000 * seconds[stage] / num_images for seconds in rounds)
           for stage in (*STAGES, "device")}}


def table(rows: list[Row]) -> str:
    stages = (*STAGES, "device")
    header = ["loader", "images/s per core", "ratio", "with the device's share", "ratio",
              *(f"{stage} (ms)" for stage in stages)]
    return markdown_table(header, [
        [row["pipeline"], number(row["images_per_second"], 0), number(row["ratio"]),
         number(row["with_device_share"], 0), number(row["ratio_with_device_share"]),
         *(number(row[stage]) for stage in stages)] for row in rows])


def main(argv: list[str]) -> None:
    parser = new_parser("loader", __doc__, batch_size=64, repeats=9, has_device=False)
    parser.add_argument("--data-path", required=True, metavar="FOLDER",
                        help="a folder per class of photographs, or train/ with these")
    args: argparse.Namespace = parser.parse(argv)
    check_at_least({name: getattr(args, name) for name in (
        "input_size", "batch_size", "repeats")})
    rows = measure(args.data_path, input_size=args.input_size, batch_size=args.batch_size,
                   repeats=args.repeats)
    title = (f"Loader, {args.data_path} at {args.input_size} px, batch {args.batch_size}, uint8 to "
             f"the device, one process, one thread, medians of {args.repeats} rounds")
    notes = ["Ratio: of images per second to torchvision's, medians of those within a round. "
             "Columns in ms: per image, by stage; device is normalising and erasing, which "
             "torchvision does before."]
    show(title, table(rows), notes, {"rows": rows}, device=None, json_path=args.json)
