"""The effective receptive field of a network (Luo et al. 2016, arXiv 1701.04128), measured as
RepLKNet (Ding et al. 2022, arXiv 2203.06717) and SLaK do.

    python -m analysis.erf --checkpoint runs/*/checkpoint-best.pth --data-path IMAGENET
    python -m analysis.erf --model slak_t --weights published --data-path IMAGENET --out erf
    python -m analysis.erf --matrix erf/*.npy --out again     # maps from files

A contribution map says how much each input pixel moves the central cell of the last feature map.
Its extent is the side of the smallest centred square that holds a share t of it. Published extents
are those of log10(1 + map), which depend on how large the gradients of a network happen to be:
where they are far above 1 the logarithm flattens the map and the square grows. The extents of the
map itself do not change when it is multiplied by a number. Both are given.
"""
import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
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
    file_name,
    in_lines,
    load_models,
    panels,
    save_array,
    save_figure,
    save_tables,
    select,
    single_process,
    unique_labels,
    validation_images,
)
from models.base import VisionModel, model_from_spec
from utils.config import Parser, at_least, between, program
from utils.log import markdown_table, progress
from utils.registry import UserError, one_line
from utils.rng import fold_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
LARGEST_MAP = 2 ** 26  # values of a map from a file
SCALES = {"log": lambda contribution: np.log10(contribution + 1), "linear": lambda map_: map_}


class Extent(NamedTuple):
    """The smallest centred square that holds more than a share of a map."""

    side: int  # input pixels: 1, 3, 5, ...; the whole map's longer edge where no such square does
    area: float  # share of the map's


class Field(NamedTuple):
    """What was measured of one network."""

    contribution: np.ndarray  # (H, W) float64, mean over the images
    num_images: int | None  # None: not known, of a map from a file
    num_skipped: int  # images whose gradient was not finite
    per_image: dict[str, list[list[Extent]]]  # scale -> an image each -> a threshold each


def contributions(model: VisionModel, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, H, W), at least 0: per image the gradient of the summed positive channels
    in the cell (h // 2, w // 2) of the last map (N, C, h, w), its positive part summed over the
    colours.

    The network must be in evaluation mode, so that no image depends on the others.
    """
    images = images.detach().requires_grad_()
    feature = model.forward_with_features(images).features[-1]
    height, width = feature.shape[2:]
    centre = feature[:, :, height // 2, width // 2].float().relu().sum()
    (gradient,) = torch.autograd.grad(centre, images)
    return gradient.relu().sum(1)


def extents(contribution: np.ndarray, scale: str = "log",
            thresholds: Iterable[float] = THRESHOLDS) -> list[Extent]:
    """Of a map (H, W) without negative values, for each threshold t in (0, 1): squares are centred
    at (H // 2, W // 2), as published, and end where the map ends.

    The published code begins with a side of 3, divides areas by 1024^2 whatever the map, and fails
    where no square reaches t; here the whole map does then.
    """
    values = SCALES[scale](contribution.astype(np.float64))
    height, width = values.shape
    rows = np.abs(np.arange(height) - height // 2)
    columns = np.abs(np.arange(width) - width // 2)
    rings = np.maximum.outer(rows, columns)  # the half side of the square that first holds a pixel
    inside = np.bincount(rings.ravel(), weights=values.ravel()).cumsum()
    found = []
    for threshold in thresholds:
        half = int(np.searchsorted(inside, threshold * inside[-1], side="right"))
        side = 2 * min(half, len(inside) - 1) + 1
        area = min(side, height) * min(side, width) / (height * width)
        found.append(Extent(min(side, max(height, width)), area))
    return found


def measure(model: VisionModel, batches: Iterable[Tensor]) -> Field:
    """The field of `model`, already in evaluation mode, over batches of images (N, 3, H, W).
    Raises UserError when there is none."""
    total: Tensor | float = 0.0
    per_image: dict[str, list[list[Extent]]] = {scale: [] for scale in SCALES}
    num_images = num_skipped = 0
    for images in batches:
        maps = contributions(model, images).double()
        maps = maps[maps.flatten(1).isfinite().all(1)]
        num_skipped += len(images) - len(maps)
        num_images += len(maps)
        total = total + maps.sum(0)
        for single in maps[maps.flatten(1).any(1)].cpu().numpy():  # an empty map has no extent
            for scale, found in per_image.items():
                found.append(extents(single, scale))
    if not num_images or not total.any():
        raise UserError(f"no image gave a finite gradient that is not zero ({num_skipped} were not "
                        "finite).")
    return Field((total / num_images).cpu().numpy(), num_images, num_skipped, per_image)


def measure_network(network: LoadedModel, loader: data.Loader, device: torch.device) -> Field:
    model = network.model.eval().requires_grad_(False).fold().to(
        device, memory_format=torch.channels_last)
    transform = data.BatchTransform(model.input_mean, model.input_std, device)

    def batches() -> Iterator[Tensor]:
        with progress(network.label, len(loader)) as bar:
            for batch in loader:
                images = transform(batch.images.to(device, memory_format=torch.channels_last))
                yield images[batch.readable.to(device)]
                bar.update()

    try:
        return measure(model, batches())
    except UserError as error:
        raise UserError(f"{network.label}: {error} Are these the weights of a trained network?"
                        ) from None


def read_field(path: Path) -> Field:
    """A mean map from a file, of which nothing else is known. Raises UserError for what is none."""
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")  # nothing is read yet
    except Exception as error:  # of a damaged header: what Python's own parser raises
        raise UserError(f"--matrix {path} is no readable .npy file ({one_line(error)[:200]})."
                        ) from None
    if not (isinstance(loaded, np.ndarray) and loaded.ndim == 2 and loaded.dtype.kind in "fiu"):
        shape = getattr(loaded, "shape", "several arrays")
        raise UserError(f"--matrix {path} must be one map (H, W) of real numbers; got {shape}, "
                        f"{getattr(loaded, 'dtype', '')}.")
    if loaded.size > LARGEST_MAP:
        raise UserError(f"--matrix {path} has {loaded.size:,} values; a map of an image has at "
                        f"most {LARGEST_MAP:,}.")
    with np.errstate(over="ignore"):
        matrix = np.array(loaded, np.float64)
        is_map = matrix.size and matrix.min() >= 0 and 0 < matrix.sum() < np.inf  # no NaN is
    if not is_map:
        raise UserError(f"--matrix {path} must be one map (H, W) of finite numbers of at least 0, "
                        "not all of them 0, with a finite sum.")
    return Field(matrix, None, 0, {scale: [] for scale in SCALES})


PANELS_PER_ROW = 4
SMALLEST_SHOWN = 1e-3  # of a map's largest contribution
LINES = ("-", "--", "-.", ":")  # a threshold each


def draw(maps: Mapping[str, np.ndarray]) -> "Figure":
    """A panel for each map (H, W) under its name, all on one logarithmic scale relative to each
    map's largest value, with the squares of the table's extents of log10(1 + map)."""
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    figure, axes = panels(len(maps), PANELS_PER_ROW, width=3.2, height=3.45, margin=0.8)
    norm = LogNorm(SMALLEST_SHOWN, 1)
    for axis, (label, map_) in zip(axes, maps.items()):
        height, width = map_.shape
        shown = axis.imshow(np.maximum(map_ / map_.max(), SMALLEST_SHOWN), norm=norm, cmap="magma")
        axis.set_title(f"{in_lines(label, 34)}\n{width} x {height} px", fontsize=9)
        axis.set_axis_off()
        for (side, _), line in zip(extents(map_), LINES):
            corner = (width // 2 - side / 2, height // 2 - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fill=False, color="deepskyblue",
                                     linestyle=line, linewidth=1))
    figure.colorbar(shown, ax=axes, shrink=0.8, label="contribution / the map's largest")
    handles = [Line2D([], [], color="deepskyblue", linestyle=line, label=f"{threshold:.0%}")
               for threshold, line in zip(THRESHOLDS, LINES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(LINES), fontsize=9,
                  title="square with this share of log10(1 + map)", title_fontsize=9)
    return figure


DEFINITIONS = """\
- side: of the smallest centred square with more than the share t of the mean map, in pixels. area:
  that square's share of the map. +-: sample standard deviation over the single images' own squares.
  Extents at different sizes cannot be compared.
- centred, as published, at the pixel (H // 2, W // 2): with an even number of cells in the last map
  that is a corner of the cell whose field is measured, which adds about a cell to small sides.
- log: of log10(1 + map), as published; depends on how large a network's gradients are.
  linear: of the map itself; does not."""


class Row(NamedTuple):
    """A network, a scale and a threshold: a line of the CSV."""
    network: str
    group: str  # the network without its seed
    size: str  # of the map, pixels
    images: int | None  # None: not known, of a map from a file
    skipped: int
    scale: str
    threshold: float
    side: int
    area: float
    image_side_mean: float | None
    image_side_std: float | None
    image_area_mean: float | None
    image_area_std: float | None


def table_rows(label: str, group: str, field: Field) -> list[Row]:
    height, width = field.contribution.shape
    rows = []
    for scale in SCALES:
        # per image, per threshold, (side, area)
        single = np.array(field.per_image[scale]).reshape(-1, len(THRESHOLDS), 2)
        for i, found in enumerate(extents(field.contribution, scale)):
            mean, std = (None, None), (None, None)
            if len(single):
                mean = single[:, i].mean(0).tolist()
            if len(single) > 1:
                std = single[:, i].std(0, ddof=1).tolist()
            rows.append(Row(label, group, f"{height}x{width}", field.num_images, field.num_skipped,
                            scale, THRESHOLDS[i], *found, mean[0], std[0], mean[1], std[1]))
    return rows


def report(rows: Sequence[Row], spread: bool) -> str:
    """Markdown: a line for each network and scale; where several share a name, their mean; what the
    words mean."""
    measures = [f"{what} {t:.0%}" for what in ("side", "area") for t in THRESHOLDS]
    networks = [*by_group(rows, [(row.network, row.scale) for row in rows]).values()]
    parts = [markdown_table(["network", "scale", "px", "images", *measures],
                            [network_line(found) for found in networks], 2)]
    groups = by_group(networks, [(found[0].group, found[0].scale, found[0].size)
                                 for found in networks])
    means = [group_line(found) for found in groups.values() if len(found) > 1]
    if means:
        parts += ["Mean and sample standard deviation over the n networks of one name:",
                  markdown_table(["network", "scale", "px", "n", *measures], means, 2)]
    notes = [f"- {row.network}: {row.skipped} image(s) left out, their gradients were not finite."
             for row in rows[::len(SCALES) * len(THRESHOLDS)] if row.skipped]
    if any(row.images for row in rows):
        which = "at equal distances through" if spread else "the first of"
        notes.append(f"- images: {which} the validation set, warped to the square.")
    return "\n\n".join([*parts, "\n".join([DEFINITIONS, *notes])])


def network_line(rows: Sequence[Row]) -> list[str]:
    """`rows`: a network's at one scale, a threshold each."""
    images = "-" if rows[0].images is None else str(rows[0].images)
    cells = [with_spread(f"{row.side}", row.image_side_std, "{:.0f}") for row in rows]
    cells += [with_spread(f"{row.area:.2%}", row.image_area_std, "{:.2%}") for row in rows]
    return [rows[0].network, rows[0].scale, rows[0].size, images, *cells]


def with_spread(value: str, std: float | None, form: str) -> str:
    return value if std is None else f"{value} +- {form.format(std)}"


def group_line(networks: Sequence[Sequence[Row]]) -> list[str]:
    """`networks`: more than one, each as for `network_line`."""
    first = networks[0][0]
    cells = [first.group, first.scale, first.size, str(len(networks))]
    for what, form in (("side", ".1f"), ("area", ".2%")):
        values = np.array([[getattr(row, what) for row in rows] for rows in networks])
        for mean, std in zip(values.mean(0), values.std(0, ddof=1)):
            cells.append(f"{mean:{form}} +- {std:{form}}")
    return cells


def controls(networks: Sequence[LoadedModel], seed: int) -> list[LoadedModel]:
    """Each architecture of `networks` with the random weights that a run starts from, once for each
    seed of their runs; `seed` where there is no run."""
    keys = dict.fromkeys((tuple(network.spec), network.model.num_classes,
                          network.settings.get("seed", seed)) for network in networks)
    architectures = dict.fromkeys(key[:2] for key in keys)
    names = unique_labels([f"{spec[0]}, untrained" for spec, _ in architectures])
    name_of = dict(zip(architectures, names))
    groups = [name_of[key[:2]] for key in keys]
    taken = {network.group for network in networks} & {*groups}
    if taken:
        raise UserError(f"--labels: {min(taken)!r} is what the control is called; choose another "
                        "name, or --no-control.")
    found = []
    for (spec, num_classes, seed_), label, group in zip(keys, unique_labels(groups), groups):
        torch.manual_seed(fold_seed(seed_, "student"))
        model = model_from_spec(list(spec), "--model", num_classes)
        found.append(LoadedModel(label, group, list(spec), model, {}))
    return found


def check_sizes(networks: Sequence[LoadedModel], size: int) -> None:
    for network in networks:
        model = network.model
        if model.fixed_size and model.input_size != size:
            raise UserError(f"{network.label} takes {model.input_size} px only. Measure all "
                            f"networks there, with --size {model.input_size}: extents at different "
                            "sizes cannot be compared.")
    check_fits(networks, size, "--size")


def build_parser() -> Parser:
    parser = Parser(prog="analysis.erf", description=__doc__.split("\n\n")[0])
    add_model_flags(parser)
    add_image_flags(parser)
    flag = parser.add_argument
    flag("--matrix", nargs="+", default=[], type=Path, metavar="NPY",
         help="contribution maps (H, W) from files, this program's or published ones")
    flag("--images", type=at_least(1), default=50, help="validation images")
    flag("--size", type=at_least(1), default=1024, help="pixels; images are warped to that square")
    flag("--batch-size", type=at_least(1), default=1, help="images at a time")
    flag("--control", action=argparse.BooleanOptionalAction, default=True,
         help="also measure each architecture with random weights")
    flag("--seed", type=between(0, 2 ** 63 - 1), default=0,
         help="of random weights where no run says its own")
    add_output_flags(parser, "erf", "FOLDER", "where everything goes")
    return parser


@program("analysis.erf", build_parser)
def main(args: argparse.Namespace) -> int:
    device = single_process(args.device)
    networks = load_models(
        args.checkpoint, args.model, args.weights, weights_key=args.weights_key, seed=args.seed,
        num_classes=args.num_classes, labels=args.labels, num_others=len(args.matrix))
    if not networks and not args.matrix:
        raise UserError("nothing to measure: give --checkpoint FILES, --model NAME with --weights "
                        "SOURCE, or --matrix FILES.")
    matrix_names = unique_labels([path.stem for path in args.matrix])
    if args.labels:
        matrix_names = args.labels[len(networks):]
    fields_of_files = [read_field(path) for path in args.matrix]
    check_sizes(networks, args.size)
    loader = None
    if networks:
        images = validation_images(args.data_set, args.data_path, networks)
        loader = data.eval_loader(
            select(images, args.images, args.spread), data.warp_transform(args.size),
            batch_size=args.batch_size, num_workers=args.num_workers,
            skip_bad_images=args.skip_bad_images)
        if args.control:
            networks += controls(networks, args.seed)
    arrays = unique_labels([file_name(network.label) for network in networks])
    arrays = [args.out / f"{name}.npy" for name in arrays]
    check_new([*arrays, *(args.out / f"erf.{end}" for end in ("md", "csv", "png"))], args.overwrite)

    fields = []
    if networks:
        with closing(loader):
            for network, path in zip(networks, arrays):
                fields.append(measure_network(network, loader, device))
                save_array(fields[-1].contribution, path)
    fields += fields_of_files
    groups = [network.group for network in networks] + matrix_names
    rows = [row for label, group, field in zip(unique_labels(groups), groups, fields)
            for row in table_rows(label, group, field)]
    text = report(rows, args.spread)
    save_tables(text, rows, args.out / "erf")
    print(text)
    if figure_class() is None:
        print(f"{NO_PLOTS} Afterwards: python -m analysis.erf --matrix {args.out}/*.npy --out "
              f"{args.out}-plot")
        return 0
    maps = {}
    for group, found in by_group(fields, groups).items():
        title = group if len(found) == 1 else f"{group}, first of {len(found)}"
        maps[title] = found[0].contribution
    save_figure(draw(maps), args.out / "erf.png")
    print(f"maps, table and plot are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
