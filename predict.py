"""Classify images with a checkpoint of train_kd.py, or with published weights.

    python predict.py --checkpoint runs/NAME/checkpoint-best.pth cat.jpg photos/
    python predict.py --model resnet50 --weights published photos/ --csv table.csv --show sheet.png

In an application:

    from predict import distilled
    student = distilled("runs/NAME/checkpoint-best.pth")
    print(student.predict(Image.open("cat.jpg")))      # [("tabby", 0.81), ...]
"""
from utils import process

if __name__ == "__main__":
    process.begin()  # first, for PyTorch takes seconds to import
import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

import data
import models
from data.folders import images_below
from models.weights import Trained, check_source, load_named, load_trained
from utils import distributed
from utils.config import Parser, at_least, program
from utils.files import write_atomically, write_text_atomically
from utils.log import print_once, progress
from utils.registry import UserError

NUM_BEST = 5
CELL, CAPTION, NUM_COLUMNS, MOST_SHOWN = 160, 44, 8, 48  # of the sheet: pixels; images


def build_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__.split("\n")[0],
                    usage="%(prog)s --checkpoint FILE IMAGE|FOLDER ... [--flag value ...]")
    flag = parser.add_argument
    flag("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="what to classify; folders "
         "with all that is in them")
    flag("--checkpoint", type=Path, metavar="FILE", help="a checkpoint of train_kd.py")
    flag("--model", nargs="+", metavar="NAME", help="NAME [key=value ...], with --weights; "
         + models.describe_models())
    flag("--weights", metavar="SOURCE", help="path, URL or published")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=at_least(1), default=1000, help="classes of --weights")
    flag("--csv", type=Path, metavar="FILE", help="write a table of all predictions")
    flag("--show", type=Path, metavar="PNG", help="write a sheet of the images with the best class")
    flag("--batch-size", type=at_least(1), default=32, help="images at a time")
    flag("--num-workers", type=at_least(0), default=2, help="loader processes")
    flag("--device", choices=distributed.DEVICES, default="auto", help="where to run")
    return parser


@program("predict.py", build_parser)
def main(args: argparse.Namespace) -> int:
    device = distributed.setup(args.device)
    check_flags(args)
    files = ImageFiles(find_images(args.images))
    check_outputs([args.csv, args.show], files)
    if args.checkpoint:
        trained = load_trained(args.checkpoint, args.weights_key)
    else:
        model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
        trained = Trained(model, settings={}, classes=model.classes)
    classifier = Classifier(trained).to(device)

    predictions = []
    loader = data.eval_loader(files, classifier.transform.read, batch_size=args.batch_size,
                              num_workers=args.num_workers, skip_bad_images=True,
                              pin_memory=device.type == "cuda")
    with closing(loader):
        for found in classifier.predict_batches(loader, device):
            predictions += found
            print_once("\n".join(describe(prediction, files) for prediction in found))
    if loader.bad:
        print_once(f"{len(loader.bad)} of {len(files)} images could not be read.")
    if args.csv:
        write_text_atomically(csv_text(predictions, files), args.csv)
        print_once(f"table of {len(predictions)} images written to {args.csv}")
    if args.show:
        sheet = draw_sheet(predictions[:MOST_SHOWN], files)
        write_atomically(lambda file: sheet.save(file, format="png"), args.show)
        shown = min(len(predictions), MOST_SHOWN)
        print_once(f"sheet of {shown} of {len(predictions)} images written to {args.show}")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise UserError("predict.py runs in one process; start it with python.")
    check_source(args.checkpoint, args.model, args.weights,
                 names_classes="num_classes" in args.given)
    for flag, path, ending in (("--csv", args.csv, ".csv"), ("--show", args.show, ".png")):
        if path and (path.suffix != ending or path.is_dir()
                     or not path.absolute().parent.is_dir()):
            raise UserError(f"{flag} {path} must be a file name ending in {ending} in a folder "
                            "that exists.")


def check_outputs(outputs: Sequence[Path | None], files: "ImageFiles") -> None:
    """Raises UserError where an image to classify would be overwritten."""
    inputs = {os.path.realpath(path) for path in files.paths}
    for path in outputs:
        if path is not None and os.path.realpath(path) in inputs:
            raise UserError(f"{path} is one of the images to classify. Name another file to write.")


def distilled(path: str | Path, *, weights_key: str | None = None) -> "Classifier":
    """The network of a checkpoint of train_kd.py, ready to use: in evaluation mode, folded, with
    `classes`, `transform` and `predict`. `weights_key`: model, or model_ema for the averaged
    weights; by default as eval.py chooses. Raises UserError for another file."""
    return Classifier(load_trained(Path(path), weights_key))


class Classifier(nn.Module):
    """A trained network with what its predictions need.

    `classes`: the name of each label. `transform`: PIL image -> float32 (3, H, W), exactly as the
    evaluation prepares it. Called with a batch of those, (N, 3, H, W), it gives logits (N, K).
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        model, settings, classes = trained
        if model.num_classes == 0:
            raise UserError("the network has no classifier, so it cannot name a class. Use one "
                            "that was trained with labels.")
        self.model = model.eval().fold().to(memory_format=torch.channels_last)
        self.classes = class_names(classes, model.num_classes)
        self.transform = ImageTransform(model, settings)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), prepared by `transform` -> logits (N, num_classes)."""
        return self.model(images)

    def predict(self, image: Image.Image, num_best: int = NUM_BEST) -> list[tuple[str, float]]:
        """The likeliest classes of one image with their probabilities, the best first."""
        device = next(self.parameters()).device
        return self.best_of(self.transform(image)[None].to(device), num_best)[0]

    @torch.no_grad()
    def best_of(self, images: Tensor, num_best: int = NUM_BEST) -> list[list[tuple[str, float]]]:
        """Of each prepared image of (N, 3, H, W): its likeliest classes with probabilities."""
        images = images.contiguous(memory_format=torch.channels_last)
        probs, labels = self(images).float().softmax(1).topk(min(num_best, len(self.classes)))
        return [[(self.classes[label], prob) for label, prob in zip(*row)]
                for row in zip(labels.tolist(), probs.tolist())]

    def predict_batches(self, loader: data.Loader, device: torch.device
                        ) -> Iterator[list["Prediction"]]:
        """Of each batch of a loader, the predictions of its readable images."""
        with progress("predict", len(loader)) as bar:
            for batch in loader:
                images = self.transform.to_floats(batch.images.to(device))
                rows = zip(batch.indices.tolist(), batch.readable.tolist(), self.best_of(images))
                bar.update()
                yield [Prediction(index, best) for index, readable, best in rows if readable]


class Prediction(NamedTuple):
    index: int  # of the image among the given ones
    best: list[tuple[str, float]]  # classes with probabilities


class ImageTransform:
    """PIL image -> float32 (3, H, W): resized, cropped and normalised as in the evaluation of the
    run whose `settings` these are. Raises what Pillow raises for an image that cannot be read."""

    def __init__(self, model: models.VisionModel, settings: dict) -> None:
        how = Trained(model, settings, classes=None).preprocessing()
        self.read = data.eval_transform(**how)
        self.mean, self.std = model.input_mean, model.input_std

    def to_floats(self, batch: data.ImageBatch) -> Tensor:
        """Bytes of many -> (N, 3, H, W), on their device."""
        return data.BatchTransform(self.mean, self.std, batch.pixels.device)(batch)

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = self.read(image)  # (3, H, W) uint8
        nothing_erased = torch.zeros(0, 6, dtype=torch.int64)
        return self.to_floats(data.ImageBatch(pixels[None], nothing_erased))[0]


def class_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """By label, in ImageNet's words where they are its wnids; numbers where no names are known."""
    wnids = data.imagenet_wnids()
    if classes is None:
        classes = wnids if num_classes == len(wnids) else [f"class {i}" for i in range(num_classes)]
    return data.class_words(classes)


class ImageFiles(data.ImageSource):
    """Image files without labels."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths, self.classes = paths, []

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return data.read_image(self.paths[index]), 0

    def name_of(self, index: int) -> str:
        return self.paths[index]


def find_images(given: Sequence[Path]) -> list[str]:
    """The files given, and those in the folders given that are images by their ending, sorted; each
    once. Raises UserError for what is not there and for a folder without images."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [path / name for name in images_below(str(path))[0]]
            if not inside:
                raise UserError(f"{path} holds no images (*.jpg, *.png, ...). Name a folder of "
                                "images, or files.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no such file or folder: {path}.")
    once = {os.path.realpath(path): str(path) for path in reversed(found)}  # the first name stays
    if len(once) < len(found):
        print_once(f"{len(found) - len(once)} of the {len(found)} files are named twice, and "
                   "classified once")
    return list(reversed(once.values()))


def describe(prediction: Prediction, files: ImageFiles) -> str:
    best = ", ".join(f"{name} {prob:.1%}" for name, prob in prediction.best)
    return f"{files.name_of(prediction.index)}: {best}"


def csv_text(predictions: Sequence[Prediction], files: ImageFiles) -> str:
    """A line per image: its file, then class and probability of each of the best."""
    number = len(predictions[0].best) if predictions else 0
    header = [name for i in range(1, number + 1) for name in (f"class_{i}", f"prob_{i}")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *header])
    for index, best in predictions:
        writer.writerow([files.name_of(index),
                         *(cell for name, prob in best for cell in (name, f"{prob:.6f}"))])
    return text.getvalue()


def draw_sheet(predictions: Sequence[Prediction], files: ImageFiles) -> Image.Image:
    """The images in a grid, under each its two best classes."""
    num_columns = min(NUM_COLUMNS, len(predictions))
    num_rows = -(-len(predictions) // num_columns)
    sheet = Image.new("RGB", (num_columns * CELL, num_rows * (CELL + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (index, best) in enumerate(predictions):
        left, top = place % num_columns * CELL, place // num_columns * (CELL + CAPTION)
        image = ImageOps.contain(data.to_rgb(files.load(index)[0]), (CELL - 8, CELL - 8))
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        for line, (name, prob) in enumerate(best[:2]):
            text = f"{prob:.0%} {name}"
            while draw.textlength(text, font) > CELL - 8:
                text = text[:-2].rstrip(" …") + "…"
            draw.text((left + 4, top + CELL + 2 + 19 * line), text, fill="black" if line == 0
                      else "dimgray", font=font)
    return sheet


if __name__ == "__main__":
    sys.exit(main())
