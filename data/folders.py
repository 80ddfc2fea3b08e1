"""Folders of images: which files in them are, kept in arrays; and the usual layout, with
train/<class>/ and val/<class>/.

A list of paths would cost 250 bytes an image, and every loader process would come to hold a copy of
its own, because Python writes to an object that is only looked at. An array's memory stays shared.
"""
import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import ImageSource, register_dataset
from data.images import EXTENSIONS, is_image, is_junk, persistently, printable, read_image
from utils.classes import are_numbers, imagenet_wnids, shortened
from utils.log import print_once
from utils.registry import UserError, short

MOST_CLASSES = 1_000_000
# Folders of a part, the first that is there; any other name is a folder itself.
PARTS = {"train": ("train", "training", "ILSVRC2012_img_train"),
         "val": ("val", "validation", "valid", "ILSVRC2012_img_val", "test")}


class Names:
    """Many file names as bytes, one after the other in one array."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.text = b"".join(names)
        # A path has 4096 bytes at most.
        self.lengths = np.fromiter(map(len, names), np.uint16, len(names))
        self.starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"there are names 0 to {len(self) - 1}; got {index}.")
        start = int(self.starts[index])
        return self.text[start:start + int(self.lengths[index])]

    def keep(self, which: np.ndarray) -> None:
        """Only those where `which`, bool, is true."""
        self.starts, self.lengths = self.starts[which], self.lengths[which]


class ListedImages(ImageSource):
    """Images by their paths below a folder, each of a class.

    `own`: names of the classes that `class_of` (N,) counts; one name may be there many times.
    """

    root = ""  # of the paths

    def __init__(self, names: Names, class_of: np.ndarray, own: Sequence[str]) -> None:
        self.names, self.class_of, self.own = names, np.asarray(class_of, np.int32), list(own)
        self.relabel(self.own)

    def __len__(self) -> int:
        return len(self.class_of)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path_of(index)), self.label(index)

    def label(self, index: int) -> int:
        return int(self.labels[self.class_of[index]])

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def name_of(self, index: int) -> str:
        return printable(self.path_of(index))

    def counts(self) -> np.ndarray:
        """(C,) images of each of the own classes."""
        return np.bincount(self.class_of, minlength=len(self.own))

    def present(self) -> list[str]:
        return list(dict.fromkeys(name for name, count in zip(self.own, self.counts()) if count))

    def relabel(self, classes: Sequence[str]) -> None:
        """An own class that is not among them has the label -1; where this is not overridden it
        has no images."""
        self.classes, self.labels = list(classes), self.labels_of(self.own, classes)

    @staticmethod
    def labels_of(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Places of the names among the classes; -1 for others."""
        label = {name: number for number, name in enumerate(classes)}
        return np.array([label.get(name, -1) for name in names])

    def keep(self, which: np.ndarray) -> None:
        """Only the images where `which`, (N,) bool, is true."""
        self.names.keep(which)
        self.class_of = self.class_of[which]

    def keep_part(self, part: str, share: float) -> None:
        """Only the images of `part` (train, val), `share` of them in val. Which, says a hash of
        class and name: it stays when others come or go. Of two images or more of a class, one at
        least is in each part; a single one is for training."""
        if not 0 < share < 1:
            raise UserError(f"split={share} must lie between 0 and 1, for example 0.1: the share "
                            "of the images to evaluate on.")
        hashes = np.fromiter(map(self._hash, range(len(self))), np.uint64, len(self))
        is_val = hashes < np.uint64(share * 2 ** 64)
        order = np.argsort(self.class_of, kind="stable")
        for indices in np.split(order, np.cumsum(self.counts())[:-1]):
            if len(indices) == 0:
                continue
            if is_val[indices].all():
                is_val[indices[hashes[indices].argmax()]] = False
            elif not is_val[indices].any() and len(indices) > 1:
                is_val[indices[hashes[indices].argmin()]] = True
        if not is_val.any():
            raise UserError(f"split={share} leaves no image to evaluate on: every class has a "
                            "single image, and single images are for training. Add images.")
        self.keep(is_val == (part != "train"))

    def _hash(self, index: int) -> int:
        name = self.names[index].replace(os.sep.encode(), b"/")
        text = self.own[self.class_of[index]].encode() + b"/" + name
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class FolderImages(ListedImages):
    """The images in some folders and below; `own` says the class of each folder."""

    def __init__(self, folders: Sequence[str], own: Sequence[str]) -> None:
        self.folders = list(folders)
        names, counts, left_out = [], [], Counter()
        for folder in self.folders:
            found, others = images_below(folder)
            names += map(os.fsencode, found)
            counts.append(len(found))
            left_out += others
        super().__init__(Names(names), np.repeat(np.arange(len(folders)), counts), own)
        if left_out:
            endings = ", ".join(f"{ending} {number:,}"
                                for ending, number in left_out.most_common(5))
            print_once(f"{common_parent(self.folders)}: left out {left_out.total():,} file(s) that "
                       f"are no images by their ending ({printable(endings)})")

    def path_of(self, index: int) -> str:
        return os.path.join(self.folders[self.class_of[index]], os.fsdecode(self.names[index]))


def images_below(folder: str) -> tuple[list[str], Counter[str]]:
    """The images in a folder and those below it, by their paths from there and in torchvision's
    order: folder by folder, each in order of name. And the endings of what else there is."""
    found: list[tuple[str, list[str]]] = []
    left_out: Counter[str] = Counter()
    pending = [("", folders_above(folder))]
    while pending:
        inner, above = pending.pop()
        here = os.path.join(folder, inner) if inner else folder
        status = os.stat(here)
        above |= {(status.st_dev, status.st_ino)}
        names = []
        for entry in entries_of(here):
            if entry.is_dir():
                path = os.path.join(inner, entry.name)
                if not entry.is_symlink() or not leads_to(entry, above):
                    pending.append((path, above))
            elif (entry.name.lower().endswith(EXTENSIONS)
                  and (entry.is_file() or entry.is_symlink())):
                names.append(entry.name)  # a link that leads nowhere will be named as unreadable
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "none"] += 1
        found.append((inner, sorted(names)))
    return [os.path.join(inner, name) if inner else name
            for inner, names in sorted(found) for name in names], left_out


def folders_above(folder: str) -> frozenset[tuple[int, int]]:
    """What a link in a class folder may not lead back to: the folder of all classes, say."""
    found = [os.stat(parent) for path in (os.path.abspath(folder), os.path.realpath(folder))
             for parent in Path(path).parents]
    return frozenset((status.st_dev, status.st_ino) for status in found)


def leads_to(link: os.DirEntry, folders: frozenset[tuple[int, int]]) -> bool:
    """Whether a linked folder is one of these: its own parent, say, without end."""
    status = link.stat()
    return (status.st_dev, status.st_ino) in folders


def entries_of(folder: str) -> list[os.DirEntry]:
    """What a folder holds, but for what systems and tools leave there."""
    def scan(path: str) -> list[os.DirEntry]:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not is_junk(entry.name)]

    try:
        return persistently(scan, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}). Make it a folder "
                        "that this user may read.") from None


def class_names(root: str) -> list[str]:
    """The names of the class folders in `root` by label: in order of name; where all are whole
    numbers, in order of these. What systems and tools leave is no class."""
    names = sorted(entry.name for entry in entries_of(root) if entry.is_dir())
    by_number = sorted(names, key=number_of) if all(map(is_number, names)) else names
    if by_number != names:
        print_once(f"{printable(root)}: the class folders are numbers; labels are in the order of "
                   f"these ({', '.join(by_number[:3])}, ...), not in that of words "
                   f"({', '.join(names[:3])}, ...)")
    return by_number


def is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def number_of(name: str) -> tuple[int, str]:
    return int(name), name


def numbered_classes(labels: Sequence[str], place: str | Path) -> list[str]:
    """'0' to the largest of labels that are whole numbers. Raises UserError for one that is no
    label."""
    largest = max(labels, key=lambda label: (len(label.lstrip("0")), label.lstrip("0")))
    if len(largest.lstrip("0")) > len(str(MOST_CLASSES)) or int(largest) >= MOST_CLASSES:
        raise UserError(f"{place} has the label {short(largest)}; whole numbers are the labels "
                        f"themselves, below {MOST_CLASSES:,}. Name the classes otherwise.")
    return [str(label) for label in range(int(largest) + 1)]


def common_parent(folders: Sequence[str]) -> str:
    return printable(os.path.commonpath(folders)) if folders else "the data"


# The usual layout


@register_dataset("imagefolder")
class ImageFolder(FolderImages):
    """Images in data_path/{train,val}/<class>/; labels in order of name, or of number.

    `split`: the share to evaluate on of images that lie in data_path/<class>/, or in
    data_path/train/<class>/ without a val/ beside it.
    """

    def __init__(self, part: str, data_path: str | None, split: float = 0.0) -> None:
        if data_path is None:
            raise UserError("--data-set imagefolder needs --data-path, a folder that holds "
                            "train/<class>/*.jpg and val/<class>/*.jpg.")
        self.root = undivided_folder(data_path) if split else part_folder(data_path, part)
        names = class_names(self.root)
        if not names:
            raise UserError(f"{self.root} has no class folders; expected {self.root}/<class>/*.jpg."
                            f"{flat_hint(self.root)}")
        super().__init__([os.path.join(self.root, name) for name in names],
                         [printable(name) for name in names])
        if part in PARTS:
            refuse_deeper_classes(self)
        if not len(self):
            raise UserError(f"{self.root} holds no images in its {len(self.classes)} class "
                            "folder(s). Fill them.")
        if split:
            refuse_empty(self, "Fill or remove them.")
            self.keep_part(part, split)
        elif part == "train":
            refuse_empty(self, "Fill or remove them, and those of the same name in val/.")

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        wnids = imagenet_wnids()
        if classes == wnids and num_classes == len(self.classes) and are_numbers(self.classes):
            classes = None  # folders named by the labels themselves
        if classes is None:
            if num_classes == len(wnids) and set(self.present()) <= set(wnids):
                classes = wnids  # the order of all published weights
            elif num_classes == len(self.classes):
                print_once("the weights do not name their classes: label k is taken for class k of "
                           f"the sorted folders ({shortened(self.classes)})")
        super().align(classes, num_classes)


def refuse_empty(source: FolderImages, advice: str) -> None:
    """Raises UserError when there are folders without images."""
    empty = [folder for folder, count in zip(source.folders, source.counts()) if not count]
    if empty:
        raise UserError(f"{len(empty)} class folder(s) hold no images: {', '.join(empty[:5])}. "
                        f"{advice}")


def part_folder(data_path: str, part: str) -> str:
    """The folder of a part. Raises UserError with the path that would do, where one is near."""
    for name in PARTS.get(part, (part,)):
        root = os.path.join(data_path, name)
        if os.path.isdir(root):
            if name != part:
                print_once(f"{printable(data_path)} has no {part}/; {name}/ is taken")
            return root
    near = next(near_paths(data_path, part), None)
    hint = f" Did you mean --data-path {near}?" if near else ""
    if not near and subfolders(Path(data_path)):
        hint = " Where training and evaluation are one, divide them with the option split=0.1."
    raise UserError(f"{os.path.join(data_path, part)} is not a folder; --data-path must hold "
                    f"train/ and val/, each with one folder per class.{hint}")


def undivided_folder(data_path: str) -> str:
    """The folder that holds the classes of training and evaluation together."""
    train, val = (next((name for name in PARTS[part]
                        if os.path.isdir(os.path.join(data_path, name))), "")
                  for part in ("train", "val"))
    if train and val:
        raise UserError(f"{data_path} is divided into {train}/ and {val}/ already; leave out the "
                        "option split.")
    if not os.path.isdir(data_path):
        raise UserError(f"{data_path} is not a folder; with the option split --data-path must hold "
                        "one folder per class.")
    return os.path.join(data_path, train) if train else data_path


def near_paths(data_path: str, part: str) -> Iterator[str]:
    """Folders that hold the part: above the path, below it, or of nearly its name."""
    path = Path(os.path.abspath(data_path))
    places: Iterable[Path] = path.parents[:2]
    if path.is_dir():
        below = subfolders(path)
        places = [*places, *below, *(deep for folder in below[:20] for deep in subfolders(folder))]
    elif path.parent.is_dir():
        names = {folder.name: folder for folder in subfolders(path.parent)}
        places = [*places, *(names[name] for name in
                             difflib.get_close_matches(path.name, names, cutoff=0.7))]
    for place in places:
        if any((place / name).is_dir() for name in PARTS.get(part, (part,))):
            yield str(place)


def subfolders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir()
                      if entry.is_dir() and not is_junk(entry.name))
    except OSError:  # only a guess is lost
        return []


def flat_hint(root: str) -> str:
    number = sum(is_image(entry.name) for entry in entries_of(root))
    if not number:
        return ""
    return (f" It holds {number:,} image(s) itself: sort them into folders named by their class, "
            "or use --data-set imagenet for ImageNet's flat val/, or --data-set list.")


def refuse_deeper_classes(source: ImageFolder) -> None:
    """One class whose images all lie in folders of it: these are the classes, one level deeper."""
    if len(source.folders) > 1:
        return
    deeper = {os.fsdecode(source.names[index]).rpartition(os.sep)[0].partition(os.sep)[0]
              for index in range(len(source))}
    if len(deeper) > 1 and "" not in deeper:
        root, only = source.root, source.folders[0]
        is_doubled = any(os.path.basename(only) in names for names in PARTS.values())
        way_out = (f"Did you mean --data-path {root}?" if is_doubled
                   else f"Move them up into {root}.")
        raise UserError(f"{root} has one class folder, {only}, and the images lie in its "
                        f"{len(deeper)} folders ({min(deeper)}, ...), which look like "
                        f"the classes. {way_out}")
