"""Transformer teachers: torchvision's own classes behind this project's contract.

They are subclasses, not wrappers, so that their state dicts are exactly torchvision's.
"""
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.layers import check_drop_path
from utils.errors import UserError


@register_model("swin_t", depths=(2, 2, 6, 2), dim=96, num_heads=(3, 6, 12, 24))
@register_model("swin_nano", depths=(1, 1, 2, 1), dim=24, num_heads=(1, 2, 4, 8))
class Swin(VisionModel, SwinTransformer):
    """Swin Transformer (Liu et al. 2021, arXiv 2103.14030), patch 4, window 7, any input size.

    The maps are the four stages before their down-sampling; the last one is normed, as pooled.
    """

    def __init__(self, num_classes: int = 1000, depths: tuple[int, ...] = (2, 2, 6, 2),
                 dim: int = 96, num_heads: tuple[int, ...] = (3, 6, 12, 24),
                 drop_path: float = 0.0) -> None:
        check_drop_path(drop_path)
        super().__init__([4, 4], dim, list(depths), list(num_heads), [7, 7],
                         stochastic_depth_prob=drop_path, num_classes=num_classes)
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

    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions, as its authors train it."""
        return {name for name, _ in self.named_parameters()
                if name.endswith("relative_position_bias_table")}


@register_model("vit_b", dim=768, depth=12, num_heads=12)
@register_model("vit_nano", dim=96, depth=4, num_heads=3)
class ViT(VisionModel, VisionTransformer):
    """Vision Transformer with 16 px patches (Dosovitskiy et al. 2021, arXiv 2010.11929).

    Its one map holds the normed patch tokens; the class token, which the head reads, is dropped.
    The learned position embedding fixes the input size.
    """

    def __init__(self, num_classes: int = 1000, dim: int = 768, depth: int = 12,
                 num_heads: int = 12, image_size: int = 224) -> None:
        if image_size % 16:
            raise UserError(f"ViT image_size must be a multiple of 16, got {image_size}.")
        super().__init__(image_size, 16, depth, num_heads, dim, 4 * dim, num_classes=num_classes,
                         norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.input_size = image_size
        self.feature_info = (FeatureInfo(dim, 16),)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        patches = self._process_input(images)  # (N, 3, H, W) -> (N, T, C)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = self.encoder(tokens)
        side = self.image_size // self.patch_size
        feature = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (N, C, side, side)
        return ModelOutput(self.heads(tokens[:, 0]), [feature])

    def no_weight_decay(self) -> set[str]:
        """Class token and positions, as in DeiT."""
        return {"class_token", "encoder.pos_embedding"}
