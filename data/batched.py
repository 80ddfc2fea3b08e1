"""The augmentation of data/transforms.py for whole batches, on the device that trains.

What is random about an image - box, flip, colours, erased rectangle: some fifty numbers - is drawn
on the host, by a counter-based generator, as a function of (seed, epoch, index) alone, and follows
the pixels in a few small copies. So the host knows how many images are blurred and how many pixels
are erased without waiting for a device, and no device's logarithm moves a box by a pixel. What is
done to the pixels is arithmetic on the device; the noise of erasing is drawn there, from the same
generator (data/batch.py).
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from data.batch import RATIO, SCALE, random_bits, uniform_share
from data.randaugment import ThreeAugment
from data.transforms import RandomResizedCrop, Transform, resize_bytes
from utils.registry import UserError
from utils.rng import fold_seed

# The place of every draw among those of an image. A rectangle takes ten areas, ten aspects, and its
# corner's two coordinates.
CROP, FLIP, IS_ERASED, RECTANGLE, NOISE_KEY, CHOICE, SIGMA, FACTORS, ORDER, NUM_DRAWS = (
    slice(0, 22), 22, 23, slice(24, 46), 46, 47, 48, slice(49, 52), 52, 53)
TRIES = 10  # torchvision's, for a rectangle
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = torch.cartesian_prod(*3 * [torch.arange(3)])
ORDERS = ORDERS[(ORDERS.sort(1).values == torch.arange(3)).all(1)]  # (6, 3): all orders of three
GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R 601, as Pillow and torchvision have it
BLUR_RADIUS = 8  # pixels: 4 standard deviations of the strongest blur
PIXELS_AT_ONCE = 2 ** 25  # resized together: 0.4 GiB as floats
POLICIES = ("none", "3a")  # of --aa


class Colours(NamedTuple):
    """DeiT III's three and the colour jitter after them."""

    grey: Tensor  # (G,) int64: places in the batch, as the next two
    solarised: Tensor  # (L,)
    blurred: Tensor  # (B,)
    sigma: Tensor  # (B,) float32: pixels
    factors: Tensor  # (N, 3) float32: of brightness, contrast, saturation
    order: Tensor  # (N, 3) int64: which comes first, second, third


@dataclass
class Drawn:
    """What is to be done to the images of a batch; on the host until `to`."""

    boxes: Tensor  # (N, 4) int64: top, left, height, width; of the image, and beyond where padded
    num_taps: int  # of the kernel that resizes the boxes
    is_flipped: Tensor  # (N,) bool
    colours: Colours | None
    erased: Tensor  # (K, 6) int64: as ImageBatch has it
    num_erased: int  # pixels

    def to(self, device: torch.device) -> "Drawn":
        colours = self.colours and Colours(*(send(tensor, device) for tensor in self.colours))
        return replace(self, boxes=send(self.boxes, device), colours=colours,
                       is_flipped=send(self.is_flipped, device), erased=send(self.erased, device))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class BatchedTransform:
    """What `transform`, of train_transform, does to single images, for batches: the same crops,
    flips, colours and erasures in distribution, not the same draws.

    Raises UserError for what is only done to single images.
    """

    def __init__(self, transform: Transform) -> None:
        self.erasing_prob = transform.random_erasing_prob
        self.crop, self.padding, self.flip_prob, self.has_colours = None, 0, 0.0, False
        if isinstance(transform.read, RandomResizedCrop):
            self.crop, self.size = transform.read, transform.read.size
            if self.crop.fast:
                raise UserError("--fast-decode does nothing with --data-on ram or device, which "
                                "decode an image once, and whole. Leave it out.")
        for step in transform.steps:
            if isinstance(step, T.RandomHorizontalFlip):
                self.flip_prob = step.p
            elif isinstance(step, T.RandomCrop):
                self.size, self.padding = step.size[0], step.padding
            elif isinstance(step, ThreeAugment):
                self.has_colours = True
            else:
                check_policy(type(step).__name__)

    def draw(self, seed: int, epoch: int, indices: Tensor, sizes: Tensor) -> Drawn:
        """For the images (N,) of an epoch, of `sizes` (N, 2), height and width in pixels; int64."""
        base = torch.tensor(fold_seed(seed, "augment", epoch))
        bits = random_bits(random_bits(base, indices)[:, None], torch.arange(NUM_DRAWS))
        shares = uniform_share(bits)  # (N, NUM_DRAWS) float64
        boxes = self._draw_boxes(shares[:, CROP], sizes)
        colours = draw_colours(shares) if self.has_colours else None
        erased, num_erased = draw_erasures(shares, bits[:, NOISE_KEY], self.size, self.erasing_prob)
        return Drawn(boxes, count_taps(boxes, self.size), shares[:, FLIP] < self.flip_prob,
                     colours, erased, num_erased)

    def _draw_boxes(self, shares: Tensor, sizes: Tensor) -> Tensor:
        if self.crop is None:
            # Padded on all sides, further where the image is smaller than the crop even then.
            padding = self.padding + (self.size - sizes - 2 * self.padding).clamp_min(0)
            room = sizes + 2 * padding - self.size + 1
            corners = (shares[:, -2:] * room).long() - padding
            return torch.cat([corners, torch.full_like(corners, self.size)], 1)
        scale, ratio = self.crop.scale, self.crop.ratio
        corners, sides, is_found = draw_rectangles(shares, sizes, scale, ratio, 1, sizes)
        # Where ten tries were too large: the centre, of a ratio allowed.
        height, width = sizes.double().unbind(1)
        central = torch.stack([torch.minimum(height, (width / ratio[0]).round()),
                               torch.minimum(width, (height * ratio[1]).round())], 1).long()
        sides = torch.where(is_found[:, None], sides, central)
        corners = torch.where(is_found[:, None], corners, (sizes - central) // 2)
        return torch.cat([corners, sides], 1)

    def one_by_one(self, images: Sequence[Tensor], drawn: Drawn) -> Tensor:
        """Images (H, W, 3) uint8 of the host -> (N, 3, size, size) uint8, channels-last in memory.

        On a processor: a product with matrices would compute mostly with zeros there.
        """
        pixels = torch.stack([cut(image, *box, self.size)
                              for image, box in zip(images, drawn.boxes.tolist())])  # (N, S, S, 3)
        flipped = drawn.is_flipped.nonzero()[:, 0]
        pixels.index_copy_(0, flipped, pixels.index_select(0, flipped).flip(2))
        if drawn.colours is not None:
            lines = pixels.permute(0, 1, 3, 2).to(torch.float32,
                                                  memory_format=torch.contiguous_format)
            pixels = to_bytes(change_colours_(lines, drawn.colours))
        return pixels.permute(0, 3, 1, 2)

    def at_once(self, pixels: Tensor, boxes: Tensor, drawn: Drawn) -> Tensor:
        """The same for a batch (N, H, W, 3) uint8 of any device, within a grey level before the
        colours change. `boxes` (N, 4): drawn.boxes, counted from the corner of `pixels`; all on
        that device."""
        step = max(1, PIXELS_AT_ONCE // max(1, pixels.shape[1] * pixels.shape[2]))
        images = torch.cat([
            resize(part, *of_part, self.size, drawn.num_taps) for part, *of_part in zip(
                pixels.split(step), boxes.split(step), drawn.is_flipped.split(step))])
        if drawn.colours is not None:
            change_colours_(images, drawn.colours)
        return to_bytes(images).permute(0, 3, 1, 2)


def check_policy(policy: str) -> None:
    """Raises UserError for a word of --aa that has no batched counterpart."""
    if policy not in POLICIES:
        raise UserError(f"--data-on ram and device augment by --aa 3a or none, not by {policy}, "
                        "which is made for single images. Pass one of the two, or leave out "
                        "--data-on.")


# Drawing, on the host


def draw_rectangles(shares: Tensor, sizes: Tensor, scale: tuple[float, float],
                    ratio: tuple[float, float], least: int, most: Tensor
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """The first of ten rectangles whose sides lie in [least, most]: corners (N, 2), sides (N, 2),
    and whether there was one (N,).

    Their areas are uniform in `scale` of the image's and their ratios, width to height, uniform in
    the logarithm; `shares` (N, 22) are uniform in [0, 1). As torchvision's RandomResizedCrop and
    RandomErasing do.
    """
    area = sizes.prod(1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * shares[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    root = (0.5 * (low + (high - low) * shares[:, TRIES:2 * TRIES])).exp()
    sides = torch.stack([area.sqrt() / root, area.sqrt() * root], 2).round().long()  # (N, 10, 2)
    fits = ((sides >= least) & (sides <= most[:, None])).all(2)
    first = fits.int().argmax(1)
    sides = sides[torch.arange(len(sides)), first]
    corners = (shares[:, -2:] * (sizes - sides + 1)).long()
    return corners, sides, fits.any(1)


def draw_erasures(shares: Tensor, keys: Tensor, size: int, prob: float) -> tuple[Tensor, int]:
    """ImageBatch's `erased` and `num_erased`, from DeiT's rectangles (data/batch.py)."""
    sizes = torch.full((len(shares), 2), size)
    corners, sides, is_found = draw_rectangles(
        shares[:, RECTANGLE], sizes, SCALE, RATIO, 0, sizes - 1)
    place = (is_found & (shares[:, IS_ERASED] < prob)).nonzero()[:, 0]
    erased = torch.cat([place[:, None], corners[place], sides[place], keys[place, None]], 1)
    return erased, int(sides[place].prod(1).sum())


def draw_colours(shares: Tensor) -> Colours:
    """As ThreeAugment draws them."""
    choice = (3 * shares[:, CHOICE]).long()
    grey, solarised, blurred = ((choice == kind).nonzero()[:, 0] for kind in range(3))
    sigma = 0.1 + 1.9 * shares[blurred, SIGMA]
    factors = 0.7 + 0.6 * shares[:, FACTORS]
    return Colours(grey, solarised, blurred, sigma.float(), factors.float(),
                   ORDERS[(6 * shares[:, ORDER]).long()])


# Changing pixels


def cut(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """The box of an image (H, W, 3) uint8 -> (size, size, 3), resized as `resize` does but for the
    rounding. A box of just this size may reach beyond the image, where all is black."""
    row, column = max(top, 0), max(left, 0)
    pixels = image[row:max(top + height, 0), column:max(left + width, 0)]
    if (height, width) != (size, size):
        return resize_bytes(pixels, size)
    padded = image.new_zeros(size, size, 3)
    row, column = row - top, column - left
    padded[row:row + pixels.shape[0], column:column + pixels.shape[1]] = pixels
    return padded


def resize(pixels: Tensor, boxes: Tensor, is_flipped: Tensor, size: int, num_taps: int) -> Tensor:
    """The boxes (N, 4) of images (N, H, W, 3) uint8, resized by bicubic interpolation, antialiased
    where it shrinks, and flipped: lines (N, size, 3, size) of whole numbers 0..255 in float32.

    What lies beyond the pixels is black. `num_taps`: of `count_taps` for these boxes. Within a grey
    level of torchvision's resized_crop of tensors; nearly always of Pillow's images, too, which are
    cut to 0..255 once more in between.
    """
    top, left, box_height, box_width = boxes.unbind(1)
    rows = resizing_weights(top, box_height, size, pixels.shape[1], num_taps)
    columns = resizing_weights(left, box_width, size, pixels.shape[2], num_taps, is_flipped)
    lines = pixels.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return separable(lines, rows, columns).round_().clamp_(0, 255)


# In lines, (N, H, 3, W), a product with a matrix from the left goes over the rows of all colours,
# and one from the right over their columns.


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Lines (N, H, 3, W) -> (N, P, 3, Q): each image's weights (N, P, H) applied to its rows and
    (N, Q, W) to its columns."""
    num_images, _, channels, width = images.shape  # of no images, too
    num_rows, num_columns = rows.shape[1], columns.shape[1]
    images = torch.bmm(rows, images.flatten(2)).view(num_images, num_rows * channels, width)
    return torch.bmm(images, columns.transpose(1, 2)).view(
        num_images, num_rows, channels, num_columns)


def count_taps(boxes: Tensor, size: int) -> int:
    """How many pixels of a line the kernel covers at most where boxes (N, 4) become `size`."""
    return math.ceil(4 * max(1, int(boxes[:, 2:].max()) / size)) + 1


def resizing_weights(start: Tensor, length: Tensor, size: int, num_pixels: int, num_taps: int,
                     is_flipped: Tensor | None = None) -> Tensor:
    """(N, size, num_pixels) float32: of every output pixel, the weights of the input pixels, from a
    segment of each line that begins at `start` (N,) and has `length` (N,) pixels; in reverse where
    `is_flipped` (N,).

    Keys' cubic with a = -0.5, stretched where it shrinks, as in Pillow and in PyTorch's antialiased
    interpolation: only pixels of the segment count, and their weights are divided by their sum.
    """
    device = start.device
    output = torch.arange(size, device=device) + 0.5  # (S,)
    if is_flipped is not None:
        output = torch.where(is_flipped[:, None], size - output, output)
    scale = (length.float() / size)[:, None]
    stretch = scale.clamp_min(1)[:, :, None]
    middle = (output * scale)[:, :, None]  # (N, S, 1), from the segment's start
    first = (middle - 2 * stretch - 0.5).floor() + 1
    pixel = first + torch.arange(num_taps, device=device)  # (N, S, taps)
    taps = cubic((pixel + 0.5 - middle).abs_() / stretch)
    taps *= (pixel >= 0) & (pixel < length[:, None, None])
    taps /= taps.sum(2, keepdim=True)
    pixel = pixel.long() + start[:, None, None]
    taps *= (pixel >= 0) & (pixel < num_pixels)  # beyond the image all is black
    weights = taps.new_zeros(len(start), size, num_pixels)
    return weights.scatter_add_(2, pixel.clamp_(0, num_pixels - 1), taps)


def cubic(distance: Tensor) -> Tensor:
    """Keys' kernel (1981) with a = -0.5 for distances >= 0; 0 from 2 on."""
    x = distance.clamp_max(2)
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    far = ((-0.5 * x + 2.5).mul_(x) - 4).mul_(x).add_(2)
    return torch.where(x < 1, near, far)


def change_colours_(images: Tensor, colours: Colours) -> Tensor:
    """DeiT III's three, one for an image, then the jitter; on lines (N, S, 3, S) of whole numbers
    0..255 in float32. Every step is within a grey level of torchvision's function of that name."""
    def change_(places: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        images.index_copy_(0, places, change(images.index_select(0, places)))

    change_(colours.grey, lambda chosen: grey_of(chosen).expand_as(chosen))
    change_(colours.solarised, lambda chosen: torch.minimum(chosen, 255 - chosen))  # from 128 on
    weights = blurring_weights(colours.sigma, images.shape[1])
    change_(colours.blurred, lambda chosen: separable(chosen, weights, weights).round_())
    for turn in range(3):
        jitter_(images, colours.order[:, turn], colours.factors)
    return images


def to_bytes(images: Tensor) -> Tensor:
    """Lines (N, S, 3, S) of whole numbers 0..255 -> (N, S, S, 3) uint8."""
    return images.permute(0, 1, 3, 2).to(torch.uint8, memory_format=torch.contiguous_format)


def grey_of(images: Tensor) -> Tensor:
    """Lines (N, S, 3, S) -> (N, S, 1, S), rounded."""
    red, green, blue = images.split(1, dim=2)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).round_()


def jitter_(images: Tensor, kind: Tensor, factors: Tensor) -> None:
    """Move the images (N, S, 3, S) away from, or towards, black (BRIGHTNESS), their mean grey
    (CONTRAST) or their own grey (SATURATION), as `kind` (N,) says, by that column of `factors`
    (N, 3); as in Pillow and torchvision, fractions are cut off."""
    kind = kind[:, None]
    factor = factors.gather(1, kind)[:, :, None, None]  # (N, 1, 1, 1)
    kind = kind[:, :, None, None]
    grey = grey_of(images)
    mean = grey.mean((1, 2, 3), keepdim=True)
    target = grey * (kind == SATURATION) + mean * (kind == CONTRAST)
    images.mul_(factor).add_((1 - factor) * target).clamp_(0, 255).floor_()


def blurring_weights(sigma: Tensor, size: int) -> Tensor:
    """(B, size, size) float32: a Gaussian of standard deviation `sigma` (B,), in pixels, around
    each pixel of a line, which is mirrored at its ends."""
    away = torch.arange(1 - size, size, device=sigma.device)
    kernel = torch.exp(-0.5 * (away / sigma[:, None]).square())  # (B, 2 size - 1)
    kernel *= away.abs() <= min(BLUR_RADIUS, size - 1)
    kernel /= kernel.sum(1, keepdim=True)
    beyond = F.pad(kernel[:, size - 1:], (0, size - 1))  # of distances from 0 on
    # (B, size, size): row i of an unfolded line is the line from its place i on.
    mirrored = beyond.unfold(1, size, 1).clone()  # pixel j is seen once more at -j ...
    mirrored[:, :, 0] = 0  # ... but the first one
    return kernel.unfold(1, size, 1).flip(1) + mirrored + mirrored.flip(1, 2)
