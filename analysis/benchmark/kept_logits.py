"""What it changes in each loss to keep a teacher's k likeliest classes only, on real logits.

    python -m analysis.benchmark kept_logits --checkpoint TEACHER STUDENT --data-path FOLDER
    python -m analysis.benchmark kept_logits --model slak_t --weights published \\
        --model resnet50 --weights random --data-path IMAGENET --top 1 5 10 32 64

The first network teaches, the second learns; a single one teaches the same network as it begins,
with random weights. Images are the validation images, mixed as in training. Each loss and its
gradient at the student's logits are those with all of the teacher's classes against those with what
a teacher cache keeps (models/kept_logits.py).
"""
import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data
import losses
from analysis.common import (
    LoadedModel,
    add_image_flags,
    add_model_flags,
    load_models,
    select,
    shuffled,
    single_process,
    validation_images,
)
from models.base import ModelOutput, model_from_spec
from models.distiller import FrozenTeacher
from models.kept_logits import compact, dense
from models.weights import Trained
from utils.classes import match
from utils.config import Parser, at_least, program
from utils.log import markdown_table, progress
from utils.registry import UserError
from utils.rng import Position

# With the temperatures and weights of ImageNet, and with those that are usual for small images.
DEFAULT_LOSSES = [["kd"], ["kd", "alpha=1"], ["kd", "alpha=1", "temperature=4"], ["nkd"], ["dkd"],
                  ["dkd", "beta=8", "temperature=4"], ["dist"]]
DEFAULT_TOPS = (1, 5, 10, 32, 64)
NOTES = """\
- change of the loss: (loss with what is kept - loss) / |loss|, of the means over all images
- change of the gradient, at the student's logits: |gradient with what is kept - gradient| /
  |gradient|, over all images; cosine: of the two gradients"""


class Sums:
    """Of a loss with all of a teacher's logits and with what is kept of them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)

    def add(self, whole: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> None:
        """Of a batch, twice: the loss, and its gradient at the student's logits (N, K)."""
        (loss, gradient), (kept_loss, kept_gradient) = whole, kept
        number = len(gradient)
        for name, value in (("loss", loss * number), ("kept loss", kept_loss * number),
                            ("square", gradient.square().sum()),
                            ("kept square", kept_gradient.square().sum()),
                            ("product", (gradient * kept_gradient).sum()),
                            ("difference", (kept_gradient - gradient).square().sum())):
            self.sums[name] += value.item()

    def changes(self) -> dict[str, float]:
        """NaN where a loss or a gradient is 0."""
        sums = self.sums
        norm, kept_norm = sums["square"] ** 0.5, sums["kept square"] ** 0.5
        return {"loss": _ratio(sums["kept loss"] - sums["loss"], abs(sums["loss"])),
                "gradient": _ratio(sums["difference"] ** 0.5, norm),
                "cosine": _ratio(sums["product"], norm * kept_norm)}


def _ratio(value: float, base: float) -> float:
    return value / base if base else math.nan


class Result(NamedTuple):
    sums: dict[tuple[str, int], Sums]  # by loss and number of classes kept
    kept: dict[int, float]  # mean share of the teacher's probability, by number of classes kept
    num_images: int


def gradient_of(loss: nn.Module, student: Tensor, teacher: Tensor, targets: Tensor
                ) -> tuple[Tensor, Tensor]:
    """A loss of logits (N, K), and its gradient at the student's, in float64."""
    student = student.detach().requires_grad_()
    value = loss(ModelOutput(student, []), ModelOutput(teacher, []), targets)
    gradient, = torch.autograd.grad(value, student)
    return value.detach().double(), gradient.double()


def measure(batches: Iterable[tuple[Tensor, Tensor, Tensor]], terms: Mapping[str, nn.Module],
            tops: Sequence[int]) -> Result:
    """`batches`: the student's logits (N, K), the teacher's, and targets."""
    sums: dict[tuple[str, int], Sums] = defaultdict(Sums)
    kept_mass, num_images = dict.fromkeys(tops, 0.0), 0
    for student, teacher, targets in batches:
        num_images += len(student)
        whole = {name: gradient_of(loss, student, teacher, targets) for name, loss in terms.items()}
        for top in tops:
            kept = compact(teacher, top)
            kept_mass[top] += (1 - kept["rest"].double()).sum().item()
            logits = dense(kept, teacher.shape[1])
            for name, loss in terms.items():
                sums[name, top].add(whole[name], gradient_of(loss, student, logits, targets))
    return Result(dict(sums), {top: mass / num_images for top, mass in kept_mass.items()},
                  num_images)


def logits_of(teacher: nn.Module, student: nn.Module, loader: data.Loader, labels: Tensor,
              mix: data.Mixup, transform: data.BatchTransform, device: torch.device
              ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `measure` takes, of the images of `loader`, mixed. `labels`: of the networks, by those
    of the images. An image without a partner is left out."""
    with progress("logits", len(loader)) as bar:
        for number, batch in enumerate(loader):
            rows = batch.readable.nonzero()[:, 0]
            rows = rows[:len(rows) // 2 * 2]
            bar.update()
            if not len(rows):
                continue
            with torch.no_grad():
                images = transform(batch.images.to(device, memory_format=torch.channels_last))
                images, targets = mix.at(images[rows.to(device)],
                                         labels[batch.labels[rows]].to(device),
                                         Position(0, number, number, 0, 0))
                logits = student(images).float(), teacher(images).float()
            yield *logits, targets


def labels_of(source: data.ImageSource, network: LoadedModel) -> Tensor:
    """The network's label of each of the classes of `source`. Raises UserError where one is not
    among its own."""
    try:
        found = match(network.classes, network.model.num_classes, source.classes)
    except UserError as error:
        raise UserError(f"{network.label} {error}.") from None
    return torch.tensor(found)


def student_of(networks: Sequence[LoadedModel]) -> LoadedModel:
    """The second network; or the first one as it begins."""
    if len(networks) == 2:
        return networks[1]
    torch.manual_seed(0)
    first = networks[0]
    model = model_from_spec(first.spec, "--model", first.model.num_classes)
    return first._replace(label=f"{first.label} with random weights", model=model)


def report(result: Result, names: Sequence[str], tops: Sequence[int], num_classes: int) -> str:
    header = [f"top {top} of {num_classes:,}" for top in tops]
    parts = [markdown_table(["kept", *header], [
        ["probability", *(f"{100 * result.kept[top]:.2f} %" for top in tops)]])]
    for quantity, what, form in (("loss", "change of the loss", "+.1e"),
                                 ("gradient", "change of the gradient", ".1e"),
                                 ("cosine", "cosine of the gradients", ".5f")):
        rows = [[name, *(format(result.sums[name, top].changes()[quantity], form) for top in tops)]
                for name in names]
        parts.append(markdown_table([what, *header], rows))
    return "\n\n".join([*parts, NOTES])


def build_parser() -> Parser:
    parser = Parser(prog="analysis.benchmark kept_logits", description=__doc__.split("\n\n")[0])
    add_model_flags(parser)
    add_image_flags(parser)
    flag = parser.add_argument
    flag("--images", type=at_least(2), help="validation images; default: all")
    flag("--input-size", type=at_least(1), help="by default the teacher's own, else 224 px")
    flag("--batch-size", type=at_least(2), default=64, help="images at a time, which dist sees")
    flag("--top", nargs="+", type=at_least(1), help="classes kept; default: as many of "
         f"{', '.join(map(str, DEFAULT_TOPS))} as leave some out")
    flag("--loss", nargs="+", action="append", metavar="NAME",
         help="NAME [key=value ...]; may be repeated; default: those of logits")
    flag("--mixup", type=at_least(0.0), default=0.8, help="mixup alpha, 0 = off")
    flag("--cutmix", type=at_least(0.0), default=1.0, help="cutmix alpha, 0 = off")
    return parser


@program("analysis.benchmark kept_logits", build_parser)
def main(args: argparse.Namespace) -> int:
    device = single_process(args.device)
    networks = load_models(args.checkpoint, args.model, args.weights, labels=args.labels, seed=0,
                           weights_key=args.weights_key, num_classes=args.num_classes)
    if len(networks) not in (1, 2):
        raise UserError(f"one network teaches and one learns; got {len(networks)}. Name them with "
                        "--checkpoint, or with --model and --weights.")
    first, second = networks[0], student_of(networks)
    num_classes = first.model.num_classes
    if second.model.num_classes != num_classes:
        raise UserError(f"{first.label} has {num_classes} classes and {second.label} has "
                        f"{second.model.num_classes}; losses compare the same ones.")
    tops = args.top or [top for top in DEFAULT_TOPS if top < num_classes]
    if max(tops) >= num_classes:
        raise UserError(f"--top {max(tops)} of {num_classes} classes leaves nothing out. Give "
                        "smaller numbers.")
    specs = args.loss or DEFAULT_LOSSES
    if not all(losses.need_teacher_logits([spec]) for spec in specs):
        raise UserError("--loss here takes losses of the teacher's logits, such as "
                        f"{', '.join(spec[0] for spec in DEFAULT_LOSSES[::3])}.")
    terms = {" ".join(spec): loss for spec in specs
             for loss in losses.create_losses([spec], second.model.feature_info,
                                              first.model.feature_info)[0].values()}
    how = Trained(first.model, first.settings, None).preprocessing(args.input_size)
    source = validation_images(args.data_set, args.data_path, networks)
    labels = labels_of(source, first)
    source = shuffled(select(source, args.images or len(source), args.spread))
    loader = data.eval_loader(
        source, data.eval_transform(**how), batch_size=args.batch_size,
        num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)
    # Both see an image as the student's weights expect it, the teacher as FrozenTeacher does.
    mean, std = second.model.input_mean, second.model.input_std
    teacher = FrozenTeacher(first.model, mean, std).to(device)
    student = second.model.to(device).eval()
    mix = data.Mixup(num_classes, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix)
    with closing(loader):
        result = measure(logits_of(teacher, student, loader, labels, mix,
                                   data.BatchTransform(mean, std, device), device),
                         terms, tops)
    print(f"{first.label} teaches {second.label}: {result.num_images:,} images at "
          f"{how['input_size']} px, mixup {args.mixup:g}, cutmix {args.cutmix:g}\n")
    print(report(result, list(terms), tops, num_classes))
    return 0
