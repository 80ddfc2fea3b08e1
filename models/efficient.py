"""EfficientNet and MobileNetV3: torchvision's own classes behind this project's contract.

They are subclasses, not wrappers, so that their state dicts are exactly torchvision's.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv3

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.layers import check_drop_path
from models.state_dicts import rename_keys
from utils.registry import UserError

# expansion, kernel, stride, in, out, blocks of EfficientNet-B0 (Tan and Le 2019, table 1)
B0 = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
      (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]


@register_model("efficientnet_b3", width=1.2, depth=1.4, input_size=300)
@register_model("efficientnet_nano", width=0.3, depth=0.3)
class EfficientNet(VisionModel, efficientnet.EfficientNet):
    """EfficientNet (Tan and Le 2019, arXiv 1905.11946). `input_size` is the side in pixels that its
    weights were trained at: as a teacher it is given images of that size, where it is not 224.

    The maps are the last at each of the strides 4, 8, 16, and the final 1x1 convolution's at 32.
    """

    classifiers = ("classifier.1",)

    def __init__(self, num_classes: int = 1000, width: float = 1.0, depth: float = 1.0,
                 input_size: int = 224, dropout: float = 0.3, drop_path: float = 0.2) -> None:
        check_drop_path(drop_path)
        if not (0 < width <= 100 and 0 < depth <= 100 and input_size > 0 and 0 <= dropout < 1):
            raise UserError(f"EfficientNet needs a width and a depth in (0, 100], a positive "
                            f"input_size and a dropout in [0, 1); got {width}, {depth}, "
                            f"{input_size}, {dropout}.")
        settings = [efficientnet.MBConvConfig(*row, width_mult=width, depth_mult=depth)
                    for row in B0]
        super().__init__(settings, dropout, stochastic_depth_prob=drop_path,
                         num_classes=num_classes)
        self.num_classes, self.input_size = num_classes, input_size
        # features: stem, seven stages, last convolution
        self.map_indices = (2, 3, 5, 8)
        channels = [settings[1].out_channels, settings[2].out_channels, settings[4].out_channels,
                    self.features[8].out_channels]
        self.feature_info = tuple(FeatureInfo(dim, 4 * 2 ** i) for i, dim in enumerate(channels))

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        return _forward(self, images)

    def parts(self) -> list[list[tuple[str, ...]]]:
        """The last convolution belongs to the last block, as in timm."""
        blocks = [[(f"features.{i}.{j}",) for j in range(len(self.features[i]))]
                  for i in range(1, 8)]
        blocks[-1][-1] += ("features.8",)
        ends = (0, 2, 3, 5, 7)  # of the stem and the stages, among blocks
        return [[("features.0",)], *[sum(blocks[start:end], [])
                                     for start, end in zip(ends, ends[1:])]]


# kernel, expanded, out, squeeze-and-excitation, activation, stride (Howard et al. 2019, table 1)
LARGE = [(16, 3, 16, 16, False, "RE", 1), (16, 3, 64, 24, False, "RE", 2),
         (24, 3, 72, 24, False, "RE", 1), (24, 5, 72, 40, True, "RE", 2),
         (40, 5, 120, 40, True, "RE", 1), (40, 5, 120, 40, True, "RE", 1),
         (40, 3, 240, 80, False, "HS", 2), (80, 3, 200, 80, False, "HS", 1),
         (80, 3, 184, 80, False, "HS", 1), (80, 3, 184, 80, False, "HS", 1),
         (80, 3, 480, 112, True, "HS", 1), (112, 3, 672, 112, True, "HS", 1),
         (112, 5, 672, 160, True, "HS", 2), (160, 5, 960, 160, True, "HS", 1),
         (160, 5, 960, 160, True, "HS", 1)]
# torchvision counts the blocks through, timm by stage.
_TIMM_BLOCKS = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3),
                (4, 0), (4, 1), (5, 0), (5, 1), (5, 2)]


@register_model("mobilenetv3_l", width=1.0)
@register_model("mobilenetv3_nano", width=0.25)
class MobileNetV3(VisionModel, mobilenetv3.MobileNetV3):
    """MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244).

    The maps are the last at each of the strides 4, 8, 16, and the final 1x1 convolution's at 32.
    `bn_eps`: torchvision's weights were trained with 1e-3, timm's with 1e-5.
    """

    classifiers = ("classifier.3",)

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2,
                 bn_eps: float = 1e-3) -> None:
        if not (0 < width <= 100 and 0 <= dropout < 1 and bn_eps > 0):
            raise UserError(f"MobileNetV3 needs a width in (0, 100], a positive bn_eps and a "
                            f"dropout in [0, 1); got {width}, {bn_eps}, {dropout}.")
        settings = [mobilenetv3.InvertedResidualConfig(*row, dilation=1, width_mult=width)
                    for row in LARGE]
        last = mobilenetv3.InvertedResidualConfig.adjust_channels(1280, width)
        super().__init__(settings, last, num_classes=num_classes, dropout=dropout,
                         norm_layer=partial(nn.BatchNorm2d, eps=bn_eps, momentum=0.01))
        self.num_classes, self.bn_eps = num_classes, bn_eps
        self.map_indices = (3, 6, 12, 16)  # features: stem, fifteen blocks, last convolution
        channels = [settings[i - 1].out_channels for i in self.map_indices[:-1]]
        channels.append(self.features[16].out_channels)
        self.feature_info = tuple(FeatureInfo(dim, 4 * 2 ** i) for i, dim in enumerate(channels))

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        return _forward(self, images)

    def parts(self) -> list[list[tuple[str, ...]]]:
        """The hidden layer of the classifier belongs to the last convolution, as in timm."""
        names = [(f"features.{i}",) for i in range(17)]
        names[-1] += ("classifier.0",)
        ends = (0, *self.map_indices)
        return [names[:1], *[names[start + 1:end + 1] for start, end in zip(ends, ends[1:])]]

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"bn_eps": 1e-5} if "conv_head.bias" in state else {}

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes timm's names, too, if `bn_eps` is timm's."""
        if not {"conv_stem.weight", "conv_head.weight", "conv_head.bias"} <= state.keys():
            return state
        if self.bn_eps != 1e-5:
            raise UserError("these are timm's MobileNetV3 weights, trained with a BatchNorm eps of "
                            "1e-5. Add the option bn_eps=1e-5 to the model.")
        state = rename_keys(state, _timm_names())
        head = state["classifier.0.weight"]
        return {**state, "classifier.0.weight": head.flatten(1)}  # there a 1x1 convolution


def _timm_names() -> list[tuple[str, str]]:
    rules = [(r"conv_stem\.(\w+)", r"features.0.0.\1"), (r"bn1\.(\w+)", r"features.0.1.\1"),
             (r"blocks\.6\.0\.conv\.(\w+)", r"features.16.0.\1"),
             (r"blocks\.6\.0\.bn1\.(\w+)", r"features.16.1.\1"),
             (r"classifier\.(\w+)", r"classifier.3.\1"), (r"conv_head\.(\w+)", r"classifier.0.\1")]
    for number, (stage, block) in enumerate(_TIMM_BLOCKS, start=1):
        _, _, expanded, _, has_squeeze, *_ = LARGE[number - 1]
        there, here = rf"blocks\.{stage}\.{block}\.", f"features.{number}.block."
        if number == 1:  # expands nothing
            places = {"conv_dw": 0, "conv_pw": 1}
        else:
            places = {"conv_pw": 0, "conv_dw": 1, "conv_pwl": 3 if has_squeeze else 2}
        for i, (conv, place) in enumerate(places.items(), start=1):
            rules.append((rf"{there}{conv}\.(\w+)", rf"{here}{place}.0.\1"))
            rules.append((rf"{there}bn{i}\.(\w+)", rf"{here}{place}.1.\1"))
        rules.append((rf"{there}se\.conv_reduce\.(\w+)", rf"{here}2.fc1.\1"))
        rules.append((rf"{there}se\.conv_expand\.(\w+)", rf"{here}2.fc2.\1"))
    return rules


def _forward(model: EfficientNet | MobileNetV3, images: Tensor) -> ModelOutput:
    features = []
    x = images
    for i, layer in enumerate(model.features):
        x = layer(x)
        if i in model.map_indices:
            features.append(x)
    return ModelOutput(model.classifier(x.mean((2, 3))), features)
