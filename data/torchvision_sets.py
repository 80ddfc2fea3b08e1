"""Data sets that torchvision knows and fetches: one row of a table each."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from data.datasets import ImageSource, register_dataset
from data.folders import ListedImages, Names
from utils.distributed import barrier, is_main
from utils.registry import UserError, one_line


class Row(NamedTuple):
    kind: str  # torchvision's class
    place: str  # what to unpack into data_path where nothing can be fetched
    parts: dict[str, Sequence[dict[str, Any]]]  # arguments of the sets that make a part
    content: Callable[[Any], tuple]  # a set -> images or paths, and labels
    classes: Callable[[Any], Sequence[str]] = lambda found: found.classes


def by_split(train: str, val: str) -> dict[str, Sequence[dict[str, Any]]]:
    """`a+b` joins two of torchvision's splits."""
    return {part: [{"split": name} for name in names.split("+")]
            for part, names in (("train", train), ("val", val))}


CIFAR = {"train": [{"train": True}], "val": [{"train": False}]}
ROWS = {
    "cifar10": Row("CIFAR10", "cifar-10-batches-py", CIFAR,
                   lambda found: (found.data, found.targets)),
    "cifar100": Row("CIFAR100", "cifar-100-python", CIFAR,
                    lambda found: (found.data, found.targets)),
    # Its classes are wnids, so that networks of ImageNet know them.
    "imagenette": Row("Imagenette", "imagenette2-320", by_split("train", "val"),
                      lambda found: tuple(zip(*found._samples)), lambda found: found.wnids),
    "flowers102": Row("Flowers102", "flowers-102", by_split("train+val", "test"),
                      lambda found: (found._image_files, found._labels),
                      lambda found: [str(number) for number in range(102)]),
    "food101": Row("Food101", "food-101", by_split("train", "test"),
                   lambda found: (found._image_files, found._labels)),
    "pets": Row("OxfordIIITPet", "oxford-iiit-pet", by_split("trainval", "test"),
                lambda found: (found._images, found._labels)),
}


class Pixels(ImageSource):
    """Images of one size that lie in memory, (N, H, W, 3) uint8."""

    def __init__(self, title: str, pixels: np.ndarray, labels: Sequence[int],
                 classes: Sequence[str]) -> None:
        self.title, self.pixels, self.classes = title, pixels, list(classes)
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.label(index)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def relabel(self, classes: Sequence[str]) -> None:
        places = np.array([classes.index(name) for name in self.classes])
        self.classes, self.labels = list(classes), places[self.labels]

    def name_of(self, index: int) -> str:
        return f"{self.title} image {index}"


def found_sets(name: str, part: str, data_path: str | None, **options: str) -> list[Any]:
    """Torchvision's sets of a part, fetched once into data_path where they are not there."""
    row = ROWS[name]
    if data_path is None:
        raise UserError(f"--data-set {name} needs --data-path, the folder to keep it in.")
    if part not in row.parts:
        raise UserError(f"--data-set {name} has the parts train and val, not {part}.")
    kind = getattr(datasets, row.kind)
    try:
        if is_main():
            for arguments in row.parts[part]:
                kind(data_path, **arguments, **options, download=True)
        barrier()
        return [kind(data_path, **arguments, **options) for arguments in row.parts[part]]
    except ImportError as error:
        raise UserError(f"{name} needs the package {error.name}: pip install {error.name}."
                        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} is not in {data_path} and could not be fetched "
                        f"({one_line(error)}). Put the unpacked folder {row.place} there."
                        ) from None


def create(name: str, part: str, data_path: str | None, **options: str) -> ImageSource:
    row, found = ROWS[name], found_sets(name, part, data_path, **options)
    contents = [row.content(one) for one in found]
    labels = np.concatenate([np.asarray(labels) for _, labels in contents])
    classes = list(row.classes(found[0]))
    if isinstance(contents[0][0], np.ndarray):
        pixels = np.concatenate([images for images, _ in contents])
        return Pixels(f"{name} {part}", pixels, labels, classes)
    paths = [str(path).encode(errors="surrogateescape") for images, _ in contents
             for path in images]
    return ListedImages(Names(paths), labels, classes)


def register(name: str) -> None:
    @register_dataset(name)
    def build(part: str, data_path: str | None) -> ImageSource:
        return create(name, part, data_path)


for name in ROWS:
    if name != "imagenette":
        register(name)


@register_dataset("imagenette")
def imagenette(part: str, data_path: str | None, size: str = "320px") -> ImageSource:
    """`size`: of the short side, 320px or 160px, or full."""
    if size not in ("320px", "160px", "full"):
        raise UserError(f"imagenette has the sizes 320px, 160px and full; got {size}.")
    return create("imagenette", part, data_path, size=size)
