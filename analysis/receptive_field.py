"""The effective receptive field of a network (Luo et al. 2016, arXiv 1701.04128), measured as
RepLKNet (Ding et al. 2022, arXiv 2203.06717) and SLaK do.

A contribution map says how much each input pixel moves the central cell of the last feature map.
Its extent is the side of the smallest centred square that holds a share t of it. Published extents
are those of log10(1 + map), which depend on how large the gradients of a network happen to be:
where they are far above 1 the logarithm flattens the map and the square grows. The extents of the
map itself do not change when it is multiplied by a number. Both are given.
"""
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.base import VisionModel
from utils.errors import UserError

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
SCALES = {"log": lambda contribution: np.log10(contribution + 1), "linear": lambda map_: map_}


class Extent(NamedTuple):
    """The smallest centred square that holds more than a share of a map."""

    side: int  # input pixels: 1, 3, 5, ...; the whole map's longer edge where no such square does
    area: float  # share of the map's


class Field(NamedTuple):
    """What was measured of one network."""

    contribution: np.ndarray  # (H, W) float64, mean over the images
    num_images: int | None  # None: not known, of a map from a file
    num_skipped: int  # images whose gradient was not finite
    per_image: dict[str, list[list[Extent]]]  # scale -> an image each -> a threshold each

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> "Field":
        """A mean map of which nothing else is known."""
        return cls(matrix, None, 0, {scale: [] for scale in SCALES})


def contributions(model: VisionModel, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, H, W), at least 0: per image the gradient of the summed positive channels
    in the cell (h // 2, w // 2) of the last map (N, C, h, w), its positive part summed over the
    colours.

    The network must be in evaluation mode, so that no image depends on the others.
    """
    images = images.detach().requires_grad_()
    feature = model.forward_with_features(images).features[-1]
    height, width = feature.shape[2:]
    centre = feature[:, :, height // 2, width // 2].float().relu().sum()
    (gradient,) = torch.autograd.grad(centre, images)
    return gradient.relu().sum(1)


def extents(contribution: np.ndarray, scale: str = "log",
            thresholds: Iterable[float] = THRESHOLDS) -> list[Extent]:
    """Of a map (H, W) without negative values, for each threshold t in (0, 1): squares are centred
    at (H // 2, W // 2), as published, and end where the map ends.

    The published code begins with a side of 3, divides areas by 1024^2 whatever the map, and fails
    where no square reaches t; here the whole map does then.
    """
    values = SCALES[scale](contribution.astype(np.float64))
    height, width = values.shape
    rows = np.abs(np.arange(height) - height // 2)
    columns = np.abs(np.arange(width) - width // 2)
    rings = np.maximum.outer(rows, columns)  # the half side of the square that first holds a pixel
    inside = np.bincount(rings.ravel(), weights=values.ravel()).cumsum()
    found = []
    for threshold in thresholds:
        half = int(np.searchsorted(inside, threshold * inside[-1], side="right"))
        side = 2 * min(half, len(inside) - 1) + 1
        area = min(side, height) * min(side, width) / (height * width)
        found.append(Extent(min(side, max(height, width)), area))
    return found


def measure(model: VisionModel, batches: Iterable[Tensor]) -> Field:
    """The field of `model`, already in evaluation mode, over batches of images (N, 3, H, W).
    Raises UserError when there is none."""
    total: Tensor | float = 0.0
    per_image: dict[str, list[list[Extent]]] = {scale: [] for scale in SCALES}
    num_images = num_skipped = 0
    for images in batches:
        maps = contributions(model, images).double()
        maps = maps[maps.flatten(1).isfinite().all(1)]
        num_skipped += len(images) - len(maps)
        num_images += len(maps)
        total = total + maps.sum(0)
        for single in maps[maps.flatten(1).any(1)].cpu().numpy():  # an empty map has no extent
            for scale, found in per_image.items():
                found.append(extents(single, scale))
    if not num_images or not total.any():
        raise UserError(f"no image gave a finite gradient that is not zero ({num_skipped} were not "
                        "finite).")
    return Field((total / num_images).cpu().numpy(), num_images, num_skipped, per_image)
