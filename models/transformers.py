"""Transformer teachers: torchvision's own classes behind this project's contract.

They are subclasses, not wrappers, so that their state dicts are exactly torchvision's.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from models.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FeatureInfo,
    ModelOutput,
    VisionModel,
    register_model,
)
from models.layers import MOST_BLOCKS, check_drop_path
from models.state_dicts import rename_keys
from utils.log import print_once
from utils.registry import UserError

# The names of its authors' files, which timm took over. There the down-sampling of stage i sits at
# its end; newer timm moved it to the beginning of the next.
SWIN_NAMES = [
    (r"patch_embed\.proj\.(\w+)", r"features.0.0.\1"),
    (r"patch_embed\.norm\.(\w+)", r"features.0.2.\1"),
    (r"head\.fc\.(\w+)", r"head.\1"),
    *[(rf"layers\.{i}\.blocks\.(\d+)\.(?!mlp)(.*)", rf"features.{2 * i + 1}.\1.\2")
      for i in range(4)],
    *[(rf"layers\.{i}\.blocks\.(\d+)\.mlp\.fc{j}\.(\w+)",
       rf"features.{2 * i + 1}.\1.mlp.{3 * (j - 1)}.\2") for i in range(4) for j in (1, 2)],
]


LARGEST_WINDOW = 64  # whose index of relative positions has 17 million entries


def is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def resized_table(table: Tensor, side: int) -> Tensor:
    """(1, S x S, C) -> (1, side x side, C): a square table of positions, between the points of its
    own grid by bicubic interpolation, as DeiT and Swin do it for images of another size."""
    old = math.isqrt(table.shape[1])
    grid = table.float().transpose(1, 2).unflatten(2, (old, old))  # (1, C, S, S)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


@register_model("swin_t", depths=(2, 2, 6, 2), dim=96, num_heads=(3, 6, 12, 24))
@register_model("swin_nano", depths=(1, 1, 2, 1), dim=24, num_heads=(1, 2, 4, 8))
class Swin(VisionModel, SwinTransformer):
    """Swin Transformer (Liu et al. 2021, arXiv 2103.14030), patch 4, any input size.

    `window`: its side in positions, 7 at 224 px; its authors take 12 at 384 px. Weights of another
    window load with their tables of relative positions resized.

    The maps are the four stages before their down-sampling; the last one is normed, as pooled.
    """

    def __init__(self, num_classes: int = 1000, depths: tuple[int, ...] = (2, 2, 6, 2),
                 dim: int = 96, num_heads: tuple[int, ...] = (3, 6, 12, 24),
                 window: int = 7, drop_path: float = 0.0) -> None:
        check_drop_path(drop_path)
        if not 1 <= window <= LARGEST_WINDOW:
            raise UserError(f"Swin window must be 1 to {LARGEST_WINDOW} positions, got {window}.")
        if not all(type(depth) is int and 1 <= depth <= MOST_BLOCKS for depth in depths):
            raise UserError(f"Swin depths must be whole numbers from 1 to {MOST_BLOCKS}, got "
                            f"{tuple(depths)}.")
        super().__init__([4, 4], dim, list(depths), list(num_heads), [window, window],
                         stochastic_depth_prob=drop_path, num_classes=num_classes)
        self.window = window
        self.feature_info = tuple(FeatureInfo(dim * 2 ** i, 4 * 2 ** i) for i in range(len(depths)))

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        features = []
        x = images
        for i, layer in enumerate(self.features):
            x = layer(x)  # (N, H, W, C); stem, stage, merge, stage, merge, ...
            if i % 2 == 1:
                features.append(x)
        features[-1] = self.norm(features[-1])
        features = [feature.permute(0, 3, 1, 2) for feature in features]
        return ModelOutput(self.head(features[-1].mean((2, 3))), features)

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the names of its authors and of timm, too."""
        shift = 0 if any(name.startswith("layers.0.downsample") for name in state) else -1
        down = [(rf"layers\.{i}\.downsample\.(.*)", rf"features.{2 * (i + shift) + 2}.\1")
                for i in range(len(self.feature_info))]
        result = rename_keys(state, [*SWIN_NAMES, *down])
        resized = []
        for name, own in self.named_parameters():
            table = result.get(name)
            if (name.endswith("relative_position_bias_table") and table is not None
                    and table.dim() == 2 and table.shape[1:] == own.shape[1:]
                    and table.shape != own.shape and is_square(len(table))):
                result[name] = resized_table(table[None], math.isqrt(len(own)))[0]
                if not (own.is_meta or table.is_meta):
                    resized.append(name)
        if resized:
            print_once(f"weights: {len(resized)} tables of relative positions resized to windows "
                       f"of {self.window} x {self.window}")
        return result

    def parts(self) -> list[list[tuple[str, ...]]]:
        """A down-sampling belongs to the last block before it, as its authors number them."""
        stages = [[(f"features.{i}.{j}",) for j in range(len(self.features[i]))]
                  for i in range(1, len(self.features), 2)]
        for i, stage in enumerate(stages[:-1]):
            stage[-1] += (f"features.{2 * i + 2}",)
        return [[("features.0",)], *stages]

    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, as its authors train it."""
        return {name for name, _ in self.named_parameters()
                if name.endswith("relative_position_bias_table")}


# The names of DeiT's authors and of timm.
VIT_NAMES = [
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"conv_proj.\1"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
     r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)",
     r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2"),
    (r"blocks\.(\d+)\.norm(\d)\.(\w+)", r"encoder.layers.encoder_layer_\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.3.\2"),
    (r"norm\.(\w+)", r"encoder.ln.\1"),
    (r"head\.(\w+)", r"heads.head.\1"),
    # torchvision's before 0.12
    (r"(encoder\..*\.mlp)\.linear_1\.(\w+)", r"\1.0.\2"),
    (r"(encoder\..*\.mlp)\.linear_2\.(\w+)", r"\1.3.\2"),
]
INPUT_STATS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3)}


@register_model("deit_s", dim=384, depth=12, num_heads=6)
# timm's first "vit_small", no DeiT-S: 8 wide layers, no bias of queries, keys and values, scores
# scaled by the whole width, PyTorch's own eps. It is the ViT-S that taught the published runs.
@register_model("vit_s", dim=768, depth=8, num_heads=8, mlp_ratio=3, norm_eps=1e-5,
                published_scale=768 ** -0.5)
@register_model("vit_b", dim=768, depth=12, num_heads=12, input_norm="half")
@register_model("vit_nano", dim=96, depth=4, num_heads=3)
class ViT(VisionModel, VisionTransformer):
    """Vision Transformer with 16 px patches (Dosovitskiy et al. 2021, arXiv 2010.11929; as DeiT,
    Touvron et al. 2021, arXiv 2012.12877).

    Its one map holds the normed patch tokens; the class token, which the head reads, is dropped.
    The learned position embedding fixes the input size, the option `image_size`. Weights of another
    size load with the positions of their patches resized. `input_norm`: what the weights expect,
    imagenet, or half for (x - 0.5) / 0.5 as timm's ViT-B (torchvision's takes imagenet).
    `published_scale`: of the attention scores under the names of timm, if not head_dim ** -0.5;
    folded into the queries when such a file is loaded.
    """

    fixed_size = True
    classifiers = ("heads.head",)

    def __init__(self, num_classes: int = 1000, dim: int = 768, depth: int = 12,
                 num_heads: int = 12, image_size: int = 224, mlp_ratio: int = 4,
                 input_norm: str = "imagenet", norm_eps: float = 1e-6,
                 published_scale: float = 0.0) -> None:
        if image_size % 16:
            raise UserError(f"ViT image_size must be a multiple of 16, got {image_size}.")
        is_deep = depth > MOST_BLOCKS
        if min(dim, depth, num_heads, mlp_ratio) < 1 or dim % num_heads or is_deep:
            raise UserError(f"ViT needs positive whole numbers, a depth of at most {MOST_BLOCKS} "
                            f"and a dim that num_heads divides; got dim {dim}, depth {depth}, "
                            f"num_heads {num_heads}, mlp_ratio {mlp_ratio}.")
        if not (norm_eps > 0 and published_scale >= 0):
            raise UserError(f"ViT norm_eps must be positive and published_scale not negative; got "
                            f"{norm_eps} and {published_scale}.")
        if input_norm not in INPUT_STATS:
            raise UserError(f"ViT input_norm must be one of {', '.join(INPUT_STATS)}; got "
                            f"{input_norm!r}.")
        super().__init__(image_size, 16, depth, num_heads, dim, mlp_ratio * dim,
                         num_classes=num_classes, norm_layer=partial(nn.LayerNorm, eps=norm_eps))
        self.input_size = image_size
        self.input_mean, self.input_std = INPUT_STATS[input_norm]
        self.feature_info = (FeatureInfo(dim, 16),)
        self.scale_ratio = published_scale / (dim // num_heads) ** -0.5 if published_scale else 1.0

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        patches = self._process_input(images)  # (N, 3, H, W) -> (N, T, C)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = self.encoder(tokens)
        side = self.image_size // self.patch_size
        feature = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (N, C, side, side)
        return ModelOutput(self.heads(tokens[:, 0]), [feature])

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the names of DeiT and timm, too; a missing bias of queries, keys, values is 0."""
        result = rename_keys(state, VIT_NAMES)
        own, table = self.encoder.pos_embedding, result.get("encoder.pos_embedding")
        if (table is not None and table.dim() == 3 and table.shape[2] == own.shape[2]
                and table.shape != own.shape and is_square(table.shape[1] - 1)):
            side = self.image_size // self.patch_size
            patches = resized_table(table[:, 1:], side)
            result["encoder.pos_embedding"] = torch.cat([table[:, :1], patches], dim=1)
            if not (own.is_meta or table.is_meta):
                print_once(f"weights: positions resized to {side} x {side} patches")
        if "pos_embed" not in state:
            return result
        patches = result.get("conv_proj.weight")
        if patches is not None and patches.dim() == 2:  # timm's first ViTs had a Linear there
            result["conv_proj.weight"] = patches.unflatten(1, (3, self.patch_size, -1))
        for name in [name for name in result if name.endswith("in_proj_weight")]:
            bias = name.replace("in_proj_weight", "in_proj_bias")
            rows = result[name].new_ones(result[name].shape[:1])
            result.setdefault(bias, torch.zeros_like(rows))
            rows[:len(rows) // 3] = self.scale_ratio  # queries come first
            result[name], result[bias] = result[name] * rows[:, None], result[bias] * rows
        return result

    def parts(self) -> list[list[tuple[str, ...]]]:
        """As BEiT numbers them (arXiv 2106.08254): tokens and positions are part of the stem."""
        names = [name for name, _ in self.encoder.layers.named_children()]
        return [[("class_token", "conv_proj", "encoder.pos_embedding")],
                [(f"encoder.layers.{name}",) for name in names]]

    def no_weight_decay(self) -> set[str]:
        """Class token and positions, as in DeiT."""
        return {"class_token", "encoder.pos_embedding"}
