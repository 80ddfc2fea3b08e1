"""SLaK and the distillation step as their authors arranged them: what the benchmarks compare with.

The functions are those of models/slak.py, and so are the names of all weights. What differs is how
they are computed: every branch an nn.Conv2d with its own BatchNorm, maps contiguous as
(N, C, H, W), the channels-first LayerNorm written out with means. Of the teacher, the graph is kept
and back-propagated, as its authors' step does.
"""
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.base import ModelOutput, VisionModel
from models.distiller import Distiller
from models.layers import GELU, LayerNorm2d, PointwiseLinear
from models.slak import LargeKernel, SLaK
from utils.rng import Position


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Over the channels of (N, C, H, W): mean and biased variance over axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Branches(nn.Module):
    """One nn.Conv2d and BatchNorm2d per branch, summed."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch.bn(branch.conv(x)) for branch in self.children())


# Blocks and stages are as published. These parts of them have the same weights in both.
PUBLISHED_CLASSES = {LargeKernel: Branches, LayerNorm2d: ChannelsFirstLayerNorm,
                     PointwiseLinear: nn.Linear, GELU: nn.GELU}


def arranged(model: VisionModel) -> VisionModel:
    """A copy of `model` as published: a SLaK in its authors' arrangement, any other network as it
    is; weights contiguous as (N, C, H, W)."""
    result = copy.deepcopy(model)
    if isinstance(model, SLaK):
        result.width_multiple = 1
        for module in result.modules():
            # Only the methods change: weights, their names and their order stay.
            module.__class__ = PUBLISHED_CLASSES.get(type(module), type(module))
    return result.to(memory_format=torch.contiguous_format)


class KeptTeacher:
    """A network as the step asks a teacher, neither frozen nor folded."""

    def __init__(self, model: VisionModel) -> None:
        self.model = model

    def teach(self, images: Tensor, position: Position) -> ModelOutput:
        return self.model.forward_with_features(images)


def through_teacher(distiller: Distiller) -> Callable:
    """`distiller` for a teacher that is in evaluation mode, but neither under no_grad nor frozen:
    the loss reaches the teacher's logits, too.

    Our losses detach them; the published NKD does not, so that its backward runs through the whole
    teacher. Here a term of value zero has a gradient of that kind, softmax / N, at the logits. (A
    factor of zero would do in principle; but a GPU multiplies zeros with less power, so faster.)
    The gradients in the teacher's weights add up and are never cleared, as published.
    """
    def forward(images: Tensor, targets: Tensor, teacher: ModelOutput
                ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        total, terms, student_logits = distiller(images, targets, teacher)
        logits = teacher.logits.float()
        graph = (logits * logits.detach().softmax(1)).sum() / len(logits)
        return total + (graph - graph.detach()), terms, student_logits

    return forward
