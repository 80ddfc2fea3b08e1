"""SLaK (Liu et al. 2023, arXiv 2207.03620): ConvNeXt whose 7x7 became a pair of k x N and N x k
depthwise convolutions beside an N x N one, each with a BatchNorm, summed.

The same class makes the published students of large-to-small kernel distillation: kernels 7 7 7 7
with N = 100 leave one 7x7 convolution and its BatchNorm (`convnext_t_bn`, `convnext_s_bn`).

Module names are those of the published checkpoints (`large_kernel.LoRA1`, which has nothing to do
with low-rank adapters; `lkb_origin`).
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import register_model
from models.convnext import SMALL, TINY, ConvNeXtBlock, ConvNeXtFrame
from models.fused.batch_norm import plain_sum, sum_of_batch_norms
from models.large_kernel.operator import LargeKernelModule, Prepared, depthwise, depthwise_sum
from models.layers import LaunchAware
from utils.registry import UserError

LARGE_KERNELS = (51, 49, 47, 13, 5)
CONVNEXT_KERNELS = (7, 7, 7, 7, 100)
# Pixels of a map from which on its BatchNorms in one pass gain more than their launches cost.
FUSED_FROM = 400


class ConvBranch(nn.Module):
    """The weights of a depthwise convolution without bias and of the BatchNorm after it if `bn`.
    LargeKernel computes all its branches at once."""

    def __init__(self, dim: int, kernel_size: tuple[int, int], bn: bool) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=padding, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim) if bn else nn.Identity()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, kh, kw) and bias (C,) of the one convolution that equals this branch in
        evaluation mode: W * gamma / std and beta - mean * gamma / std."""
        kernel = self.conv.weight.detach().double()
        if isinstance(self.bn, nn.Identity):
            return kernel, kernel.new_zeros(len(kernel))
        std = (self.bn.running_var.double() + self.bn.eps).sqrt()
        scale = self.bn.weight.detach().double() / std
        bias = self.bn.bias.detach().double() - self.bn.running_mean.double() * scale
        return kernel * scale.view(-1, 1, 1, 1), bias


class LargeKernel(LaunchAware, LargeKernelModule):
    """Sum of parallel depthwise branches: LoRA1 (k x N) and LoRA2 (N x k) if `decomposed`, else
    lkb_origin (k x k); and small_conv (N x N) where N < k."""

    def __init__(self, dim: int, kernel_size: int, small_kernel: int, decomposed: bool,
                 bn: bool) -> None:
        super().__init__()
        if decomposed:
            self.LoRA1 = ConvBranch(dim, (kernel_size, small_kernel), bn)
            self.LoRA2 = ConvBranch(dim, (small_kernel, kernel_size), bn)
        else:
            self.lkb_origin = ConvBranch(dim, (kernel_size, kernel_size), bn)
        if small_kernel < kernel_size:
            self.small_conv = ConvBranch(dim, (small_kernel, small_kernel), bn)

    def forward(self, x: Tensor) -> Tensor:
        maps = depthwise(x, self.kernels(), self.backend)
        norms = [branch.bn for branch in self.children()]
        if self.launches_are_free or x.shape[2] * x.shape[3] >= FUSED_FROM:
            return sum_of_batch_norms(maps, norms)
        return plain_sum(maps, norms)

    def kernels(self) -> list[Tensor]:
        return [branch.conv.weight for branch in self.children()]

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The same function in evaluation mode with the BatchNorms folded and the small kernel
        added, zero-padded, to the middle of the first: one convolution, or two if decomposed."""
        kernels, biases = zip(*[branch.folded() for branch in self.children()])
        kernels = list(kernels)
        if hasattr(self, "small_conv"):
            small = kernels.pop()
            height, width = [(big - edge) // 2 for big, edge in
                             zip(kernels[0].shape[2:], small.shape[2:])]
            kernels[0] = kernels[0] + F.pad(small, (width, width, height, height))
        return FoldedLargeKernel(kernels, sum(biases), like=next(self.parameters()))


class FoldedLargeKernel(LargeKernelModule):
    """Depthwise convolutions of one map, summed; the bias sits in the first. For inference: the
    weights must not change after the first call."""

    def __init__(self, kernels: list[Tensor], bias: Tensor, like: Tensor) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for i, kernel in enumerate(kernels):
            dim, _, height, width = kernel.shape
            conv = nn.Conv2d(dim, dim, (height, width), padding=(height // 2, width // 2),
                             groups=dim, bias=i == 0, device=like.device, dtype=like.dtype)
            conv.weight.data.copy_(kernel)
            self.convs.append(conv)
        self.convs[0].bias.data.copy_(bias)
        self.prepared = Prepared()
        self.register_load_state_dict_post_hook(_forget_prepared)

    def forward(self, x: Tensor) -> Tensor:
        return self._sum(x, any_layout=False)

    def in_any_layout(self, x: Tensor) -> Tensor:
        return self._sum(x, any_layout=True)

    def _sum(self, x: Tensor, any_layout: bool) -> Tensor:
        return depthwise_sum(x, self.kernels(), self.convs[0].bias, self.prepared, self.backend,
                             any_layout=any_layout)

    def kernels(self) -> list[Tensor]:
        return [conv.weight for conv in self.convs]


def _forget_prepared(module: FoldedLargeKernel, _: object) -> None:
    module.prepared.clear()


# The pair of the quickstart: a large-kernel network of two stages, and one with 3x3 kernels only.
@register_model("slak_pico", depths=(1, 2), dims=(48, 96), kernel_size=(15, 7, 3),
                width_factor=1.0, layer_scale_init=0.0)
@register_model("convnext_bn_pico", depths=(1, 1), dims=(48, 96), kernel_size=(3, 3, 100),
                width_factor=1.0, decomposed=False, layer_scale_init=0.0)
@register_model("slak_nano", depths=(1, 1, 2, 1), dims=(20, 40, 80, 160),
                kernel_size=(15, 15, 7, 3, 3))
@register_model("convnext_bn_nano", depths=(1, 1, 3, 1), dims=(24, 48, 96, 192),
                kernel_size=CONVNEXT_KERNELS, width_factor=1.0, decomposed=False)
@register_model("slak_t", depths=TINY, dims=(96, 192, 384, 768))
@register_model("slak_s", depths=SMALL, dims=(96, 192, 384, 768))
@register_model("slak_b", depths=SMALL, dims=(128, 256, 512, 1024))
@register_model("slak_l", depths=SMALL, dims=(192, 384, 768, 1536))
@register_model("convnext_t_bn", depths=TINY, dims=(96, 192, 384, 768),
                kernel_size=CONVNEXT_KERNELS, width_factor=1.0, decomposed=False)
@register_model("convnext_s_bn", depths=SMALL, dims=(96, 192, 384, 768),
                kernel_size=CONVNEXT_KERNELS, width_factor=1.0, decomposed=False)
class SLaK(ConvNeXtFrame):
    """Sparse Large Kernel network.

    `kernel_size` holds odd numbers: the kernel k of each stage (four), and N, the short edge of the
    decomposed kernels and the size of the parallel small one (none where N >= k; the published
    ConvNeXt setting writes N = 100 for that). `dims` are widths before `width_factor`; each becomes
    `int(dim * width_factor)`, truncated as published (96 * 1.3 -> 124).
    """

    def __init__(self, num_classes: int = 1000, depths: Sequence[int] = TINY,
                 dims: Sequence[int] = (96, 192, 384, 768),
                 kernel_size: Sequence[int] = LARGE_KERNELS, width_factor: float = 1.3,
                 decomposed: bool = True, bn: bool = True, layer_scale_init: float = 1e-6,
                 drop_path: float = 0.0, head_init_scale: float = 1.0,
                 stem: str = "patch") -> None:
        if not 0 < width_factor < math.inf:
            raise UserError(f"width_factor must be a positive number, got {width_factor}.")
        _check_kernels(kernel_size, len(dims), decomposed)
        small_kernel = kernel_size[-1]

        def make_block(stage: int, dim: int, rate: float) -> nn.Module:
            mixer = LargeKernel(dim, kernel_size[stage], small_kernel, decomposed, bn)
            return ConvNeXtBlock(dim, "large_kernel", mixer, drop_path=rate,
                                 layer_scale_init=layer_scale_init)

        widths = [int(dim * width_factor) for dim in dims]
        super().__init__(num_classes, depths, widths, make_block, drop_path=drop_path,
                         head_init_scale=head_init_scale, stem=stem)

    def fold(self) -> "SLaK":
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock) and isinstance(module.large_kernel, LargeKernel):
                module.large_kernel = module.large_kernel.folded()
        return self

    def convnext_state(self) -> dict[str, Tensor]:
        """The state dict of the original ConvNeXt that is the same function in evaluation mode: the
        BatchNorm after each 7x7 convolution becomes part of it. Raises UserError where the mixer is
        more than one convolution."""
        state = {name: value for name, value in self.state_dict().items()
                 if ".large_kernel." not in name}
        for name, module in self.named_modules():
            if not isinstance(module, LargeKernel):
                continue
            folded = module.folded()
            if len(folded.convs) > 1 or folded.convs[0].kernel_size != (7, 7):
                raise UserError("only a 7x7 kernel without a parallel or decomposed one is that of "
                                "a ConvNeXt; this is another SLaK.")
            mixer = name.replace("large_kernel", "dwconv")
            state[f"{mixer}.weight"] = folded.convs[0].weight.detach()
            state[f"{mixer}.bias"] = folded.convs[0].bias.detach()
        return state

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = {name: value.shape for name, value in state.items()}
        num_stages = 1 + max(int(name.split(".")[1]) for name in shapes
                             if name.startswith("stages."))
        mixers = [f"stages.{stage}.0.large_kernel." for stage in range(num_stages)]
        decomposed = f"{mixers[0]}LoRA1.conv.weight" in shapes
        first = "LoRA1" if decomposed else "lkb_origin"
        kernels = [shapes[f"{mixer}{first}.conv.weight"][2] for mixer in mixers]
        smalls = [shapes[name][2] for name in shapes if name.endswith("small_conv.conv.weight")]
        if decomposed:
            small = shapes[f"{mixers[0]}LoRA1.conv.weight"][3]
        else:
            small = smalls[0] if smalls else 100  # as published for none
        return {**super().options_of(state), "kernel_size": (*kernels, small),
                "decomposed": decomposed,
                "bn": f"{mixers[0]}{first}.bn.weight" in shapes}

    def large_kernels(self) -> set[str]:
        """Of each block the k x N, N x k or k x k kernels, not the small one beside them."""
        return {name for name, _ in self.named_parameters()
                if name.endswith(("LoRA1.conv.weight", "LoRA2.conv.weight",
                                  "lkb_origin.conv.weight"))}


LARGEST_KERNEL = 4097  # as wide as the first map of an image of 16,384 px


def _check_kernels(kernel_size: Sequence[int], num_stages: int, decomposed: bool) -> None:
    numbers = list(kernel_size) if isinstance(kernel_size, (tuple, list)) else [kernel_size]
    if len(numbers) != num_stages + 1 or not all(isinstance(k, int) and k > 0 for k in numbers):
        raise UserError(f"kernel_size takes {num_stages + 1} positive integers, the kernel of each "
                        f"stage and the small kernel N, e.g. 51,49,47,13,5; got {numbers}.")
    *kernels, small = numbers
    if decomposed or small < max(kernels):  # else it is not used
        kernels.append(small)
    if any(k % 2 == 0 or k > LARGEST_KERNEL for k in kernels):
        raise UserError(f"kernels must be odd to keep the size of a map, and at most "
                        f"{LARGEST_KERNEL}; got {numbers}.")
