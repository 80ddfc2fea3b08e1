"""What happens to one PIL image on its way to the batch, for training and for evaluation.

The order and numbers are DeiT's and ConvNeXt's (timm's create_transform with their flags). Built on
torchvision's v1 transforms: measured on PIL images they are as fast as v2 at 224 px and 20% faster
at 32 px. All randomness comes from torch's global generator, which the loader seeds per sample.
Bytes are handed over; data/batch.py normalises and erases them on the device.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from data.batch import Erasure, draw_erasure
from data.images import decoding, to_rgb
from data.randaugment import BICUBIC, parse_policy
from utils.registry import UserError

SMALL_IMAGE = 32  # up to this input size images are cropped with padding and never resized
WARP_FROM = 384  # from this input size evaluation sees the whole image, ConvNeXt's rule
DEFAULT_CROP_PCT = 224 / 256
FILTERS = ("bicubic", "bilinear")  # of evaluation's resizing
LARGEST_SIDE = 16384  # pixels: no network of the zoo runs there within the memory of a machine
MOST_ENLARGED = 16  # times the input size; what a memory holds of an image, too
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels


class Transform(NamedTuple):
    """An image's way, in two parts: whatever is wrong with its file shows in the first."""

    read: Callable[[Image.Image], Image.Image]  # image, decoded or not -> RGB; raises OSError
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

    def __call__(self, image: Image.Image) -> Tensor:
        return self.finish(self.read(image))[0]


def train_transform(input_size: int, *, auto_augment: str = "rand-m9-mstd0.5-inc1",
                    random_erasing_prob: float = 0.25, scale: tuple[float, float] = CROP_SCALE,
                    ratio: tuple[float, float] = CROP_RATIO, hflip_prob: float = 0.5,
                    fast_decode: bool = False) -> Transform:
    """Image -> uint8 (3, input_size, input_size), augmented.

    `auto_augment` is a policy of data/randaugment.py or "none". `scale` (area), `ratio` and
    `fast_decode` belong to RandomResizedCrop, so inputs of 32 px or less refuse values other than
    the defaults.
    """
    _check_input_size(input_size)
    for name, prob in (("random_erasing_prob", random_erasing_prob), ("hflip_prob", hflip_prob)):
        if not 0 <= prob <= 1:
            raise UserError(f"{name} is {prob}; a probability must lie in 0..1.")
    _check_crop(input_size, scale, ratio, fast_decode)
    steps = [T.RandomHorizontalFlip(hflip_prob)]
    if auto_augment != "none":
        steps.append(parse_policy(auto_augment))
    if input_size <= SMALL_IMAGE:
        read = to_rgb
        steps.insert(0, T.RandomCrop(input_size, padding=4, pad_if_needed=True))
    else:
        read = RandomResizedCrop(input_size, scale, ratio, fast_decode)
    return Transform(read, tuple(steps), random_erasing_prob)


def eval_transform(input_size: int, *, crop_pct: float | None = None, resize: int | None = None,
                   interpolation: str = "bicubic") -> Transform:
    """Image -> uint8 (3, input_size, input_size), nothing random, always decoded whole.

    Short side to `resize` px, or int(input_size / crop_pct), then the centre. With neither:
    224/256, but 384 px and more are warped to the square, and 32 px and less are cropped without
    resizing. `interpolation`: the filter, one of FILTERS.
    """
    _check_input_size(input_size)
    if crop_pct is not None and resize is not None:
        raise UserError(f"the crop {crop_pct} and the short side {resize} px are two ways to say "
                        "the same; give one.")
    if interpolation not in FILTERS:
        raise UserError(f"the filter is {interpolation!r}; it must be {' or '.join(FILTERS)}.")
    centre = T.CenterCrop(input_size)
    if crop_pct is None and resize is None:
        if input_size >= WARP_FROM:
            return warp_transform(input_size, interpolation)
        if input_size <= SMALL_IMAGE:
            return Transform(to_rgb, (centre,))  # does nothing to an image of the right size
        crop_pct = DEFAULT_CROP_PCT
    if resize is None:
        if not 1 / MOST_ENLARGED <= crop_pct <= 1:
            raise UserError(f"crop_pct is {crop_pct}; it must lie in [{1 / MOST_ENLARGED}, 1], for "
                            "example 0.875.")
        resize = int(input_size / crop_pct)
    if not input_size <= resize <= MOST_ENLARGED * input_size:
        raise UserError(f"the short side is resized to {resize} px; for a centre of {input_size} "
                        f"px it must be {input_size} to {MOST_ENLARGED * input_size}.")
    return Transform(to_rgb, (_resize(resize, interpolation), centre))


def describe_eval(transform: Transform) -> str:
    """What a transform of eval_transform does with an image, in words."""
    (first, *rest) = transform.steps
    if isinstance(first, T.CenterCrop):
        return "their centre"
    if not rest:
        return f"warped to the square ({first.interpolation.value})"
    return f"short side to {first.size} px ({first.interpolation.value}), then the centre"


def warp_transform(input_size: int, interpolation: str = "bicubic") -> Transform:
    """Image -> uint8 (3, input_size, input_size): the whole image, whatever its shape, resized to
    the square."""
    _check_input_size(input_size)
    return Transform(to_rgb, (_resize((input_size, input_size), interpolation),))


def _resize(size: int | tuple[int, int], interpolation: str) -> T.Resize:
    """An int is for the short side."""
    return T.Resize(size, interpolation=T.InterpolationMode(interpolation))


class RandomResizedCrop:
    """Image -> RGB (size, size), drawn as torchvision draws, from torch's global generator.

    `fast`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop stays large enough.
    """

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float],
                 fast: bool = False) -> None:
        self.size, self.scale, self.ratio, self.fast = size, scale, ratio, fast

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.resize(*self.decode(image))

    def decode(self, image: Image.Image) -> tuple[Image.Image, Box, int]:
        """The image in RGB at 1/factor of its size, the crop in pixels of its whole size, and
        factor."""
        if not self.fast or image.format != "JPEG":  # some formats know their size only then
            image = to_rgb(image)
        top, left, height, width = T.RandomResizedCrop.get_params(image, self.scale, self.ratio)
        factor, full_size = decoding_factor(width, height, self.size), image.size
        if self.fast and factor > 1:
            with decoding():
                image.draft("RGB", (full_size[0] // factor, full_size[1] // factor))
        if image.size == full_size:  # no JPEG, or decoded before
            factor = 1
        return to_rgb(image), (left, top, left + width, top + height), factor

    def resize(self, image: Image.Image, box: Box, factor: int) -> Image.Image:
        size = (self.size, self.size)
        if factor > 1:  # the box ends between two pixels
            return image.resize(size, BICUBIC, box=tuple(edge / factor for edge in box))
        # Cut first: Image.resize(box=...) lets the filter see what is around the box.
        image = image.crop(box)
        return resize_by_integers(image, self.size) if self.fast else image.resize(size, BICUBIC)


def decoding_factor(width: int, height: int, size: int) -> int:
    """The largest of 8, 4, 2, 1 (what the JPEG library can divide by) by which a crop of width x
    height can be divided and still not be smaller than size x size: nothing is ever enlarged that
    need not be."""
    return next((factor for factor in (8, 4, 2) if min(width, height) >= factor * size), 1)


def resize_by_integers(image: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, four times as fast as Pillow's. Its weights have 16 bits: one
    value in 30 of a photograph is a grey level off, one in 10,000 more than that."""
    return Image.fromarray(resize_bytes(torch.from_numpy(np.array(image)), size).numpy())


def resize_bytes(pixels: Tensor, size: int) -> Tensor:
    """(H, W, 3) uint8 -> (size, size, 3)."""
    pixels = pixels[None].permute(0, 3, 1, 2)  # still channels-last
    resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0)


def _check_input_size(input_size: int) -> None:
    if not 1 <= input_size <= LARGEST_SIDE or int(input_size) != input_size:
        raise UserError(f"input size is {input_size}; it must be a whole number of pixels, 1 to "
                        f"{LARGEST_SIDE}.")


def _check_crop(input_size: int, scale: tuple[float, float], ratio: tuple[float, float],
                fast_decode: bool) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"crop scale is {tuple(scale)}; it must be 0 < smallest <= largest <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop ratio is {tuple(ratio)}; it must be 0 < smallest <= largest.")
    if input_size > SMALL_IMAGE:
        return
    if tuple(scale) != CROP_SCALE or tuple(ratio) != CROP_RATIO:
        raise UserError(f"crop scale {tuple(scale)} and ratio {tuple(ratio)} have no effect at "
                        f"input size {input_size}: inputs up to {SMALL_IMAGE} px are padded by 4 "
                        "and cropped, never resized. Leave both at their defaults or use a larger "
                        "input size.")
    if fast_decode:
        raise UserError(f"--fast-decode has no effect at input size {input_size}: inputs up to "
                        f"{SMALL_IMAGE} px are never resized. Leave it out.")
