"""SLaK and the distillation step as their authors arranged them: what the benchmarks compare with.

The functions are those of models/slak.py, and so are the names of all weights. What differs is how
they are computed: every branch an nn.Conv2d with its own BatchNorm, maps contiguous as
(N, C, H, W), the channels-first LayerNorm written out with means. Of the teacher, the graph is kept
and back-propagated, as its authors' step does.
"""
import copy

import torch
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from models.large_kernel.operator import LargeKernelModule
from models.layers import DropPath
from models.slak import SLaK


class ChannelsFirstLayerNorm(nn.Module):
    """Over the channels of (N, C, H, W): mean and biased variance over axis 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Branches(nn.Module):
    """One nn.Conv2d and BatchNorm2d per branch, summed; `like` is a models.slak.LargeKernel."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, branch in like.named_children():
            dim, _, height, width = branch.conv.weight.shape
            layers = nn.Sequential()
            layers.add_module("conv", nn.Conv2d(dim, dim, (height, width), groups=dim, bias=False,
                                                padding=(height // 2, width // 2)))
            if isinstance(branch.bn, nn.BatchNorm2d):
                layers.add_module("bn", nn.BatchNorm2d(dim))
            self.add_module(name, layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.children())


class Block(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        dim = like.norm.weight.shape[0]
        self.large_kernel = Branches(like.large_kernel)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(dim, 4 * dim), nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if like.gamma is None else nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(getattr(like.drop_path, "drop_prob", 0.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.large_kernel(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class PublishedSLaK(VisionModel):
    """The network `like` in its authors' arrangement, with copies of its weights."""

    def __init__(self, like: SLaK) -> None:
        super().__init__()
        self.num_classes, self.feature_info = like.num_classes, like.feature_info
        dims = [info.channels for info in self.feature_info]
        self.downsample_layers = nn.ModuleList([nn.Sequential(
            nn.Conv2d(3, dims[0], 4, stride=4), ChannelsFirstLayerNorm(dims[0]))])
        for narrow, wide in zip(dims[:-1], dims[1:]):
            self.downsample_layers.append(nn.Sequential(
                ChannelsFirstLayerNorm(narrow), nn.Conv2d(narrow, wide, 2, stride=2)))
        self.stages = nn.ModuleList(nn.Sequential(*map(Block, stage)) for stage in like.stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], self.num_classes)
        self.load_state_dict(like.state_dict())
        self.train(like.training)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        features, x = [], images
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x).contiguous())
            features.append(x)
        return ModelOutput(self.head(self.norm(x.mean((2, 3)))), features)


def arranged(model: VisionModel) -> VisionModel:
    """A copy of `model` as published: a SLaK in its authors' arrangement, any other network as it
    is; weights contiguous as (N, C, H, W)."""
    is_slak = isinstance(model, SLaK)
    result = PublishedSLaK(model) if is_slak else copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, LargeKernelModule):
            module.implementation = "library"
    return result.to(memory_format=torch.contiguous_format)


class GraphTeacher(nn.Module):
    """A teacher whose output carries its graph: in evaluation mode, but neither under no_grad nor
    frozen, as published."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self.feature_info, self.num_classes = model.feature_info, model.num_classes
        self.train(False)

    def train(self, mode: bool = True) -> "GraphTeacher":
        return super().train(False)

    def forward(self, images: Tensor) -> ModelOutput:
        return self.model.forward_with_features(images)


class GraphDistiller(nn.Module):
    """`distiller` for a GraphTeacher: the loss reaches the teacher's logits, too.

    Our losses detach them; the published NKD does not, so that its backward runs through the whole
    teacher. Here a term of value zero has a gradient of that kind, softmax / N, at the logits. (A
    factor of zero would do in principle; but a GPU multiplies zeros with less power, so faster.)
    The gradients in the teacher's weights add up and are never cleared, as published.
    """

    def __init__(self, distiller: nn.Module) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor, targets: Tensor,
                teacher: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = self.distiller(images, targets, teacher)
        logits = teacher.logits.float()
        graph = (logits * logits.detach().softmax(1)).sum() / len(logits)
        return total + (graph - graph.detach()), terms
