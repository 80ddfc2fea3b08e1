"""What --aa names: RandAugment with the 'increasing' operations, written as `rand-m9-mstd0.5-inc1`;
`ta`, TrivialAugment; `3a`, DeiT III's three augmentations.

Cubuk et al., RandAugment (arXiv 1909.13719), in the variant DeiT and ConvNeXt train with: a
larger magnitude always distorts more. Operations and ranges are those of timm 0.6. Images are RGB;
the loader converts everything else.
"""
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms as T

from utils.registry import UnknownName, UserError

MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)  # ImageNet mean (0.485, 0.456, 0.406) * 255, rounded
BICUBIC = Image.Resampling.BICUBIC


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    # PIL's matrix maps an output pixel to the input pixel it is read from
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    # Magnitude 10 asks for 0 bits, which Pillow refuses; no bits kept is black.
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


class Operation(NamedTuple):
    apply: Callable  # (image, argument) -> image
    argument: Callable  # magnitude in [-10, 10], never negative unless `signed` -> argument
    signed: bool  # whether half of the draws use the negative magnitude


def _factor(m: float) -> float:
    return 1 + 0.9 * m / 10  # 0.1..1.9; 1 leaves the image alone


# One line per operation: what it does and how the magnitude m becomes its argument.
OPERATIONS = {
    "AutoContrast": Operation(lambda im, _: ImageOps.autocontrast(im), lambda m: None, False),
    "Equalize": Operation(lambda im, _: ImageOps.equalize(im), lambda m: None, False),
    "Invert": Operation(lambda im, _: ImageOps.invert(im), lambda m: None, False),
    "Rotate": Operation(  # degrees
        lambda im, a: im.rotate(a, resample=BICUBIC, fillcolor=FILL), lambda m: 30 * m / 10, True),
    "PosterizeIncreasing": Operation(_posterize, lambda m: 4 - int(4 * m / 10), False),  # bits kept
    "SolarizeIncreasing": Operation(  # values from this threshold on are inverted
        ImageOps.solarize, lambda m: 256 - int(256 * m / 10), False),
    "SolarizeAdd": Operation(_solarize_add, lambda m: int(110 * m / 10), False),
    "ColorIncreasing": Operation(lambda im, a: ImageEnhance.Color(im).enhance(a), _factor, True),
    "ContrastIncreasing": Operation(
        lambda im, a: ImageEnhance.Contrast(im).enhance(a), _factor, True),
    "BrightnessIncreasing": Operation(
        lambda im, a: ImageEnhance.Brightness(im).enhance(a), _factor, True),
    "SharpnessIncreasing": Operation(
        lambda im, a: ImageEnhance.Sharpness(im).enhance(a), _factor, True),
    "ShearX": Operation(lambda im, a: _affine(im, 1, a, 0, 0, 1, 0), lambda m: 0.3 * m / 10, True),
    "ShearY": Operation(lambda im, a: _affine(im, 1, 0, 0, a, 1, 0), lambda m: 0.3 * m / 10, True),
    "TranslateXRel": Operation(  # fraction of the width
        lambda im, a: _affine(im, 1, 0, a * im.width, 0, 1, 0), lambda m: 0.45 * m / 10, True),
    "TranslateYRel": Operation(  # fraction of the height
        lambda im, a: _affine(im, 1, 0, 0, 0, 1, a * im.height), lambda m: 0.45 * m / 10, True),
}
OPERATION_NAMES = tuple(OPERATIONS)


def apply_operation(image: Image.Image, name: str, argument: float | None) -> Image.Image:
    """The RGB image after one operation; `argument` in the operation's own unit (see OPERATIONS).

    AutoContrast, Equalize and Invert take None. Raises UnknownName.
    """
    if name not in OPERATIONS:
        raise UnknownName(f"unknown RandAugment operation {name!r}. "
                          f"Known: {', '.join(OPERATION_NAMES)}.")
    return OPERATIONS[name].apply(image, argument)


class RandAugment:
    """Applies `num_ops` operations drawn with replacement, each with probability `op_prob`.

    Magnitudes are N(magnitude, magnitude_std) clipped to [0, 10]. Every draw comes from torch's
    global CPU generator, so seeding it decides the result; nothing else is read or kept.
    """

    def __init__(self, magnitude: float = 9, magnitude_std: float = 0.5, num_ops: int = 2,
                 op_prob: float = 0.5) -> None:
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise UserError(f"RandAugment magnitude (m) is {magnitude}; it must lie in 0..10.")
        if not (magnitude_std >= 0 and math.isfinite(magnitude_std)):
            raise UserError(f"RandAugment magnitude_std (mstd) is {magnitude_std}; it must be "
                            "finite, >= 0.")
        if num_ops < 1 or int(num_ops) != num_ops:
            raise UserError(f"RandAugment num_ops (n) is {num_ops}; it must be 1, 2, 3, ...")
        if not 0 <= op_prob <= 1:
            raise UserError(f"RandAugment op_prob (p) is {op_prob}; it must lie in 0..1.")
        self.magnitude, self.magnitude_std = magnitude, magnitude_std
        self.num_ops, self.op_prob = int(num_ops), op_prob

    def __call__(self, image: Image.Image) -> Image.Image:
        num = self.num_ops
        chosen = torch.randint(len(OPERATION_NAMES), (num,)).tolist()
        is_applied = (torch.rand(num) < self.op_prob).tolist()
        noise = torch.randn(num, dtype=torch.float64)
        magnitudes = (self.magnitude + self.magnitude_std * noise).clamp(0, MAX_MAGNITUDE).tolist()
        is_negative = (torch.rand(num) < 0.5).tolist()
        for k in range(num):
            if is_applied[k]:
                name = OPERATION_NAMES[chosen[k]]
                operation, magnitude = OPERATIONS[name], magnitudes[k]
                if operation.signed and is_negative[k]:
                    magnitude = -magnitude
                image = apply_operation(image, name, operation.argument(magnitude))
        return image


class ThreeAugment:
    """Grey, solarised (from 128 on) or blurred (Gaussian, radius 0.1 to 2 px), one of the three for
    every image; then brightness, contrast and saturation by up to 0.3 (DeiT III, Touvron et al.
    2022, arXiv 2204.07118, section 3.2, and --color-jitter 0.3 of its commands). Every draw comes
    from torch's global CPU generator."""

    def __init__(self) -> None:
        self.jitter = T.ColorJitter(0.3, 0.3, 0.3)

    def __call__(self, image: Image.Image) -> Image.Image:
        chosen, share = int(torch.randint(3, ())), float(torch.rand(()))
        if chosen == 0:
            image = ImageOps.grayscale(image).convert("RGB")
        elif chosen == 1:
            image = ImageOps.solarize(image)
        else:
            image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * share))
        return self.jitter(image)


def parse_policy(policy: str) -> Callable[[Image.Image], Image.Image]:
    """What a word of --aa names: `ta`, `3a`, or a RandAugment of timm's policy strings.

    `ta` is torchvision's TrivialAugmentWide (Mueller and Hutter 2021, arXiv 2103.10158) with
    bilinear interpolation, as in torchvision's recipes. Raises UserError for any other word.
    """
    if policy == "ta":
        return T.TrivialAugmentWide(interpolation=T.InterpolationMode.BILINEAR)
    return ThreeAugment() if policy == "3a" else parse_randaugment(policy)


def parse_randaugment(policy: str) -> RandAugment:
    """The RandAugment that a timm policy string such as "rand-m9-mstd0.5-inc1" describes.

    Parts left out mean what they mean in timm, not the defaults of the class: m10, mstd0, n2, p0.5.
    Raises UserError for unknown or repeated parts, and without inc1.
    """
    understood = ("Understood: rand, then -m (magnitude 0..10), -mstd (its standard deviation), -n "
                  "(operations per image), -p (probability of each) and -inc1 (increasing "
                  'operations, required); for example "rand-m9-mstd0.5-inc1".')
    head, *parts = policy.split("-")
    if head != "rand":
        raise UserError(f"augmentation policy {policy!r} is none of none, ta, 3a, and does not "
                        f"begin with 'rand'. {understood}")
    values, seen = {"m": 10.0, "mstd": 0.0, "n": 2.0, "p": 0.5}, set()
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?|\.\d+)", part)
        if match is None or (match[1] == "inc" and match[2] != "1"):
            raise UserError(f"augmentation policy {policy!r} has the part {part!r}. {understood}")
        if match[1] in seen:
            raise UserError(f"augmentation policy {policy!r} has {match[1]!r} twice. {understood}")
        seen.add(match[1])
        values[match[1]] = float(match[2])
    if "inc" not in seen:
        raise UserError(f"augmentation policy {policy!r} lacks 'inc1'; only increasing operations "
                        f"exist here. {understood}")
    return RandAugment(values["m"], values["mstd"], values["n"], values["p"])
