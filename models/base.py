"""The contract of every network, teacher or student."""
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from utils.registry import Registry, UserError

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
    input_size: int | None = None  # the only side length it accepts, in pixels; None: any
    native_size: int | None = None  # of any, the one its weights expect as a teacher's

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits (N, num_classes) and one map per stage."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        return self.forward_with_features(images).logits

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def fold(self) -> "VisionModel":
        """Fold, in place, what can be folded for inference without changing the function; self."""
        return self

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options of the constructor that the names and shapes of a state dict tell, to say which
        network a file is of. May raise LookupError or ValueError for another architecture's."""
        return {}

    def translated(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
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


def create_model(name: str, num_classes: int = 1000, **options) -> VisionModel:
    """The registered network `name` with random weights. Raises UserError for unknown options."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes must be a positive int, got {num_classes!r}.")
    return MODELS.create(name, num_classes, **options)


def list_models() -> list[str]:
    return MODELS.names()
