"""From the loader's bytes to the network's floats: the batch, and what is done to it on the device,
in training and evaluation alike."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms as T

from utils.registry import UserError

# Of an erased rectangle: DeiT's, as in timm; the ratio is drawn uniformly in its logarithm.
SCALE = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014): the step
# of its counter and its two multipliers, as signed numbers.
GAMMA, FIRST, SECOND = (value - 2 ** 64 for value in (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Erasure(NamedTuple):
    top: int
    left: int
    height: int
    width: int
    key: int  # of the noise


class Sample(NamedTuple):
    pixels: Tensor  # (3, H, W) uint8
    erasure: Erasure | None
    label: int
    index: int  # in the data set
    readable: bool = True  # False: the next readable image stands in for this one


def draw_erasure(pixels: Tensor, prob: float) -> Erasure | None:
    """A rectangle of (C, H, W) with probability `prob`, as torchvision's RandomErasing draws it;
    from torch's global generator."""
    if torch.rand(1) >= prob:
        return None
    *rectangle, filling = T.RandomErasing.get_params(pixels, SCALE, RATIO, [0.0])
    if filling is pixels:  # ten rectangles were too large
        return None
    return Erasure(*rectangle, int(torch.empty((), dtype=torch.int64).random_()))


@dataclass
class ImageBatch:
    """A batch of images as bytes, and where they are to be erased."""

    pixels: Tensor  # (N, 3, H, W) uint8, channels-last in memory
    erased: Tensor  # (K, 6) int64: place in the batch, then Erasure's fields
    num_erased: int = 0  # pixels in all rectangles together

    @classmethod
    def blank(cls, number: int, input_size: int) -> "ImageBatch":
        """Black ones, nothing erased."""
        return cls(torch.zeros(number, 3, input_size, input_size, dtype=torch.uint8),
                   torch.zeros(0, 6, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device, *, non_blocking: bool = False,
           memory_format: torch.memory_format = torch.preserve_format) -> "ImageBatch":
        # Copied as they lie, so that pinned memory goes without waiting; reordered there.
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        if memory_format is not torch.preserve_format:
            pixels = pixels.contiguous(memory_format=memory_format)
        return replace(self, pixels=pixels,
                       erased=self.erased.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ImageBatch":  # torch's loader asks for it by this name
        return replace(self, pixels=self.pixels.pin_memory(), erased=self.erased.pin_memory())


class Batch(NamedTuple):
    """What a loader yields."""

    images: ImageBatch
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64, in the data set
    readable: Tensor  # (N,) bool; False: the next readable image stands in for this one


def collate(samples: Sequence[Sample]) -> Batch:
    all_pixels, erasures, labels, indices, readable = zip(*samples)
    # Stacked as they lie in memory, (H, W, 3): one copy, in a worker straight into shared memory.
    stacked = default_collate([pixels.permute(1, 2, 0) for pixels in all_pixels])
    rows, num_erased = [], 0
    for place, erasure in enumerate(erasures):
        if erasure is not None:
            rows.append((place, *erasure))
            num_erased += erasure.height * erasure.width
    erased = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
    return Batch(ImageBatch(stacked.permute(0, 3, 1, 2), erased, num_erased),
                 torch.tensor(labels), torch.tensor(indices), torch.tensor(readable))


class BatchTransform:
    """ImageBatch -> float32 (N, 3, H, W), normalised, then erased, all on their device.

    `mean` and `std` are of pixels in 0..1. Normalising is one multiplication and one addition:
    within 1e-6 of torchvision's ToTensor and Normalize.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float],
                 device: torch.device | str = "cpu") -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"mean is {tuple(mean)} and std is {tuple(std)}; both need three "
                            "numbers (red, green, blue), those of std above 0.")
        means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
                       for values in (mean, std))
        self.scale = (1 / (255 * stds)).float().to(device)
        self.shift = (-means / stds).float().to(device)

    def __call__(self, batch: ImageBatch) -> Tensor:
        images = batch.pixels.float()
        torch.addcmul(self.shift, images, self.scale, out=images)
        if len(batch.erased):
            # After normalisation, so that N(0, 1) noise has the statistics of what is around it.
            erase_(images, batch.erased, batch.num_erased)
        return images


def erase_(images: Tensor, erased: Tensor, num_pixels: int) -> None:
    """Fill rectangles of images (N, C, H, W) with N(0, 1) noise for every value.

    `erased` (K, 6), int64, on the images' device: place in the batch, then Erasure's fields.
    `num_pixels`: their areas' sum, handed in so that nobody waits for the device to tell.
    """
    place, top, left, height, width, key = erased.unbind(1)
    area = height * width
    owner = torch.repeat_interleave(
        torch.arange(len(erased), device=erased.device), area, output_size=num_pixels)  # (M,)
    at = torch.arange(num_pixels, device=erased.device) - (area.cumsum(0) - area)[owner]
    columns = width[owner]
    row = at.div(columns, rounding_mode="floor")
    num_channels = images.shape[1]
    channel = torch.arange(num_channels, device=erased.device)
    noise = normal_noise(key[owner, None], at[:, None] * num_channels + channel)  # (M, C)
    images[place[owner], :, top[owner] + row, left[owner] + at - row * columns] = noise


def normal_noise(key: Tensor, counter: Tensor) -> Tensor:
    """N(0, 1) in float32 for every key and counter (int64): the upper 23 of `random_bits` sent
    through the normal distribution's quantiles."""
    bits = random_bits(key, counter)
    uniform = (_shift_right(bits, 41).float() + 0.5) * 2.0 ** -22 - 1  # exact, within (-1, 1)
    return uniform.erfinv_().mul_(math.sqrt(2))


def random_bits(key: Tensor, counter: Tensor) -> Tensor:
    """64 bits for every key and counter (int64): SplitMix64's output number `counter` from the
    seed `key`. The same on every device."""
    bits = key + (counter + 1) * GAMMA  # integers wrap around
    for shift, factor in ((30, FIRST), (27, SECOND)):
        bits = (bits ^ _shift_right(bits, shift)) * factor
    return bits ^ _shift_right(bits, 31)


def uniform_share(bits: Tensor) -> Tensor:
    """float64 in [0, 1): the upper 53 of these bits."""
    return _shift_right(bits, 11).double() * 2.0 ** -53


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """As if the numbers were unsigned: zeros come in."""
    return (bits >> by) & (2 ** (64 - by) - 1)
