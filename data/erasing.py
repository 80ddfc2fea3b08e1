"""Random erasing (Zhong et al., arXiv 1708.04896) in two halves: the loader draws one rectangle per
picture, the device fills those of a whole batch at once.

The noise in a rectangle is a function of its key alone, so it depends neither on the other pictures
of the batch nor on how many processes share it.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import transforms as T

# DeiT's, as in timm; the ratio is drawn uniformly in its logarithm.
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


def draw_erasure(image: Tensor, prob: float) -> Erasure | None:
    """A rectangle of (C, H, W) with probability `prob`, as torchvision's RandomErasing draws it;
    from torch's global generator."""
    if torch.rand(1) >= prob:
        return None
    *rectangle, filling = T.RandomErasing.get_params(image, SCALE, RATIO, [0.0])
    if filling is image:  # ten rectangles were too large
        return None
    return Erasure(*rectangle, int(torch.empty((), dtype=torch.int64).random_()))


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
    """N(0, 1) in float32 for every key and counter (int64): SplitMix64's output number `counter`
    from the seed `key`, its upper 23 bits sent through the normal distribution's quantiles."""
    bits = key + (counter + 1) * GAMMA  # integers wrap around
    for shift, factor in ((30, FIRST), (27, SECOND)):
        bits = (bits ^ _shift_right(bits, shift)) * factor
    bits ^= _shift_right(bits, 31)
    uniform = (_shift_right(bits, 41).float() + 0.5) * 2.0 ** -22 - 1  # exact, within (-1, 1)
    return uniform.erfinv_().mul_(math.sqrt(2))


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """As if the numbers were unsigned: zeros come in."""
    return (bits >> by) & (2 ** (64 - by) - 1)
