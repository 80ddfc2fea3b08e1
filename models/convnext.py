"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), and the frame that SLaK shares with it.

Module names are those of the published checkpoints (facebookresearch/ConvNeXt).
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.layers import (
    GELU,
    DropPath,
    LayerNorm2d,
    PointwiseLinear,
    check_stages,
    drop_path_rates,
)
from models.weights import rename_keys

TINY, SMALL = (3, 3, 9, 3), (3, 3, 27, 3)


class GlobalResponseNorm(nn.Module):
    """x + beta + gamma * x * n on (N, H, W, C), n being each channel's L2 norm over the map divided
    by the mean of these norms (ConvNeXt V2, Woo et al. 2023, arXiv 2301.00808, section 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.float().norm(dim=(1, 2), keepdim=True)  # (N, 1, 1, C); squares overflow float16
        norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return x + self.beta + self.gamma * (x * norm.to(x.dtype))


class ConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * MLP(LayerNorm(mix(x)))), the MLP on channels-last positions.

    `mixer` is the depthwise part; it is registered as `mixer_name`, the checkpoint's name for it.
    `grn` puts a response normalisation into the MLP, as ConvNeXt V2 does.
    """

    def __init__(self, dim: int, mixer_name: str, mixer: nn.Module, *, drop_path: float,
                 layer_scale_init: float, grn: bool = False) -> None:
        super().__init__()
        self.mixer_name = mixer_name
        # A non-positive start means no layer scale, as published.
        self.gamma = None
        if layer_scale_init > 0:
            self.gamma = nn.Parameter(layer_scale_init * torch.ones(dim))
        self.add_module(mixer_name, mixer)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = PointwiseLinear(dim, 4 * dim)
        self.act = GELU()
        self.grn = GlobalResponseNorm(4 * dim) if grn else nn.Identity()
        self.pwconv2 = PointwiseLinear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self, self.mixer_name)(x)
        y = y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        # The activation may overwrite what pwconv1 gave (models.layers.GELU).
        y = self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(y)))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXtFrame(VisionModel):
    """Stem, four stages of blocks with down-sampling between them, pooled norm and head.

    `make_block(stage, dim, drop_path)` builds a block; `dims` are the final widths.
    """

    def __init__(self, num_classes: int, depths: Sequence[int], dims: Sequence[int],
                 make_block: Callable[[int, int, float], nn.Module], *, drop_path: float,
                 head_init_scale: float) -> None:
        super().__init__()
        check_stages(depths, dims)
        self.num_classes = num_classes
        self.depths = tuple(depths)
        self.feature_info = tuple(FeatureInfo(dim, 4 * 2 ** i) for i, dim in enumerate(dims))
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in zip(dims[:-1], dims[1:]):
            self.downsample_layers.append(nn.Sequential(
                LayerNorm2d(narrow, eps=1e-6), nn.Conv2d(narrow, wide, 2, stride=2)))
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[make_block(stage, dim, next(rates)) for _ in range(depth)])
            for stage, (depth, dim) in enumerate(zip(depths, dims)))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_init_weights)
        self.head.weight.data.mul_(head_init_scale)
        self.head.bias.data.mul_(head_init_scale)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        features = []
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            features.append(x)
        return ModelOutput(self.head(self.norm(x.mean((2, 3)))), features)

    def no_weight_decay(self) -> set[str]:
        """GRN's scale and shift, which are four-dimensional, as its authors train it."""
        return {name for name, _ in self.named_parameters() if ".grn." in name}

    def layer_ids(self) -> dict[str, int]:
        """The published assignment: 12 groups and the head, written for 27 blocks in stage 3."""
        return {name: _layer_id(name, self.depths) for name, _ in self.named_parameters()}


def _layer_id(name: str, depths: Sequence[int]) -> int:
    parts = name.split(".")
    if parts[0] not in ("downsample_layers", "stages"):
        return 13
    stage = int(parts[1])
    if parts[0] == "downsample_layers":
        return (0, 2, 3, 12)[stage]
    if stage == 2:
        return 3 + int(parts[2]) // 3
    return (1, 2, None, 12)[stage]


# torchvision's names (features.*, classifier.*) and timm's (stem.*, blocks, conv_dw, mlp).
_BLOCK = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
CONVNEXT_NAMES = [
    *[(rf"features\.{2 * i}\.(\d)\.(\w+)", rf"downsample_layers.{i}.\1.\2") for i in range(4)],
    *[(rf"features\.{2 * i + 1}\.(\d+)\.block\.{number}\.(\w+)", rf"stages.{i}.\1.{name}.\2")
      for i in range(4) for number, name in _BLOCK.items()],
    *[(rf"features\.{2 * i + 1}\.(\d+)\.layer_scale", rf"stages.{i}.\1.gamma") for i in range(4)],
    (r"classifier\.0\.(\w+)", r"norm.\1"), (r"classifier\.2\.(\w+)", r"head.\1"),
    (r"stem\.(\d)\.(\w+)", r"downsample_layers.0.\1.\2"),
    (r"stages\.(\d)\.downsample\.(\d)\.(\w+)", r"downsample_layers.\1.\2.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(\w+)", r"stages.\1.\2.dwconv.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm\.(\w+)", r"stages.\1.\2.norm.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.(\w+)", r"stages.\1.\2.pwconv\3.\4"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
    (r"head\.norm\.(\w+)", r"norm.\1"), (r"head\.fc\.(\w+)", r"head.\1"),
]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model("convnext_nano", depths=(1, 1, 3, 1), dims=(24, 48, 96, 192))
@register_model("convnext_t", depths=TINY, dims=(96, 192, 384, 768))
@register_model("convnext_s", depths=SMALL, dims=(96, 192, 384, 768))
@register_model("convnext_b", depths=SMALL, dims=(128, 256, 512, 1024))
class ConvNeXt(ConvNeXtFrame):
    """The original ConvNeXt: depthwise 7x7 with bias and no BatchNorm."""

    grn = False

    def __init__(self, num_classes: int = 1000, depths: Sequence[int] = TINY,
                 dims: Sequence[int] = (96, 192, 384, 768), layer_scale_init: float = 1e-6,
                 drop_path: float = 0.0, head_init_scale: float = 1.0) -> None:
        def make_block(stage: int, dim: int, rate: float) -> nn.Module:
            dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
            return ConvNeXtBlock(dim, "dwconv", dwconv, drop_path=rate,
                                 layer_scale_init=layer_scale_init, grn=self.grn)

        super().__init__(num_classes, depths, dims, make_block, drop_path=drop_path,
                         head_init_scale=head_init_scale)

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the names and shapes of torchvision and timm, too."""
        result = rename_keys(state, CONVNEXT_NAMES)
        for name, value in result.items():
            if name.endswith(".gamma") and value.shape[1:] == (1, 1):
                result[name] = value.flatten()  # torchvision's layer scale is (C, 1, 1)
            elif ".grn." in name and value.dim() == 1:
                result[name] = value.view(1, 1, 1, -1)  # timm's is (4C,)
            elif ".pwconv" in name and value.shape[2:] == (1, 1):
                result[name] = value.flatten(1)  # 1x1 convolutions in some of timm's files
        return result


@register_model("convnextv2_nano", depths=(1, 1, 2, 1), dims=(24, 48, 96, 192))
@register_model("convnextv2_t", depths=TINY, dims=(96, 192, 384, 768))
@register_model("convnextv2_s", depths=SMALL, dims=(96, 192, 384, 768))
class ConvNeXtV2(ConvNeXt):
    """ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808): a response normalisation in every MLP and no
    layer scale. (Its paper has no S; `convnextv2_s` is the depth of ConvNeXt-S.)"""

    grn = True

    def __init__(self, num_classes: int = 1000, depths: Sequence[int] = TINY,
                 dims: Sequence[int] = (96, 192, 384, 768), drop_path: float = 0.0,
                 head_init_scale: float = 1.0) -> None:
        super().__init__(num_classes, depths, dims, layer_scale_init=0.0, drop_path=drop_path,
                         head_init_scale=head_init_scale)
