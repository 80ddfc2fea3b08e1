"""ImageNet's further test sets, from folders as their authors distribute them: -A, -R, -Sketch,
-V2, the ReaL labels and -C. They are evaluated on, never trained on.

A class folder is known by its wnid (n01440764), so the sets fit any model whose classes are known
by theirs. The classes of ImageNet-1K are the sorted wnids, the order of all published weights.
"""
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.datasets import Metric, register_dataset
from data.folders import FolderImages, entries_of, refuse_empty
from utils.classes import imagenet_wnids, shortened
from utils.log import print_once
from utils.registry import UserError, did_you_mean

NUM_VALIDATION = 50_000  # images of ImageNet's validation set, each with its entry in real.json
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")

# AlexNet's top-1 error, mean over the severities, as the authors publish it: what mCE divides by.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published, no part of mCE
SEVERITIES = (1, 2, 3, 4, 5)


# Folders of classes


class ClassFolder(NamedTuple):
    path: str
    wnid: str


class ClassFolders(FolderImages):
    """The images of some folders, in their order. The label is the wnid's place among the sorted
    ones until `align` makes it a model's.

    `num_published`: classes of the whole set. Below 1000 these alone compete, as in the evaluation
    of the set's authors, and not all that the model knows.
    """

    def __init__(self, title: str, folders: Sequence[ClassFolder], num_published: int = 1000
                 ) -> None:
        super().__init__([folder.path for folder in folders], [folder.wnid for folder in folders])
        refuse_empty(self, "Fill or remove them.")
        self.title, self.num_published = title, num_published
        self.relabel(sorted({*self.own}))
        self.num_present = len(self.classes)  # of those published

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        """Match by name and leave out the images of classes that the model does not know."""
        own = self.classes
        if self.num_present < self.num_published:
            print_once(f"{self.title}: {self.num_present} of its {self.num_published} classes are "
                       "there")
        self.relabel(model_classes(classes, num_classes))
        is_kept = self.labels[self.class_of] >= 0
        if not is_kept.any():
            raise UserError(f"the model knows none of the {len(own)} classes of {self.title}: it "
                            f"has {shortened(self.classes)}, the set has {shortened(own)}. They "
                            "are matched by name, so train on class folders named by wnid.")
        unknown = set(own) - set(self.classes)
        if unknown:
            print_once(f"{self.title}: left out {len(unknown)} of {len(own)} classes, "
                       f"{(~is_kept).sum():,} of {len(self):,} images; the model does not know "
                       "them")
        self.keep(is_kept)
        if self.num_published < 1000:
            self.competing = np.unique(self.labels[self.class_of]).tolist()


def class_folders(root: Path, takes_index: bool = False) -> list[ClassFolder]:
    """The folders in `root`, each named by its wnid, in order of the wnids. `takes_index`: or named
    by the label, whose order as a name (0, 1, 10, 100, ...) is not that of the classes."""
    wnids = imagenet_wnids()
    known = {wnid: wnid for wnid in wnids}
    expected = "<wnid>, such as n01440764"
    if takes_index:
        known |= {str(number): wnid for number, wnid in enumerate(wnids)}
        expected += ", or its index 0 ... 999"
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected one that holds a folder per class: "
                        f"{expected}.")
    names = [entry.name for entry in entries_of(str(root)) if entry.is_dir()]
    strange = sorted(set(names) - known.keys())
    if strange or not names:
        what = f"the folder(s) {shortened(strange)}" if strange else "no class folders"
        raise UserError(f"{root} has {what}; expected a folder per class of ImageNet-1K: "
                        f"{expected}. Point --data-path at the folder that holds those.")
    return sorted((ClassFolder(str(root / name), known[name]) for name in names),
                  key=lambda folder: folder.wnid)


def model_classes(classes: list[str] | None, num_classes: int) -> list[str]:
    """`classes`, or ImageNet's where a model of 1000 classes does not say which."""
    if classes:
        return list(classes)
    wnids = imagenet_wnids()
    if num_classes != len(wnids):
        raise UserError(f"the model has {num_classes} classes and nothing says which (a model of "
                        f"{len(wnids)} is taken for ImageNet's). Use --checkpoint with a file of "
                        "train_kd.py that has their names, as all have but the first ones.")
    return wnids


def checked_root(name: str, part: str, data_path: str | None, layout: str) -> Path:
    """The folder of a test set, `layout` in it as its authors distribute it."""
    if part != "val":
        raise UserError(f"--data-set {name} has no images to {part} on: it is a test set for "
                        "eval.py. Train on another, such as imagefolder.")
    if data_path is None or not Path(data_path).is_dir():
        got = "none" if data_path is None else f"{data_path}, which is no folder"
        raise UserError(f"--data-set {name} needs --data-path, a folder that holds {layout}; got "
                        f"{got}.")
    return Path(data_path)


@register_dataset("imagenet_a")
def imagenet_a(part: str, data_path: str | None) -> ClassFolders:
    """Hendrycks et al., arXiv 1907.07174."""
    root = checked_root("imagenet_a", part, data_path, "<wnid>/*.jpg")
    return ClassFolders("imagenet_a", class_folders(root), num_published=200)


@register_dataset("imagenet_r")
def imagenet_r(part: str, data_path: str | None) -> ClassFolders:
    """Hendrycks et al., arXiv 2006.16241."""
    root = checked_root("imagenet_r", part, data_path, "<wnid>/*.jpg")
    return ClassFolders("imagenet_r", class_folders(root), num_published=200)


@register_dataset("imagenet_sketch")
def imagenet_sketch(part: str, data_path: str | None) -> ClassFolders:
    """Wang et al., arXiv 1905.13549."""
    root = checked_root("imagenet_sketch", part, data_path, "<wnid>/*.JPEG")
    return ClassFolders("imagenet_sketch", class_folders(root))


@register_dataset("imagenet_v2")
def imagenet_v2(part: str, data_path: str | None) -> ClassFolders:
    """Recht et al., arXiv 1902.10811; one of its three folders."""
    root = checked_root("imagenet_v2", part, data_path, "0/*.jpeg ... 999/*.jpeg")
    return ClassFolders("imagenet_v2", class_folders(root, takes_index=True))


# ReaL


@register_dataset("imagenet_real")
def imagenet_real(part: str, data_path: str | None, labels: str = "") -> ClassFolders:
    """Beyer et al., arXiv 2006.07159. `labels`: its real.json, by default the one in data_path."""
    root = checked_root("imagenet_real", part, data_path, "val/<wnid>/ILSVRC2012_val_*.JPEG")
    answers = read_real(Path(labels) if labels else root / "real.json")
    source = ClassFolders("imagenet_real", class_folders(root / "val"))
    source.metric = RealAccuracy(source, answers)
    return source


def read_real(path: Path) -> list[list[int]]:
    """By number of a validation image, from 0, the classes that people accept for it."""
    where = "Fetch real.json of ReaL's authors into --data-path, or name it with labels=FILE."
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {where}") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is not readable JSON ({error}). {where}") from None
    if not isinstance(content, list) or not all(map(_is_list_of_classes, content)):
        raise UserError(f"{path} is not a list of lists of classes 0 ... 999. {where}")
    if len(content) != NUM_VALIDATION:
        raise UserError(f"{path} has {len(content):,} entries, expected {NUM_VALIDATION:,}: one "
                        f"for each image of ImageNet's validation set. {where}")
    return content


def _is_list_of_classes(entry: object) -> bool:
    return isinstance(entry, list) and all(
        type(label) is int and 0 <= label < 1000 for label in entry)


class RealAccuracy(Metric):
    """As in the paper the best class is right when it is among an image's answers, and images
    without any are left out. Answers that the model does not know are none."""

    def __init__(self, source: ClassFolders, answers: list[list[int]]) -> None:
        self.source, self.answers = source, answers
        for index in range(len(source)):
            self._number(index)  # a strange name shall show now

    def count(self, indices: Tensor, top5: Tensor) -> Tensor:
        """(2,): hits and images."""
        known = self.source.labels_of(imagenet_wnids(), self.source.classes)
        hits = number = 0
        for index, best in zip(indices.tolist(), top5[:, 0].tolist()):
            accepted = {known[answer] for answer in self.answers[self._number(index)]} - {-1}
            if accepted:
                number += 1
                hits += best in accepted
        return torch.tensor([hits, number], dtype=torch.float64)

    def rows(self, counts: Tensor) -> dict[str, str]:
        hits, number = counts.tolist()
        return {"ReaL top-1": f"{100 * hits / max(number, 1):.2f} % of the {number:,.0f} images "
                              "that have such labels"}

    def _number(self, index: int) -> int:
        """Of an image in the validation set, from 0."""
        match = VALIDATION_NAME.fullmatch(os.path.basename(os.fsdecode(self.source.names[index])))
        if not match or not 1 <= int(match[1]) <= NUM_VALIDATION:
            raise UserError(f"{self.source.name_of(index)} is not called "
                            "ILSVRC2012_val_00000001.JPEG to "
                            f"ILSVRC2012_val_{NUM_VALIDATION:08d}.JPEG, and its ReaL labels are "
                            "found by that number. Keep the names of ImageNet's validation set.")
        return int(match[1]) - 1


# -C


@register_dataset("imagenet_c")
def imagenet_c(part: str, data_path: str | None,
               corruptions: str | tuple[str, ...] | None = None) -> ClassFolders:
    """Hendrycks and Dietterich, arXiv 1903.12261. `corruptions`: these instead of the 15; those
    beyond the 15 do not count in mCE."""
    root = checked_root("imagenet_c", part, data_path, "<corruption>/<1 ... 5>/<wnid>/*.JPEG")
    if corruptions is None:
        corruptions = tuple(ALEXNET_ERRORS)
    elif not isinstance(corruptions, tuple):
        corruptions = (corruptions,)
    known = [*ALEXNET_ERRORS, *EXTRA]
    for name in corruptions:
        if name not in known:
            raise UserError(f"imagenet_c has no corruption {name!r}. Known: {', '.join(known)}."
                            f"{did_you_mean(str(name), known)}")
    corruptions = list(dict.fromkeys(corruptions))
    source = ClassFolders("imagenet_c", corrupted_folders(root, corruptions))
    source.crop_pct = 1.0  # 224 px as they are: the authors resized before they corrupted
    source.metric = CorruptionError(source, corruptions)
    return source


def corrupted_folders(root: Path, corruptions: Sequence[str]) -> list[ClassFolder]:
    """The class folders of the five severities of each corruption, one severity after the other,
    from folders right in `root` or in those that the authors' archives unpack to (blur/, noise/,
    ...). Raises UserError where one is missing or has other classes."""
    places = [root, *sorted(root / entry.name for entry in entries_of(str(root)) if entry.is_dir())]
    homes = {name: next((place / name for place in places if (place / name).is_dir()), None)
             for name in corruptions}
    missing = []
    for name, home in homes.items():
        if home is None:
            missing.append(name)
        else:
            missing += [f"{name}/{number}" for number in SEVERITIES
                        if not (home / str(number)).is_dir()]
    if missing:
        raise UserError(f"{root} lacks {', '.join(missing)}; looked for "
                        f"{root}/<corruption>/<1 ... 5> and {root}/*/<corruption>/<1 ... 5>. "
                        "Unpack the archives of the authors there, or name with "
                        "corruptions=NAME,NAME those to evaluate on.")
    folders, wnids = [], None
    for name, home in homes.items():
        for number in SEVERITIES:
            found = class_folders(home / str(number))
            wnids = wnids or [folder.wnid for folder in found]
            if [folder.wnid for folder in found] != wnids:
                raise UserError(f"{root}: {name}/{number} has {len(found)} class folders that are "
                                f"not the {len(wnids)} of {corruptions[0]}/{SEVERITIES[0]}. Unpack "
                                "its archive again, to the end.")
            folders += found
    return folders


class CorruptionError(Metric):
    """The error of a corruption is the mean of its five severities'; CE is that over AlexNet's, and
    mCE the mean of CE over the 15 corruptions."""

    def __init__(self, source: ClassFolders, corruptions: Sequence[str]) -> None:
        self.source, self.corruptions, self.num_images = source, corruptions, len(source)
        # Of every folder; each severity has one of every class.
        self.severity_of = np.arange(len(source.folders)) // len(source.classes)

    def count(self, indices: Tensor, top5: Tensor) -> Tensor:
        """(2, severities): hits and images."""
        folder = self.source.class_of[indices.numpy()]
        hits = top5[:, 0] == torch.from_numpy(self.source.labels[folder])
        counts = torch.zeros(2, len(self.corruptions) * len(SEVERITIES), dtype=torch.float64)
        return counts.index_add_(1, torch.from_numpy(self.severity_of[folder]),
                                 torch.stack([hits, torch.ones_like(hits)]).double())

    def rows(self, counts: Tensor) -> dict[str, str]:
        hits, number = counts.view(2, -1, len(SEVERITIES))
        errors = dict(zip(self.corruptions, (1 - hits / number).mean(1).tolist()))
        is_whole = len(self.source) == self.num_images  # no class was left out
        rows, ratios = {}, []
        for name, error in errors.items():
            rows[name] = f"error {100 * error:.2f} %"
            if is_whole and name in ALEXNET_ERRORS:
                ratios.append(error / ALEXNET_ERRORS[name])
                rows[name] += f", CE {100 * ratios[-1]:.2f} %"
        rows["mean error"] = f"{100 * np.mean(list(errors.values())):.2f} %"
        if not is_whole:
            rows["mCE"] = "none: AlexNet's errors, which it divides by, are of all classes"
        elif len(ratios) < len(ALEXNET_ERRORS):
            rows["mCE"] = f"none: it takes all {len(ALEXNET_ERRORS)} corruptions"
        else:
            rows["mCE"] = f"{100 * np.mean(ratios):.2f} %"
            if self.source.num_present < self.source.num_published:
                rows["mCE"] += (f" over {self.source.num_present} of the "
                                f"{self.source.num_published} classes, AlexNet's errors over all")
        return rows
