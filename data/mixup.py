"""Mixup and CutMix, with label smoothing, on whatever device the batch is.

mixup: Zhang et al. (arXiv 1710.09412). CutMix: Yun et al. (arXiv 1905.04899). `Mixup`: one choice
and one lambda per batch, partner = the batch in reverse order, as DeiT does (timm's mode "batch").
`PairMixup`: neighbours of the epoch's order, a choice and a lambda for each two.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.distributed import world_size
from utils.registry import UserError
from utils.rng import Position, fold_seed


class Box(NamedTuple):
    top: int
    bottom: int  # exclusive
    left: int
    right: int  # exclusive


class Mixup:
    """Mixes a batch with its mirror image and gives soft targets; the default is DeiT's setting.

    An alpha of 0 switches that kind off; with both on, `switch_prob` is the share of CutMix.
    Without mixing and without smoothing, labels pass through untouched.
    """

    def __init__(self, num_classes: int, *, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0,
                 prob: float = 1.0, switch_prob: float = 0.5, smoothing: float = 0.1,
                 seed: int = 0) -> None:
        if num_classes < 1 or int(num_classes) != num_classes:
            raise UserError(f"num_classes is {num_classes}; it must be a whole number, 1 or more.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not (alpha >= 0 and math.isfinite(alpha)):
                raise UserError(f"{name} is {alpha}; it must be 0 (off) or a positive number.")
        for name, value in (("mixup prob", prob), ("mixup switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; a probability must lie in 0..1.")
        if not 0 <= smoothing < 1:
            raise UserError(f"label smoothing is {smoothing}; it must lie in [0, 1).")
        self.num_classes, self.smoothing = int(num_classes), smoothing
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.prob, self.switch_prob, self.seed = prob, switch_prob, seed

    @property
    def mixes(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError for a batch that cannot be mixed with its mirror image."""
        if self.mixes and batch_size % 2:
            raise UserError("mixup and cutmix pair the images of a batch, so --batch-size must be "
                            f"even; got {batch_size}. Or switch both off (--mixup 0 --cutmix 0).")

    def at(self, images: Tensor, labels: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        """The batch mixed as the run's seed and its place in the run decide."""
        return self(images, labels, fold_seed(self.seed, "mixup", position.step, position.micro,
                                              position.rank))

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W), (N,) int64 -> images (N, 3, H, W), targets (N, num_classes) float32.

        A pure function of its arguments: `seed` (>= 0) decides everything random, and the images
        passed in are never written to. Raises UserError for odd N when mixing is on.
        """
        if not self.mixes:
            return images, self._smooth_one_hot(labels) if self.smoothing > 0 else labels
        self.check_batch_size(len(images))
        # Drawn on the CPU by numpy: a draw on the GPU would have to be waited for.
        lam, box = self.draw(np.random.Generator(np.random.PCG64(seed)), *images.shape[-2:])
        one_hot = self._smooth_one_hot(labels)
        if lam == 1:
            return images, one_hot
        targets = lam * one_hot + (1 - lam) * one_hot.flip(0)
        if box is None:
            return lam * images + (1 - lam) * images.flip(0), targets
        mixed = images.clone()
        window = (..., slice(box.top, box.bottom), slice(box.left, box.right))
        mixed[window] = images[window].flip(0)
        return mixed, targets

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[float, Box | None]:
        """lambda, the share of the image itself, and the box its partner fills (None = mixup)."""
        if rng.random() >= self.prob:
            return 1.0, None
        cutmix_prob = self.switch_prob if self.mixup_alpha > 0 else 1.0
        if self.cutmix_alpha > 0 and rng.random() < cutmix_prob:
            box = draw_box(rng, rng.beta(self.cutmix_alpha, self.cutmix_alpha), height, width)
            # The box may be cut off by the border, so lambda is what is really left.
            area = (box.bottom - box.top) * (box.right - box.left)
            return 1 - area / (height * width), box
        return float(rng.beta(self.mixup_alpha, self.mixup_alpha)), None

    def _smooth_one_hot(self, labels: Tensor) -> Tensor:
        # Not F.one_hot: it reads the labels back to the CPU to check their range.
        off = self.smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off, device=labels.device)
        return targets.scatter_(1, labels.unsqueeze(1), 1 - self.smoothing + off)


class PairMixup(Mixup):
    """Mixes images 2i and 2i + 1 of the epoch's order with each other, each two by a draw of their
    own, in the shares of `Mixup`: lambda of one is that of the other, and so is the box.

    A draw depends on the seed, the epoch and i alone, so that what an image becomes does not depend
    on how the order is cut into batches and shared among processes.
    """

    def at(self, images: Tensor, labels: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        # As TrainKeys gives each process a part of the order.
        first = (position.batch * world_size() + position.rank) * len(images) // 2
        return self(images, labels, fold_seed(self.seed, "mixup of pairs", position.epoch), first)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, first: int = 0
                 ) -> tuple[Tensor, Tensor]:
        """As `Mixup` does; `first`: the number in the epoch's order of the batch's first pair."""
        if not self.mixes:
            return super().__call__(images, labels, seed)
        self.check_batch_size(len(images))
        height, width = images.shape[-2:]
        # A row for each image, sent in one go: its share of the targets, its weight where it is
        # mixed up, and the box of its partner.
        rows = np.empty((len(images), 6), np.float32)
        for pair in range(len(images) // 2):
            rng = np.random.Generator(np.random.PCG64(fold_seed(seed, "pair", first + pair)))
            lam, box = self.draw(rng, height, width)
            rows[2 * pair:2 * pair + 2] = lam, lam if box is None else 1, *(box or (0, 0, 0, 0))
        table = torch.from_numpy(rows)
        if images.is_cuda:  # out of ordinary memory the copy would wait for what is computed
            table = table.pin_memory()
        lam, *table = table.to(images.device, non_blocking=True).unsqueeze(-1).unbind(1)  # (N, 1)
        weight, top, bottom, left, right = (column[:, :, None, None] for column in table)

        y = torch.arange(height, device=images.device)[:, None]
        x = torch.arange(width, device=images.device)
        is_pasted = (top <= y) & (y < bottom) & (left <= x) & (x < right)  # (N, 1, H, W)
        weight = weight.masked_fill(is_pasted, 0).to(images.dtype)
        one_hot = self._smooth_one_hot(labels)
        return _weighted(weight, images), _weighted(lam, one_hot)


MIXUP_MODES = {"batch": Mixup, "pair": PairMixup}


def _weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """weight x each row + (1 - weight) x its neighbour: of rows 0, 1, 2, 3, ... 1, 0, 3, 2, ..."""
    mixed = torch.empty_like(rows)
    mixed[::2], mixed[1::2] = rows[1::2], rows[::2]
    # Not torch.lerp, which need not round alike wherever in memory a value stands.
    return mixed.mul_(1 - weight).add_(weight * rows)


def draw_box(rng: np.random.Generator, lam: float, height: int, width: int) -> Box:
    """A box of sides sqrt(1 - lam) around a uniformly drawn pixel, clipped at the border."""
    share = math.sqrt(1 - lam)
    half_height, half_width = int(height * share) // 2, int(width * share) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return Box(top=max(y - half_height, 0), bottom=min(y + half_height, height),
               left=max(x - half_width, 0), right=min(x + half_width, width))
