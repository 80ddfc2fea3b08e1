"""What happens to one PIL image on its way to the network, for training and for evaluation.

The order and numbers are DeiT's and ConvNeXt's (timm's create_transform with their flags). Built on
torchvision's v1 transforms: measured on PIL images they are as fast as v2 at 224 px and 20% faster
at 32 px. All randomness comes from torch's global generator, which the dataset seeds per sample.
"""

from collections.abc import Sequence

from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from data.randaugment import parse_policy
from utils.errors import UserError

SMALL_IMAGE = 32  # up to this input size images are cropped with padding and never resized
WARP_FROM = 384  # from this input size evaluation sees the whole image, ConvNeXt's rule
DEFAULT_CROP_PCT = 224 / 256
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
BICUBIC = InterpolationMode.BICUBIC


def train_transform(
    input_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    random_erasing_prob: float = 0.25,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    hflip_prob: float = 0.5,
) -> T.Compose:
    """RGB PIL image -> float32 (3, input_size, input_size), augmented and normalised.

    `auto_augment` is a policy of data/randaugment.py or "none". `scale` (area) and `ratio` belong
    to RandomResizedCrop, so inputs of 32 px or less refuse values other than the defaults.
    """
    _check_common(input_size, mean, std)
    _check_prob("random_erasing_prob", random_erasing_prob)
    _check_prob("hflip_prob", hflip_prob)
    steps = [_train_crop(input_size, scale, ratio), T.RandomHorizontalFlip(hflip_prob)]
    if auto_augment != "none":
        steps.append(parse_policy(auto_augment))
    steps += _to_normalised_tensor(mean, std)
    if random_erasing_prob > 0:
        # After normalisation, so that N(0, 1) noise has the statistics of the image around it.
        steps.append(T.RandomErasing(
            random_erasing_prob, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random",
            inplace=True))
    return T.Compose(steps)


def eval_transform(
    input_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float | None = None,
) -> T.Compose:
    """RGB PIL image -> float32 (3, input_size, input_size), normalised, nothing random.

    Short side to int(input_size / crop_pct), then the centre. Without `crop_pct`: 224/256, but
    384 px and more are warped to the square, and 32 px and less are cropped without resizing.
    """
    _check_common(input_size, mean, std)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct is {crop_pct}; it must lie in (0, 1], for example 0.875.")
    if crop_pct is None and input_size >= WARP_FROM:
        steps = [T.Resize((input_size, input_size), interpolation=BICUBIC)]
    elif crop_pct is None and input_size <= SMALL_IMAGE:
        steps = [T.CenterCrop(input_size)]  # does nothing to an image of the right size
    else:
        short_side = int(input_size / (crop_pct or DEFAULT_CROP_PCT))
        steps = [T.Resize(short_side, interpolation=BICUBIC), T.CenterCrop(input_size)]
    return T.Compose(steps + _to_normalised_tensor(mean, std))


def _train_crop(input_size: int, scale: tuple[float, float], ratio: tuple[float, float]):
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"crop scale is {tuple(scale)}; it must be 0 < smallest <= largest <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop ratio is {tuple(ratio)}; it must be 0 < smallest <= largest.")
    if input_size > SMALL_IMAGE:
        return T.RandomResizedCrop(input_size, scale=scale, ratio=ratio, interpolation=BICUBIC)
    if tuple(scale) != CROP_SCALE or tuple(ratio) != CROP_RATIO:
        raise UserError(
            f"crop scale {tuple(scale)} and ratio {tuple(ratio)} have no effect at input size "
            f"{input_size}: inputs up to {SMALL_IMAGE} px are padded by 4 and cropped, never "
            "resized. Leave both at their defaults or use a larger input size."
        )
    return T.RandomCrop(input_size, padding=4)


def _to_normalised_tensor(mean: Sequence[float], std: Sequence[float]) -> list:
    return [T.ToTensor(), T.Normalize(mean, std, inplace=True)]


def _check_common(input_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if int(input_size) != input_size or input_size < 1:
        raise UserError(f"input size is {input_size}; it must be a whole number of pixels, >= 1.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(
            f"mean is {tuple(mean)} and std is {tuple(std)}; both need three numbers (red, green, "
            "blue), those of std above 0."
        )


def _check_prob(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; a probability must lie in 0..1.")
