"""CSWin Transformer (Dong et al. 2022, arXiv 2107.00652): attention within a cross of stripes.

Module names are those of the published checkpoints (microsoft/CSWin-Transformer).
"""
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.layers import DropPath, LayerNorm2d, check_stages, drop_path_rates
from utils.registry import UserError

Window = tuple[int, int]  # height and width, in positions of the map


class StripeAttention(nn.Module):
    """Self-attention inside windows that tile the map, plus LePE: a depthwise 3x3 convolution of
    the values that does not see beyond its window either (eq. 5 and 7 of the paper)."""

    def __init__(self, dim: int, num_heads: int, window: Window) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)  # LePE's published name

    def forward(self, qkv: Tensor) -> Tensor:
        """(N, H, W, 3, C), H and W multiples of the window's -> (N, H, W, C)."""
        height, width = self.window
        tiles = qkv.unflatten(2, (-1, width)).unflatten(1, (-1, height))
        rows, columns = tiles.shape[1], tiles.shape[3]
        # (N, rows, height, columns, width, 3, C) -> (3, B, height, width, C), B of all windows
        tiles = tiles.permute(5, 0, 1, 3, 2, 4, 6).flatten(1, 3).contiguous()
        tokens = tiles.flatten(2, 3).unflatten(3, (self.num_heads, -1))
        q, k, v = tokens.transpose(2, 3)  # each (B, heads, height * width, C / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tiles.shape[1:])
        # A channels-last view: the convolution needs no other copy.
        y = y + self.get_v(tiles[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y.unflatten(0, (-1, rows, columns))
        # (N, rows, columns, height, width, C) -> (N, H, W, C)
        return y.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class CSWinBlock(nn.Module):
    """A pre-norm transformer block on (N, H, W, C). Channels and heads are shared out evenly among
    `windows`: tall and wide stripes, which make the cross, or the whole map alone."""

    def __init__(self, dim: int, num_heads: int, windows: Sequence[Window],
                 drop_path: float) -> None:
        super().__init__()
        num_groups = len(windows)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(
            StripeAttention(dim // num_groups, num_heads // num_groups, window)
            for window in windows)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(3, (3, -1))  # (N, H, W, 3, C)
        groups = qkv.chunk(len(self.attns), dim=4)
        y = torch.cat([attn(group) for attn, group in zip(self.attns, groups)], dim=3)
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_model("cswin_t", dim=64, depths=(1, 2, 21, 1), splits=(1, 2, 7, 7), heads=(2, 4, 8, 16))
@register_model("cswin_nano", dim=24, depths=(1, 1, 2, 1), splits=(1, 2, 7, 7),
                heads=(2, 4, 8, 16))
class CSWin(VisionModel):
    """`splits` are the widths of the stripes, in positions of each stage's map. As published, the
    last stage attends over its whole map, so that its width is the map's side.

    Only `image_size` is accepted: stripes must tile every map, which the published widths do at
    multiples of 224 px alone (7 positions of stride 16, and a side of 32 n). The parameters do not
    depend on it, so that weights of 224 px load at 448 with splits=1,2,7,14. (The published code
    joins the two groups of an earlier stage too where a stripe is the whole map, which gives the
    same function under other names.)

    The maps are the four stages before their down-sampling; the last one is normed, as pooled.
    """

    fixed_size = True

    def __init__(self, num_classes: int = 1000, dim: int = 64,
                 depths: Sequence[int] = (1, 2, 21, 1), splits: Sequence[int] = (1, 2, 7, 7),
                 heads: Sequence[int] = (2, 4, 8, 16), image_size: int = 224,
                 drop_path: float = 0.0) -> None:
        super().__init__()
        dims = [dim * 2 ** i for i in range(len(depths))]
        check_stages(depths, dims, smallest_depth=1)
        _check_heads(heads, dims)
        stages = _stage_windows(splits, image_size, len(depths))
        self.num_classes = num_classes
        self.input_size = image_size
        self.feature_info = tuple(FeatureInfo(width, 4 * 2 ** i) for i, width in enumerate(dims))
        # Index 1 is the published reshape to tokens.
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(3, dim, 7, stride=4, padding=2), nn.Identity(), LayerNorm2d(dim))
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        for i, width in enumerate(dims):
            if i > 0:
                self.add_module(f"merge{i}", nn.Sequential(OrderedDict(
                    conv=nn.Conv2d(dims[i - 1], width, 3, stride=2, padding=1),
                    norm=LayerNorm2d(width))))
            self.add_module(f"stage{i + 1}", nn.Sequential(*[
                CSWinBlock(width, heads[i], stages[i], next(rates)) for _ in range(depths[i])]))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_init_weights)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        size = self.input_size
        if images.shape[2:] != (size, size):
            raise UserError(f"this CSWin takes images of {size}x{size} px, got {images.shape[2]}x"
                            f"{images.shape[3]}. Resize them, or build it with another image_size.")
        features = []
        x = self.stage1_conv_embed(images)
        for i in range(len(self.feature_info)):
            if i > 0:
                x = getattr(self, f"merge{i}")(x)
            x = getattr(self, f"stage{i + 1}")(x.permute(0, 2, 3, 1))  # (N, H, W, C)
            x = x.permute(0, 3, 1, 2)  # -> (N, C, H, W), channels-last in memory
            features.append(x)
        x = self.norm(x.permute(0, 2, 3, 1))
        features[-1] = x.permute(0, 3, 1, 2)
        return ModelOutput(self.head(x.mean((1, 2))), features)

    def parts(self) -> list[list[tuple[str, ...]]]:
        """A down-sampling belongs to the last block before it, as in Swin."""
        stages = [[(f"stage{i + 1}.{j}",) for j in range(len(getattr(self, f"stage{i + 1}")))]
                  for i in range(len(self.feature_info))]
        for i, stage in enumerate(stages[:-1]):
            stage[-1] += (f"merge{i + 1}",)
        return [[("stage1_conv_embed",)], *stages]


def _init_weights(module: nn.Module) -> None:
    """As the authors: convolutions keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _check_per_stage(name: str, values: Sequence[int], num_stages: int) -> None:
    if len(values) != num_stages or not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"CSWin {name} needs one positive whole number for each of the "
                        f"{num_stages} stages (depths), got {tuple(values)}.")


def _check_heads(heads: Sequence[int], dims: Sequence[int]) -> None:
    """Half of the heads look along tall stripes and half along wide ones, but in the last stage."""
    _check_per_stage("heads", heads, len(dims))
    for i, (num_heads, dim) in enumerate(zip(heads, dims)):
        if dim % num_heads or (num_heads % 2 and i + 1 < len(dims)):
            raise UserError(f"CSWin heads must divide the width of their stage and, but for the "
                            f"last stage, be even; stage {i + 1} of width {dim} got {num_heads}. "
                            f"Change heads or dim.")


def _stage_windows(splits: Sequence[int], image_size: int, num_stages: int
                   ) -> list[tuple[Window, ...]]:
    """The windows of each stage's groups: tall and wide stripes, or the whole map at the end.
    Raises UserError where they cannot tile the maps of `image_size`."""
    _check_per_stage("splits", splits, num_stages)
    stride = 4 * 2 ** (num_stages - 1)
    if image_size < 1 or image_size % stride:
        raise UserError(f"CSWin image_size must be a positive multiple of {stride}, the stride of "
                        f"its last map; got {image_size}.")
    windows = []
    for i, split in enumerate(splits[:-1]):
        side = image_size // (4 * 2 ** i)
        if side % split:
            raise UserError(f"at image_size {image_size} the map of CSWin stage {i + 1} is {side} "
                            f"wide, which stripes of {split} do not tile. Change image_size, or "
                            f"splits[{i}] to a divisor of {side}; got splits {tuple(splits)}.")
        windows.append(((side, split), (split, side)))
    side = image_size // stride
    if splits[-1] != side:
        raise UserError(f"CSWin's last stage attends over its whole map, {side} wide at image_size "
                        f"{image_size}: the last of splits must be {side}, got {tuple(splits)}.")
    return [*windows, ((side, side),)]
