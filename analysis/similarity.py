"""Linear centred kernel alignment of feature maps, accumulated over minibatches.

Kornblith et al. 2019 (arXiv 1905.00414) with the unbiased estimator of HSIC of Song et al. 2012
(JMLR 13), summed over minibatches as in Nguyen et al. 2021 (arXiv 2010.15327): the result does not
depend on the size of the batches but for its noise, as long as each batch is drawn at random.
"""
import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from analysis.common import (
    NO_PICTURES,
    LoadedModel,
    add_image_flags,
    add_model_flags,
    by_group,
    check_common,
    check_fits,
    figure_class,
    in_lines,
    load_models,
    markdown_table,
    new_files,
    refuse_flags,
    save_array,
    save_figure,
    save_tables,
    select,
    shuffled,
    validation_images,
)
from models.base import IMAGENET_MEAN, IMAGENET_STD, FeatureInfo
from models.distiller import FrozenTeacher
from utils.config import Parser
from utils.distributed import run_program, setup
from utils.log import print_once, progress
from utils.registry import UserError

SMALLEST_BATCH = 4  # images that the unbiased estimator needs


def gram(feature: Tensor) -> Tensor:
    """(N, C, H, W) or (N, D) -> inner products of the images' features, float64 (N, N), with zeros
    on the diagonal.

    Their mean is taken off first: the estimate stays the same, and less is lost to rounding.
    """
    flat = feature.flatten(1).float()
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double().fill_diagonal_(0)


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Of two matrices of `gram` for the same N >= 4 images, a scalar whose mean is 0 where the
    features are independent (HSIC_1 of Song et al.)."""
    number = len(first)
    rows, columns = first.sum(1), second.sum(1)
    total = (first * second).sum() - 2 / (number - 2) * (rows @ columns)
    total = total + rows.sum() * columns.sum() / ((number - 1) * (number - 2))
    return total / (number * (number - 3))


class MinibatchCKA:
    """Every map of one network with every map of another."""

    def __init__(self, num_first: int, num_second: int) -> None:
        self.between = torch.zeros(num_first, num_second, dtype=torch.float64)
        self.first = torch.zeros(num_first, dtype=torch.float64)
        self.second = torch.zeros(num_second, dtype=torch.float64)

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """`gram` of each map, of the same images."""
        for i, left in enumerate(first):
            self.first[i] += unbiased_hsic(left, left).cpu()
            for j, right in enumerate(second):
                self.between[i, j] += unbiased_hsic(left, right).cpu()
        for j, right in enumerate(second):
            self.second[j] += unbiased_hsic(right, right).cpu()

    def value(self) -> np.ndarray:
        """(first's maps, second's maps): 1 for equal or rotated features, near 0 for independent
        ones, a little below included; NaN where a map is the same for all images."""
        scale = (self.first[:, None] * self.second).clamp_min(0).sqrt()
        return torch.where(scale > 0, self.between / scale, torch.nan).numpy()


if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFINITIONS = """\
- agreement@k: mean share of the k most probable classes that both networks have in common.
- KL: mean over the images, in nats, of sum p log(p / q); p of the first network named, q of the
  second.
- CKA: linear, of the maps flattened per image, unbiased, over whole batches of {} images in
  random order; 1 for features equal up to rotation and scale, near 0 for independent ones."""


PANELS_PER_ROW = 3


class Pair(NamedTuple):
    """The first network against another."""

    first: LoadedModel
    other: LoadedModel
    cka: np.ndarray  # (first's stages, other's stages)
    predictions: dict[str, float] | None  # None: their classes are not the same
    num_images: int
    num_for_cka: int


class Row(NamedTuple):
    """A figure: a line of the CSV."""
    first: str
    other: str
    group: str  # the other without its seed
    quantity: str
    first_stage: int | None
    other_stage: int | None
    value: float
    images: int


def table_rows(pairs: Sequence[Pair]) -> list[Row]:
    rows = []
    for pair in pairs:
        names = (pair.first.label, pair.other.label, pair.other.group)
        for quantity, value in (pair.predictions or {}).items():
            rows.append(Row(*names, quantity, None, None, value, pair.num_images))
        for (i, j), value in np.ndenumerate(pair.cka):
            rows.append(Row(*names, "CKA", i + 1, j + 1, float(value), pair.num_for_cka))
    return rows


def report(pairs: Sequence[Pair], batch_size: int) -> str:
    """Markdown: a table of predictions, then one of stages for each group of pairs."""
    heads = ["first", "other", "n", "images", "agreement@1 %", "agreement@5 %", "KL(first, other)",
             "KL(other, first)"]
    groups = grouped(pairs)
    lines = [[pairs[0].first.label, group, str(len(found)), f"{found[0].num_images:,}",
              *prediction_cells(found)] for group, found in groups.items()]
    parts = [markdown_table(heads, lines, 2), DEFINITIONS.format(batch_size)]
    if any(pair.predictions is None for pair in pairs):
        parts.append("'-': the two networks have other classes.")
    for group, found in groups.items():
        columns = [describe_stage(info) for info in found[0].other.model.feature_info]
        cells = [[describe_stage(info), *(f"{value:.3f}" for value in row)]
                 for info, row in zip(found[0].first.model.feature_info, mean_cka(found))]
        parts.append(f"CKA of {found[0].first.label} (rows) and {group} (columns), mean over "
                     f"n = {len(found)}, {found[0].num_for_cka:,} images; channels/stride:")
        parts.append(markdown_table(["", *columns], cells))
    return "\n\n".join(parts)


def grouped(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs whose other network has one name: seeds of one."""
    return by_group(pairs, [pair.other.group for pair in pairs])


def prediction_cells(pairs: Sequence[Pair]) -> list[str]:
    """Means over the pairs, their sample standard deviation where there are several."""
    if any(pair.predictions is None for pair in pairs):
        return ["-"] * 4
    cells = []
    for name in pairs[0].predictions:
        values = [pair.predictions[name] for pair in pairs]
        digits = 2 if "@" in name else 4
        spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{spread}")
    return cells


def mean_cka(pairs: Sequence[Pair]) -> np.ndarray:
    return np.mean([pair.cka for pair in pairs], axis=0)


def describe_stage(info: FeatureInfo) -> str:
    return f"{info.channels}/{info.stride}"


def draw(pairs: Sequence[Pair]) -> "Figure":
    """A panel for each group of pairs on one scale from 0 to 1, the mean values in the cells."""
    groups = grouped(pairs)
    columns = min(PANELS_PER_ROW, len(groups))
    rows = -(-len(groups) // columns)
    height, width = np.max([pair.cka.shape for pair in pairs], axis=0)
    size = (max(5, (1.6 + 0.75 * width) * columns + 1), (1.6 + 0.6 * height) * rows + 0.4)
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (group, found) in zip(axes.flat, groups.items()):
        cka = mean_cka(found)
        image = axis.imshow(cka, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(cka):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 else "white")
        other = f"{group}, n = {len(found)}" if len(found) > 1 else group
        for label, subject, set_ticks, set_label in (
                (other, found[0].other, axis.set_xticks, axis.set_xlabel),
                (found[0].first.label, found[0].first, axis.set_yticks, axis.set_ylabel)):
            names = [describe_stage(info) for info in subject.model.feature_info]
            set_ticks(range(len(names)), names, fontsize=8)
            set_label(in_lines(label, 34), fontsize=9)
    for axis in axes.flat[len(groups):]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="linear CKA")
    return figure


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


def have_same_classes(first: LoadedModel, other: LoadedModel) -> bool:
    known = None not in (first.classes, other.classes)
    return first.classes == other.classes if known else (
        first.model.num_classes == other.model.num_classes)


@torch.no_grad()
def compare(subjects: Sequence[LoadedModel], loader: data.Loader, device: torch.device,
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
    prepare = data.BatchTransform(IMAGENET_MEAN, IMAGENET_STD, device)
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


def run(subjects: Sequence[LoadedModel], loader: data.Loader, *, device: torch.device,
        batch_size: int, out: Path) -> None:
    """Compare, print the tables, write everything below `out`."""
    with closing(loader):
        pairs = compare(subjects, loader, device, batch_size)
    text = report(pairs, batch_size)
    save_tables(text, table_rows(pairs), out / "similarity")
    for number, pair in enumerate(pairs, 1):
        save_array(pair.cka, out / f"cka-{number}.npy")
    print_once(text)
    if figure_class() is None:
        return print_once(NO_PICTURES)
    save_figure(draw(pairs), out / "similarity.png")
    print_once(f"\ntables, arrays and picture are in {out}")


def build_parser() -> Parser:
    parser = Parser(prog="analysis.similarity", description=" ".join(
        __doc__.split("\n\n")[0].split()))
    add_model_flags(parser)
    add_image_flags(parser)
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
        subjects = load_models(args.checkpoint, args.model, args.weights, labels=args.labels,
                                 weights_key=args.weights_key, num_classes=args.num_classes, seed=0)
        if len(subjects) < 2:
            raise UserError(f"two networks at least are compared; got {len(subjects)}. Name more "
                            "with --checkpoint, or with --model and --weights.")
        first = subjects[0]
        size = args.input_size or first.settings.get("input_size") or first.model.input_size or (
            first.model.native_size or 224)
        check_fits(subjects, size, "--input-size")
        crop_pct = first.settings.get("crop_pct") if args.crop_pct is None else args.crop_pct
        source = validation_images(args.data_set, args.data_path, subjects)
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
        print_once(f"{len(source):,} pictures at {size} px")
        run(subjects, loader, device=device, batch_size=batch_size, out=args.out)
        return 0

    return run_program("analysis.similarity", program)


if __name__ == "__main__":
    sys.exit(main())
