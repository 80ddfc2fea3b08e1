"""ImageNet's further test sets, from folders as their authors distribute them: -A, -R, -Sketch, -V2
and the ReaL labels. They are evaluated on, never trained on.

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
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.datasets import read_picture, register_dataset
from utils.errors import UserError
from utils.log import say

NUM_VALIDATION = 50_000  # pictures of ImageNet's validation set, each with its entry in real.json
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


class ClassFolder(NamedTuple):
    path: str
    wnid: str


class ClassFolders:
    """The pictures of some folders, in their order. The label is the wnid's place among the sorted
    ones until `align` makes it a model's (EvalSource says what these names mean).

    `num_published`: classes of the whole set. `restricts`: whether these alone compete, as in the
    evaluation of the set's authors, and not all that the model knows.
    """

    crop_pct: float | None = None

    def __init__(self, title: str, folders: Sequence[ClassFolder], *, num_published: int = 1000,
                 restricts: bool = False) -> None:
        self.title, self.num_published, self.restricts = title, num_published, restricts
        self.folders = list(folders)
        self.classes = sorted({folder.wnid for folder in folders})
        self.num_present = len(self.classes)  # of those published
        self.competing: list[int] | None = None
        self.labels = self._labels()
        # Arrays, as ImageNet-C has 3,750,000 pictures: every loader process would come to hold a
        # list's objects once more.
        names = [picture_names(folder.path) for folder in folders]
        empty = [folder.path for folder, found in zip(folders, names) if not len(found)]
        if empty:
            raise UserError(f"{len(empty)} class folder(s) hold no pictures: "
                            f"{', '.join(empty[:5])}. Fill or remove them.")
        self.names = np.concatenate(names)
        self.folder_of = np.repeat(np.arange(len(folders)), [len(found) for found in names])

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_picture(self.name_of(index)), int(self.labels[self.folder_of[index]])

    def name_of(self, index: int) -> str:
        return os.path.join(self.folders[self.folder_of[index]].path,
                            os.fsdecode(self.names[index]))

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        own = self.classes
        if self.num_present < self.num_published:
            say(f"{self.title}: {self.num_present} of its {self.num_published} classes are there")
        self.classes = model_classes(classes, num_classes)
        self.labels = self._labels()
        is_kept = self.labels[self.folder_of] >= 0
        if not is_kept.any():
            raise UserError(f"the model knows none of the {len(own)} classes of {self.title}: it "
                            f"has {shortened(self.classes)}, the set has {shortened(own)}. They "
                            "are matched by name, so train on class folders named by wnid.")
        unknown = set(own) - set(self.classes)
        if unknown:
            say(f"{self.title}: left out {len(unknown)} of {len(own)} classes, {(~is_kept).sum():,}"
                f" of {len(self):,} pictures; the model does not know them")
        self.names, self.folder_of = self.names[is_kept], self.folder_of[is_kept]
        if self.restricts:
            self.competing = np.unique(self.labels[self.folder_of]).tolist()

    def _labels(self) -> np.ndarray:
        """Of each folder; -1 where its wnid is not among the classes."""
        label = {name: number for number, name in enumerate(self.classes)}
        return np.array([label.get(folder.wnid, -1) for folder in self.folders])


class RealLabels(ClassFolders):
    """ImageNet's validation set, with the answers that people accept for its pictures.

    `answers`: by number of the picture, from 0, classes of ImageNet-1K. As in the paper the best
    class is right when it is among them, and pictures without any are left out. Answers that the
    model does not know are none.
    """

    def __init__(self, title: str, folders: Sequence[ClassFolder], answers: list[list[int]]
                 ) -> None:
        super().__init__(title, folders)
        self.answers = answers
        for index in range(len(self)):
            self._number(index)  # a strange name shall show now

    def count(self, index: Tensor, top5: Tensor) -> Tensor:
        label = {name: number for number, name in enumerate(self.classes)}
        known = [label.get(wnid, -1) for wnid in imagenet_wnids()]
        hits = number = 0
        for sample, best in zip(index.tolist(), top5[:, 0].tolist()):
            accepted = {known[answer] for answer in self.answers[self._number(sample)]} - {-1}
            hits += best in accepted
            number += len(accepted) > 0
        return torch.tensor([hits, number], dtype=torch.float64)

    def figures(self, counts: Tensor) -> dict[str, str]:
        hits, number = counts.tolist()
        return {"ReaL top-1": f"{100 * hits / max(number, 1):.2f} % of the {number:,.0f} images "
                              "that have such labels"}

    def _number(self, index: int) -> int:
        match = VALIDATION_NAME.fullmatch(os.fsdecode(self.names[index]))
        if not match or not 1 <= int(match[1]) <= NUM_VALIDATION:
            raise UserError(f"{self.name_of(index)} is not called ILSVRC2012_val_00000001.JPEG to "
                            f"ILSVRC2012_val_{NUM_VALIDATION:08d}.JPEG, and its ReaL labels are "
                            "found by that number. Keep the names of ImageNet's validation set.")
        return int(match[1]) - 1


@register_dataset("imagenet_a")
def imagenet_a(split: str, data_path: str | None) -> ClassFolders:
    """Hendrycks et al., arXiv 1907.07174."""
    root = checked_root("imagenet_a", split, data_path, "<wnid>/*.jpg")
    return ClassFolders("imagenet_a", class_folders(root), num_published=200, restricts=True)


@register_dataset("imagenet_r")
def imagenet_r(split: str, data_path: str | None) -> ClassFolders:
    """Hendrycks et al., arXiv 2006.16241."""
    root = checked_root("imagenet_r", split, data_path, "<wnid>/*.jpg")
    return ClassFolders("imagenet_r", class_folders(root), num_published=200, restricts=True)


@register_dataset("imagenet_sketch")
def imagenet_sketch(split: str, data_path: str | None) -> ClassFolders:
    """Wang et al., arXiv 1905.13549."""
    root = checked_root("imagenet_sketch", split, data_path, "<wnid>/*.JPEG")
    return ClassFolders("imagenet_sketch", class_folders(root))


@register_dataset("imagenet_v2")
def imagenet_v2(split: str, data_path: str | None) -> ClassFolders:
    """Recht et al., arXiv 1902.10811; one of its three folders."""
    root = checked_root("imagenet_v2", split, data_path, "0/*.jpeg ... 999/*.jpeg")
    return ClassFolders("imagenet_v2", class_folders(root, takes_index=True))


@register_dataset("imagenet_real")
def imagenet_real(split: str, data_path: str | None, labels: str = "") -> RealLabels:
    """Beyer et al., arXiv 2006.07159. `labels`: its real.json, by default the one in data_path."""
    root = checked_root("imagenet_real", split, data_path, "val/<wnid>/ILSVRC2012_val_*.JPEG")
    answers = read_real(Path(labels) if labels else root / "real.json")
    return RealLabels("imagenet_real", class_folders(root / "val"), answers)


def checked_root(name: str, split: str, data_path: str | None, layout: str) -> Path:
    """The folder of a test set, `layout` in it as its authors distribute it."""
    if split != "val":
        raise UserError(f"--data-set {name} has no pictures to {split} on: it is a test set for "
                        "eval.py. Train on another, such as imagefolder.")
    if data_path is None or not Path(data_path).is_dir():
        got = "none" if data_path is None else f"{data_path}, which is no folder"
        raise UserError(f"--data-set {name} needs --data-path, a folder that holds {layout}; got "
                        f"{got}.")
    return Path(data_path)


def class_folders(root: Path, takes_index: bool = False) -> list[ClassFolder]:
    """The folders in `root`, each named by its wnid, in order of the wnids. `takes_index`: or named
    by the label, whose order as a name (0, 1, 10, 100, ...) is not that of the classes."""
    wnids = imagenet_wnids()
    known = {wnid: wnid for wnid in wnids}
    if takes_index:
        known |= {str(number): wnid for number, wnid in enumerate(wnids)}
    expected = "<wnid>, such as n01440764" + (", or its index 0 ... 999" if takes_index else "")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected one that holds a folder per class: "
                        f"{expected}.")
    names = [entry.name for entry in os.scandir(root)
             if entry.is_dir() and not entry.name.startswith(".")]
    strange = sorted(set(names) - known.keys())
    if strange or not names:
        what = f"the folder(s) {shortened(strange)}" if strange else "no class folders"
        raise UserError(f"{root} has {what}; expected a folder per class of ImageNet-1K: "
                        f"{expected}. Point --data-path at the folder that holds those.")
    return sorted((ClassFolder(str(root / name), known[name]) for name in names),
                  key=lambda folder: folder.wnid)


def picture_names(folder: str) -> np.ndarray:
    """Of the files in a folder that are pictures by their ending, as bytes, sorted."""
    return np.array([os.fsencode(name) for name in sorted(os.listdir(folder))
                     if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")],
                    dtype=np.bytes_)


def imagenet_wnids() -> list[str]:
    """Of the 1000 classes, by label."""
    return Path(__file__).with_name("imagenet_wnids.txt").read_text().split()


def model_classes(classes: list[str] | None, num_classes: int) -> list[str]:
    """`classes`, or ImageNet's where a model of 1000 classes does not say which."""
    wnids = imagenet_wnids()
    if not classes and num_classes != len(wnids):
        raise UserError(f"the model has {num_classes} classes and nothing says which (a model of "
                        f"{len(wnids)} is taken for ImageNet's). Use --checkpoint with a file of "
                        "train_kd.py that has their names, as all have but the first ones.")
    return list(classes or wnids)


def read_real(path: Path) -> list[list[int]]:
    where = "Fetch real.json of ReaL's authors into --data-path, or name it with labels=FILE."
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {where}") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is not readable JSON ({error}). {where}") from None
    if not isinstance(content, list) or not all(
            isinstance(entry, list) and all(type(label) is int and 0 <= label < 1000
                                            for label in entry) for entry in content):
        raise UserError(f"{path} is not a list of lists of classes 0 ... 999. {where}")
    if len(content) != NUM_VALIDATION:
        raise UserError(f"{path} has {len(content):,} entries, expected {NUM_VALIDATION:,}: one "
                        f"for each picture of ImageNet's validation set. {where}")
    return content


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
