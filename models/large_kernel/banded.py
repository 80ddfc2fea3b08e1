"""Large depthwise convolutions as banded matrix products.

A column of a tall kernel k, slid along the rows of a map, is a Toeplitz matrix T of H x H with
T[h, h'] = k[h' - h + kh // 2]. So per channel

    out = sum over columns j of  T_j @ (map shifted by j - kw // 2 columns),

one product of (H, kw * H) with (kw * H, N * W): a batched GEMM over the channels, for which
processors have matrix units that a loop over taps cannot use. A wide kernel is the same on the
transposed map. Per output kw * H MACs (280 for a 51 x 5 kernel on 56 rows, in place of
255), and kw copies of the map beside one read and one write.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.large_kernel.backend import Backend, sum_dtype


def is_tall(size: Sequence[int]) -> bool:
    return size[0] >= size[1]


def toeplitz(kernel: Tensor, length: int) -> Tensor:
    """(C, 1, kh, kw) -> (C, length, kw * length): [c, h, j * length + h'] is kernel[c, 0, h' - h +
    kh // 2, j], or zero outside the kernel. Needs kh <= 2 * length - 1."""
    channels, _, rows, columns = kernel.shape
    margin = length - 1 - rows // 2
    taps = F.pad(kernel[:, 0].transpose(1, 2), (margin, margin))  # (C, kw, 2 * length - 1)
    bands = taps.unfold(2, length, 1).flip(2)  # (C, kw, h, h')
    return bands.permute(0, 2, 1, 3).reshape(channels, length, columns * length)


def shifted_maps(x: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) -> (C, columns * H, N * W): the map shifted by -columns // 2 ... columns // 2
    columns, zeros coming in."""
    num_images, channels, height, width = x.shape
    x = F.pad(x.permute(1, 2, 0, 3), (columns // 2, columns // 2))  # (C, H, N, W + columns - 1)
    windows = x.unfold(3, width, 1)  # (C, H, N, columns, W)
    return windows.permute(0, 3, 1, 2, 4).reshape(channels, columns * height, -1)


def convolve(x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Maps in the layout (C, H, N, W), or transposed, as (N, C, H, W) views."""
    result, shifted = [], {}
    for kernel, matrix in zip(kernels, matrices):
        tall = is_tall(kernel.shape[2:])
        along = x if tall else x.transpose(2, 3)  # its rows lie along the kernel
        key = (tall, min(kernel.shape[2:]))
        if key not in shifted:  # the tall and the small kernel share theirs
            shifted[key] = shifted_maps(along, key[1])
        num_images, channels, length, width = along.shape
        y = torch.bmm(matrix, shifted[key]).view(channels, length, num_images, width)
        y = y.permute(2, 0, 1, 3)
        result.append(y if tall else y.transpose(2, 3))
    return result


def padded_lines(x: Tensor, before: int, after: int) -> Tensor:
    """(N, C, H, W) -> (C, N * (before + W + after), H), with zero lines around every image."""
    num_images, channels, height, width = x.shape
    lines = x.new_zeros(channels, num_images, before + width + after, height)
    lines[:, :, before:before + width] = x.permute(1, 0, 3, 2)
    return lines.flatten(1, 2)


def diagonal_sums(matrices: Tensor) -> Tensor:
    """(..., L, L) -> (..., 2 L - 1): [d] sums the elements [h, h'] with h' - h + L - 1 = d."""
    length = matrices.shape[-1]
    # L zeros after each row, then rows one element shorter: diagonals become columns.
    skewed = F.pad(matrices.flip(-2), (0, length)).flatten(-2)[..., :-length]
    return skewed.view(*matrices.shape[:-2], length, 2 * length - 1).sum(-2)


def kernel_gradient(x: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, 1, kh, kw): the gradient of the kernel's matrices, summed along their diagonals."""
    if not is_tall(size):
        tall = kernel_gradient(x.transpose(2, 3), gradient.transpose(2, 3), size[::-1])
        return tall.transpose(2, 3)
    rows, columns = size
    length, middle = x.shape[2], columns // 2
    # Both maps as (C, N * (W + kw - 1), H), zeros between the images: a shift of columns is then a
    # shift of lines, and no shifted map is ever written.
    lines, across = padded_lines(x, middle, middle), padded_lines(gradient, 0, columns - 1)
    number = across.shape[1] - columns + 1  # beyond it there are zeros
    across = across[:, :number].transpose(1, 2)
    # Each shift's product is rounded to the map's dtype once, then summed in float32.
    products = torch.stack([torch.bmm(across, lines[:, j:j + number]) for j in range(columns)], 1)
    sums = diagonal_sums(products.to(sum_dtype(x)))  # (C, kw, 2 * length - 1)
    margin = length - 1 - rows // 2
    return sums[:, :, margin:margin + rows].transpose(1, 2)[:, None]


class Banded(Backend):
    def matrices(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """Per kernel the matrices (C, L, short * L), L the map's edge along the kernel's long one,
        `short` the kernel's other edge."""
        return [toeplitz(kernel, x.shape[2]).to(x.dtype) if is_tall(kernel.shape[2:])
                else toeplitz(kernel.transpose(2, 3), x.shape[3]).to(x.dtype)
                for kernel in kernels]

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        result = sum(convolve(x, kernels, prepared))
        result += bias.view(-1, 1, 1)
        return result.contiguous(memory_format=torch.channels_last)

    def outputs(self, x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor] = ()
                ) -> list[Tensor]:
        maps = convolve(x, kernels, matrices or self.matrices(x, kernels))
        return [y.contiguous(memory_format=torch.channels_last) for y in maps]

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                       matrices: Sequence[Tensor] = ()) -> Tensor:
        flipped = [kernel.flip(2, 3) for kernel in kernels]
        matrices = self.matrices(gradients[0], flipped)
        result = sum(convolve(gradient, [kernel], [matrix])[0]
                     for gradient, kernel, matrix in zip(gradients, flipped, matrices))
        return result.contiguous(memory_format=torch.channels_last)

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor]
                         ) -> list[Tensor]:
        return [kernel_gradient(x, gradient, tuple(kernel.shape[2:]))
                for gradient, kernel in zip(gradients, kernels)]


BACKEND = Banded()
