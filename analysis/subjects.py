"""The networks and pictures that an analysis is about, as its command line names them."""
import argparse
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import data
from models.base import VisionModel
from models.trained import load_named, load_trained
from utils.config import Parser
from utils.distributed import world_size
from utils.errors import UserError
from utils.registry import parse_spec
from utils.rng import fold_seed, generator


class Subject(NamedTuple):
    """A network with its weights."""

    label: str  # what tables and pictures call it; no two are equal
    group: str  # the name it was given, which it may share with the same network of other seeds
    words: list[str]  # NAME key=value ...
    model: VisionModel
    settings: dict[str, Any]  # of its run; empty for weights without one
    classes: list[str] | None = None  # names by label, where they are known


def add_subject_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("networks").add_argument
    flag("--checkpoint", nargs="+", default=[], type=Path, metavar="FILE", help="of train_kd.py")
    flag("--model", nargs="+", action="append", default=None, metavar="NAME",
         help="NAME [key=value ...], with --weights; may be repeated")
    flag("--weights", action="append", default=None, metavar="SOURCE",
         help="path, URL, published or random, for each --model in turn")
    flag("--weights-key", metavar="KEY", help="model, or model_ema for the averaged weights")
    flag("--num-classes", type=int, default=1000, help="of --weights")
    flag("--labels", nargs="+", default=None, metavar="NAME",
         help="what to call the networks, in order (default: their run folders or files); those "
         "of one name are taken for seeds of one network, and their mean is shown")


def add_picture_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("pictures").add_argument
    flag("--data-set", nargs="+", default=None, metavar="NAME",
         help="by default the first checkpoint's, else imagefolder")
    flag("--data-path", default=None, help="folder that holds val/, or the folder of classes")
    flag("--num-workers", type=int, default=2, help="loader processes")
    flag("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
         help="leave unreadable pictures out instead of stopping")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")


def check_common(smallest: dict[str, tuple[int, int]]) -> None:
    """`smallest`: flag -> (its value, the least it may be)."""
    for flag, (value, least) in smallest.items():
        if value < least:
            raise UserError(f"{flag} must be at least {least}, got {value}.")
    if world_size() > 1:
        raise UserError(f"this analysis runs in one process, not in {world_size()}; start it with "
                        "python -m.")


def refuse_flags(given: Sequence[str], useless: set[str], why: str) -> None:
    """Raises UserError for a flag of the command line that would change nothing."""
    for name in sorted(useless & {*given}):
        raise UserError(f"--{name.replace('_', '-')} has no effect {why}; leave it out.")


def check_fits(subjects: Sequence[Subject], size: int, flag: str) -> None:
    """Raises UserError where a network's last map would have no whole cell."""
    for subject in subjects:
        stride = subject.model.feature_info[-1].stride
        if size < stride:
            raise UserError(f"{flag} {size} is below one cell of {subject.label}'s last map, "
                            f"{stride} px.")


def load_subjects(checkpoints: Sequence[Path], models: Sequence[list[str]] | None,
                  weights: Sequence[str] | None, *, weights_key: str | None, num_classes: int,
                  labels: Sequence[str] | None, seed: int, others: int = 0) -> list[Subject]:
    """The students of `checkpoints`, then each of `models` with its weights, random ones from
    `seed`. `labels` may go on with names for `others` things that are no networks; they are not
    used here."""
    models, weights = models or [], weights or []
    if len(models) != len(weights):
        raise UserError(f"each --model needs its --weights; got {len(models)} and {len(weights)}.")
    total = len(checkpoints) + len(models) + others
    if labels is not None and len(labels) != total:
        raise UserError(f"--labels needs {total} names, one for each network; got {len(labels)}: "
                        f"{', '.join(labels)}.")
    subjects = []
    folders = [path.absolute().parent.name for path in checkpoints]
    for path, name in zip(checkpoints, folders):
        model, settings, classes = load_trained(path, weights_key)
        name += f" {path.stem}" if folders.count(name) > 1 else ""
        subjects.append(Subject(name, name, settings["student"], model, settings, classes))
    for words, source in zip(models, weights):
        torch.manual_seed(fold_seed(seed, "student"))
        model = load_named(words, source, weights_key, num_classes)
        name = " ".join(words) + ("" if source == "published" else f", {Path(source).name}")
        subjects.append(Subject(name, name, words, model, {}))
    groups = labels or told_apart([subject.label for subject in subjects])
    for group, found in by_group([subject.words for subject in subjects], groups).items():
        if any(words != found[0] for words in found):
            raise UserError(f"--labels calls different networks {group!r}; give one name to seeds "
                            "of one network only.")
    return [subject._replace(label=label, group=group) for subject, label, group in zip(
        subjects, told_apart(groups), groups)]


def by_group(items: Sequence[Any], groups: Sequence[Hashable]) -> dict[Any, list[Any]]:
    """`items` under the group of each, in order."""
    found: dict[Any, list[Any]] = {}
    for item, group in zip(items, groups):
        found.setdefault(group, []).append(item)
    return found


def told_apart(labels: Sequence[str]) -> list[str]:
    """`labels`, a number after each that was there before."""
    names: list[str] = []
    for label in labels:
        name, number = label, 1
        while name in names:
            number += 1
            name = f"{label} ({number})"
        names.append(name)
    return names


def validation_pictures(data_set: list[str] | None, data_path: str | None,
                        subjects: Sequence[Subject]) -> data.ImageSource:
    """The validation pictures of the named data set, by default that of the first run. A folder of
    class folders will do where an image folder's val/ is expected."""
    trained = [subject.settings["data_set"] for subject in subjects if subject.settings]
    name, options = parse_spec(data_set or (trained or [["imagefolder"]])[0], "--data-set")
    split = "val"
    if name == "imagefolder" and data_path and not (Path(data_path) / split).is_dir():
        folder = Path(data_path).absolute()
        if (folder / "train").is_dir():
            raise UserError(f"{folder} holds train/ but no val/, whose pictures are looked at.")
        split, data_path = folder.name, str(folder.parent)
    return data.create_dataset(name, split, data_path, **options)


class Selection:
    """Some pictures of a source, as a source."""

    def __init__(self, source: data.ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])

    def name_of(self, index: int) -> str:
        return self.source.name_of(self.indices[index])


def select(source: data.ImageSource, number: int, spread: bool) -> Selection:
    """The first `number` pictures, or as many at equal distances through all of them; all of them
    for a larger number."""
    number = min(number, len(source))
    step = len(source) / number if spread else 1
    return Selection(source, [int(i * step) for i in range(number)])


def shuffled(selection: Selection) -> Selection:
    """The same pictures in a fixed random order, so that a batch has those of many classes."""
    order = torch.randperm(len(selection), generator=generator(0, "analysis"))
    return Selection(selection.source, [selection.indices[i] for i in order.tolist()])
