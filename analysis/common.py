"""What the analyses share: the networks, images and runs that a command line names, and the files
that come out."""
import argparse
import csv
import io
import math
import re
import sys
import textwrap
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import data
from data.folders import PARTS
from models.base import VisionModel
from models.weights import load_named, load_trained
from utils.config import Parser, at_least
from utils.distributed import DEVICES, setup, world_size
from utils.files import write_atomically, write_text_atomically
from utils.records import read_records, read_yaml
from utils.registry import UserError, parse_spec
from utils.rng import fold_seed, generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def single_process(device: str) -> torch.device:
    """The device to run on. Raises UserError under torchrun."""
    found = setup(device)
    if world_size() > 1:
        raise UserError(f"this analysis runs in one process, not in {world_size()}; start it with "
                        "python -m.")
    return found


def unique_labels(labels: Sequence[str]) -> list[str]:
    """`labels`, a number after each that was there before."""
    names: list[str] = []
    for label in labels:
        name, number = label, 1
        while name in names:
            number += 1
            name = f"{label} ({number})"
        names.append(name)
    return names


def by_group(items: Sequence[Any], groups: Sequence[Hashable]) -> dict[Any, list[Any]]:
    """`items` under the group of each, in order."""
    found: dict[Any, list[Any]] = {}
    for item, group in zip(items, groups):
        found.setdefault(group, []).append(item)
    return found


# Networks


class LoadedModel(NamedTuple):
    """A network with its weights."""

    label: str  # what tables and plots call it; no two are equal
    group: str  # the name it was given, which it may share with the same network of other seeds
    spec: list[str]  # NAME key=value ...
    model: VisionModel
    settings: dict[str, Any]  # of its run; empty for weights without one
    classes: list[str] | None = None  # names by label, where they are known


def add_model_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("networks").add_argument
    flag("--checkpoint", nargs="+", default=[], type=Path, metavar="FILE", help="of train_kd.py")
    flag("--model", nargs="+", action="append", default=None, metavar="NAME",
         help="NAME [key=value ...], with --weights; may be repeated")
    flag("--weights", action="append", default=None, metavar="SOURCE",
         help="path, URL, published or random, for each --model in turn")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=at_least(1), default=1000, help="of --weights")
    flag("--labels", nargs="+", default=None, metavar="NAME",
         help="what to call the networks, in order (default: their run folders or files); those "
         "of one name are taken for seeds of one network, and their mean is shown")


def load_models(checkpoints: Sequence[Path], specs: Sequence[list[str]] | None,
                weights: Sequence[str] | None, *, weights_key: str | None, num_classes: int,
                labels: Sequence[str] | None, seed: int, num_others: int = 0) -> list[LoadedModel]:
    """The students of `checkpoints`, then each of `specs` with its weights, random ones from
    `seed`. `labels` may go on with names for `num_others` things that are no networks; they are
    not used here."""
    specs, weights = specs or [], weights or []
    if len(specs) != len(weights):
        raise UserError(f"each --model needs its --weights; got {len(specs)} and {len(weights)}.")
    total = len(checkpoints) + len(specs) + num_others
    if labels is not None and len(labels) != total:
        raise UserError(f"--labels needs {total} names, one for each network; got {len(labels)}: "
                        f"{', '.join(labels)}.")
    networks = []
    folders = [path.absolute().parent.name for path in checkpoints]
    for path, name in zip(checkpoints, folders):
        model, settings, classes = load_trained(path, weights_key)
        if folders.count(name) > 1:
            name = f"{name} {path.stem}"
        networks.append(LoadedModel(name, name, settings["student"], model, settings, classes))
    for spec, source in zip(specs, weights):
        torch.manual_seed(fold_seed(seed, "student"))
        model = load_named(spec, source, weights_key, num_classes)
        name = " ".join(spec)
        if source != "published":
            name = f"{name}, {Path(source).name}"
        networks.append(LoadedModel(name, name, spec, model, {}, model.classes))
    groups = labels or unique_labels([network.label for network in networks])
    for group, found in by_group([network.spec for network in networks], groups).items():
        if any(spec != found[0] for spec in found):
            raise UserError(f"--labels calls different networks {group!r}; give one name to seeds "
                            "of one network only.")
    return [network._replace(label=label, group=group) for network, label, group in zip(
        networks, unique_labels(groups), groups)]


def check_fits(networks: Sequence[LoadedModel], input_size: int, flag: str) -> None:
    """Raises UserError where a network's last map would have no whole cell."""
    for network in networks:
        if not network.model.feature_info:
            raise UserError(f"{network.label} does not say which feature maps it has, which are "
                            "looked at here (feature_info of a VisionModel).")
        stride = network.model.feature_info[-1].stride
        if input_size < stride:
            raise UserError(f"{flag} {input_size} is below one cell of {network.label}'s last map, "
                            f"{stride} px.")


# Images


def add_image_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("images").add_argument
    flag("--data-set", nargs="+", default=None, metavar="NAME",
         help="by default the first checkpoint's, else imagefolder")
    flag("--data-path", default=None, help="folder that holds val/, or the folder of classes")
    flag("--spread", action=argparse.BooleanOptionalAction, default=False,
         help="take images at equal distances, not the first ones (of one class, often)")
    flag("--num-workers", type=at_least(0), default=2, help="loader processes")
    flag("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
         help="leave unreadable images out instead of stopping")
    flag("--device", choices=DEVICES, default="auto", help="where to run")


def validation_images(data_set: list[str] | None, data_path: str | None,
                      networks: Sequence[LoadedModel]) -> data.ImageSource:
    """The validation images of the named data set, by default that of the first run. A folder of
    class folders will do where an image folder's val/ is expected."""
    if data_set is None:
        trained_on = [network.settings["data_set"] for network in networks
                      if "data_set" in network.settings]
        data_set = trained_on[0] if trained_on else ["imagefolder"]
    name, options = parse_spec(data_set, "--data-set")
    split = "val"
    if (name == "imagefolder" and data_path and "split" not in options
            and not any((Path(data_path) / place).is_dir() for place in PARTS[split])):
        folder = Path(data_path).absolute()
        if (folder / "train").is_dir():
            raise UserError(f"{folder} holds train/ but no val/, whose images are looked at.")
        split, data_path = folder.name, str(folder.parent)
    return data.create_dataset(name, split, data_path, **options)


class Selection(data.ImageSource):
    """Some images of a source, as a source."""

    def __init__(self, source: data.ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])

    def name_of(self, index: int) -> str:
        return self.source.name_of(self.indices[index])


def select(source: data.ImageSource, number: int, spread: bool) -> Selection:
    """The first `number` images, or as many at equal distances through all of them; all of them
    for a larger number."""
    number = min(number, len(source))
    step = len(source) / number if spread else 1
    return Selection(source, [int(i * step) for i in range(number)])


def shuffled(selection: Selection) -> Selection:
    """The same images in a fixed random order, so that a batch has those of many classes."""
    order = torch.randperm(len(selection), generator=generator(0, "analysis"))
    return Selection(selection.source, [selection.indices[i] for i in order.tolist()])


# Run folders


def is_number(value: Any) -> bool:
    """Whether it is one that a float can be, no truth value."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_percent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def is_spec(value: Any) -> bool:
    """Whether it is [NAME, key=value, ...]."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


# What is read of a run's settings, and when it is valid.
NEEDED: dict[str, Callable[[Any], bool]] = {
    "teacher": is_spec, "student": is_spec,
    "loss": lambda value: isinstance(value, list) and value and all(map(is_spec, value)),
    "epochs": lambda value: type(value) is int, "seed": lambda value: type(value) is int,
    "sparsity": lambda value: value is None or is_number(value)}


class Run(NamedTuple):
    folder: Path
    args: dict[str, Any]
    acc1: float  # last epoch, percent; of the averaged weights when the run kept them
    num_epochs_done: int
    teacher_acc1: float | None  # percent
    records: list[dict[str, Any]]  # an epoch each, as in log.txt


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and what is none with the reason. Raises UserError when nothing is left."""
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError(f"nothing to report on: {'; '.join(left_out)}.")
    return runs, left_out


def read_run(folder: Path) -> Run:
    """A run folder's settings and its log.txt; UserError where there is none."""
    for name in ("args.yaml", "log.txt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} (no run with a finished epoch: {name} is missing)")
    try:
        args = read_yaml(folder / "args.yaml")
    except UserError as error:
        raise UserError(f"{folder} (args.yaml is damaged: {str(error).rstrip('.')})") from None
    wrong = [name for name, is_good in NEEDED.items() if not is_good(args.get(name))]
    if wrong:
        raise UserError(f"{folder} (args.yaml has no valid {', '.join(wrong)})")
    try:
        records = read_records(folder / "log.txt")
    except OSError as error:
        raise UserError(f"{folder} (log.txt cannot be read: {error.strerror})") from None
    except UserError as error:
        raise UserError(f"{folder} ({error})") from None
    if not records:
        raise UserError(f"{folder} (no finished epoch)")
    for number, record in enumerate(records, 1):
        if not is_percent(record.get("test_acc1")) or not all(
                record.get(key) is None or is_percent(record[key])
                for key in ("test_acc1_ema", "teacher_acc1")):
            raise UserError(f"{folder} (line {number} of {folder / 'log.txt'} has no valid "
                            "test_acc1, test_acc1_ema or teacher_acc1)")
    last = records[-1]
    acc1 = last["test_acc1"] if last.get("test_acc1_ema") is None else last["test_acc1_ema"]
    return Run(folder, args, acc1, last["epoch"] + 1, last.get("teacher_acc1"), records)


# Files


def add_output_flags(parser: Parser, out: str, metavar: str, help: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(out), metavar=metavar, help=help)
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="replace files of the same names")


def check_new(paths: Sequence[Path], overwrite: bool) -> None:
    """Make the folders of `paths`. Raises UserError where files are there already and would be
    lost; meant for before the work."""
    folders = [str(path) for path in paths if path.is_dir()]
    if folders:
        raise UserError(f"{', '.join(folders[:3])} is a folder. Give another --out.")
    files = [str(path) for path in paths if path.exists()]
    if files and not overwrite:
        raise UserError(f"{', '.join(files[:3])} would be overwritten. Give another --out, or add "
                        "--overwrite.")
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {path.parent} ({error.strerror})."
                        ) from None


def save_array(array: np.ndarray, path: Path) -> None:
    write_atomically(lambda file: np.save(file, array), path)


def save_tables(text: str, rows: Sequence[Any], base: Path) -> None:
    """`text` to base.md, `rows` (of one NamedTuple) to base.csv."""
    write_text_atomically(text + "\n", base.with_suffix(".md"))
    write_text_atomically(csv_text(rows), base.with_suffix(".csv"))


def csv_text(rows: Sequence[Any], digits: int | None = None) -> str:
    """NamedTuples of one kind under the names of their fields, at least one; an empty cell for
    None. `digits`: decimals of numbers; None: all that they have."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(type(rows[0])._fields)
    for row in rows:
        writer.writerow([round(value, digits) if digits is not None and isinstance(value, float)
                         else value for value in row])
    return file.getvalue()


def file_name(label: str) -> str:
    """`label` without what a file name should not have."""
    return re.sub(r"[^\w.=-]+", "_", label).strip("._") or "network"


# Plots


NO_PLOTS = ("no plots, since matplotlib is not installed: pip install matplotlib. Arrays and "
            "tables are written all the same.")


def figure_class() -> "type[Figure] | None":
    """Matplotlib's figure, which draws without a screen; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def panels(number: int, per_row: int, width: float, height: float, margin: float
           ) -> "tuple[Figure, list[Axes]]":
    """A figure with `number` axes of `width` by `height` inches, and `margin` below them; axes that
    its last row has too many are hidden."""
    columns = min(per_row, number)
    rows = math.ceil(number / columns)
    figure = figure_class()(figsize=(max(6, width * columns), height * rows + margin),
                            layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    write_atomically(lambda file: figure.savefig(file, format="png", dpi=150), path)


def in_lines(label: str, width: int) -> str:
    """`label` broken into lines, for a plot: no character of it is taken for mathematics."""
    return textwrap.fill(label, width).replace("$", r"\$")
