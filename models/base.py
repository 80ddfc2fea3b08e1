"""The contract of every network, teacher or student."""
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from utils.registry import Registry, UserError, one_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODELS = Registry("model", home="models/__init__.py")
register_model = MODELS.register


class FeatureInfo(NamedTuple):
    channels: int
    stride: int  # input pixels per feature pixel


class ModelOutput(NamedTuple):
    logits: Tensor  # (N, num_classes), before softmax
    features: list[Tensor]  # per stage, (N, C_i, H / stride_i, W / stride_i); the last is pooled


class VisionModel(nn.Module):
    """A classifier that also returns its stage maps.

    A subclass sets `feature_info` and `num_classes` and implements `forward_with_features`.
    """

    feature_info: tuple[FeatureInfo, ...]
    num_classes: int
    input_mean: tuple[float, float, float] = IMAGENET_MEAN  # what the weights expect
    input_std: tuple[float, float, float] = IMAGENET_STD
    input_size: int = 224  # side of the images that its weights were trained at, in pixels
    fixed_size: bool = False  # whether it accepts no other

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits (N, num_classes) and one map per stage."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        return self.forward_with_features(images).logits

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def count_macs(self, input_size: int) -> int:
        """MACs (multiply-accumulates) of one image of this side, in convolutions and matrix
        products. Computed on shapes alone; the model is left as it is. Raises
        UserError where it does not run at this size."""
        with FlopCounterMode(display=False) as counter:
            run_on_shapes(copy.deepcopy(self).to("meta"), input_size)
        return counter.get_total_flops() // 2

    def fold(self) -> "VisionModel":
        """Fold, in place, what can be folded for inference without changing the function; self."""
        return self

    def pad_widths(self, multiple: int) -> "VisionModel":
        """Lay the weights out, in place and for inference, for maps whose channels are filled up
        with zeros to a multiple, where the network can; after `fold`. The function stays; self."""
        return self

    def to_half(self, dtype: torch.dtype) -> "VisionModel":
        """Cast the weights, in place, for inference in `dtype` without autocast; self. BatchNorms,
        which hold statistics, stay as they are; norms and softmax sum in float32 anyway."""
        for module in self.modules():
            if not isinstance(module, _BatchNorm):
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
        return self

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options of the constructor that the names and shapes of a state dict tell, to say which
        network a file is of. May raise LookupError or ValueError for another architecture's."""
        return {}

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict of this architecture under this class's names; `state` itself when
        it has them already or is none that the class knows."""
        return state

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay beside the 1-D ones."""
        return set()

    def large_kernels(self) -> set[str]:
        """Names of the weights of large depthwise kernels, which may be masked alone."""
        return set()

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, 0 = stem, for layer-wise learning rate decay: the rate is
        scaled by `decay ** (largest id - id)`. Raises UserError where no depth is defined."""
        raise UserError(f"--layer-decay is not defined for {type(self).__name__}: the model has "
                        "no layer_ids(). Leave --layer-decay at 1.")


@torch.no_grad()
def run_on_shapes(model: VisionModel, input_size: int) -> None:
    """One image through a network on the meta device. Raises UserError where it does not fit."""
    if model.fixed_size and input_size != model.input_size:
        raise UserError(f"the model takes {model.input_size} px only, and --input-size is "
                        f"{input_size}.")
    try:
        model.eval()(torch.empty(1, 3, input_size, input_size, device="meta"))
    except RuntimeError as error:
        raise UserError(f"the model does not run at --input-size {input_size}: "
                        f"{one_line(error)}.") from error


def create_model(name: str, num_classes: int = 1000, /, **options: Any) -> VisionModel:
    """The registered network `name` with random weights. Raises UnknownName, or UserError for
    options that it does not have."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes must be a positive int, got {num_classes!r}.")
    return MODELS.create(name, {"num_classes": num_classes}, **options)


def list_models() -> list[str]:
    return MODELS.names()
