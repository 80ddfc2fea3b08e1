"""The work of the operator's benchmark: one shape, computed by one implementation."""
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from analysis.complexity import count_macs
from models.large_kernel.operator import (
    BACKENDS,
    LargeKernelModule,
    Prepared,
    cropped,
    depthwise,
    depthwise_sum,
)
from utils.registry import UserError

PUBLISHED = "published"


class Shape(NamedTuple):
    """Of one module's work: its map and its kernels."""

    channels: int
    height: int
    width: int
    kernels: tuple[tuple[int, int], ...]

    def macs(self, batch_size: int) -> int:
        """Multiply-adds of the direct sums, taps that no pixel reaches left out."""
        kernels = [torch.empty(1, 1, *edges, device="meta") for edges in self.kernels]
        taps = sum(cropped(kernel, self.height, self.width).numel() for kernel in kernels)
        return batch_size * self.channels * self.height * self.width * taps

    def copied_bytes(self, batch_size: int, dtype: torch.dtype) -> int:
        """One map read and one written."""
        return 2 * batch_size * self.channels * self.height * self.width * dtype.itemsize

    def __str__(self) -> str:
        kernels = ", ".join(f"{height}x{width}" for height, width in self.kernels)
        return f"{self.channels} x {self.height} x {self.width}, {kernels}"


def shapes_of(model: models.VisionModel, input_size: int) -> dict[Shape, int]:
    """How many modules of `model` compute large kernels of each shape, in its order."""
    found: Counter[Shape] = Counter()

    def note(module: LargeKernelModule, inputs: tuple[Tensor, ...]) -> None:
        sizes = tuple(tuple(kernel.shape[2:]) for kernel in module.kernels())
        found[Shape(*inputs[0].shape[1:], sizes)] += 1

    for module in model.modules():
        if isinstance(module, LargeKernelModule):
            module.register_forward_pre_hook(note)
    count_macs(model, input_size)  # a forward pass on shapes alone
    if not found:
        raise UserError("--model has no large depthwise kernels. Take a SLaK, e.g. slak_t.")
    return dict(found)


class Work:
    """Random maps, kernels and gradients of one shape for one implementation, and its passes."""

    def __init__(self, shape: Shape, batch_size: int, name: str, *, device: torch.device,
                 dtype: torch.dtype, only_sum: bool) -> None:
        torch.manual_seed(0)  # the same numbers for all
        size = (batch_size, *shape[:3])
        self.name, self.only_sum = name, only_sum
        is_published = name == PUBLISHED
        # Ours get the map as the networks give it, and gradients as their own outputs lie.
        layout = torch.contiguous_format if is_published else torch.channels_last
        of_outputs = (BACKENDS[name].memory_format if name in BACKENDS else layout)
        self.x = _normal(size, device, dtype).to(memory_format=layout).requires_grad_()
        self.kernels = [_normal((shape.channels, 1, *edges), device, dtype).requires_grad_()
                        for edges in shape.kernels]
        self.bias = _normal((shape.channels,), device, dtype)
        number = 1 if only_sum else len(shape.kernels)
        self.gradients = [_normal(size, device, dtype).to(memory_format=of_outputs)
                          for _ in range(number)]
        self.prepared = Prepared()
        self.kept: list[Tensor] = []

    def outputs(self) -> list[Tensor]:
        if self.name == PUBLISHED:
            return [F.conv2d(self.x, kernel, groups=len(kernel), padding=(
                kernel.shape[2] // 2, kernel.shape[3] // 2)) for kernel in self.kernels]
        return depthwise(self.x, self.kernels, self.name)

    def forward(self) -> list[Tensor]:
        if not self.only_sum:
            return self.outputs()
        with torch.no_grad():
            if self.name == PUBLISHED:
                return [sum(self.outputs()) + self.bias.view(-1, 1, 1)]
            return [depthwise_sum(self.x, self.kernels, self.bias, self.prepared, self.name)]

    def backward(self) -> tuple[Tensor, ...]:
        """Of a kept graph: with --only-sum the backward pass is timed by itself."""
        if not self.kept:
            self.kept = [sum(self.outputs())]
        return torch.autograd.grad(self.kept, [self.x, *self.kernels], self.gradients,
                                   retain_graph=True)

    def forward_backward(self) -> tuple[Tensor, ...]:
        if self.only_sum:
            return self.backward()
        return torch.autograd.grad(self.outputs(), [self.x, *self.kernels], self.gradients)


def _normal(size: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size).to(device, dtype)


def results(work: Work) -> list[Tensor]:
    return [*work.forward(), *work.forward_backward()]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over largest value, the worst of the tensors."""
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
               for a, b in zip(found, expected, strict=True))
