"""What networks have in common: linear centred kernel alignment (CKA) of their feature maps, and
agreement and divergence of their predictions. The first is compared with each of the others.

    python -m analysis.similarity --checkpoint TEACHER STUDENT STUDENT2 --data-path IMAGENET
    python -m analysis.similarity --model slak_t --weights published --model resnet50 \\
        --weights published --data-path IMAGENET --images 5000 --spread

CKA is that of Kornblith et al. 2019 (arXiv 1905.00414) with the unbiased estimator of HSIC of Song
et al. 2012 (JMLR 13), summed over minibatches as in Nguyen et al. 2021 (arXiv 2010.15327): it does
not depend on the size of the batches but for its noise, as long as each batch is drawn at random.
"""
import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from analysis.common import (
    NO_PLOTS,
    LoadedModel,
    add_image_flags,
    add_model_flags,
    add_output_flags,
    by_group,
    check_fits,
    check_new,
    figure_class,
    in_lines,
    load_models,
    panels,
    save_array,
    save_figure,
    save_tables,
    select,
    shuffled,
    single_process,
    validation_images,
)
from models.base import IMAGENET_MEAN, IMAGENET_STD
from models.distiller import FrozenTeacher
from models.weights import Trained
from utils.classes import match
from utils.config import Parser, at_least, program
from utils.log import markdown_table, progress
from utils.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class PredictionSums:
    """Sums over images of what two networks' logits have in common."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.number = 0

    def add(self, first: Tensor, other: Tensor) -> None:
        """Logits (N, K) of the same images and classes."""
        log_p, log_q = (logits.double().log_softmax(1) for logits in (first, other))
        values = {f"agreement@{k}": 100 * overlap(first, other, k) for k in (1, 5)}
        values["KL(first, other)"] = (log_p.exp() * (log_p - log_q)).sum(1)
        values["KL(other, first)"] = (log_q.exp() * (log_q - log_p)).sum(1)
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


class Pair(NamedTuple):
    """The first network against another."""

    first: LoadedModel
    other: LoadedModel
    cka: np.ndarray  # (first's stages, other's stages)
    predictions: dict[str, float] | None  # None: their classes are not the same
    num_images: int
    num_for_cka: int


def common_labels(first: LoadedModel, other: LoadedModel) -> tuple[list[int], list[int]] | None:
    """Of the classes that both know, matched by name, the labels of each network; None unless they
    are all classes of one of the two. Networks that name none, of as many, are taken as equal."""
    networks = [first, other]
    # What the classes of the one are in the other: first the one with fewer, which names them.
    networks.sort(key=lambda network: (network.model.num_classes, network.classes is None))
    few, many = networks
    number = few.model.num_classes
    wanted = few.classes or [str(label) for label in range(number)]
    try:
        labels = match(many.classes, many.model.num_classes, wanted)
    except UserError:
        return None
    return (list(range(number)), labels)[::1 if few is first else -1] if number else None


@torch.no_grad()
def compare(networks: Sequence[LoadedModel], loader: data.Loader, device: torch.device,
            batch_size: int) -> list[Pair]:
    """The first of `networks` against each of the others. Every one gets the same images,
    normalised as its weights expect and resized where they expect another size, as a teacher does.
    Raises UserError when too few of them could be read."""
    teachers = [FrozenTeacher(network.model, IMAGENET_MEAN, IMAGENET_STD).to(device)
                for network in networks]
    num_stages = [len(network.model.feature_info) for network in networks]
    alignments = [MinibatchCKA(num_stages[0], number) for number in num_stages[1:]]
    common = [common_labels(networks[0], other) for other in networks[1:]]
    predictions = [None if labels is None else PredictionSums() for labels in common]
    for other, labels in zip(networks[1:], common):
        if labels is not None and labels[0] != labels[1]:
            print(f"{other.label}: its predictions are compared on {len(labels[0])} classes, "
                  "matched by name")
    transform = data.BatchTransform(IMAGENET_MEAN, IMAGENET_STD, device)
    num_images = num_for_cka = 0
    with progress("compare", len(loader)) as bar:
        for batch in loader:
            images = transform(batch.images.to(device, memory_format=torch.channels_last))
            images = images[batch.readable.to(device)]
            bar.update()
            if not len(images):
                continue
            num_images += len(images)
            first, *others = [teacher.forward_with_features(images) for teacher in teachers]
            for sums, labels, other in zip(predictions, common, others):
                if sums is not None:
                    sums.add(first.logits[:, labels[0]], other.logits[:, labels[1]])
            if len(images) == batch_size:
                num_for_cka += len(images)
                grams = [gram(feature) for feature in first.features]
                for alignment, other in zip(alignments, others):
                    alignment.add(grams, [gram(feature) for feature in other.features])
    if not num_for_cka:
        raise UserError(f"no batch of {batch_size} images without an unreadable one, of "
                        f"{num_images} that could be read. Lower --batch-size or give more.")
    return [Pair(networks[0], other, alignment.value(), sums.means() if sums else None, num_images,
                 num_for_cka)
            for other, alignment, sums in zip(networks[1:], alignments, predictions)]


def grouped(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs whose other network has one name: seeds of one."""
    return by_group(pairs, [pair.other.group for pair in pairs])


def mean_cka(pairs: Sequence[Pair]) -> np.ndarray:
    return np.mean([pair.cka for pair in pairs], axis=0)


def stage_names(network: LoadedModel) -> list[str]:
    return [f"{info.channels}/{info.stride}" for info in network.model.feature_info]


PANELS_PER_ROW = 3


def draw(pairs: Sequence[Pair]) -> "Figure":
    """A panel for each group of pairs on one scale from 0 to 1, the mean values in the cells."""
    groups = grouped(pairs)
    height, width = np.max([pair.cka.shape for pair in pairs], axis=0)
    figure, axes = panels(len(groups), PANELS_PER_ROW, width=1.9 + 0.75 * width,
                          height=1.6 + 0.6 * height, margin=0.4)
    for axis, (group, found) in zip(axes, groups.items()):
        cka = mean_cka(found)
        shown = axis.imshow(cka, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(cka):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 else "white")
        other = f"{group}, n = {len(found)}" if len(found) > 1 else group
        columns, rows = stage_names(found[0].other), stage_names(found[0].first)
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_xlabel(in_lines(other, 34), fontsize=9)
        axis.set_ylabel(in_lines(found[0].first.label, 34), fontsize=9)
    figure.colorbar(shown, ax=axes, label="linear CKA")
    return figure


DEFINITIONS = """\
- agreement@k: mean share of the k most probable classes that both networks have in common.
- KL: mean over the images, in nats, of sum p log(p / q); p of the first network named, q of the
  second.
- CKA: linear, of the maps flattened per image, unbiased, over whole batches of {} images in
  random order; 1 for features equal up to rotation and scale, near 0 for independent ones."""


class Row(NamedTuple):
    """A value: a line of the CSV."""
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
    header = ["first", "other", "n", "images", "agreement@1 %", "agreement@5 %", "KL(first, other)",
              "KL(other, first)"]
    groups = grouped(pairs)
    lines = [[pairs[0].first.label, group, str(len(found)), f"{found[0].num_images:,}",
              *prediction_cells(found)] for group, found in groups.items()]
    parts = [markdown_table(header, lines, 2), DEFINITIONS.format(batch_size)]
    if any(pair.predictions is None for pair in pairs):
        parts.append("'-': the two networks have other classes.")
    for group, found in groups.items():
        first = found[0].first
        cells = [[stage, *(f"{value:.3f}" for value in row)]
                 for stage, row in zip(stage_names(first), mean_cka(found))]
        parts.append(f"CKA of {first.label} (rows) and {group} (columns), mean over "
                     f"n = {len(found)}, {found[0].num_for_cka:,} images; channels/stride:")
        parts.append(markdown_table(["", *stage_names(found[0].other)], cells))
    return "\n\n".join(parts)


def prediction_cells(pairs: Sequence[Pair]) -> list[str]:
    """Means over the pairs, their sample standard deviation where there are several."""
    if any(pair.predictions is None for pair in pairs):
        return ["-"] * 4
    cells = []
    for name in pairs[0].predictions:
        values = [pair.predictions[name] for pair in pairs]
        digits = 2 if "@" in name else 4
        cells.append(f"{np.mean(values):.{digits}f}")
        if len(values) > 1:
            cells[-1] += f" +- {np.std(values, ddof=1):.{digits}f}"
    return cells


def build_parser() -> Parser:
    parser = Parser(prog="analysis.similarity", description=__doc__.split("\n\n")[0])
    add_model_flags(parser)
    add_image_flags(parser)
    flag = parser.add_argument
    flag("--images", type=at_least(SMALLEST_BATCH), default=None,
         help="validation images; default: all")
    flag("--input-size", type=at_least(1), default=None,
         help="by default the first's own, else 224 px")
    flag("--crop-pct", type=float, default=None,
         help="by default as the first is evaluated, else 224/256")
    flag("--batch-size", type=at_least(SMALLEST_BATCH), default=64,
         help="images at a time, and for each CKA estimate")
    add_output_flags(parser, "similarity", "FOLDER", "where everything goes")
    return parser


@program("analysis.similarity", build_parser)
def main(args: argparse.Namespace) -> int:
    device = single_process(args.device)
    networks = load_models(args.checkpoint, args.model, args.weights, labels=args.labels, seed=0,
                           weights_key=args.weights_key, num_classes=args.num_classes)
    if len(networks) < 2:
        raise UserError(f"two networks at least are compared; got {len(networks)}. Name more with "
                        "--checkpoint, or with --model and --weights.")
    first = networks[0]
    how = Trained(first.model, first.settings, None).preprocessing(args.input_size)
    size = how["input_size"]
    check_fits(networks, size, "--input-size")
    if args.crop_pct is not None:
        how |= {"crop_pct": args.crop_pct, "resize": None}
    source = validation_images(args.data_set, args.data_path, networks)
    if len(source) < SMALLEST_BATCH:
        raise UserError(f"CKA needs {SMALLEST_BATCH} validation images at least; there are "
                        f"{len(source)}.")
    source = shuffled(select(source, args.images or len(source), args.spread))
    batch_size = min(args.batch_size, len(source))
    loader = data.eval_loader(
        source, data.eval_transform(**how), batch_size=batch_size,
        num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)
    arrays = [args.out / f"cka-{number}.npy" for number in range(1, len(networks))]
    tables = [args.out / f"similarity.{end}" for end in ("md", "csv", "png")]
    check_new([*arrays, *tables], args.overwrite)

    print(f"{len(source):,} images at {size} px")
    with closing(loader):
        pairs = compare(networks, loader, device, batch_size)
    text = report(pairs, batch_size)
    save_tables(text, table_rows(pairs), args.out / "similarity")
    for pair, path in zip(pairs, arrays):
        save_array(pair.cka, path)
    print(text)
    if figure_class() is None:
        print(NO_PLOTS)
        return 0
    save_figure(draw(pairs), args.out / "similarity.png")
    print(f"\ntables, arrays and plot are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
