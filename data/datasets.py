"""Where pictures come from. A data set has `classes`, `len()`, `load(index)` -> (picture, label)
and `name_of(index)`, what to call a sample in a message. A picture is of any mode and need not be
decoded yet, so what is wrong with its file may show only in its own load()."""
import io
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets import ImageFolder as TorchvisionFolder

from data.outlines import Outlines
from utils.distributed import barrier, is_main
from utils.registry import Registry, UserError

DATASETS = Registry("data set", home="data/datasets.py and data/imagenet_*.py")
register_dataset = DATASETS.register


class ImageSource(Protocol):
    classes: list[str]

    def __len__(self) -> int: ...
    def load(self, index: int) -> tuple[Image.Image, int]: ...
    def name_of(self, index: int) -> str: ...


class EvalSource(ImageSource, Protocol):
    """What a set that is only evaluated on may have besides; eval.py does without any of it, but
    `count` and `figures` go together."""

    crop_pct: float | None  # that suits its pictures, before the checkpoint's; None: any
    competing: list[int] | None  # once aligned, the classes whose logits count; None: all

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        """Make labels and `classes` those of a model, whose classes are called `classes` (None:
        not known), and leave out the pictures of others. Raises UserError where none is left."""

    def count(self, index: Tensor, top5: Tensor) -> Tensor:
        """Sums, in float64, over samples index (n,) whose best classes are top5 (n, 5); those of
        all processes are added up."""

    def figures(self, counts: Tensor) -> dict[str, str]:
        """Rows of eval.py's report, from the sum of the counts."""


def create_dataset(name: str, split: str, data_path: str | None, **options) -> ImageSource:
    """The `train` or `val` split of a registered data set."""
    return DATASETS.create(name, split, data_path, **options)


def list_datasets() -> list[str]:
    return DATASETS.names()


def read_image(path: str) -> Image.Image:
    with open(path, "rb") as file:  # read at once: no file stays open until it is decoded
        return Image.open(io.BytesIO(file.read()))


@register_dataset("imagefolder")
class ImageFolder:
    """ImageBatch in data_path/{train,val}/<class>/ (ImageNet's layout); labels in order of name."""

    def __init__(self, split: str, data_path: str | None) -> None:
        if data_path is None:
            raise UserError("--data-set imagefolder needs --data-path, a folder that holds "
                            "train/<class>/*.jpg and val/<class>/*.jpg.")
        root = Path(data_path) / split
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; --data-path must hold train/ and val/, each "
                            "with one folder per class.")
        try:
            folder = TorchvisionFolder(str(root), allow_empty=True)
        except FileNotFoundError:
            raise UserError(f"{root} has no class folders; expected {root}/<class>/*.jpg."
                            ) from None
        self.classes, self.samples = folder.classes, folder.samples
        filled = {label for _, label in self.samples}
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            raise UserError(f"{len(empty)} class folder(s) of {root} hold no pictures: "
                            f"{', '.join(empty[:5])}. Fill or remove them.")

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label

    def name_of(self, index: int) -> str:
        return self.samples[index][0]


@register_dataset("cifar100")
class Cifar100:
    """CIFAR-100 through torchvision, downloaded once into data_path if it is not there."""

    def __init__(self, split: str, data_path: str | None) -> None:
        if data_path is None:
            raise UserError("--data-set cifar100 needs --data-path, the folder to keep it in.")
        is_train = split == "train"
        try:
            if is_main():
                CIFAR100(data_path, train=is_train, download=True)
            barrier()
            self.dataset = CIFAR100(data_path, train=is_train)
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-100 is not in {data_path} and could not be fetched ({error}). "
                            "Put the unpacked folder cifar-100-python there.") from None
        self.split = split
        self.classes = self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    def name_of(self, index: int) -> str:
        return f"CIFAR-100 {self.split} image {index}"


@register_dataset("outlines")
def outlines(split: str, data_path: str | None, train_size: int = 10_000, val_size: int = 2_000,
             seed: int = 0, image_size: int = 64) -> Outlines:
    """The embedded procedural data set; needs no path."""
    if data_path is not None:
        raise UserError(f"--data-set outlines draws its pictures itself; leave out --data-path "
                        f"{data_path}.")
    return Outlines(split, train_size if split == "train" else val_size, seed, image_size)


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    if train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))[:5]
    only_val = sorted(set(val.classes) - set(train.classes))[:5]
    raise UserError(f"train has {len(train.classes)} classes and val {len(val.classes)}, and they "
                    f"differ: only in train: {', '.join(only_train) or 'none'}; only in val: "
                    f"{', '.join(only_val) or 'none'}. Both need the same class folders.")


def align(source: ImageSource, classes: list[str] | None, num_classes: int) -> None:
    """Make the labels of `source` those of a model: by name where it can, else they are its own
    when there are as many. `classes`: as EvalSource has it."""
    if hasattr(source, "align"):
        return source.align(classes, num_classes)
    if len(source.classes) != num_classes:
        raise UserError(f"the validation set has {len(source.classes)} classes, the model "
                        f"{num_classes}. Evaluate on the data set it was trained for (for "
                        "--weights of another number of classes, set --num-classes).")
    others = [pair for pair in zip(source.classes, classes or source.classes) if pair[0] != pair[1]]
    if others:
        raise UserError(f"the validation set and the model have {num_classes} classes, but "
                        f"{len(others)} of other names: {others[0][0]} in the set is {others[0][1]}"
                        " in the model. Evaluate on the data set it was trained for.")
