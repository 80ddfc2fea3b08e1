"""Linear centred kernel alignment of feature maps, accumulated over minibatches.

Kornblith et al. 2019 (arXiv 1905.00414) with the unbiased estimator of HSIC of Song et al. 2012
(JMLR 13), summed over minibatches as in Nguyen et al. 2021 (arXiv 2010.15327): the result does not
depend on the size of the batches but for its noise, as long as each batch is drawn at random.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST_BATCH = 4  # images that the unbiased estimator needs


def gram(feature: Tensor) -> Tensor:
    """(N, C, H, W) or (N, D) -> inner products of the images' features, float64 (N, N), with zeros
    on the diagonal.

    Their mean is taken off first: the estimate stays the same, and less is lost to rounding.
    """
    flat = feature.flatten(1).float()
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double().fill_diagonal_(0)


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Of two matrices of `gram` for the same N >= 4 images, a scalar whose mean is 0 where the
    features are independent (HSIC_1 of Song et al.)."""
    number = len(first)
    rows, columns = first.sum(1), second.sum(1)
    total = (first * second).sum() - 2 / (number - 2) * (rows @ columns)
    total = total + rows.sum() * columns.sum() / ((number - 1) * (number - 2))
    return total / (number * (number - 3))


class MinibatchCKA:
    """Every map of one network with every map of another."""

    def __init__(self, num_first: int, num_second: int) -> None:
        self.between = torch.zeros(num_first, num_second, dtype=torch.float64)
        self.first = torch.zeros(num_first, dtype=torch.float64)
        self.second = torch.zeros(num_second, dtype=torch.float64)

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """`gram` of each map, of the same images."""
        for i, left in enumerate(first):
            self.first[i] += unbiased_hsic(left, left).cpu()
            for j, right in enumerate(second):
                self.between[i, j] += unbiased_hsic(left, right).cpu()
        for j, right in enumerate(second):
            self.second[j] += unbiased_hsic(right, right).cpu()

    def value(self) -> np.ndarray:
        """(first's maps, second's maps): 1 for equal or rotated features, near 0 for independent
        ones, a little below included; NaN where a map is the same for all images."""
        scale = (self.first[:, None] * self.second).clamp_min(0).sqrt()
        return torch.where(scale > 0, self.between / scale, torch.nan).numpy()
