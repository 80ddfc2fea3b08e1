"""ImageNet-C: the validation set under 15 corruptions at five severities (Hendrycks and Dietterich,
arXiv 1903.12261), and its mean corruption error, mCE."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.datasets import register_dataset
from data.imagenet_sets import ClassFolder, ClassFolders, checked_root, class_folders
from utils.errors import UserError
from utils.registry import did_you_mean

# AlexNet's top-1 error, mean over the severities, as the authors publish it: what mCE divides by.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published, no part of mCE
SEVERITIES = (1, 2, 3, 4, 5)


class Severity(NamedTuple):
    """One severity of one corruption."""

    corruption: str
    number: int
    folders: list[ClassFolder]


class Corrupted(ClassFolders):
    """The pictures of `severities`, all five of each corruption."""

    crop_pct = 1.0  # 224 px as they are: the authors resized before they corrupted

    def __init__(self, title: str, severities: Sequence[Severity]) -> None:
        super().__init__(title, [folder for severity in severities for folder in severity.folders])
        self.corruptions = list(dict.fromkeys(severity.corruption for severity in severities))
        self.severity_of = np.repeat(np.arange(len(severities)),  # of every folder
                                     [len(severity.folders) for severity in severities])
        self.is_whole = True

    def align(self, classes: list[str] | None, num_classes: int) -> None:
        num_before = len(self)
        super().align(classes, num_classes)
        self.is_whole = len(self) == num_before

    def count(self, index: Tensor, top5: Tensor) -> Tensor:
        """(2, severities): hits and images."""
        folder = self.folder_of[index.numpy()]
        hits = top5[:, 0] == torch.from_numpy(self.labels[folder])
        counts = torch.zeros(2, len(self.corruptions) * len(SEVERITIES), dtype=torch.float64)
        return counts.index_add_(1, torch.from_numpy(self.severity_of[folder]),
                                 torch.stack([hits, torch.ones_like(hits)]).double())

    def figures(self, counts: Tensor) -> dict[str, str]:
        """The error of a corruption is the mean of its five severities'; CE: over AlexNet's."""
        hits, number = counts.view(2, -1, len(SEVERITIES))
        errors = dict(zip(self.corruptions, (1 - hits / number).mean(1).tolist()))
        ratios = {name: errors[name] / ALEXNET_ERRORS[name] for name in errors
                  if name in ALEXNET_ERRORS and self.is_whole}
        rows = {name: f"error {100 * error:.2f} %" + (
            f", CE {100 * ratios[name]:.2f} %" if name in ratios else "")
            for name, error in errors.items()}
        rows["mean error"] = f"{100 * np.mean(list(errors.values())):.2f} %"
        if not self.is_whole:
            rows["mCE"] = "none: AlexNet's errors, which it divides by, are of all classes"
        elif len(ratios) < len(ALEXNET_ERRORS):
            rows["mCE"] = f"none: it takes all {len(ALEXNET_ERRORS)} corruptions"
        else:
            rows["mCE"] = f"{100 * np.mean(list(ratios.values())):.2f} %"
            if self.num_present < self.num_published:
                rows["mCE"] += (f" over {self.num_present} of the {self.num_published} classes, "
                                "AlexNet's errors over all")
        return rows


@register_dataset("imagenet_c")
def imagenet_c(split: str, data_path: str | None,
               corruptions: str | tuple[str, ...] | None = None) -> Corrupted:
    """`corruptions`: these instead of the 15; those beyond the 15 do not count in mCE."""
    root = checked_root("imagenet_c", split, data_path, "<corruption>/<1 ... 5>/<wnid>/*.JPEG")
    if corruptions is None:
        corruptions = tuple(ALEXNET_ERRORS)
    elif not isinstance(corruptions, tuple):
        corruptions = (corruptions,)
    known = [*ALEXNET_ERRORS, *EXTRA]
    for name in corruptions:
        if name not in known:
            raise UserError(f"imagenet_c has no corruption {name!r}. Known: {', '.join(known)}."
                            f"{did_you_mean(str(name), known)}")
    return Corrupted("imagenet_c", find_severities(root, list(dict.fromkeys(corruptions))))


def find_severities(root: Path, corruptions: Sequence[str]) -> list[Severity]:
    """Of all of them, from folders right in `root` or in those that the authors' archives unpack to
    (blur/, noise/, ...). Raises UserError where one is missing or has other classes."""
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    homes = {name: next((place / name for place in places if (place / name).is_dir()), root / name)
             for name in corruptions}
    missing = [name if not home.is_dir() else f"{name}/{number}" for name, home in homes.items()
               for number in SEVERITIES if not (home / str(number)).is_dir()]
    if missing:
        raise UserError(f"{root} lacks {', '.join(dict.fromkeys(missing))}; looked for "
                        f"{root}/<corruption>/<1 ... 5> and {root}/*/<corruption>/<1 ... 5>. "
                        "Unpack the archives of the authors there, or name with "
                        "corruptions=NAME,NAME those to evaluate on.")
    severities = [Severity(name, number, class_folders(home / str(number)))
                  for name, home in homes.items() for number in SEVERITIES]
    first, *others = severities
    wnids = [folder.wnid for folder in first.folders]
    for other in others:
        if [folder.wnid for folder in other.folders] != wnids:
            raise UserError(f"{root}: {other.corruption}/{other.number} has {len(other.folders)} "
                            f"class folders that are not the {len(wnids)} of {first.corruption}/"
                            f"{first.number}. Unpack its archive again, to the end.")
    return severities
