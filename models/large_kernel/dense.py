"""Depthwise convolutions of small maps as one matrix per channel.

On a map of HW pixels a convolution of any kernel is out = M x per channel, x being the pixels of
all images, (HW, N), and M[(h, w), (h', w')] = k[h' - h + kh // 2, w' - w + kw // 2] or zero. So the
sum of branches is one batched product over the channels, the branches by themselves are one with
the matrices one below the other, the gradient of x is one with these transposed, and one more gives
the gradient of M, whose elements are summed up tap by tap.

Per output HW MACs (196 on 14 x 14), and HW^2 elements of M for HW * N of the map: small
next to it where HW is below N or so, too many to keep where maps are large.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from models.large_kernel.backend import Backend, sum_dtype
from models.large_kernel.layout import copy_transposed
from models.large_kernel.tables import Table, gather, gather_gradient, make_table, tap_numbers

LARGEST_MAP = 196  # pixels: a matrix of 14 x 14 pixels takes 78 KB in 16 bits, of 28 x 28 1.2 MB


def padded(number: int) -> int:
    """A multiple of 8, so that lines of 16-bit elements are aligned to 16 bytes: matrix units are
    fed slowly with others."""
    return -(-number // 8) * 8


@cache  # for ever: a CUDA graph goes on reading the table
def table_of(sizes: tuple[tuple[int, int], ...], height: int, width: int,
             device: torch.device) -> Table:
    """For matrices (kernel, out pixel, padded(HW)), zero in the padded columns."""
    rows = torch.arange(height).repeat_interleave(width)  # of each pixel
    columns = torch.arange(width).repeat(height)
    down, right = rows - rows[:, None], columns - columns[:, None]  # (out pixel, in pixel)
    zero = sum(kh * kw for kh, kw in sizes)
    pixels = height * width
    index = torch.full((len(sizes), pixels, padded(pixels)), zero)
    for i, (kh, kw) in enumerate(sizes):
        index[i, :, :pixels] = tap_numbers(sizes, i, down + kh // 2, right + kw // 2)
    return make_table(sizes, index.flatten(), device)


def pixel_lines(maps: Sequence[Tensor], num_lines: int) -> Tensor:
    """Maps (N, C, H, W), any layout, as (C, maps * num_lines, padded(N)): the pixels of one map
    after those of the other, each followed by zeros."""
    num_images, channels, height, width = maps[0].shape
    lines = maps[0].new_empty(channels, len(maps) * num_lines, padded(num_images))
    # (pixel, image, channel) on both sides: dense in channels there, in images here
    copy_transposed([part.permute(1, 2, 0) for part in lines.chunk(len(maps), 1)],
                    [x.permute(2, 3, 0, 1).reshape(height * width, num_images, channels)
                     for x in maps])
    return lines


def in_lines(x: Tensor, num_lines: int) -> Tensor:
    """`pixel_lines` of a single map, which `Dense.arranged` may have made already."""
    num_images, channels, height, width = x.shape
    columns = padded(num_images)
    if x.stride() == (1, num_lines * columns, width * columns, columns):
        return x.as_strided((channels, num_lines, columns), (num_lines * columns, columns, 1))
    return pixel_lines([x], num_lines)


def as_maps(lines: Tensor, number: int, shape: torch.Size, bias: Tensor | None = None
            ) -> list[Tensor]:
    """Maps (N, C, H, W) in channels-last memory, each of an equal share of lines
    (C, number * HW or more, N or more)."""
    num_images, channels, height, width = shape
    pixels = height * width
    outs = [lines.new_empty(num_images, pixels, channels) for _ in range(number)]
    copy_transposed([out.permute(1, 2, 0) for out in outs],
                    [part[:, :pixels, :num_images].transpose(0, 1)
                     for part in lines.chunk(number, 1)], bias)
    return [out.view(num_images, height, width, channels).permute(0, 3, 1, 2) for out in outs]


def table_for(x: Tensor, kernels: Sequence[Tensor]) -> Table:
    sizes = tuple(tuple(kernel.shape[2:]) for kernel in kernels)
    return table_of(sizes, x.shape[2], x.shape[3], x.device)


class Dense(Backend):
    takes_any_kernel = True

    def arranged(self, x: Tensor) -> Tensor:
        """The same map in the memory of its `pixel_lines`."""
        lines = in_lines(x, padded(x.shape[2] * x.shape[3]))
        pixels = lines[:, :x.shape[2] * x.shape[3], :x.shape[0]]
        return pixels.unflatten(1, x.shape[2:]).permute(3, 0, 1, 2)

    def matrices(self, x: Tensor, kernels: Sequence[Tensor], dtype: torch.dtype | None = None
                 ) -> list[Tensor]:
        """One tensor (C, number of kernels * HW, padded(HW))."""
        pixels = x.shape[2] * x.shape[3]
        found = gather(kernels, table_for(x, kernels), x.shape[1], dtype or x.dtype)
        return [found.view(x.shape[1], len(kernels) * pixels, padded(pixels))]

    def prepare(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """The sum of the kernels' matrices, (C, HW, padded(HW))."""
        found, = self.matrices(x, kernels, sum_dtype(x))
        return [found.unflatten(1, (len(kernels), -1)).sum(1).to(x.dtype)]

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        matrix, = prepared
        out, = as_maps(torch.bmm(matrix, in_lines(x, matrix.shape[2])), 1, x.shape, bias)
        return out

    def outputs(self, x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor] = ()
                ) -> list[Tensor]:
        matrix, = matrices or self.matrices(x, kernels)
        lines = torch.bmm(matrix, in_lines(x, matrix.shape[2]))
        return as_maps(lines, len(kernels), x.shape)

    def backward(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                 matrices: Sequence[Tensor] = (), *, of_input: bool = True,
                 of_kernels: bool = True) -> tuple[Tensor | None, list[Tensor] | None]:
        pixels = x.shape[2] * x.shape[3]
        lines = pixel_lines(gradients, pixels)
        of_x, found = None, None
        if of_input:
            matrix, = matrices or self.matrices(x, kernels)
            of_x, = as_maps(torch.bmm(matrix.transpose(1, 2), lines), 1, x.shape)
        if of_kernels:
            # Each element is rounded to the map's dtype once, then summed in float32.
            products = torch.bmm(lines, in_lines(x, padded(pixels)).transpose(1, 2))
            found = gather_gradient(products.flatten(1)[None], table_for(x, kernels),
                                    len(kernels[0]))
        return of_x, found


BACKEND = Dense()
