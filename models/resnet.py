"""ResNet (He et al. 2016, arXiv 1512.03385), with the stride in the 3x3 convolution as in
torchvision and timm. Module names are torchvision's, so its weights load. ResNet-D (He et al. 2019,
arXiv 1812.01187, figure 2) is its options `deep_stem` and `avg_down`, under timm's names.

In a step that a CUDA graph replays, BatchNorms, shortcut and ReLU are computed together
(models/fused/batch_norm.py)."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.fused import is_traced
from models.fused.batch_norm import plain_sum, sum_of_batch_norms
from models.layers import (
    DropPath,
    LaunchAware,
    MaxPool2d,
    are_ordinary,
    check_stages,
    drop_path_rates,
)
from utils.registry import UserError


class Normalizing(LaunchAware):
    """What normalizes maps (N, C, H, W)."""

    def normalize(self, maps: Sequence[Tensor], norms: Sequence[nn.Module],
                  shortcut: Tensor | None = None, activation: nn.Module | None = None) -> Tensor:
        """activation(sum of the normalized maps + shortcut). In few passes of memory where launches
        are free, for the kernels take more of the host's time than they save of the GPU's; they
        would change the layout of contiguous maps."""
        if (self.launches_are_free and not is_traced()
                and maps[0].is_contiguous(memory_format=torch.channels_last)
                and (activation is None or are_ordinary([activation], [nn.ReLU]))):
            return sum_of_batch_norms(maps, norms, shortcut=shortcut, relu=activation is not None)
        out = plain_sum(maps, norms, shortcut=shortcut)
        return out if activation is None else activation(out)


class Block(Normalizing):
    """How both kinds end."""

    def add_shortcut(self, norm: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """relu(norm(y) + the shortcut of the block's input x). Drop path comes between norm and
        addition, which are then apart."""
        shortcut, drop = self.downsample, self.drop_path
        if not are_ordinary([drop], [DropPath]) or (drop.training and drop.drop_prob > 0):
            y = drop(self.normalize([y], [norm]))
            return self.relu(y + (x if shortcut is None else shortcut(x)))
        if shortcut is None or not are_ordinary([shortcut], [nn.Sequential]):
            x = x if shortcut is None else shortcut(x)
            return self.normalize([y], [norm], x, self.relu)
        *layers, norm_of_shortcut = shortcut
        for layer in layers:
            x = layer(x)
        return self.normalize([y, x], [norm, norm_of_shortcut], activation=self.relu)


class BasicBlock(Block):
    expansion = 1

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float, *,
                 avg_down: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        self.downsample = _shortcut(in_dim, dim, stride, avg_down)
        self.last_bn = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize([self.conv1(x)], [self.bn1], activation=self.relu)
        return self.add_shortcut(self.bn2, self.conv2(y), x)


class Bottleneck(Block):
    expansion = 4

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float, *,
                 avg_down: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * dim)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        self.downsample = _shortcut(in_dim, 4 * dim, stride, avg_down)
        self.last_bn = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize([self.conv1(x)], [self.bn1], activation=self.relu)
        y = self.normalize([self.conv2(y)], [self.bn2], activation=self.relu)
        return self.add_shortcut(self.bn3, self.conv3(y), x)


def _shortcut(in_dim: int, out_dim: int, stride: int, avg_down: bool) -> nn.Module | None:
    """`avg_down` averages 2x2 before a convolution of stride 1, where a strided one would read a
    quarter of the positions; odd maps keep their last row and column."""
    if stride == 1 and in_dim == out_dim:
        return None
    layers = [nn.Conv2d(in_dim, out_dim, 1, stride=1 if avg_down else stride, bias=False),
              nn.BatchNorm2d(out_dim)]
    if avg_down:  # always index 0, as in timm
        layers.insert(0, nn.Identity() if stride == 1 else nn.AvgPool2d(
            2, stride, ceil_mode=True, count_include_pad=False))
    return nn.Sequential(*layers)


def _stem(dim: int, deep: bool, small: bool) -> nn.Module:
    """(N, 3, H, W) -> (N, dim, H / 2, W / 2), before its BatchNorm: 7x7, or three of 3x3; or, if
    `small`, one 3x3 of stride 1."""
    if small:
        return nn.Conv2d(3, dim, 3, padding=1, bias=False)
    if not deep:
        return nn.Conv2d(3, dim, 7, stride=2, padding=3, bias=False)
    if dim < 2:
        raise UserError(f"deep_stem halves the first of dims, which must be 2 or more; got {dim}.")
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        nn.Conv2d(half, dim, 3, padding=1, bias=False))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@register_model("resnet_nano", block="basic", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128))
@register_model("resnet_d_nano", block="basic", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128),
                deep_stem=True, avg_down=True)
@register_model("resnet18", block="basic", depths=(2, 2, 2, 2))
@register_model("resnet34", block="basic", depths=(3, 4, 6, 3))
@register_model("resnet50", block="bottleneck", depths=(3, 4, 6, 3))
@register_model("resnet50d", block="bottleneck", depths=(3, 4, 6, 3), deep_stem=True, avg_down=True)
@register_model("resnet101", block="bottleneck", depths=(3, 4, 23, 3))
class ResNet(Normalizing, VisionModel):
    """`zero_init_residual` starts the last BatchNorm weight of every block at 0, as the timm
    ResNets behind the published runs did; torchvision's default is off. ResNet-D has both others:
    `deep_stem`, three 3x3 convolutions for the 7x7 one, and `avg_down`, an average before the
    convolution of a shortcut. `stem`: 7x7 and pooling as published, or `small`, a 3x3 convolution
    of stride 1 without pooling, for images of 32 px (as in the ResNets for CIFAR)."""

    classifiers = ("fc",)

    def __init__(self, num_classes: int = 1000, block: str = "bottleneck",
                 depths: Sequence[int] = (3, 4, 6, 3), dims: Sequence[int] = (64, 128, 256, 512),
                 drop_path: float = 0.0, zero_init_residual: bool = True,
                 deep_stem: bool = False, avg_down: bool = False, stem: str = "large") -> None:
        super().__init__()
        if block not in BLOCKS:
            raise UserError(f"ResNet block must be one of {', '.join(BLOCKS)}; got {block!r}.")
        check_stages(depths, dims, smallest_depth=1)
        self.num_classes = num_classes
        self.relu = nn.ReLU(inplace=True)
        if stem not in ("large", "small") or (stem == "small" and deep_stem):
            raise UserError(f"ResNet stem must be large, as published, or small, for images of 32 "
                            f"px and without deep_stem; got {stem!r}.")
        is_small = stem == "small"
        self.conv1 = _stem(dims[0], deep_stem, is_small)
        self.bn1 = nn.BatchNorm2d(dims[0])
        self.maxpool = nn.Identity() if is_small else MaxPool2d(3, stride=2, padding=1)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        in_dim = dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(BLOCKS[block](in_dim, dim, stride, next(rates), avg_down=avg_down))
                in_dim = dim * BLOCKS[block].expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stage_names = [f"layer{i + 1}" for i in range(len(depths))]
        self.fc = nn.Linear(in_dim, num_classes)
        stride = 1 if is_small else 4
        self.feature_info = tuple(FeatureInfo(dim * BLOCKS[block].expansion, stride * 2 ** i)
                                  for i, dim in enumerate(dims))
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(getattr(module, module.last_bn).weight)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        x = self.maxpool(self.normalize([self.conv1(images)], [self.bn1], activation=self.relu))
        features = []
        for name in self.stage_names:
            x = getattr(self, name)(x)
            features.append(x)
        return ModelOutput(self.fc(x.mean((2, 3))), features)

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        is_small = "conv1.weight" in state and state["conv1.weight"].shape[2] == 3
        return {"stem": "small"} if is_small else {}

    def parts(self) -> list[list[tuple[str, ...]]]:
        return [[("conv1", "bn1")], *[[(f"{stage}.{j}",) for j in range(len(getattr(self, stage)))]
                                      for stage in self.stage_names]]
