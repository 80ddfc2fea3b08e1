"""Where images come from: the contract of a data set, folders of images, and CIFAR-100."""
import io
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets import ImageFolder as TorchvisionFolder

from utils.distributed import barrier, is_main
from utils.registry import Registry, UserError, parse_spec

DATASETS = Registry("data set", home="data/datasets.py, outlines.py and robustness.py")
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
        with its file may show only in its own load()."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """What to call a sample in a message."""
        raise NotImplementedError

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        """Make labels and `classes` those of a model, whose classes are called `classes` (None:
        not known). Raises UserError where that cannot be; here, unless they are equal already."""
        if len(self.classes) != num_classes:
            raise UserError(f"the validation set has {len(self.classes)} classes, the model "
                            f"{num_classes}. Evaluate on the data set it was trained for (for "
                            "--weights of another number of classes, set --num-classes).")
        others = [(own, other) for own, other in zip(self.classes, classes or self.classes)
                  if own != other]
        if others:
            own, other = others[0]
            raise UserError(f"the validation set and the model have {num_classes} classes, but "
                            f"{len(others)} of other names: {own} in the set is {other} in the "
                            "model. Evaluate on the data set it was trained for.")


def create_dataset(name: str, split: str, data_path: str | None, /, **options) -> ImageSource:
    """The `train` or `val` split of a registered data set."""
    return DATASETS.create(name, {"split": split, "data_path": data_path}, **options)


def list_datasets() -> list[str]:
    return DATASETS.names()


def create_splits(spec: list[str], data_path: str | None) -> tuple[ImageSource, ImageSource]:
    """The training and the validation split of `NAME key=value ...`, of the same classes."""
    name, options = parse_spec(spec, "--data-set")
    train, val = (create_dataset(name, split, data_path, **options) for split in ("train", "val"))
    if train.classes != val.classes:
        only_train = ", ".join(sorted(set(train.classes) - set(val.classes))[:5])
        only_val = ", ".join(sorted(set(val.classes) - set(train.classes))[:5])
        raise UserError(f"train has {len(train.classes)} classes and val {len(val.classes)}, and "
                        f"they differ: only in train: {only_train or 'none'}; only in val: "
                        f"{only_val or 'none'}. Both need the same class folders.")
    return train, val


def read_image(path: str) -> Image.Image:
    with open(path, "rb") as file:  # read at once: no file stays open until it is decoded
        return Image.open(io.BytesIO(file.read()))


def refuse_empty(folders: list[str]) -> None:
    """Raises UserError when there are class folders without images."""
    if folders:
        raise UserError(f"{len(folders)} class folder(s) hold no images: "
                        f"{', '.join(folders[:5])}. Fill or remove them.")


@register_dataset("imagefolder")
class ImageFolder(ImageSource):
    """Images in data_path/{train,val}/<class>/ (ImageNet's layout); labels in order of name."""

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
        refuse_empty([str(root / name) for label, name in enumerate(self.classes)
                      if label not in filled])

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label

    def name_of(self, index: int) -> str:
        return self.samples[index][0]


@register_dataset("cifar100")
class Cifar100(ImageSource):
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
