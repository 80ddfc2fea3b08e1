"""Where images come from: the contract of a data set, and how one is made by its name."""
import mmap
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import to_rgb
from utils.classes import shortened
from utils.content import is_list_of_words
from utils.log import print_once
from utils.registry import Registry, UserError, parse_spec

DATASETS = Registry("data set", home="the files of data/")
register_dataset = DATASETS.register


class Metric:
    """What a data set measures beside the accuracy."""

    def count(self, indices: Tensor, top5: Tensor) -> Tensor:
        """Sums, in float64, over samples indices (n,) whose best classes are top5 (n, 5); those of
        all processes are added up."""
        raise NotImplementedError

    def rows(self, counts: Tensor) -> dict[str, str]:
        """Rows of eval.py's report, from the sum of the counts."""
        raise NotImplementedError


class ImageSource:
    """A data set."""

    classes: list[str]  # names by label
    crop_pct: float | None = None  # that suits its images, before the checkpoint's; None: any
    competing: list[int] | None = None  # once aligned, the classes whose logits count; None: all
    metric: Metric | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image of any mode, and its label. The image need not be decoded yet, so what is wrong
        with its file may show only in data.images.to_rgb. Raises OSError for a file that cannot be
        read."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """That of load(index), without the image."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """What to call a sample in a message."""
        raise NotImplementedError

    def present(self) -> list[str]:
        """The classes that it has images of."""
        return self.classes

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        """Make labels and `classes` those of a model, whose classes are called `classes` (None:
        not known, label k is class k), matched by name. Classes without images are said. Raises
        UserError where the model lacks one that has images."""
        if classes is None:
            if len(self.classes) != num_classes:
                raise UserError(f"the validation set has {len(self.classes)} classes, the model "
                                f"{num_classes}, and nothing says which. Evaluate on the data set "
                                "it was trained for (for --weights of another number of classes, "
                                "set --num-classes).")
            classes = self.classes
        present = self.present()
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise UserError(f"the validation set has {len(present)} classes, and the model, which "
                            f"has {len(classes)}, lacks {len(unknown)} of these: "
                            f"{shortened(unknown)}; its own are {shortened(classes)}. They are "
                            "matched by name; evaluate on the data set it was trained for.")
        absent = sorted(set(classes) - set(present))
        if absent:
            print_once(f"no images to evaluate on of {len(absent)} of the {len(classes)} classes: "
                       f"{shortened(absent)}")
        if classes != self.classes:
            self.relabel(classes)

    def relabel(self, classes: Sequence[str]) -> None:
        """Make labels those among `classes`, of which all that have images are some."""
        raise UserError(f"the model has the classes in another order than the data set: "
                        f"{shortened(classes)} instead of {shortened(self.classes)}. Evaluate on "
                        "the data set it was trained for.")


def create_dataset(name: str, part: str, data_path: str | None, /, *, cache: str = "none",
                   **options) -> ImageSource:
    """The `train` or `val` part of a registered data set. `cache`: ram keeps the decoded images."""
    if cache not in ("none", "ram"):
        raise UserError(f"cache={cache} of data set {name!r} is unknown. Known: none, ram.")
    if data_path is not None:
        data_path = os.path.expanduser(data_path)
    source = DATASETS.create(name, {"part": part, "data_path": data_path}, **options)
    return InMemory(source) if cache == "ram" else source


def list_datasets() -> list[str]:
    return DATASETS.names()


def create_splits(spec: list[str], data_path: str | None) -> tuple[ImageSource, ImageSource]:
    """The training and the validation part of `NAME key=value ...`, of the same classes."""
    name, options = parse_spec(spec, "--data-set")
    train, val = (create_dataset(name, part, data_path, **options) for part in ("train", "val"))
    strange = sorted(set(val.present()) - set(train.classes))
    if strange:
        others = sorted(set(train.classes) - set(val.present()))
        raise UserError(f"train has {len(train.classes)} classes and val has images of "
                        f"{len(strange)} that are not among them: only in val: "
                        f"{shortened(strange)}; only in train: {shortened(others) or 'none'}. Give "
                        "both the same names, or remove from val what train lacks.")
    val.align(train.classes, len(train.classes))
    return train, val


def keep_labels(saved: tuple[Path, dict[str, Any]] | None, *sources: ImageSource) -> None:
    """Give the data of a run that continues the labels which it had in the checkpoint, matched by
    name. Raises UserError where its classes are others."""
    path, content = saved or (None, {})
    classes = content.get("classes")
    if not is_list_of_words(classes):
        return  # a new run, or not known; that it is damaged will be seen
    for source in sources:
        if set(source.classes) != set(classes):
            raise UserError(f"{path} is from a run on other classes ({shortened(classes)}; here "
                            f"{shortened(source.classes)}). Continue it on its own data, or set "
                            "another --output-dir.")
        if source.classes != classes:
            print_once(f"labels are those of {path}: the data's classes in its order "
                       f"({shortened(classes)})")
            source.relabel(classes)


class InMemory(ImageSource):
    """A source whose images are decoded once and kept as bytes, shared by the loader's processes.

    An image is decoded when it is first asked for, by whichever process; its pixels are those that
    the source gives. One that cannot be read is tried again each time.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.crop_pct, self.metric = source.crop_pct, source.metric
        self._allocate()

    def _allocate(self) -> None:
        """Room for all images, by the sizes that their files say."""
        self.sizes = np.zeros((len(self.source), 2), np.int32)  # width, height
        for index in range(len(self.source)):
            try:
                self.sizes[index] = self.source.load(index)[0].size
            except OSError:  # not kept, and reported when it is loaded
                continue
        ends = np.cumsum(3 * self.sizes.prod(1, dtype=np.int64))
        self.starts = np.concatenate([[0], ends])[:-1]
        total = int(ends[-1]) + len(self.source)
        check_memory(total)
        memory = shared_bytes(total)
        self.is_kept, self.pixels = memory[:len(self.source)], memory[len(self.source):]

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def competing(self) -> list[int] | None:
        return self.source.competing

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        width, height = self.sizes[index].tolist()
        start = int(self.starts[index])
        kept = self.pixels[start:start + 3 * width * height]
        if self.is_kept[index]:
            pixels = kept.view(height, width, 3).numpy()
            return Image.fromarray(pixels), self.source.label(index)
        image, label = self.source.load(index)
        image = to_rgb(image)
        if image.size == (width, height):
            kept.copy_(torch.from_numpy(np.array(image)).flatten())
            self.is_kept[index] = 1
        return image, label

    def label(self, index: int) -> int:
        return self.source.label(index)

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)

    def present(self) -> list[str]:
        return self.source.present()

    def relabel(self, classes: Sequence[str]) -> None:
        self.source.relabel(classes)

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        number = len(self.source)
        self.source.align(classes, num_classes)
        if len(self.source) != number:  # images that the model does not know are left out
            self._allocate()


def shared_bytes(number: int) -> Tensor:
    """(number,) uint8 zeros that forked processes see as one memory, not as copies of it."""
    if multiprocessing.get_start_method() == "fork":
        return torch.frombuffer(mmap.mmap(-1, number), dtype=torch.uint8)
    return torch.zeros(number, dtype=torch.uint8).share_memory_()


def check_memory(needed: int, what: str = "cache=ram") -> None:
    """Raises UserError where the machine says that it has not as many bytes left as `what` asks
    for."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return
    free = next((1024 * int(line.split()[1]) for line in lines
                 if line.startswith("MemAvailable:")), needed)
    if needed > free:
        raise UserError(f"{what} needs {needed / 2 ** 30:.1f} GiB for the decoded images, and "
                        f"{free / 2 ** 30:.1f} GiB of memory are left. Leave it out.")
