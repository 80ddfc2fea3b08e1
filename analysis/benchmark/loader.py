"""Images per second and core of the training loader, against torchvision's ImageFolder, transforms
and default collating with the same operations on the same photographs.

    python -m analysis.benchmark loader --data-path FOLDER
"""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import data
from analysis.benchmark import common
from data.batch import RATIO, SCALE, BatchTransform, Sample, collate
from data.loader import FREED_BLOCKS, Samples, keep_freed_memory
from data.randaugment import parse_policy
from utils.config import Parser, program
from utils.log import progress
from utils.registry import UserError
from utils.rng import seeded

POLICY, REPROB = "rand-m9-mstd0.5-inc1", 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("decode", "crop, resize", "flip, RandAugment", "tensor", "collate")
BASELINE = "torchvision"
COLUMNS = [
    ("loader", "pipeline", ""), ("images/s per core", "images_per_second", ".0f"),
    ("ratio", "ratio", ".2f"), ("with the device's share", "with_device_share", ".0f"),
    ("ratio", "ratio_with_device_share", ".2f"),
    *((f"{stage} (ms)", stage, ".2f") for stage in (*STAGES, "device"))]


class TorchvisionSamples:
    """(epoch, index) -> (image, label) by torchvision alone, drawn from the seeds of ours."""

    def __init__(self, root: Path, input_size: int) -> None:
        self.crop = T.RandomResizedCrop(input_size, interpolation=T.InterpolationMode.BICUBIC)
        self.augment = T.Compose([T.RandomHorizontalFlip(), parse_policy(POLICY)])
        self.to_tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD), T.RandomErasing(
            REPROB, scale=SCALE, ratio=RATIO, value="random")])
        self.folder = ImageFolder(str(root), T.Compose([self.crop, self.augment, self.to_tensor]))

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        with seeded(0, "augment", *key):
            return self.folder[key[1]]


class Pipeline(NamedTuple):
    """A loader, whole and in its stages."""

    samples: Any  # (epoch, index) -> a sample
    collate: Callable[[list], Any]
    stages: Sequence[Callable]  # STAGES but the last: index -> ... -> a sample
    to_images: Callable[[Any], torch.Tensor] | None  # what is left to do on the device with a batch
    freed_blocks: int  # that a worker's memory keeps

    def time(self, epoch: int, batches: list[range]) -> dict[str, float]:
        """Seconds of every stage, and of `all` of them up to the batch."""
        watch = common.Stopwatch()
        keep_freed_memory(self.freed_blocks)
        for indices in batches:
            watch.start()
            batch = self.collate([self.samples[epoch, index] for index in indices])
            watch.lap("all")
            if self.to_images is not None:
                self.to_images(batch)
                watch.lap("device")
            samples = []
            for index in indices:  # the same again, stage by stage
                value = index
                with seeded(0, "augment", epoch, index):
                    watch.start()
                    for name, stage in zip(STAGES, self.stages):
                        value = stage(value)
                        watch.lap(name)
                samples.append(value)
            watch.start()
            self.collate(samples)
            watch.lap("collate")
        return watch.seconds


def torchvision_pipeline(samples: TorchvisionSamples) -> Pipeline:
    folder = samples.folder
    stages = (lambda index: folder.loader(folder.samples[index][0]), samples.crop, samples.augment,
              lambda image: (samples.to_tensor(image), 0))
    return Pipeline(samples, default_collate, stages, None, freed_blocks=0)


def our_pipeline(samples: Samples) -> Pipeline:
    crop, only_hand_over = samples.transform.read, samples.transform._replace(steps=())
    to_images = BatchTransform(MEAN, STD)

    def augment(image: Any) -> Any:
        for step in samples.transform.steps:
            image = step(image)
        return image

    stages = (lambda index: crop.decode(samples.source.load(index)[0]),
              lambda decoded: crop.resize(*decoded), augment,
              lambda image: Sample(*only_hand_over.finish(image), label=0, index=0))
    return Pipeline(samples, collate, stages, lambda batch: to_images(batch.images), FREED_BLOCKS)


def photographs(folder: str | Path) -> Path:
    """The folder with one folder per class: its train/ if there is one, else itself."""
    root = Path(folder)
    return root / "train" if (root / "train").is_dir() else root


def check_readable(source: data.ImageSource) -> None:
    """Ours would skip a broken image and torchvision's pipeline would not."""
    for index in range(len(source)):
        try:
            data.to_rgb(source.load(index)[0])
        except OSError as error:
            raise UserError(f"cannot read the image {source.name_of(index)} ({error}). Repair or "
                            "remove it.") from None


def measure(folder: str | Path, *, input_size: int = 224, batch_size: int = 64, repeats: int = 9
            ) -> list[common.Row]:
    """One row per pipeline, torchvision's first: `images_per_second`, up to the batch;
    `with_device_share`, up to the normalised and erased float batch, as torchvision's is already;
    `ratio` and `ratio_with_device_share` to torchvision; and per image the milliseconds of STAGES
    and of the `device` share.

    One process and one thread. A round passes over the photographs once with each pipeline, with
    the same crops and operations; values are medians over `repeats` rounds after one to warm up,
    ratios those of ratios within a round. Ours runs as it does in a worker of the loader.
    """
    root = photographs(folder).resolve()
    source = data.create_dataset("imagefolder", root.name, str(root.parent))
    check_readable(source)
    batch_size = min(batch_size, len(source))
    batches = [range(first, first + batch_size)
               for first in range(0, len(source) - batch_size + 1, batch_size)]
    pipelines = {BASELINE: torchvision_pipeline(TorchvisionSamples(root, input_size))}
    for name, is_fast in (("ours, the same pixels", False), ("ours, --fast-decode", True)):
        transform = data.train_transform(input_size, auto_augment=POLICY, fast_decode=is_fast,
                                         random_erasing_prob=REPROB)
        pipelines[name] = our_pipeline(Samples(source, transform, seed=0))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress("rounds", repeats + 1, unit="round") as bar:
            for epoch in range(repeats + 1):
                for name, pipeline in pipelines.items():
                    rounds[name].append(pipeline.time(epoch, batches))
                bar.update()
    finally:
        torch.set_num_threads(num_threads)
        keep_freed_memory(0)
    num_images = batch_size * len(batches)
    return [row_of(name, seconds[1:], rounds[BASELINE][1:], num_images)
            for name, seconds in rounds.items()]


def row_of(name: str, rounds: list[dict[str, float]], baseline: list[dict[str, float]],
           num_images: int) -> common.Row:
    row: common.Row = {"pipeline": name}
    # Torchvision's batch is ready for the network when it is collated.
    bases = [seconds["all"] for seconds in baseline]
    without = [seconds["all"] for seconds in rounds]
    whole = [seconds["all"] + seconds["device"] for seconds in rounds]
    for speed, ratio, times in (("images_per_second", "ratio", without),
                                ("with_device_share", "ratio_with_device_share", whole)):
        row[speed] = median(num_images / time for time in times)
        row[ratio] = median(base / time for base, time in zip(bases, times))
    for stage in (*STAGES, "device"):
        row[stage] = median(1000 * seconds[stage] / num_images for seconds in rounds)
    return row


def build_parser() -> Parser:
    parser = common.new_parser("loader", __doc__, batch_size=64, repeats=9, has_device=False)
    parser.add_argument("--data-path", required=True, metavar="FOLDER",
                        help="a folder per class of photographs, or train/ with these")
    return parser


@program("analysis.benchmark loader", build_parser)
def main(args: argparse.Namespace) -> int:
    rows = measure(args.data_path, input_size=args.input_size, batch_size=args.batch_size,
                   repeats=args.repeats)
    title = (f"Loader, {args.data_path} at {args.input_size} px, batch {args.batch_size}, uint8 to "
             "the device, one process, one thread")
    notes = ["Ratio: of images per second to torchvision's, medians of those within a round. "
             "Columns in ms: per image, by stage; device is normalising and erasing, which "
             "torchvision does before."]
    common.show(title, rows, COLUMNS, notes, {}, repeats=args.repeats, device=None,
                json_path=args.json)
    return 0
