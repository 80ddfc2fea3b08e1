"""Data as people have it: ImageNet as it is distributed, and lists of paths and labels."""
import csv
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torchvision.models import ResNet50_Weights

from data.datasets import ImageSource, register_dataset
from data.folders import (
    ImageFolder,
    ListedImages,
    Names,
    class_names,
    images_below,
    is_number,
    numbered_classes,
    part_folder,
)
from data.images import printable
from utils.classes import imagenet_wnids
from utils.registry import UserError, one_line

# ImageNet

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
PLACES = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # of train/ and val/; Kaggle's
CSV = "LOC_val_solution.csv"
TRUTH = "*validation_ground_truth.txt"  # of a development kit: a number of a synset a line
KITS = (".", "data", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data",
        "ILSVRC/devkit/data")


def class_words(classes: Sequence[str]) -> list[str]:
    """What to call classes: ImageNet's words for its wnids, else their names."""
    words = dict(zip(imagenet_wnids(), ResNet50_Weights.DEFAULT.meta["categories"]))
    return [words.get(name, name) for name in classes]


@register_dataset("imagenet")
def imagenet(part: str, data_path: str | None) -> ImageSource:
    """ImageNet-1K as it is distributed: train/<wnid>/ and val/ with folders or without, right in
    data_path or in Kaggle's tree below it."""
    if data_path is None:
        raise UserError("--data-set imagenet needs --data-path, a folder that holds train/ and "
                        "val/, or Kaggle's ILSVRC/.")
    places = [os.path.normpath(os.path.join(data_path, name)) for name in PLACES]
    root = next((place for place in places if os.path.isdir(os.path.join(place, "train"))
                 or os.path.isdir(os.path.join(place, "val"))), data_path)
    if part == "train":
        return ImageFolder(part, root)
    folder = part_folder(root, part)
    return ImageFolder(part, root) if class_names(folder) else flat_validation(folder, data_path)


def flat_validation(folder: str, data_path: str) -> ListedImages:
    """The validation images of one folder, their labels from the development kit or Kaggle's
    csv."""
    names, _ = images_below(folder)
    if not names:
        raise UserError(f"{folder} holds neither class folders nor images.")
    above = [Path(os.path.abspath(folder)).parents[up] for up in range(4)]
    wnid_of = read_truth([*dict.fromkeys([Path(os.path.abspath(data_path)), *above])])
    wnids = imagenet_wnids()
    label = {wnid: number for number, wnid in enumerate(wnids)}
    labels = []
    for name in names:
        match = VALIDATION_NAME.match(os.path.basename(name))
        wnid = wnid_of.get(int(match[1])) if match else None
        if wnid not in label:
            raise UserError(f"{os.path.join(folder, name)} has no label: its name or its number is "
                            "not in the list of ImageNet's validation set. Keep the names "
                            "ILSVRC2012_val_00000001.JPEG, ...")
        labels.append(label[wnid])
    source = ListedImages(Names([os.fsencode(name) for name in names]), np.array(labels), wnids)
    source.root = folder
    return source


def read_truth(places: list[Path]) -> dict[int, str]:
    """Number of a validation image -> wnid, from the first list that is found."""
    for place in places:
        if (place / CSV).is_file():
            return read_solution(place / CSV)
        for kit in KITS:
            for path in sorted((place / kit).glob(TRUTH)):
                return read_kit(path)
    raise UserError(f"{places[0]}: val/ is one folder without classes, and neither Kaggle's {CSV} "
                    "nor the development kit (ILSVRC2012_devkit_t12/) is beside or above it. Put "
                    "one there, or sort the images into val/<wnid>/.")


def read_solution(path: Path) -> dict[int, str]:
    """Kaggle's csv: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`, with a box for each object
    of the class."""
    found = {}
    try:
        for row in csv.reader(path.read_text().splitlines()):
            match = VALIDATION_NAME.match(row[0]) if len(row) > 1 else None
            if match:
                found[int(match[1])] = row[1].split()[0]
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise UserError(f"{path} is not readable ({one_line(error)}); expected lines such as "
                        "ILSVRC2012_val_00048981,n03995372 85 1 499 272.") from None
    return found


def read_kit(path: Path) -> dict[int, str]:
    """A development kit's list: in line i the number of image i's synset, which meta.mat or
    map_clsloc.txt beside it name."""
    try:
        numbers = [int(line) for line in path.read_text().split()]
        if (path.parent / "meta.mat").is_file():
            synsets = read_synsets((path.parent / "meta.mat").read_bytes())
        else:
            lines = (path.parent / "map_clsloc.txt").read_text().splitlines()
            synsets = {int(line.split()[1]): line.split()[0] for line in lines if line.strip()}
        return {place: synsets[number] for place, number in enumerate(numbers, 1)}
    except FileNotFoundError:
        raise UserError(f"{path.parent} lacks meta.mat (or map_clsloc.txt), which says what the "
                        f"numbers of {path.name} mean. Unpack the whole development kit.") from None
    except (OSError, TypeError, ValueError, LookupError, struct.error, zlib.error) as error:
        raise UserError(f"the development kit in {path.parent} is not readable "
                        f"({one_line(error)}). Unpack it again.") from None


# MATLAB's format 5 (MathWorks, "MAT-File Format"), as far as meta.mat needs it: an element is a
# type, a length and its bytes; a matrix is an element of elements.

COMPRESSED, MATRIX = 15, 14
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8", 16: "u1", 17: "u2"}
STRUCT, TEXT = 2, 4  # classes of a matrix


def read_synsets(content: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID of the struct array in a meta.mat."""
    for kind, data in elements(content[128:]):  # behind the header
        if kind == COMPRESSED:
            (kind, data), = elements(zlib.decompress(data))
        if kind == MATRIX and matrix_class(data) == STRUCT:
            return {int(row["ILSVRC2012_ID"][0]): "".join(map(chr, row["WNID"]))
                    for row in structs(data)}
    raise ValueError("no struct array in meta.mat")


def elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of each element."""
    at = 0
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<II", content, at)
        if kind >> 16:  # a small one: its bytes lie in the place of the length
            yield kind & 0xFFFF, content[at + 4:at + 4 + (kind >> 16)]
            at += 8
        else:
            yield kind, content[at + 8:at + 8 + length]
            at += 8 + length + (-length % 8 if kind != COMPRESSED else 0)


def matrix_class(matrix: bytes) -> int:
    (_, flags), *_ = elements(matrix)
    return flags[0]


def structs(matrix: bytes) -> Iterator[dict[str, np.ndarray]]:
    """The fields that hold numbers or text, of each struct of an array."""
    _, _, _, (_, width), (_, names), *fields = elements(matrix)
    length = int.from_bytes(width[:4], "little")
    keys = [names[at:at + length].split(b"\0")[0].decode() for at in range(0, len(names), length)]
    for first in range(0, len(fields), len(keys)):
        yield {key: values(field) for key, (_, field) in zip(keys, fields[first:])}


def values(matrix: bytes) -> np.ndarray:
    parts = list(elements(matrix))
    if len(parts) < 4 or parts[3][0] not in NUMBERS:
        return np.zeros(0)
    kind, data = parts[3]
    return np.frombuffer(data, "<" + NUMBERS[kind])


# Lists


@register_dataset("list")
def image_list(part: str, data_path: str | None, file: str = "", val: str = "",
               split: float = 0.0) -> ListedImages:
    """Images that a file lists: a path and a label a line, with a comma, a tab or a blank between.

    `file`: to train on; `val`: to evaluate on, or `split`: that share of `file` instead. Paths are
    relative to data_path, by default to the folder of the file. Labels are names of classes, or
    numbers, which are the labels themselves.
    """
    if not file:
        raise UserError("--data-set list needs file=FILE, a path and a label a line.")
    if (part == "train" and not (val or split)) or (val and split):
        raise UserError("--data-set list needs val=FILE, the list to evaluate on, or split=0.1, "
                        "the share of file's images; one of them.")
    path = Path(os.path.expanduser(val if part == "val" and val else file))
    rows = read_list(path)
    own = sorted({label for _, label in rows})
    if all(map(is_number, own)):
        own = numbered_classes(own, path)
        rows = [(name, str(int(label))) for name, label in rows]
    names = [os.fsencode(name) for name, _ in rows]
    source = ListedImages(Names(names), ListedImages.labels_of([label for _, label in rows], own),
                          [printable(label) for label in own])
    source.root = data_path or str(path.parent)
    if not any(os.path.exists(source.path_of(index)) for index in range(min(len(rows), 100))):
        raise UserError(f"{path} lists {source.name_of(0)}, which is not there, nor are those "
                        "after it. Name the folder that its paths begin in with --data-path.")
    if split:
        source.keep_part(part, split)
    return source


def read_list(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_bytes().decode(errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a list of paths and "
                        "labels.") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    comma = "," if path.suffix.lower() == ".csv" else None
    rows = []
    try:
        parts = list(csv.reader(lines) if comma else map(split_line, lines))
    except csv.Error as error:
        raise UserError(f"{path} is no readable list with commas ({one_line(error)}).") from None
    for line in parts:
        if len(line) < 2 or not line[0].strip() or not line[1].strip():
            raise UserError(f"{path} has the line {printable(' '.join(line))!r}; expected a path "
                            "and a label in each.")
        rows.append((line[0].strip(), line[1].strip()))
    endings = [os.path.splitext(name)[1] for name, _ in rows[:2]]
    if len(endings) == 2 and endings[1] and not endings[0]:  # names of the columns
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path} lists no images; expected a path and a label a line.")
    return rows


def split_line(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.strip().rsplit(maxsplit=1)
