"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545), and the frame that SLaK shares with it.

Module names are those of the published checkpoints (facebookresearch/ConvNeXt).
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.fused import block as fused_block
from models.fused import mlp as fused_mlp
from models.layers import (
    GELU,
    Conv2d,
    DepthwiseConv2d,
    DropPath,
    LaunchAware,
    LayerNorm,
    LayerNorm2d,
    PointwiseLinear,
    are_ordinary,
    check_stages,
    down_sampled,
    drop_path_rates,
    pad_to,
    round_up,
)
from models.state_dicts import rename_keys
from utils.registry import UserError

TINY, SMALL = (3, 3, 9, 3), (3, 3, 27, 3)


class GlobalResponseNorm(nn.Module):
    """x + beta + gamma * x * n on (N, H, W, C), n being each channel's L2 norm over the map divided
    by the mean of these norms (ConvNeXt V2, Woo et al. 2023, arXiv 2301.00808, section 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.float().norm(dim=(1, 2), keepdim=True)  # (N, 1, 1, C); squares overflow float16
        # The mean over the own channels: x may carry others of zeros.
        mean = norm.mean(dim=-1, keepdim=True) * (x.shape[-1] / self.dim)
        norm = norm / (mean + 1e-6)
        gamma, beta = [pad_to(values, 1, 1, 1, x.shape[-1]) for values in (self.gamma, self.beta)]
        return x + beta + gamma * (x * norm.to(x.dtype))


class ConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * MLP(LayerNorm(mix(x)))), the MLP on channels-last positions.

    `mixer` is the depthwise part; it is registered as `mixer_name`, the checkpoint's name for it.
    Its `in_any_layout(x)` gives what it gives, channels-last or contiguous, whichever costs less.
    `grn` puts a response normalisation into the MLP, as ConvNeXt V2 does. x may carry channels of
    zeros behind the block's own; they stay zeros. Where one kernel computes a frozen block, its
    layers are not called, nor are their hooks. In training on a GPU what stands beside the products
    takes one pass each way where `fused_block.can_fuse`, unless one of these layers has hooks.
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
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = PointwiseLinear(dim, 4 * dim)
        self.act = GELU()
        self.grn = GlobalResponseNorm(4 * dim) if grn else nn.Identity()
        self.pwconv2 = PointwiseLinear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)
        self.is_plain = False  # nothing but what the fused MLP computes: see `absorb_scales`

    def forward(self, x: Tensor) -> Tensor:
        mixer, first, last = getattr(self, self.mixer_name), self.pwconv1, self.pwconv2
        if (self.is_plain and not self.training
                and fused_mlp.can_fuse(x, first.weight, self.parameters())):
            return fused_mlp.mlp(x, mixer.in_any_layout(x), first.weight, first.bias, last.weight,
                             last.bias, self.norm.eps, self.norm.normalized_shape[0])
        if fused_block.can_fuse(x) and are_ordinary(
                (first, self.act, last, self.drop_path), (PointwiseLinear, GELU, DropPath)):
            x, y = fused_block.fork(x)
            y = first(self.norm(mixer(y).permute(0, 2, 3, 1)), with_bias=False)
            y = last(self.grn(fused_block.bias_gelu(y, first.bias)), with_bias=False)
            return fused_block.add_branch(x, y, last.bias, self.gamma, self.drop_path.draw(y),
                                          self.drop_path.keep_prob)
        y = mixer(x)
        y = y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        # The activation may overwrite what pwconv1 gave (models.layers.GELU).
        y = last(self.grn(self.act(first(self.norm(y)))))
        if self.gamma is not None:
            y = pad_to(self.gamma, y.shape[-1]) * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    @torch.no_grad()
    def absorb_scales(self) -> None:
        """Let the linear layers hold the norm's weight and bias and the layer scale, for inference:
        what a low precision need not round by itself. They become 1, 0 and none."""
        norm, first, last = self.norm, self.pwconv1, self.pwconv2
        weight = first.weight.double()
        scale, shift = [pad_to(values.double(), weight.shape[1])
                        for values in (norm.weight, norm.bias)]
        first.bias.copy_(first.bias.double() + weight @ shift)
        first.weight.copy_(weight * scale)
        norm.weight.fill_(1)
        norm.bias.zero_()
        if self.gamma is not None:
            last.weight.copy_(last.weight.double() * self.gamma.double()[:, None])
            last.bias.copy_(last.bias.double() * self.gamma.double())
            self.gamma = None
        self.is_plain = isinstance(self.grn, nn.Identity)
        self.register_load_state_dict_post_hook(_stop_being_plain)


def _stop_being_plain(block: ConvNeXtBlock, _: Any) -> None:
    """Weights that are loaded later may have a norm's weight and bias of their own."""
    block.is_plain = False


class ConvNeXtFrame(LaunchAware, VisionModel):
    """Stem, four stages of blocks with down-sampling between them, pooled norm and head. `stem`:
    patches of 4x4 px as published, or `small`, a 3x3 convolution of stride 1 for images of 32 px.

    `make_block(stage, dim, drop_path)` builds a block; `dims` are the final widths.

    Inside, maps have widths that are multiples of `width_multiple`, zeros behind their own
    channels. None: of 8 in half precision on a GPU, whose matrix units take rows of 16 bytes, where
    its launches are free or it is compiled; else the widths as they are. Features, logits,
    parameters and gradients have the plain widths.
    """

    gains_by_compiler = False
    width_multiple: int | None = None
    pooled_dtype: torch.dtype | None = None  # of the pooled map; None: as the map

    def __init__(self, num_classes: int, depths: Sequence[int], dims: Sequence[int],
                 make_block: Callable[[int, int, float], nn.Module], *, drop_path: float,
                 head_init_scale: float, stem: str) -> None:
        super().__init__()
        check_stages(depths, dims)
        check_stem(stem)
        self.num_classes = num_classes
        self.depths = tuple(depths)
        first = Conv2d(3, dims[0], 4, stride=4)
        if stem == "small":
            first = Conv2d(3, dims[0], 3, padding=1)
        self.feature_info = tuple(FeatureInfo(dim, first.stride[0] * 2 ** i)
                                  for i, dim in enumerate(dims))
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(first, LayerNorm2d(dims[0], eps=1e-6))])
        for narrow, wide in zip(dims[:-1], dims[1:]):
            self.downsample_layers.append(nn.Sequential(
                LayerNorm2d(narrow, eps=1e-6), Conv2d(narrow, wide, 2, stride=2)))
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
        multiple = self._width_multiple(images)
        features = []
        x = images
        for info, layers, stage in zip(self.feature_info, self.downsample_layers, self.stages):
            x = stage(down_sampled(layers, x, round_up(info.channels, multiple)))
            features.append(x if x.shape[1] == info.channels else x[:, :info.channels])
        pooled = x.mean((2, 3), dtype=self.pooled_dtype)[:, :info.channels]
        return ModelOutput(self.head(self.norm(pooled)), features)

    def _width_multiple(self, images: Tensor) -> int:
        if self.width_multiple is not None:
            return self.width_multiple
        is_half = images.dtype in (torch.bfloat16, torch.float16)
        if ((self.launches_are_free or torch.compiler.is_compiling())
                and images.device.type == "cuda"
                and (is_half or torch.is_autocast_enabled("cuda"))):
            return 8
        return 1

    @torch.no_grad()
    def pad_widths(self, multiple: int) -> "ConvNeXtFrame":
        self.width_multiple = multiple
        for prefix, module in self.named_modules():
            if isinstance(module, nn.LayerNorm) or module is self.head:
                continue  # which know the plain width
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parameter.data = pad_to(parameter, *_padded_sizes(name, parameter.shape, multiple))
        return self

    def to_half(self, dtype: torch.dtype) -> "ConvNeXtFrame":
        """Also pooled and classified in float32, which costs nothing there."""
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock):
                module.absorb_scales()
        super().to_half(dtype)
        self.norm.float()
        self.head.float()
        self.pooled_dtype = torch.float32
        return self

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        is_small = state["downsample_layers.0.0.weight"].shape[2] == 3
        return {"stem": "small"} if is_small else {}

    def no_weight_decay(self) -> set[str]:
        """GRN's scale and shift, which are four-dimensional, as its authors train it."""
        return {name for name, _ in self.named_parameters() if ".grn." in name}

    def parts(self) -> list[list[tuple[str, ...]]]:
        stages = [[(f"stages.{i}.{j}",) for j in range(depth)]
                  for i, depth in enumerate(self.depths)]
        for i, stage in enumerate(stages[1:], start=1):
            stage.insert(0, (f"downsample_layers.{i}",))
        return [[("downsample_layers.0",)], *stages]

    def layer_ids(self) -> dict[str, int]:
        """The published assignment: 12 groups and the head, written for 27 blocks in stage 3."""
        return {name: _layer_id(name, self.depths) for name, _ in self.named_parameters()}


def _padded_sizes(name: str, shape: Sequence[int], multiple: int) -> tuple[int, ...]:
    """What a parameter's first dimensions become where its channels fill up `multiple`."""
    def width(number: int) -> int:
        return round_up(number, multiple)

    def hidden(number: int) -> int:
        return 4 * width(number // 4)

    if ".grn." in name:
        return 1, 1, 1, hidden(shape[3])
    if ".pwconv1." in name:
        return hidden(shape[0]), *[width(number) for number in shape[1:]]
    if ".pwconv2." in name:
        return width(shape[0]), *[hidden(number) for number in shape[1:]]
    if len(shape) == 4 and shape[1] > 1 and not name.startswith("downsample_layers.0"):
        return width(shape[0]), width(shape[1])
    return (width(shape[0]),)


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


def check_stem(stem: str) -> None:
    if stem not in ("patch", "small"):
        raise UserError(f"stem must be patch, as published, or small, for images of 32 px; got "
                        f"{stem!r}.")


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
                 drop_path: float = 0.0, head_init_scale: float = 1.0,
                 stem: str = "patch") -> None:
        def make_block(stage: int, dim: int, rate: float) -> nn.Module:
            return ConvNeXtBlock(dim, "dwconv", DepthwiseConv2d(dim, 7), drop_path=rate,
                                 layer_scale_init=layer_scale_init, grn=self.grn)

        super().__init__(num_classes, depths, dims, make_block, drop_path=drop_path,
                         head_init_scale=head_init_scale, stem=stem)

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
                 head_init_scale: float = 1.0, stem: str = "patch") -> None:
        super().__init__(num_classes, depths, dims, layer_scale_init=0.0, drop_path=drop_path,
                         head_init_scale=head_init_scale, stem=stem)
