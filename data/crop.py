"""The random crop of a picture that need not be decoded yet, exact or fast.

Exact: torchvision's RandomResizedCrop, bit for bit. Fast: the same rectangles, but the JPEG library
decodes at 1/2, 1/4 or 1/8 of the size where that leaves the crop no smaller than what it is resized
to, and a crop of a picture decoded whole is resized by PyTorch's integers of 16 bits instead of
Pillow's of 22. Measured at 224 px, mean absolute difference in grey levels: 0.03 on 255 crops of
ImageNet photographs decoded whole; 0.4 at 1/2 and 1.2 at 1/4, on the same photographs enlarged.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

BICUBIC = Image.Resampling.BICUBIC
FACTORS = (8, 4, 2)  # of the size, that Pillow asks the JPEG library for
Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture decoded. Raises what Pillow raises for a file that cannot be."""
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")


class RandomResizedCrop:
    """Picture -> RGB (size, size), drawn as torchvision draws, from torch's global generator."""

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float],
                 fast: bool = False) -> None:
        self.size, self.scale, self.ratio, self.fast = size, scale, ratio, fast

    def __call__(self, picture: Image.Image) -> Image.Image:
        return self.resize(*self.decode(picture))

    def decode(self, picture: Image.Image) -> tuple[Image.Image, Box, int]:
        """The picture in RGB at 1/factor of its size, the crop in pixels of its whole size, and
        factor."""
        if not self.fast or picture.format != "JPEG":  # some formats know their size only then
            picture = to_rgb(picture)
        top, left, height, width = T.RandomResizedCrop.get_params(picture, self.scale, self.ratio)
        factor, full_size = decoding_factor(width, height, self.size), picture.size
        if self.fast and factor > 1:
            picture.draft("RGB", (full_size[0] // factor, full_size[1] // factor))
        if picture.size == full_size:  # no JPEG, or decoded before
            factor = 1
        return to_rgb(picture), (left, top, left + width, top + height), factor

    def resize(self, image: Image.Image, box: Box, factor: int) -> Image.Image:
        size = (self.size, self.size)
        if factor > 1:  # the box ends between two pixels
            return image.resize(size, BICUBIC, box=tuple(edge / factor for edge in box))
        # Cut first: Image.resize(box=...) lets the filter see what is around the box.
        image = image.crop(box)
        return resize_by_integers(image, self.size) if self.fast else image.resize(size, BICUBIC)


def decoding_factor(width: int, height: int, size: int) -> int:
    """The largest of 8, 4, 2, 1 by which a crop of width x height can be divided and still not be
    smaller than size x size: nothing is ever enlarged that need not be."""
    return next((factor for factor in FACTORS if min(width, height) >= factor * size), 1)


def resize_by_integers(image: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, four times as fast as Pillow's. Its weights have 16 bits: one
    value in 30 of a photograph is a grey level off, one in 10,000 more than that."""
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)  # still channels-last
    resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
