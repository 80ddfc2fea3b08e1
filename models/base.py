"""The contract of every network, teacher or student."""
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from utils.distributed import num_bytes
from utils.registry import Registry, UserError, one_line, parse_spec, short

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_TENSORS = 20_000  # of weights: of the largest networks known, a few thousand

MODELS = Registry("model", home="models/__init__.py; others are timm model=NAME, torchvision "
                  "model=NAME, or my_module:build for a function of your own")
register_model = MODELS.register


class FeatureInfo(NamedTuple):
    channels: int
    stride: int  # input pixels per feature pixel


class ModelOutput(NamedTuple):
    logits: Tensor | None  # (N, num_classes), before softmax; None without a classifier
    features: list[Tensor]  # per stage, (N, C_i, H / stride_i, W / stride_i); the last is pooled


class VisionModel(nn.Module):
    """A classifier that also returns its stage maps.

    A subclass sets `feature_info` and `num_classes` and implements `forward_with_features`. A
    network without a classifier has 0 classes and gives None for logits.
    """

    feature_info: tuple[FeatureInfo, ...]
    num_classes: int
    classes: list[str] | None = None  # names by label, where they are known of its weights
    # Modules, nn.Linear or 1x1 nn.Conv2d, that logits come from: of `weight` and `bias` a row is a
    # class. More than one where logits are a mean of several; () where there is none to be named.
    classifiers: tuple[str, ...] = ("head",)
    # Whether a compiler makes it faster on a GPU. Not where its layers are kernels of their own.
    gains_by_compiler: bool = True
    input_mean: tuple[float, float, float] = IMAGENET_MEAN  # what the weights expect
    input_std: tuple[float, float, float] = IMAGENET_STD
    input_size: int = 224  # side of the images that its weights were trained at, in pixels
    fixed_size: bool = False  # whether it accepts no other
    is_of_library: bool = False  # whether a library has its published weights
    # Of these, by label; [] for weights without a classifier, None where nothing is known of them.
    published_classes: list[str] | None = None
    # How its weights were evaluated at `input_size`: the side in pixels that an image's short side
    # is resized to before its centre is cut out (None: not known), and the filter of all resizing.
    input_resize: int | None = None
    input_filter: str = "bicubic"

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
            run_on_shapes(copy.deepcopy(self).to("meta").requires_grad_(False), input_size)
        return counter.get_total_flops() // 2

    def keep_classes(self, labels: Sequence[int]) -> "VisionModel":
        """Let logits and `classes` be those of these labels, in this order, in place; self. May be
        called before or after `fold`, not after `pad_widths`. Raises UserError where a network
        does not know its classifier."""
        if not self.classifiers:
            raise UserError(f"{type(self).__name__} does not say which of its layers is the "
                            f"classifier, so its {self.num_classes} classes cannot be chosen from.")
        for name in self.classifiers:
            layer = self.get_submodule(name)
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor.data = tensor.data[list(labels)]
            if isinstance(layer, nn.Linear):
                layer.out_features = len(labels)
            else:
                layer.out_channels = len(labels)
        self.num_classes = len(labels)
        if self.classes is not None:
            self.classes = [self.classes[label] for label in labels]
        return self

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

    def synchronise_batch_norms(self) -> None:
        """Let BatchNorms take their statistics over all processes, in place; parameters and names
        stay. Raises UserError for a kind that PyTorch's would not replace."""
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm) and type(module).forward not in (
                    _BatchNorm.forward, nn.SyncBatchNorm.forward):
                raise UserError(f"{name} is a {type(module).__name__}, which computes more than a "
                                "BatchNorm and cannot be synchronised over processes; let the "
                                "network have synchronise_batch_norms(), or use one process.")
        nn.SyncBatchNorm.convert_sync_batchnorm(self)

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options of the constructor that the names and shapes of a state dict tell, to say which
        network a file is of. May raise LookupError or ValueError for another architecture's."""
        return {}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises UserError for options that can be told wrong before a network is built."""

    def published_state(self) -> dict[str, Tensor]:
        """Where `is_of_library`: the weights that the library publishes, fetched by it."""
        raise NotImplementedError

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

    def parts(self) -> list[list[tuple[str, ...]]]:
        """Names of the modules and parameters of the stem, then of each stage, in the order of
        their depth; those of one block stand together. What is not named is the head. Raises
        UserError where the network names none."""
        raise UserError(f"{type(self).__name__} does not name its stages and blocks, which "
                        "--layer-decay and --freeze with a number need. Leave --layer-decay at 1; "
                        "--freeze backbone needs none.")

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter for layer-wise learning rate decay: 0 for the stem, then one id
        per block, the head last. The rate is scaled by `decay ** (largest id - id)`. Raises
        UserError where the network names no blocks."""
        blocks = [names for stage in self.parts() for names in stage]
        depths = {name: depth for depth, names in enumerate(blocks) for name in names}

        def depth_of(name: str) -> int:
            while name and name not in depths:
                name = name.rpartition(".")[0]
            return depths.get(name, len(blocks))

        return {name: depth_of(name) for name, _ in self.named_parameters()}


@torch.no_grad()
def run_on_shapes(model: VisionModel, input_size: int) -> None:
    """One image through a network on the meta device. Raises UserError where it does not fit."""
    if model.fixed_size and input_size != model.input_size:
        raise UserError(f"the model takes {model.input_size} px only, and --input-size is "
                        f"{input_size}.")
    try:
        model.eval()(torch.empty(1, 3, input_size, input_size, device="meta"))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"the model does not run at --input-size {input_size}: "
                        f"{one_line(error)}.") from error


def create_model(name: str, num_classes: int = 1000, /, **options: Any) -> VisionModel:
    """The registered network `name` with random weights. Every one has the options `input_mean` and
    `input_std`: what its weights expect, a number or one for each colour. Raises UnknownName, or
    UserError for options that it does not have."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes must be a positive int, got {num_classes!r}.")
    stats = {key: options.pop(key) for key in ("input_mean", "input_std") if key in options}
    if options and name in MODELS.names():
        _check_size(name, num_classes, options)
    try:
        model = MODELS.create(name, {"num_classes": num_classes}, **options)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"model {name} cannot be built with these options: "
                        f"{one_line(error)[:200]}.") from error
    for key, value in stats.items():
        setattr(model, key, _three_numbers(key, value, above=0.0 if key == "input_std" else None))
    return model


def _check_size(name: str, num_classes: int, options: Mapping[str, Any]) -> None:
    """Raises UserError for a network that no memory holds, which is built without any first."""
    limit, held, number = num_bytes(), 0, 0

    def count(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        nonlocal held, number
        if parameter is not None:
            held, number = held + parameter.nbytes, number + 1
        if held > limit or number > MOST_TENSORS:
            words = " ".join(f"{option}={short(value)}" for option, value in options.items())
            raise UserError(f"model {name} {words} has more weights than the memory of this "
                            f"machine holds ({limit / 2 ** 30:.1f} GiB), or than "
                            f"{MOST_TENSORS:,} tensors. Lower its options.")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            MODELS.create(name, {"num_classes": num_classes}, **options)
    except (RuntimeError, OverflowError):
        pass  # the network itself says why
    finally:
        hook.remove()


def _three_numbers(key: str, value: Any, above: float | None) -> tuple[float, float, float]:
    numbers = [value] * 3 if isinstance(value, (int, float)) else value
    if (not isinstance(numbers, (tuple, list)) or len(numbers) != 3
            or not all(type(number) in (int, float) and math.isfinite(number)
                       and (above is None or number > above) for number in numbers)):
        raise UserError(f"{key} must be a {'' if above is None else 'positive '}number, or three "
                        f"joined by commas; got {value!r}.")
    return tuple(map(float, numbers))


def check_spec(spec: Sequence[str], flag: str) -> None:
    """Raises what `model_from_spec` would where that can be told without building a network."""
    name, options = parse_spec(spec, flag)
    builder = MODELS.builder(name)
    if isinstance(builder, type):
        builder.check_options(options)


def model_from_spec(spec: Sequence[str], flag: str, num_classes: int = 1000) -> VisionModel:
    """What `{flag} NAME key=value ...` names, with random weights. Raises UserError."""
    name, options = parse_spec(spec, flag)
    return create_model(name, num_classes, **options)


def describe_models() -> str:
    """What may stand for NAME, for a help text."""
    return ("timm model=NAME, torchvision model=NAME, MODULE:FUNCTION of your own, or one of: "
            + ", ".join(MODELS.names()))


def list_models() -> list[str]:
    """The networks that are registered here; those of libraries are not listed."""
    return MODELS.names()
