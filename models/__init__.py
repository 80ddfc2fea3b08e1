"""Every network, teacher or student. A new one is a file here and its import below."""
# Importing registers them.
from models import convnext, cswin, efficient, resnet, slak, transformers  # noqa: F401
from models.base import (
    MODELS,
    FeatureInfo,
    ModelOutput,
    VisionModel,
    create_model,
    describe_models,
    list_models,
)
from models.library import TimmNetwork, TorchvisionNetwork
from models.own import own_builder

# What the authors, torchvision and timm call the same networks.
MODELS.add_aliases({
    "CSWin_64_12211_tiny_224": "cswin_t", "SLaK_base": "slak_b", "SLaK_large": "slak_l",
    "SLaK_small": "slak_s", "SLaK_tiny": "slak_t", "convnext_base": "convnext_b",
    "convnext_small": "convnext_s", "convnext_tiny": "convnext_t",
    "convnextv2_small": "convnextv2_s", "convnextv2_tiny": "convnextv2_t",
    "deit_small_patch16_224": "deit_s", "mobilenet_v3_large": "mobilenetv3_l",
    "mobilenetv3_large_100": "mobilenetv3_l", "swin_tiny_patch4_window7_224": "swin_t",
    "vit_base_patch16_224": "vit_b"})

LIBRARIES = {"timm": TimmNetwork, "torchvision": TorchvisionNetwork}
MODELS.find_with(lambda name: own_builder(name) if ":" in name else LIBRARIES.get(name))

__all__ = ["FeatureInfo", "ModelOutput", "VisionModel", "create_model", "describe_models",
           "list_models"]
