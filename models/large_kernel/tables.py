"""Matrices whose every element is a tap of a kernel or zero, built by one gather, and gradients of
such matrices summed up to those of the taps.

A table says which tap stands where. It depends on sizes alone, so it is made once, and a call
costs two launches whatever the number of kernels.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import cdiv, has_kernels, jit, on_device_of, tl
from models.large_kernel.backend import sum_dtype

BLOCK, CHANNELS = 1024, 8  # of a program of gather_kernel, which loads its indices once
TAPS, PLACES = 32, 32  # a tile of gather_gradient_kernel


@dataclass(frozen=True, eq=False)
class Table:
    """`sizes` are the kernels' (kh, kw). Their T taps, kernel after kernel, are numbered by rows;
    the number T means zero. index (M,) holds the tap at each place of the matrices, and
    places (T, L) where each tap stands, filled up with M; starts (T,) and counts (T,) of which
    kernel a tap is, as the first of its numbers and how many there are."""

    sizes: tuple[tuple[int, int], ...]
    index: Tensor
    places: Tensor
    starts: Tensor
    counts: Tensor

    @property
    def num_taps(self) -> int:
        return len(self.places)


def tap_numbers(sizes: Sequence[tuple[int, int]], number: int, row: Tensor, column: Tensor
                ) -> Tensor:
    """Number of the tap (row, column) of kernel `number`; T, for zero, outside the kernel."""
    areas = [height * width for height, width in sizes]
    height, width = sizes[number]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, sum(areas[:number]) + row * width + column, sum(areas))


def make_table(sizes: Sequence[tuple[int, int]], index: Tensor, device: torch.device) -> Table:
    areas = torch.tensor([height * width for height, width in sizes])
    total = int(areas.sum())
    order = torch.argsort(index, stable=True)
    uses = torch.bincount(index, minlength=total + 1)
    first = torch.cumsum(uses, 0) - uses
    taps = index[order]
    rank = torch.arange(len(index)) - first[taps]
    places = torch.full((total + 1, int(uses[:total].max())), len(index))
    used = taps < total
    places[taps[used], rank[used]] = order[used]
    starts = (torch.cumsum(areas, 0) - areas).repeat_interleave(areas)
    tensors = index, places[:total], starts, areas.repeat_interleave(areas)
    return Table(tuple(sizes), *[tensor.to(device, torch.int32) for tensor in tensors])


@jit
def gather_kernel(out, taps, index, num_channels, own_channels, T: tl.constexpr, M: tl.constexpr,
                  CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """out (C, M) from taps (C or less, T)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.load(index + place, mask=place < M, other=T)
    first = tl.program_id(1) * CHANNELS
    for step in range(CHANNELS):
        channel = (first + step).to(tl.int64)
        value = tl.load(taps + channel * T + tap, mask=(tap < T) & (channel < own_channels),
                        other=0.0)
        tl.store(out + channel * M + place, value.to(out.dtype.element_ty),
                 mask=(place < M) & (channel < num_channels))


@jit
def gather_gradient_kernel(out, values, places, starts, counts, num_channels, own_channels, splits,
                           T: tl.constexpr, M: tl.constexpr, L: tl.constexpr, TAPS: tl.constexpr,
                           PLACES: tl.constexpr):
    """out, one (C or less, kh, kw) after the other, from values (splits, C, M)."""
    tap, step = tl.program_id(0) * TAPS + tl.arange(0, TAPS), tl.arange(0, PLACES)
    channel = tl.program_id(1)
    acc = tl.zeros((TAPS, PLACES), tl.float32)
    for first in range(0, L, PLACES):
        exists = (tap < T)[:, None] & (first + step < L)[None, :]
        place = tl.load(places + tap[:, None] * L + (first + step)[None, :], mask=exists, other=M)
        for split in range(splits):
            start = values + (split * num_channels + channel).to(tl.int64) * M
            acc += tl.load(start + place, mask=place < M, other=0.0).to(tl.float32)
    start = tl.load(starts + tap, mask=tap < T, other=0)
    count = tl.load(counts + tap, mask=tap < T, other=0)
    # This kernel's (C, kh, kw) begins at start * C; `tap - start` is the tap within it.
    tl.store(out + start * own_channels + channel * count + tap - start, tl.sum(acc, 1),
             mask=tap < T)


def gather(kernels: Sequence[Tensor], table: Table, num_channels: int, dtype: torch.dtype
           ) -> Tensor:
    """(num_channels, M) in `dtype`: the taps of kernels (C, 1, kh, kw), rounded to it, where the
    table has them. Channels beyond C are zeros."""
    taps = torch.cat([kernel.flatten(1) for kernel in kernels], 1)  # (C, T)
    if not has_kernels(taps.device) or torch.float64 in (taps.dtype, dtype):
        taps = F.pad(taps.to(dtype), (0, 1, 0, num_channels - len(taps)))
        return taps.index_select(1, table.index)
    num_places = len(table.index)
    out = taps.new_empty((num_channels, num_places), dtype=dtype)
    with on_device_of(taps):
        gather_kernel[(cdiv(num_places, BLOCK), cdiv(num_channels, CHANNELS))](
            out, taps, table.index, num_channels, len(taps), T=table.num_taps, M=num_places,
            CHANNELS=CHANNELS, BLOCK=BLOCK, num_warps=4)
    return out


def gather_gradient(values: Tensor, table: Table, own_channels: int) -> list[Tensor]:
    """Gradients (own_channels, 1, kh, kw) of the kernels, in float32 (float64 from float64), from
    those of the matrices, (splits, C, M), of which the splits are summed."""
    splits, num_channels, num_places = values.shape
    if not has_kernels(values.device) or values.dtype == torch.float64:
        return plain_gather_gradient(values[:, :own_channels], table)
    out = values.new_empty(own_channels * table.num_taps, dtype=torch.float32)
    with on_device_of(values):
        gather_gradient_kernel[(cdiv(table.num_taps, TAPS), own_channels)](
            out, values, table.places, table.starts, table.counts, num_channels, own_channels,
            splits, T=table.num_taps, M=num_places, L=table.places.shape[1], TAPS=TAPS,
            PLACES=PLACES, num_warps=4)
    areas = [own_channels * height * width for height, width in table.sizes]
    return [part.view(own_channels, 1, *size)
            for part, size in zip(out.split(areas), table.sizes)]


def plain_gather_gradient(values: Tensor, table: Table) -> list[Tensor]:
    values = F.pad(values.sum(0, dtype=sum_dtype(values)), (0, 1))  # the last one: none
    taps = values.index_select(1, table.places.flatten())
    taps = taps.unflatten(1, table.places.shape).sum(2)  # (C, T, L) -> (C, T)
    areas = [height * width for height, width in table.sizes]
    return [part.reshape(len(part), 1, *size)
            for part, size in zip(taps.split(areas, 1), table.sizes)]
