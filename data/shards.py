"""Images in tar files, as WebDataset names what is in them, read at any place.

A sample is what has one name up to the first dot: `0001.jpg` and `0001.cls`, whose text is the
label. Without a `.cls`, the label is the name of the folder inside the tar. An index of the places,
built once and kept beside the tars where that is allowed, lets every sample be read alone: order,
resume and evaluation are those of files.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.datasets import register_dataset
from data.folders import (
    PARTS,
    ListedImages,
    Names,
    is_number,
    numbered_classes,
    part_folder,
)
from data.images import (
    EXTENSIONS,
    StorageFault,
    Unreadable,
    is_junk,
    may_pass,
    open_image,
    persistently,
    printable,
)
from utils.distributed import barrier, is_main
from utils.files import write_atomically
from utils.log import print_once
from utils.registry import UserError, one_line

INDEX = ".shards-{}.npz"  # of a part
NAMES = "classes.txt"  # of the classes whose labels are numbers, one a line


class Member(NamedTuple):
    name: str
    shard: int
    start: int  # of the image's bytes in the tar
    size: int
    label: str


class Shards(ListedImages):
    """The samples of some tars, in the order of the tars and of what is in them."""

    def __init__(self, paths: list[Path], index: dict[str, np.ndarray], classes: list[str]) -> None:
        self.paths = paths
        self.shard_of, self.starts, self.sizes = index["shard"], index["start"], index["size"]
        lengths = index["length"]
        names = Names([])
        names.text, names.lengths = index["text"].tobytes(), lengths
        names.starts = np.cumsum(lengths, dtype=np.int64) - lengths
        super().__init__(names, index["class_of"], classes)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path = str(self.paths[self.shard_of[index]])
        start, size = int(self.starts[index]), int(self.sizes[index])

        def read(path: str) -> bytes:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(size)

        try:
            content = persistently(read, path)
        except OSError as error:
            kind = StorageFault if may_pass(error, path) else Unreadable
            raise kind(error.strerror or one_line(error)) from None
        if len(content) < size:
            raise Unreadable("its tar ends before it")
        return open_image(content), self.label(index)

    def path_of(self, index: int) -> str:
        return os.path.join(self.paths[self.shard_of[index]], os.fsdecode(self.names[index]))

    def keep(self, which: np.ndarray) -> None:
        super().keep(which)
        self.shard_of, self.starts = self.shard_of[which], self.starts[which]
        self.sizes = self.sizes[which]


@register_dataset("shards")
def shards(part: str, data_path: str | None) -> Shards:
    """Tars in data_path/{train,val}/, or those in data_path whose names hold train or val."""
    if data_path is None:
        raise UserError("--data-set shards needs --data-path, a folder that holds train/*.tar and "
                        "val/*.tar, or NAME-train-000000.tar, NAME-val-000000.tar, ...")
    paths = find_tars(Path(data_path), part)
    place = Path(data_path) / INDEX.format(part)
    state = np.array([f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
                      for path in paths])
    index = read_index(place, state)
    if index is None and is_main():
        print_once(f"{printable(data_path)}: looking through {len(paths)} tar file(s) of {part}")
        index = build_index(paths)
        try:
            write_atomically(lambda file: np.savez(file, state=state, **index), place)
        except (OSError, UserError):  # a folder that may not be written to: next time again
            pass
    barrier()
    if index is None:
        index = read_index(place, state) or build_index(paths)
    classes = index.pop("classes").tolist()
    names = Path(data_path) / NAMES
    if names.is_file():
        text = printable(names.read_bytes().decode(errors="surrogateescape"))
        wanted = [line.strip() for line in text.splitlines() if line.strip()]
        if len(wanted) < len(classes):
            raise UserError(f"{names} has {len(wanted)} names, and the labels of {part} go to "
                            f"{len(classes) - 1}. Give each class a line.")
        classes = wanted
    return Shards(paths, index, classes)


def find_tars(root: Path, part: str) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data-set shards reads the tar files in one.")
    words = PARTS.get(part, (part,))
    if any((root / name).is_dir() for name in words):
        folder = Path(part_folder(str(root), part))
        found = [path for path in folder.iterdir() if is_tar(path)]
    else:
        found = [path for path in root.iterdir()
                 if is_tar(path) and any(name in path.name for name in words)]
    if not found:
        raise UserError(f"{root} has no tar files of {part}; expected {part}/*.tar, or *.tar with "
                        f"{part} in their names. (Packed ones, .tar.gz, cannot be read at any "
                        "place; unpack these.)")
    return sorted(found)


def is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and not is_junk(path.name)


def read_index(place: Path, state: np.ndarray) -> dict[str, np.ndarray] | None:
    """The index kept of these very files, if there is one."""
    try:
        with np.load(place) as kept:
            index = {key: kept[key] for key in kept.files}
    except Exception:  # of whatever kind the damage: it is built again
        return None
    is_same = np.array_equal(index.pop("state", None), state)
    return index if is_same and {"shard", "start", "size", "text", "length", "class_of",
                                 "classes"} <= index.keys() else None


def build_index(paths: list[Path]) -> dict[str, np.ndarray]:
    """Arrays of a Member's fields. Labels that are all numbers are the labels themselves."""
    members = [member for number, path in enumerate(paths) for member in members_of(path, number)]
    if not members:
        raise UserError(f"{paths[0].parent}: its {len(paths)} tar file(s) hold no samples; "
                        "expected 0001.jpg and 0001.cls, or <class>/0001.jpg.")
    labels = [member.label for member in members]
    classes = sorted(set(labels))
    if all(map(is_number, classes)):
        classes = numbered_classes(classes, paths[0].parent)
        labels = [str(int(label)) for label in labels]
    names = Names([os.fsencode(member.name) for member in members])
    return {"shard": np.array([member.shard for member in members], np.int32),
            "start": np.array([member.start for member in members], np.int64),
            "size": np.array([member.size for member in members], np.int64),
            "text": np.frombuffer(names.text, np.uint8), "length": names.lengths,
            "class_of": ListedImages.labels_of(labels, classes).astype(np.int32),
            "classes": np.array(classes)}


def members_of(path: Path, number: int) -> Iterator[Member]:
    """The samples of a tar. Raises UserError where it is damaged or a sample has no label."""
    image: tarfile.TarInfo | None = None
    key, label = "", ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                if not member.isfile() or any(map(is_junk, member.name.split("/"))):
                    continue
                stem, _, ending = base.partition(".")
                if f"{folder}/{stem}" != key:
                    if image is not None:
                        yield sample_of(path, number, image, label)
                    key, image, label = f"{folder}/{stem}", None, ""
                if f".{ending.lower()}" in EXTENSIONS:
                    image = member
                elif ending == "cls":
                    label = tar.extractfile(member).read().decode(errors="replace").strip()
            if image is not None:
                yield sample_of(path, number, image, label)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is no whole tar file ({one_line(error)}). Fetch it again."
                        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None


def sample_of(path: Path, number: int, image: tarfile.TarInfo, label: str) -> Member:
    label = label or os.path.basename(os.path.dirname(image.name))
    if not label:
        raise UserError(f"{path} has no label for {image.name}: expected a file of the same name "
                        "that ends in .cls, or a folder named by the class.")
    return Member(image.name, number, image.offset_data, image.size, printable(label))
