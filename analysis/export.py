"""Write a student alone, for its use in other programs, and compare the file with the network.

    python -m analysis.export --checkpoint runs/NAME/checkpoint-best.pth --out student.pth
    python -m analysis.export --checkpoint FILE --format onnx --out student.onnx --data-path DIR
    python -m analysis.export --model convnext_t_bn --weights published --format convnext --out FILE
"""
import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
from analysis.card import model_card
from analysis.common import LoadedModel, check_new, select, validation_images
from analysis.formats import FORMATS, Format, Forward, Student
from models.weights import Trained, load_named, load_trained
from utils.config import Parser, at_least, program
from utils.files import write_text_atomically
from utils.registry import UserError

TOLERANCE = 1e-3  # of the largest logit; rounding alone makes 1e-6 to 1e-5 of it


def build_parser() -> Parser:
    parser = Parser(prog="analysis.export", description=__doc__.split("\n\n")[0],
                    usage="%(prog)s --checkpoint FILE --out FILE [--flag value ...]")
    flag = parser.add_argument
    flag("--checkpoint", type=Path, metavar="FILE", help="of train_kd.py")
    flag("--model", nargs="+", metavar="NAME", help="NAME [key=value ...], with --weights")
    flag("--weights", metavar="SOURCE", help="path, URL or published")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=at_least(1), default=1000, help="of --weights")
    flag("--format", choices=list(FORMATS), default="weights", help="of the file; docs/export.md")
    flag("--out", type=Path, required=True, metavar="FILE", help="a file that does not exist yet")
    flag("--input-size", type=at_least(1), help="pixels; by default as it is evaluated")
    flag("--dynamic-size", action=argparse.BooleanOptionalAction, default=False,
         help="let torch-export and onnx take images of any size, not of --input-size alone")
    flag("--data-set", nargs="+", metavar="NAME", help="of the images that are compared on; by "
         "default the checkpoint's")
    flag("--data-path", help="folder that holds its val/; without it the images are random")
    flag("--images", type=at_least(1), default=32, help="how many are compared on")
    return parser


@program("analysis.export", build_parser)
def main(args: argparse.Namespace) -> int:
    has_weights = args.model is not None and args.weights is not None
    has_half = (args.model is None) != (args.weights is None)
    if has_half or has_weights == (args.checkpoint is not None):
        raise UserError("give either --checkpoint FILE, or --model NAME with --weights SOURCE.")
    if args.weights == "random":
        raise UserError("--weights random has nothing to export; name a file.")
    kind = FORMATS[args.format]
    card = check_out(args.out, args.format)
    if args.dynamic_size and args.format not in ("torch-export", "onnx"):
        raise UserError(f"--dynamic-size has no effect with --format {args.format}, which holds no "
                        "graph. Leave it out.")
    if args.checkpoint:
        trained = load_trained(args.checkpoint, args.weights_key)
        spec = trained.settings["student"]
    else:
        model = load_named(args.model, args.weights, args.weights_key, args.num_classes)
        trained, spec = Trained(model, {}, model.classes), args.model
    student = prepare(trained, spec, args.input_size, args.dynamic_size)

    images, what = images_to_compare(trained, student, args.data_set, args.data_path, args.images)
    kind.write(student, args.out)
    found = compare(student, kind, args.out, images)
    text = describe(found, what)
    about = model_card(student, args.out.name, args.format, text, checkpoint=args.checkpoint,
                       weights_key=args.weights_key, source=args.weights)
    write_text_atomically(about, card)
    print(f"{args.format}: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB), model card {card}\n"
          f"{text}")
    return 0


def check_out(out: Path, name: str) -> Path:
    """Where the model card goes. Raises UserError for a file that cannot be written."""
    ending = FORMATS[name].ending
    if out.exists() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} must be a file that does not exist yet, in a folder that "
                        "does.")
    if out.suffix != ending:
        raise UserError(f"--out {out}: a file of --format {name} ends in {ending}.")
    card = out.with_name(f"{out.name}.md")
    check_new([card], overwrite=False)
    return card


def prepare(trained: Trained, spec: list[str], input_size: int | None, dynamic_size: bool
            ) -> Student:
    """What is written. Without a run, the settings say what an evaluation needs to know."""
    model, settings, classes = trained
    if model.num_classes == 0:
        raise UserError(f"{' '.join(spec)} has no classifier; there is nothing to export.")
    how = trained.preprocessing(input_size)
    size = how["input_size"]
    if model.fixed_size and size != model.input_size:
        raise UserError(f"--input-size {size}: this model takes {model.input_size} px only.")
    if model.fixed_size and dynamic_size:
        raise UserError(f"--dynamic-size: this model takes {model.input_size} px only.")
    if not settings:
        # A short side in pixels as the share that is seen; half a pixel more is cut off again.
        crop_pct = size / (how["resize"] + 0.5) if how["resize"] else None
        settings = {"student": spec, "num_classes": model.num_classes, "input_size": size,
                    "crop_pct": crop_pct, "interpolation": how["interpolation"],
                    "data_set": ["imagefolder"]}
    return Student(spec, model.eval(), settings, classes, size, dynamic_size)


def images_to_compare(trained: Trained, student: Student, data_set: list[str] | None,
                      data_path: str | None, number: int) -> tuple[Tensor, str]:
    """(N, 3, H, W), prepared as for the network, and which images these are."""
    size, model = student.input_size, student.model
    if data_set is None and data_path is None:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(number, 3, size, size, generator=rng), (
            f"{number} random images (--data-path compares on real ones)")
    network = LoadedModel("student", "student", student.spec, model, trained.settings)
    source = select(validation_images(data_set, data_path, [network]), number, spread=True)
    how = trained.preprocessing(size)
    batch_transform = data.BatchTransform(model.input_mean, model.input_std, torch.device("cpu"))
    loader = data.eval_loader(source, data.eval_transform(**how), batch_size=len(source),
                              num_workers=0)
    with closing(loader):
        (batch,) = loader
        return batch_transform(batch.images), f"{len(source)} validation images"


class Difference(NamedTuple):
    largest: float  # between two logits
    scale: float  # of the logits: the largest
    agreement: float  # share of images with the same best class


@torch.no_grad()
def compare(student: Student, kind: Format, path: Path, images: Tensor) -> Difference | None:
    """How far the written file is from the network, on all images at once and on one alone; None
    where what runs it is not installed. A file that is another function is deleted, and UserError
    raised."""
    forward = kind.read(student, path)
    if forward is None:
        return None
    batches = [images, images[:1]]
    if student.dynamic_size:
        batches.append(images[:2, :, 16:, 32:] if min(images.shape[2:]) > 64 else
                       torch.nn.functional.pad(images[:2], (0, 64, 0, 32)))
    found = [difference(student.model, forward, batch) for batch in batches]
    worst = max(found, key=lambda one: one.largest / one.scale)
    if not worst.largest <= TOLERANCE * worst.scale:  # NaN, too
        path.unlink()
        raise UserError(f"{path} would not be the same function: its logits differ by up to "
                        f"{worst.largest:.2g}, of {worst.scale:.2g}; it was deleted. Use another "
                        "--format.")
    return found[0]


def difference(model: torch.nn.Module, forward: Forward, images: Tensor) -> Difference:
    expected, found = model(images), forward(images)
    return Difference((found - expected).abs().max().item(), expected.abs().max().item() or 1.0,
                      (found.argmax(1) == expected.argmax(1)).float().mean().item())


def describe(found: Difference | None, what: str) -> str:
    if found is None:
        return "not compared with the network: onnxruntime is not installed"
    return (f"compared on {what}: largest difference of logits {found.largest:.1e} (the largest "
            f"logit is {found.scale:.3g}), same best class on {found.agreement:.1%}")


if __name__ == "__main__":
    sys.exit(main())
