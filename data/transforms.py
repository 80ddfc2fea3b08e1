"""What happens to one PIL image on its way to the batch, for training and for evaluation.

The order and numbers are DeiT's and ConvNeXt's (timm's create_transform with their flags). Built on
torchvision's v1 transforms: measured on PIL images they are as fast as v2 at 224 px and 20% faster
at 32 px. All randomness comes from torch's global generator, which the dataset seeds per sample.
Bytes are handed over; data/preparation.py normalises and erases them on the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from data.crop import RandomResizedCrop, to_rgb
from data.erasing import Erasure, draw_erasure
from data.randaugment import parse_policy
from utils.errors import UserError

SMALL_IMAGE = 32  # up to this input size images are cropped with padding and never resized
WARP_FROM = 384  # from this input size evaluation sees the whole image, ConvNeXt's rule
DEFAULT_CROP_PCT = 224 / 256
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
BICUBIC = InterpolationMode.BICUBIC


class Transform(NamedTuple):
    """A picture's way, in two parts: whatever is wrong with its file shows in the first."""

    read: Callable[[Image.Image], Image.Image]  # picture, decoded or not -> RGB
    steps: tuple[Callable[[Image.Image], Image.Image], ...]
    random_erasing_prob: float = 0.0

    def finish(self, image: Image.Image) -> tuple[Tensor, Erasure | None]:
        """(3, H, W) uint8, and what is to be erased of it."""
        for step in self.steps:
            image = step(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a view: (H, W, 3) in memory
        if self.random_erasing_prob == 0:
            return pixels, None
        return pixels, draw_erasure(pixels, self.random_erasing_prob)

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.finish(self.read(picture))[0]


def train_transform(
    input_size: int,
    *,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    random_erasing_prob: float = 0.25,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    hflip_prob: float = 0.5,
    fast_decode: bool = False,
) -> Transform:
    """Picture -> uint8 (3, input_size, input_size), augmented.

    `auto_augment` is a policy of data/randaugment.py or "none". `scale` (area), `ratio` and
    `fast_decode` belong to RandomResizedCrop, so inputs of 32 px or less refuse values other than
    the defaults.
    """
    _check_input_size(input_size)
    _check_prob("random_erasing_prob", random_erasing_prob)
    _check_prob("hflip_prob", hflip_prob)
    steps = [T.RandomHorizontalFlip(hflip_prob)]
    if auto_augment != "none":
        steps.append(parse_policy(auto_augment))
    _check_crop(input_size, scale, ratio, fast_decode)
    if input_size <= SMALL_IMAGE:
        return Transform(to_rgb, (T.RandomCrop(input_size, padding=4), *steps), random_erasing_prob)
    return Transform(RandomResizedCrop(input_size, scale, ratio, fast_decode), tuple(steps),
                     random_erasing_prob)


def eval_transform(input_size: int, *, crop_pct: float | None = None) -> Transform:
    """Picture -> uint8 (3, input_size, input_size), nothing random, always decoded whole.

    Short side to int(input_size / crop_pct), then the centre. Without `crop_pct`: 224/256, but
    384 px and more are warped to the square, and 32 px and less are cropped without resizing.
    """
    _check_input_size(input_size)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct is {crop_pct}; it must lie in (0, 1], for example 0.875.")
    if crop_pct is None and input_size >= WARP_FROM:
        return warp_transform(input_size)
    if crop_pct is None and input_size <= SMALL_IMAGE:
        steps = [T.CenterCrop(input_size)]  # does nothing to an image of the right size
    else:
        short_side = int(input_size / (crop_pct or DEFAULT_CROP_PCT))
        steps = [T.Resize(short_side, interpolation=BICUBIC), T.CenterCrop(input_size)]
    return Transform(to_rgb, tuple(steps))


def warp_transform(input_size: int) -> Transform:
    """Picture -> uint8 (3, input_size, input_size): the whole picture, whatever its shape, resized
    to the square."""
    _check_input_size(input_size)
    return Transform(to_rgb, (T.Resize((input_size, input_size), interpolation=BICUBIC),))


def _check_crop(input_size: int, scale: tuple[float, float], ratio: tuple[float, float],
                fast_decode: bool) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"crop scale is {tuple(scale)}; it must be 0 < smallest <= largest <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop ratio is {tuple(ratio)}; it must be 0 < smallest <= largest.")
    if input_size > SMALL_IMAGE:
        return
    if tuple(scale) != CROP_SCALE or tuple(ratio) != CROP_RATIO:
        raise UserError(
            f"crop scale {tuple(scale)} and ratio {tuple(ratio)} have no effect at input size "
            f"{input_size}: inputs up to {SMALL_IMAGE} px are padded by 4 and cropped, never "
            "resized. Leave both at their defaults or use a larger input size."
        )
    if fast_decode:
        raise UserError(f"--fast-decode has no effect at input size {input_size}: inputs up to "
                        f"{SMALL_IMAGE} px are never resized. Leave it out.")


def _check_input_size(input_size: int) -> None:
    if int(input_size) != input_size or input_size < 1:
        raise UserError(f"input size is {input_size}; it must be a whole number of pixels, >= 1.")


def _check_prob(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; a probability must lie in 0..1.")
