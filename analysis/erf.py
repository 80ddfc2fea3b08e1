"""The effective receptive field of a network (Luo et al. 2016, arXiv 1701.04128), measured as
RepLKNet (Ding et al. 2022, arXiv 2203.06717) and SLaK do.

A contribution map says how much each input pixel moves the central cell of the last feature map.
Its extent is the side of the smallest centred square that holds a share t of it. Published extents
are those of log10(1 + map), which depend on how large the gradients of a network happen to be:
where they are far above 1 the logarithm flattens the map and the square grows. The extents of the
map itself do not change when it is multiplied by a number. Both are given.
"""
import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import models
from analysis.common import (
    NO_PICTURES,
    LoadedModel,
    add_image_flags,
    add_model_flags,
    by_group,
    check_common,
    check_fits,
    figure_class,
    file_name,
    in_lines,
    load_models,
    markdown_table,
    new_files,
    refuse_flags,
    save_array,
    save_figure,
    save_tables,
    select,
    unique_labels,
    validation_images,
)
from models.base import VisionModel
from utils.config import Parser
from utils.distributed import run_program, setup
from utils.log import print_once, progress
from utils.registry import UserError, one_line, parse_spec
from utils.rng import fold_seed

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
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

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> "Field":
        """A mean map of which nothing else is known."""
        return cls(matrix, None, 0, {scale: [] for scale in SCALES})


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


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        single = field.per_image[scale]  # per image, per threshold, (side, area)
        for i, (threshold, found) in enumerate(
                zip(THRESHOLDS, extents(field.contribution, scale))):
            values = np.array([extents_[i] for extents_ in single]).reshape(-1, 2)
            mean = values.mean(0).tolist() if len(values) else (None, None)
            std = values.std(0, ddof=1).tolist() if len(values) > 1 else (None, None)
            rows.append(Row(label, group, f"{height}x{width}", field.num_images, field.num_skipped,
                            scale, threshold, *found, mean[0], std[0], mean[1], std[1]))
    return rows


def report(rows: Sequence[Row], spread: bool) -> str:
    """Markdown: a line for each network and scale; where several share a name, their mean; what the
    words mean."""
    measures = [f"{what} {t:.0%}" for what in ("side", "area") for t in THRESHOLDS]
    networks = by_group(rows, [(row.network, row.scale) for row in rows])
    parts = [markdown_table(["network", "scale", "px", "images", *measures],
                            [network_line(found) for found in networks.values()], 2)]
    groups = by_group([*networks.values()], [
        (found[0].group, found[0].scale, found[0].size) for found in networks.values()])
    means = [group_line(found) for found in groups.values() if len(found) > 1]
    if means:
        parts += ["Mean and sample standard deviation over the n networks of one name:",
                  markdown_table(["network", "scale", "px", "n", *measures], means, 2)]
    notes = [f"- {row.network}: {row.skipped} image(s) left out, their gradients were not finite."
             for row in rows[::len(SCALES) * len(THRESHOLDS)] if row.skipped]
    if any(row.images for row in rows):
        notes.append("- images: " + ("at equal distances through" if spread else "the first of")
                     + " the validation set, warped to the square.")
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
    sides, areas = (np.array([[getattr(row, what) for row in rows] for rows in networks])
                    for what in ("side", "area"))
    return [first.group, first.scale, first.size, str(len(networks)),
            *(f"{mean:.1f} +- {std:.1f}" for mean, std in zip(sides.mean(0), sides.std(0, ddof=1))),
            *(f"{mean:.2%} +- {std:.2%}" for mean, std in zip(areas.mean(0),
                                                             areas.std(0, ddof=1)))]


PANELS_PER_ROW = 4
SMALLEST_SHOWN = 1e-3  # of a map's largest contribution
LINES = ("-", "--", "-.", ":")  # a threshold each


def draw(maps: Mapping[str, np.ndarray]) -> "Figure":
    """A panel for each map (H, W) under its name, all on one logarithmic scale relative to each
    map's largest value, with the squares of the table's extents of log10(1 + map)."""
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    columns = min(PANELS_PER_ROW, len(maps))
    rows = -(-len(maps) // columns)
    size = (max(3.2 * columns, 5), 3.45 * rows + 0.8)
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    norm = LogNorm(SMALLEST_SHOWN, 1)
    for axis, (label, map_) in zip(axes.flat, maps.items()):
        image = axis.imshow(np.maximum(map_ / map_.max(), SMALLEST_SHOWN), norm=norm, cmap="magma")
        axis.set_title(f"{in_lines(label, 34)}\n{map_.shape[1]} x {map_.shape[0]} px", fontsize=9)
        axis.set_axis_off()
        draw_squares(axis, map_)
    for axis in axes.flat[len(maps):]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="contribution / the map's largest")
    handles = [Line2D([], [], color="deepskyblue", linestyle=line, label=f"{threshold:.0%}")
               for threshold, line in zip(THRESHOLDS, LINES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(LINES), fontsize=9,
                  title="square with this share of log10(1 + map)", title_fontsize=9)
    return figure


def draw_squares(axis: "Axes", map_: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    height, width = map_.shape
    for (side, _), line in zip(extents(map_), LINES):
        corner = (width // 2 - side / 2, height // 2 - side / 2)
        axis.add_patch(Rectangle(corner, side, side, fill=False, color="deepskyblue",
                                 linestyle=line, linewidth=1))


def build_parser() -> Parser:
    parser = Parser(prog="analysis.erf", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    add_image_flags(parser)
    flag = parser.add_argument
    flag("--matrix", nargs="+", default=[], type=Path, metavar="NPY",
         help="contribution maps (H, W) from files, this program's or published ones")
    flag("--images", type=int, default=50, help="validation images")
    flag("--spread", action=argparse.BooleanOptionalAction, default=False,
         help="take them at equal distances, not the first ones (of one class, often)")
    flag("--size", type=int, default=1024, help="pixels; images are warped to that square")
    flag("--batch-size", type=int, default=1, help="images at a time")
    flag("--control", action=argparse.BooleanOptionalAction, default=True,
         help="also measure each architecture with random weights")
    flag("--seed", type=int, default=0, help="of random weights where no run says its own")
    flag("--out", type=Path, default=Path("erf"), metavar="FOLDER", help="where everything goes")
    flag("--overwrite", action=argparse.BooleanOptionalAction, default=False,
         help="replace files of the same names there")
    return parser


def refuse_useless(given: Sequence[str], has_models: bool, has_networks: bool) -> None:
    if not has_networks and "matrix" in given:
        measuring = {"images", "spread", "size", "batch_size", "control", "seed", "data_set",
                     "data_path", "num_workers", "skip_bad_images", "device", "weights_key"}
        refuse_flags(given, measuring, "on --matrix alone, which is measured already")
    if not has_models:
        refuse_flags(given, {"num_classes"}, "without --model: a checkpoint knows its classes")


def controls(subjects: Sequence[LoadedModel], seed: int) -> list[LoadedModel]:
    """Each architecture of `subjects` with the random weights that a run starts from, once for each
    seed of their runs; `seed` where there is no run."""
    keys = dict.fromkeys((tuple(subject.words), subject.model.num_classes,
                          subject.settings.get("seed", seed)) for subject in subjects)
    networks = dict.fromkeys(key[:2] for key in keys)
    names = dict(zip(networks, unique_labels([f"{words[0]}, untrained" for words, _ in networks])))
    groups = [names[key[:2]] for key in keys]
    taken = {subject.group for subject in subjects} & {*groups}
    if taken:
        raise UserError(f"--labels: {min(taken)!r} is what the control is called; choose another "
                        "name, or --no-control.")
    found = []
    for (words, num_classes, seed_), label, group in zip(keys, unique_labels(groups), groups):
        name, options = parse_spec(list(words), "--model")
        torch.manual_seed(fold_seed(seed_, "student"))
        model = models.create_model(name, num_classes, **options)
        found.append(LoadedModel(label, group, list(words), model, {}))
    return found


def check_sizes(subjects: Sequence[LoadedModel], size: int) -> None:
    for subject in subjects:
        if subject.model.input_size not in (None, size):
            raise UserError(f"{subject.label} takes {subject.model.input_size} px only. Measure "
                            f"all networks there, with --size {subject.model.input_size}: extents "
                            "at different sizes cannot be compared.")
    check_fits(subjects, size, "--size")


def measure_network(subject: LoadedModel, loader: data.Loader, device: torch.device) -> Field:
    model = subject.model.eval().requires_grad_(False).fold().to(
        device, memory_format=torch.channels_last)
    prepare = data.BatchTransform(model.input_mean, model.input_std, device)

    def batches() -> Iterator[Tensor]:
        with progress(subject.label, len(loader)) as bar:
            for pictures, _, indices in loader:
                images = prepare(pictures.to(device, memory_format=torch.channels_last))
                yield images[(indices >= 0).to(device)]
                bar.update()

    try:
        return measure(model, batches())
    except UserError as error:
        raise UserError(f"{subject.label}: {error} Are these the weights of a trained network?"
                        ) from None


def array_names(subjects: Sequence[LoadedModel]) -> list[str]:
    return [f"{name}.npy" for name in unique_labels([file_name(subject.label)
                                                  for subject in subjects])]


def read_matrix(path: Path) -> np.ndarray:
    """A contribution map. Raises UserError for what is none."""
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--matrix {path} is no readable .npy file ({one_line(error)}).") from None
    if not (isinstance(matrix, np.ndarray) and matrix.ndim == 2 and matrix.size
            and np.issubdtype(matrix.dtype, np.number) and np.isfinite(matrix).all()
            and matrix.min() >= 0 and matrix.max() > 0):
        shape = getattr(matrix, "shape", "several arrays")
        raise UserError(f"--matrix {path} must be one map (H, W) of finite numbers of at least 0, "
                        f"not all of them 0; got {shape}, {getattr(matrix, 'dtype', '')}.")
    return matrix


def run(subjects: Sequence[LoadedModel], matrices: Sequence[tuple[str, np.ndarray]],
        loader: data.Loader | None, *, device: torch.device, out: Path, spread: bool) -> None:
    """Measure, print the table, write everything below `out`."""
    fields = []
    for subject, name in zip(subjects, array_names(subjects)):
        fields.append(measure_network(subject, loader, device))
        save_array(fields[-1].contribution, out / name)
    fields += [Field.of_matrix(matrix) for _, matrix in matrices]
    groups = [subject.group for subject in subjects] + [name for name, _ in matrices]
    rows = [row for label, group, field in zip(unique_labels(groups), groups, fields)
            for row in table_rows(label, group, field)]
    text = report(rows, spread)
    save_tables(text, rows, out / "erf")
    print_once(text)
    if figure_class() is None:
        return print_once(f"{NO_PICTURES} Afterwards: python -m analysis.erf --matrix {out}/*.npy "
                   f"--out {out}-picture")
    panels = {group if len(found) == 1 else f"{group}, first of {len(found)}":
              found[0].contribution for group, found in by_group(fields, groups).items()}
    save_figure(draw(panels), out / "erf.png")
    print_once(f"maps, table and picture are in {out}")


def main(argv: list[str] | None = None) -> int:
    def program() -> int:
        args: argparse.Namespace = build_parser().parse(sys.argv[1:] if argv is None else argv)
        refuse_useless(args.given, bool(args.model), bool(args.model or args.checkpoint))
        device = setup(args.device)
        check_common({"--images": (args.images, 1), "--size": (args.size, 1),
                      "--batch-size": (args.batch_size, 1), "--num-workers": (args.num_workers, 0)})
        subjects = load_models(
            args.checkpoint, args.model, args.weights, weights_key=args.weights_key,
            num_classes=args.num_classes, labels=args.labels, seed=args.seed,
            others=len(args.matrix))
        if not subjects and not args.matrix:
            raise UserError("nothing to measure: give --checkpoint FILES, --model NAME with "
                            "--weights SOURCE, or --matrix FILES.")
        names = args.labels[len(subjects):] if args.labels else unique_labels(
            [path.stem for path in args.matrix])
        matrices = list(zip(names, map(read_matrix, args.matrix)))
        check_sizes(subjects, args.size)
        loader = None
        if subjects:
            source = select(validation_images(args.data_set, args.data_path, subjects),
                            args.images, args.spread)
            loader = data.eval_loader(
                source, data.warp_transform(args.size), batch_size=args.batch_size,
                num_workers=args.num_workers, skip_bad_images=args.skip_bad_images)
            subjects += controls(subjects, args.seed) if args.control else []
        new_files([args.out / name for name in [*array_names(subjects), "erf.md", "erf.csv",
                                                "erf.png"]], args.overwrite)
        with closing(loader) if loader else nullcontext():
            run(subjects, matrices, loader, device=device, out=args.out, spread=args.spread)
        return 0

    return run_program("analysis.erf", program)


if __name__ == "__main__":
    sys.exit(main())
