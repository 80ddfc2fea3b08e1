"""How alike networks are: the first one against each of the others, stage by stage and in what they
predict.

    python -m analysis.similarity --checkpoint runs/TEACHER/checkpoint-best.pth \\
        runs/ALONE/checkpoint-best.pth runs/DISTILLED/checkpoint-best.pth \\
        --data-path IMAGENET --out similarity
"""
import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

import data
from analysis.cka import SMALLEST_BATCH, MinibatchCKA, gram
from analysis.output import (
    NO_PICTURES,
    figure_class,
    new_files,
    save_array,
    save_figure,
    save_tables,
)
from analysis.similarity_report import Pair, draw, report, table_rows
from analysis.subjects import (
    Subject,
    add_picture_flags,
    add_subject_flags,
    check_common,
    check_fits,
    load_subjects,
    refuse_flags,
    select,
    shuffled,
    validation_pictures,
)
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.teacher import FrozenTeacher
from utils.config import Parser
from utils.distributed import run_program, setup
from utils.errors import UserError
from utils.log import progress, say


class PredictionSums:
    """Sums over images of what two networks' logits have in common."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.number = 0

    def add(self, first: Tensor, other: Tensor) -> None:
        """Logits (N, K) of the same images and classes."""
        logs = [logits.double().log_softmax(1) for logits in (first, other)]
        values = {f"agreement@{k}": 100 * overlap(first, other, k) for k in (1, 5)}
        values["KL(first, other)"] = (logs[0].exp() * (logs[0] - logs[1])).sum(1)
        values["KL(other, first)"] = (logs[1].exp() * (logs[1] - logs[0])).sum(1)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.sum().item()
        self.number += len(first)

    def means(self) -> dict[str, float]:
        return {name: value / self.number for name, value in self.sums.items()}


def overlap(first: Tensor, other: Tensor, k: int) -> Tensor:
    """(N, K) each -> (N,): share of the k largest classes, or of all where there are fewer, that
    both have."""
    k = min(k, first.shape[1])
    tops = [logits.topk(k, dim=1).indices for logits in (first, other)]
    return (tops[0][:, :, None] == tops[1][:, None, :]).sum((1, 2)).double() / k


def have_same_classes(first: Subject, other: Subject) -> bool:
    known = None not in (first.classes, other.classes)
    return first.classes == other.classes if known else (
        first.model.num_classes == other.model.num_classes)


@torch.no_grad()
def compare(subjects: Sequence[Subject], loader: data.Loader, device: torch.device,
            batch_size: int) -> list[Pair]:
    """The first of `subjects` against each of the others. Every network gets the same pictures,
    normalised as its weights expect and resized for those that take one size only, as a teacher
    does. Raises UserError when too few of them could be read."""
    networks = [FrozenTeacher(subject.model, IMAGENET_MEAN, IMAGENET_STD).to(device)
                for subject in subjects]
    stages = [len(subject.model.feature_info) for subject in subjects]
    alignments = [MinibatchCKA(stages[0], number) for number in stages[1:]]
    predictions = [PredictionSums() if have_same_classes(subjects[0], other) else None
                   for other in subjects[1:]]
    prepare = data.Preparation(IMAGENET_MEAN, IMAGENET_STD, device)
    num_images = num_for_cka = 0
    with progress("compare", len(loader)) as bar:
        for pictures, _, indices in loader:
            images = prepare(pictures.to(device, memory_format=torch.channels_last))
            images = images[(indices >= 0).to(device)]
            if len(images):
                first, *others = [network(images) for network in networks]
                num_images += len(images)
                for sums, other in zip(predictions, others):
                    if sums is not None:
                        sums.add(first.logits, other.logits)
            if len(images) == batch_size:
                num_for_cka += len(images)
                grams, *more = [[*map(gram, out.features)] for out in (first, *others)]
                for alignment, other in zip(alignments, more):
                    alignment.add(grams, other)
            bar.update()
    if not num_for_cka:
        raise UserError(f"no batch of {batch_size} pictures without an unreadable one, of "
                        f"{num_images} that could be read. Lower --batch-size or give more.")
    return [Pair(subjects[0], other, alignment.value(), sums and sums.means(), num_images,
                 num_for_cka)
            for other, alignment, sums in zip(subjects[1:], alignments, predictions)]


def run(subjects: Sequence[Subject], loader: data.Loader, *, device: torch.device,
        batch_size: int, out: Path) -> None:
    """Compare, print the tables, write everything below `out`."""
    with closing(loader):
        pairs = compare(subjects, loader, device, batch_size)
    text = report(pairs, batch_size)
    save_tables(text, table_rows(pairs), out / "similarity")
    for number, pair in enumerate(pairs, 1):
        save_array(pair.cka, out / f"cka-{number}.npy")
    say(text)
    if figure_class() is None:
        return say(NO_PICTURES)
    save_figure(draw(pairs), out / "similarity.png")
    say(f"\ntables, arrays and picture are in {out}")


def build_parser() -> Parser:
    parser = Parser(prog="analysis.similarity", description=" ".join(
        __doc__.split("\n\n")[0].split()))
    add_subject_flags(parser)
    add_picture_flags(parser)
    flag = parser.add_argument
    flag("--images", type=int, default=None, help="validation images; default: all")
    flag("--spread", action=argparse.BooleanOptionalAction, default=False,
         help="take them at equal distances, not the first ones (of one class, often)")
    flag("--input-size", type=int, default=None, help="by default the first's own, else 224 px")
    flag("--crop-pct", type=float, default=None, help="by default the first's own, else 224/256")
    flag("--batch-size", type=int, default=64, help="images at a time, and for each CKA estimate")
    flag("--out", type=Path, default=Path("similarity"), metavar="FOLDER",
         help="where everything goes")
    flag("--overwrite", action=argparse.BooleanOptionalAction, default=False,
         help="replace files of the same names there")
    return parser


def main(argv: list[str] | None = None) -> int:
    def program() -> int:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        if not args.model:
            refuse_flags(args.given, {"num_classes"}, "without --model")
        device = setup(args.device)
        check_common({"--batch-size": (args.batch_size, SMALLEST_BATCH), "--num-workers":
                      (args.num_workers, 0), **({"--images": (args.images, SMALLEST_BATCH)}
                                                if args.images is not None else {}),
                      **({"--input-size": (args.input_size, 1)}
                         if args.input_size is not None else {})})
        subjects = load_subjects(args.checkpoint, args.model, args.weights, labels=args.labels,
                                 weights_key=args.weights_key, num_classes=args.num_classes, seed=0)
        if len(subjects) < 2:
            raise UserError(f"two networks at least are compared; got {len(subjects)}. Name more "
                            "with --checkpoint, or with --model and --weights.")
        first = subjects[0]
        size = args.input_size or first.settings.get("input_size") or first.model.input_size or (
            first.model.native_size or 224)
        check_fits(subjects, size, "--input-size")
        crop_pct = first.settings.get("crop_pct") if args.crop_pct is None else args.crop_pct
        source = validation_pictures(args.data_set, args.data_path, subjects)
        if len(source) < SMALLEST_BATCH:
            raise UserError(f"CKA needs {SMALLEST_BATCH} validation pictures at least; there are "
                            f"{len(source)}.")
        source = shuffled(select(source, args.images or len(source), args.spread))
        batch_size = min(args.batch_size, len(source))
        loader = data.eval_loader(
            source, data.eval_transform(size, crop_pct=crop_pct), batch_size=batch_size,
            num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)
        names = [f"cka-{number}.npy" for number in range(1, len(subjects))]
        new_files([args.out / name for name in [*names, *(
            f"similarity.{end}" for end in ("md", "csv", "png"))]], args.overwrite)
        say(f"{len(source):,} pictures at {size} px")
        run(subjects, loader, device=device, batch_size=batch_size, out=args.out)
        return 0

    return run_program("analysis.similarity", program)


if __name__ == "__main__":
    sys.exit(main())
